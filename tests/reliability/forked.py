# SPDX-License-Identifier: Apache-2.0
"""Running a script in a real process that starts in milliseconds: a fork of one that has imported everything.

A fork is safe only in a process with one thread, so what forks is a worker of a pool (`warm_pool`), never the tests'
own process.
"""

from __future__ import annotations

import faulthandler
import importlib
import mmap
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 90.0
POLL = 0.005
CURSOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# What scripts import only when they get there.
WARMED = (
    "experiments.runs.finetune", "experiments.runs.sweep", "experiments.runs.checkpoint_task",
    "matplotlib.pyplot",
    "sklearn.metrics", "scipy.cluster.hierarchy", "pandas", "PIL.Image", "torch.profiler",
    "datasets.packaged_modules.parquet.parquet", "datasets.packaged_modules.csv.csv",
    "datasets.packaged_modules.imagefolder.imagefolder", "transformers.trainer", "accelerate",
)  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """When a run gets SIGKILL: after so many seconds, or as it calls a function for the n-th time; or never.

    Attributes:
        seconds: after the script began.
        function: "module:name" or "module:Class.name".
        call: the first one is 1.
        half: after the call, with half of the file that it has written.
    """

    seconds: float | None = None
    function: str | None = None
    call: int = 1
    half: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: as a shell sees it, negative for a signal.
        stdout, stderr: all that was written to them.
        seconds: from the first line of the script on.
        training_steps, evaluation_steps: batches.
        hung: whether it was ended because it took longer than the time limit.
        stack: functions that a killed or hung run was in, outermost first.
    """

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    training_steps: int
    evaluation_steps: int
    hung: bool = False
    stack: tuple[str, ...] = ()

    @property
    def killed(self) -> bool:
        """Whether SIGKILL came before the end."""
        return self.exit_code == -signal.SIGKILL and not self.hung

    @property
    def errors(self) -> list[str]:
        """The lines that say what stopped it, without what moves a terminal's cursor to their beginning."""
        return [line for line in CURSOR.sub("", self.stderr).splitlines() if line.startswith("error: ")]

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stderr + self.stdout


def isolate(folder: Path) -> None:
    """Set the environment of what is to be started: no network, one thread, caches and home of their own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }


def warm_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that have imported everything, and may fork."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_warm)


def _warm() -> None:
    for name in WARMED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def run_forked(
    script: str,
    arguments: Sequence[object],
    cwd: Path,
    kill: Kill | None = None,
    time_limit: float = TIME_LIMIT,
) -> Outcome:
    """Run `python SCRIPT ARGUMENTS` in a fork of this process.

    Args:
        script: its file name.
        arguments: what follows.
        cwd: folder to run it in.
        kill: when to kill it; by default never.
        time_limit: in seconds; what takes longer hangs.
    """
    kill = kill or Kill()
    steps = mmap.mmap(-1, 2 * 8)  # shared with the fork: batches trained on, and evaluated
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as stack:
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(script, arguments, cwd, kill, steps, (out.fileno(), err.fileno(), stack.fileno()))
        status = _wait(pid, start + (time_limit if kill.seconds is None else kill.seconds))
        hung = status is None and kill.seconds is None
        if status is None:
            # Where it is first, then the end of it.
            os.kill(pid, signal.SIGUSR1)
            until = time.monotonic() + 0.1
            while os.fstat(stack.fileno()).st_size == 0 and time.monotonic() < until:
                time.sleep(POLL / 10)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        seconds = time.monotonic() - start
        for file in (out, err, stack):
            file.seek(0)
        texts = [file.read().decode(errors="replace") for file in (out, err, stack)]
    trained, evaluated = (int.from_bytes(steps[8 * at : 8 * at + 8], "little") for at in (0, 1))
    frames = [line.rpartition(" in ")[2] for line in texts[2].splitlines() if " in " in line]
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, texts[0], texts[1], seconds, trained, evaluated, hung, tuple(reversed(frames)))


def _wait(pid: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(POLL)
    return None


def _child(
    script: str, arguments: Sequence[object], cwd: Path, kill: Kill, steps: mmap.mmap, files: tuple[int, int, int]
) -> None:
    """What the fork does, to its end: run the script as the interpreter would, and leave with its exit code."""
    code = 1
    try:
        for descriptor, file in ((1, files[0]), (2, files[1])):
            os.dup2(file, descriptor)
        faulthandler.register(signal.SIGUSR1, file=files[2], all_threads=False)
        # What data collators ask whether they are in a worker of their own.
        multiprocessing.current_process().name = "MainProcess"
        _own_lock(tqdm)
        os.chdir(cwd)
        _count_steps(steps)
        if kill.function is not None:
            _kill_at(kill)
        sys.argv = [script, *map(str, arguments)]
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _own_lock(bars: type[tqdm]) -> None:
    """A lock for progress bars of each class, which may have one of its own: all forks share that, and a killed one may
    hold it."""
    bars.set_lock(threading.RLock())
    for each in bars.__subclasses__():
        _own_lock(each)


def _count_steps(steps: mmap.mmap) -> None:
    from transformers import Trainer

    for place, name in enumerate(("training_step", "prediction_step")):
        _before(Trainer, name, _adder(steps, place))


def _adder(steps: mmap.mmap, place: int) -> Callable[[], None]:
    def add() -> None:
        at = slice(8 * place, 8 * place + 8)
        steps[at] = (int.from_bytes(steps[at], "little") + 1).to_bytes(8, "little")

    return add


def _kill_at(kill: Kill) -> None:
    module, _, path = str(kill.function).partition(":")
    *owners, name = path.split(".")
    owner: object = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    def killing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == kill.call:
            if kill.half:
                function(*args, **kwargs)
                paths = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, os.PathLike))]
                written = max(filter(os.path.isfile, paths), key=os.path.getmtime)
                os.truncate(written, os.path.getsize(written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, killing)


def _before(owner: object, name: str, do: Callable[[], None]) -> None:
    """Do something before every call of a function; nothing is undone, since the process ends."""
    function = getattr(owner, name)

    def wrapped(*args: object, **kwargs: object) -> object:
        do()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)
