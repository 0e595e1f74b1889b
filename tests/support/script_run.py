# SPDX-License-Identifier: Apache-2.0
"""Run a script as `python SCRIPT` does, in a fork of a process that has imported everything, or in this process."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
# Programs that tests run in new interpreters, from other folders.
PROGRAMS = Path(__file__).resolve().parent / "programs"
TIME_LIMIT = 300
# A fork server with one thread: the test process has threads of torch, so it must not fork itself.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.preload"])


def isolated_environment(home: str | Path) -> dict[str, str]:
    """Return variables to set before libraries are imported: no network, no token, one thread, own caches."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(Path(home) / "datasets"),
        **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), ""),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }


@cache
def start_server() -> None:
    """Start the fork server, which takes a few seconds to import everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()


def start_fork(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """Call a function in a fork; it and its arguments are pickled."""
    start_server()
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def start_script(
    name: str | Path,
    arguments: tuple[object, ...],
    cwd: Path,
    streams: Path,
    before: Callable[[], object] | None = None,
) -> BaseProcess:
    """Start `python NAME ARGUMENTS` in a fork.

    Args:
        name: path of the script, relative to the repository.
        arguments: command line arguments.
        cwd: folder to run it in.
        streams: folder for its output, in the files `stdout` and `stderr`.
        before: picklable function that is called in the fork before the script.
    """
    return start_fork(_run, ROOT / name, [*map(str, arguments)], cwd, dict(os.environ), streams, before)


def run_script(
    name: str | Path, *arguments: object, cwd: Path = ROOT, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python NAME ARGUMENTS` to its end, as `start_script` does."""
    with tempfile.TemporaryDirectory() as streams:
        process = start_script(name, arguments, cwd, Path(streams), before)
        process.join(TIME_LIMIT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([str(name), *map(str, arguments)], TIME_LIMIT)
        out, err = (Path(streams, stream).read_text(errors="replace") for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess([str(name), *map(str, arguments)], process.exitcode, out, err)


def _run(
    script: Path,
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str],
    streams: Path,
    before: Callable[[], object] | None,
) -> None:
    """Run a script in this fork as the interpreter would; multiprocessing turns SystemExit into the exit code."""
    for stream in (sys.stdout, sys.stderr):
        descriptor = os.open(streams / stream.name.strip("<>"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    os.environ.update(environment)
    os.chdir(cwd)
    # Workers start as in an interpreter of Python 3.11, whereas a fork of the server would ask the server for them.
    multiprocessing.set_start_method("fork", force=True)
    # Data collators detect workers by the name of the process.
    multiprocessing.current_process().name = "MainProcess"
    _renew_lock(tqdm)
    if before is not None:
        before()
    sys.argv = [script.name, *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _renew_lock(bars: type[tqdm]) -> None:
    """Give progress bars of every class a new lock, because a killed fork may still hold the shared one."""
    bars.set_lock(threading.RLock())
    for subclass in bars.__subclasses__():
        _renew_lock(subclass)


def at_call(function: str, call: int, action: Callable[[], object]) -> None:
    """Call `action` in this process before one call of a function.

    Args:
        function: "module:name" or "module:Class.name".
        call: number of the call, from 1.
        action: for example raises an error.
    """
    calls = itertools.count(1)

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            if next(calls) == call:
                action()
            return original(*args, **kwargs)

        return wrapped

    _wrap(function, wrap)


def kill_at(function: str, call: int = 1, half: bool = False) -> None:
    """Kill this process with SIGKILL when it calls a function.

    Args:
        function, call: as for `at_call`.
        half: let the call finish, cut the file that it wrote to half of its length, and only then kill.
    """
    if not half:
        at_call(function, call, partial(os.kill, os.getpid(), signal.SIGKILL))
        return
    calls = itertools.count(1)

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def killing(*args: object, **kwargs: object) -> object:
            result = original(*args, **kwargs)
            if next(calls) == call:
                paths = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, os.PathLike))]
                written = max(filter(os.path.isfile, paths), key=os.path.getmtime)
                os.truncate(written, os.path.getsize(written) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return killing

    _wrap(function, wrap)


def _wrap(function: str, wrap: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: object = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, wrap(getattr(owner, name)))


def call_script(name: str, *arguments: object) -> None:
    """Run a script in this process, so that monkeypatches apply to it."""
    module = importlib.import_module(name.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with module.exit_on_bad_input():
            module.main()


def bad_input_line(capsys: pytest.CaptureFixture[str], name: str, *arguments: object, exit_code: int = 2) -> str:
    """Return the one line that a script prints when it stops, with exit code 2 for a user's mistake."""
    with pytest.raises(SystemExit) as exit_info:
        call_script(name, *arguments)
    assert exit_info.value.code == exit_code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    return errors[0]
