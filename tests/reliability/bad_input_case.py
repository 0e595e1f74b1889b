# SPDX-License-Identifier: Apache-2.0
"""A bad input, and what must come of it: one line, before any work, with everything on disk as it was."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.forked import TIME_LIMIT, Outcome, run_forked
from tests.reliability.inputs import Command, Inputs
from tests.reliability.verdicts import Verdict
from tests.support.script_run import run_script

OUTPUT = "out"
# Before a file with all arguments, `--output_dir` among them: the command is this file and nothing else.
ONLY = "only"
Make = Callable[[Inputs, Path], Command]


@dataclass(frozen=True)
class BadInputCase:
    """A command that is a mistake.

    Attributes:
        mistake: its class, a row of the table.
        name: unlike that of any other case of this class and script.
        script: that is called.
        make: writes what it takes into an empty folder, and returns the arguments; `--output_dir out`, in that folder,
            comes before them, so that they may name another one.
        says: what the line must contain, at least.
        exit_code: 2 for a mistake of the user's, 1 for what else stops a script.
        works: whether it can be known only by training or evaluating, and may leave what was written until then.
    """

    mistake: str
    name: str
    script: str
    make: Make
    says: tuple[str, ...]
    exit_code: int = 2
    works: bool = False

    @property
    def row(self) -> str:
        return self.mistake

    @property
    def id(self) -> str:
        return f"{self.script.removesuffix('.py')}: {self.mistake}: {self.name}"


def try_bad_input(case: BadInputCase, inputs: Inputs, folder: Path, real: bool = False) -> Verdict:
    """Run a case and judge it.

    Args:
        case: the case.
        inputs: that it is made from, which it leaves as they are.
        folder: a new one for the case.
        real: in an interpreter of its own and not in a fork, which takes the seconds of all imports.
    """
    folder.mkdir(parents=True)
    made = case.make(inputs, folder)
    command: Command = made[1:] if made[0] == ONLY else ("--output_dir", folder / OUTPUT, *made)
    before = contents(folder)
    outcome = _interpreted(case.script, command) if real else run_forked(case.script, command, folder)
    wrong, fault = _judged(case, outcome, before, contents(folder))
    detail = " / ".join(outcome.errors) or outcome.stderr[-1500:]
    if outcome.hung:
        detail += f" in {' > '.join(outcome.stack[-6:])}"
    shown = f"python {case.script} {shlex.join(map(str, command))}"
    kind = "some of them in an interpreter of their own" if real else "bad inputs"
    return Verdict(kind, case.mistake, case.id, wrong, fault, shown, detail)


def _judged(case: BadInputCase, outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> tuple[str, str]:
    """What is wrong with an outcome, and which kind of wrong that is; empty if nothing."""
    if outcome.hung:
        return f"still running after {TIME_LIMIT:.0f} s", "hang"
    if outcome.has_traceback:
        return f"a traceback, exit code {outcome.exit_code}", "traceback"
    if outcome.exit_code == 0:
        return "exit code 0", "wrong in silence"
    if outcome.exit_code != case.exit_code:
        return f"exit code {outcome.exit_code}, not {case.exit_code}", "other"
    if len(outcome.errors) != 1:
        return f"{len(outcome.errors)} lines that start with 'error: '", "other"
    if missing := [part for part in case.says if not _names(outcome.errors[0], part)]:
        return f"the line does not say {missing}", "other"
    if case.works:
        return "", ""
    if outcome.training_steps or outcome.evaluation_steps:
        steps = f"{outcome.training_steps} training and {outcome.evaluation_steps} evaluation steps"
        return f"{steps} before the line", "other"
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        return f"written or changed: {', '.join(changed[:4])}", "other"
    return "", ""


def _names(line: str, part: str) -> bool:
    """Whether a line has a part in it, a number as whatever it is written, and a list with or without brackets."""
    line, part = line.lower(), part.lower()
    if part in line or part in line.replace(", ", ","):
        return True
    try:
        number = float(part)
    except ValueError:
        return False
    return any(float(found) == number for found in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", line))


def contents(folder: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, with a hash of what is in it."""
    return dict(_hashed(folder))


def _hashed(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            yield name, f"link to {path.readlink()}"
        elif path.is_file():
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            yield name, "folder"


def _interpreted(script: str, command: Command) -> Outcome:
    try:
        done = run_script(script, *command)
    except subprocess.TimeoutExpired:
        return Outcome(-9, "", "", TIME_LIMIT, 0, 0, hung=True)
    return Outcome(done.returncode, done.stdout, done.stderr, 0.0, 0, 0)
