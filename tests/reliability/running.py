# SPDX-License-Identifier: Apache-2.0
"""Run a script in a fork, kill it at a chosen moment, and record how it ended."""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.script_run import kill_at, start_script

TIME_LIMIT = 90.0
CURSOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Kill:
    """When a run gets a signal; by default never."""

    seconds: float | None = None  # from the start of the fork
    function: str | None = None  # this and the next two: arguments of `kill_at`
    call: int = 1
    half: bool = False
    number: int = signal.SIGKILL  # signal that is sent after `seconds`; a run may end in its own way at another one


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    exit_code: int  # negative for a signal
    stdout: str
    stderr: str
    seconds: float = 0.0  # wall-clock time
    training_steps: int = 0  # batches
    evaluation_steps: int = 0
    hung: bool = False  # whether it was killed at the time limit
    stack: tuple[str, ...] = ()  # functions on the stack of a killed or hung run, outermost first

    @property
    def killed(self) -> bool:
        """Whether SIGKILL came before the end."""
        return self.exit_code == -signal.SIGKILL and not self.hung

    @property
    def errors(self) -> list[str]:
        """Error lines, without terminal control codes."""
        return [line for line in CURSOR.sub("", self.stderr).splitlines() if line.startswith("error: ")]

    @property
    def fault(self) -> tuple[str, str]:
        """Description and name of a hang or a traceback; empty if there was none."""
        if self.hung:
            return f"still running at the time limit, in {' '.join(self.stack[-3:])}", "hang"
        if "Traceback (most recent call last)" in self.stderr + self.stdout:
            return f"a traceback, exit code {self.exit_code}", "traceback"
        return "", ""


def run_forked(
    script: str,
    arguments: Sequence[object],
    cwd: Path,
    kill: Kill | None = None,
    time_limit: float = TIME_LIMIT,
    prepare: Callable[[], object] | None = None,
) -> Outcome:
    """Run `python SCRIPT ARGUMENTS` in a fork, killed as `kill` says, or after `time_limit` seconds.

    Args:
        prepare: picklable function that is called in the fork before the script.
    """
    kill = kill or Kill()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps, stack = folder / "steps", folder / "stack"
        steps.write_bytes(bytes(16))
        stack.touch()
        start = time.monotonic()
        process = start_script(script, tuple(arguments), cwd, folder, partial(_observe, steps, stack, kill, prepare))
        process.join(time_limit if kill.seconds is None else kill.seconds)
        if kill.seconds is not None and kill.number != signal.SIGKILL and process.exitcode is None:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(process.pid, kill.number)
            process.join(time_limit)
        running = process.exitcode is None
        if running:
            os.kill(process.pid, signal.SIGUSR1)
            until = time.monotonic() + 0.1
            while stack.stat().st_size == 0 and time.monotonic() < until:
                time.sleep(0.001)
            process.kill()
            process.join()
        seconds = time.monotonic() - start
        out, err, frames = (
            path.read_text(errors="replace") if path.exists() else ""
            for path in (folder / "stdout", folder / "stderr", stack)
        )
        trained, evaluated = (int.from_bytes(steps.read_bytes()[at : at + 8], "little") for at in (0, 8))
    functions = [line.rpartition(" in ")[2] for line in frames.splitlines() if " in " in line]
    hung = running and (kill.seconds is None or kill.number != signal.SIGKILL)
    return Outcome(process.exitcode, out, err, seconds, trained, evaluated, hung, tuple(reversed(functions)))


def _observe(steps: Path, stack: Path, kill: Kill, prepare: Callable[[], object] | None) -> None:
    """Prepare this fork: count steps in a file, write the stack to another at SIGUSR1, and set the kill."""
    # Open until the process ends.
    faulthandler.register(signal.SIGUSR1, file=os.open(stack, os.O_WRONLY), all_threads=False)
    with steps.open("r+b") as file:
        counts = mmap.mmap(file.fileno(), 0)
    from transformers import Trainer

    for at, name in ((0, "training_step"), (8, "prediction_step")):
        setattr(Trainer, name, _counting(getattr(Trainer, name), counts, slice(at, at + 8)))
    if kill.function is not None:
        kill_at(kill.function, kill.call, kill.half)
    if prepare is not None:
        prepare()


def _counting(function, counts: mmap.mmap, at: slice):
    def counted(*args: object, **kwargs: object) -> object:
        counts[at] = (int.from_bytes(counts[at], "little") + 1).to_bytes(8, "little")
        return function(*args, **kwargs)

    return counted
