# SPDX-License-Identifier: Apache-2.0
"""A user's mistake ends a script in one line with exit code 2; only a bug shows a traceback."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from experiments.errors import BadInput, Stopped, exit_on_bad_input, naming, one_line
from experiments.interruption import Interrupted
from tests.support.script_run import ROOT


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "out/model.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInput("--r -1: must be 0 or more\nand more"), 2, "--r -1: must be 0 or more\n"),
        (Stopped("training has diverged"), 1, "training has diverged\n"),
        (KeyboardInterrupt(), 130, "interrupted; "),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; "),
        (caused(RuntimeError("generation failed"), BadInput("row 3: has no label")), 2, "row 3: has no label\n"),
        *((os_error(number), 1, f"[Errno {number}] ") for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
        *((os_error(number), 1, f"[Errno {number}] ") for number in (errno.EACCES, errno.ENOTDIR, errno.EISDIR)),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "I/O error: No space left on device"),
        (MemoryError(), 1, "out of memory ("),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "out of memory ("),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "a worker process has ended ("),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory ("),
    ],
    ids=str,
)
def test_what_stops_a_script_is_one_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise error
    shown = capsys.readouterr().err
    assert exit_info.value.code == code and shown.startswith(f"error: {line}") and shown.count("\n") == 1
    if isinstance(error, OSError):
        assert "out/model.safetensors" in shown


def test_of_several_processes_the_first_one_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise BadInput("--r -1: must be 0 or more")
    assert exit_info.value.code == 2 and capsys.readouterr().err == ""


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("truncated")
        except OSError as error:
            raise BadInput("image 3: Broken: cannot be read") from error


def test_a_mistake_that_a_worker_finds_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: image 3: Broken: cannot be read\n"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError("\n  no such file\nlong explanation"), BadInput("--file x: no such file")),
        (BadInput("row 3"), BadInput("row 3")),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
    ids=str,
)
def test_naming_names_the_argument_of_an_error_that_it_is_asked_for(error, raised):
    with pytest.raises(type(raised)) as caught, naming("--file x", OSError):
        raise error
    assert type(caught.value) is type(raised) and str(caught.value) == str(raised)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(), "ValueError"),
        (KeyError("label"), "KeyError: 'label'"),
        (ValueError("not a number"), "not a number"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch for x\n\tand y"),
            "Error(s) in loading: size mismatch for x",
        ),
    ],
)
def test_an_error_in_one_line_says_what_is_wrong(error, line):
    assert one_line(error) == line


def test_a_fault_of_the_program_keeps_its_traceback_and_is_called_one():
    program = "from experiments.errors import exit_on_bad_input\nwith exit_on_bad_input():\n    1 / 0\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *traceback, last = result.stderr.splitlines()
    assert result.returncode == 1 and traceback[-1] == "ZeroDivisionError: division by zero"
    assert last.startswith("error: this is a fault of the program") and "issue tracker" in last


PRINTING = """
import logging, sys
from tqdm import tqdm
from experiments.errors import BadInput, exit_on_bad_input
with exit_on_bad_input():
    for _ in tqdm(range(3)):
        print("\u00b1" * 9000)
        tqdm.write("\u00b1")
        logging.warning("\u00b1")
    open(sys.argv[1], "w").write("ended")
    raise BadInput("--x \u00b1: is bad")
"""


@pytest.mark.parametrize(
    ("where", "encoding"),
    [
        ("", "ascii"), ("| head -1", "utf-8"), ("> /dev/full", "latin-1:strict"), ("2> /dev/full", "utf-8"),
        ("> /dev/full 2>&1", "utf-8"), (">&-", "utf-8"), (">&- 2>&-", "utf-8"),
    ],
)  # fmt: skip
def test_no_print_ends_a_script(tmp_path, where, encoding):
    """Characters that the terminal's encoding lacks, a closed pipe, a full disk, a closed stream."""
    command = shlex.join([sys.executable, "-c", PRINTING, str(tmp_path / "ended")])
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "-c", f"{command} {where}; exit ${{PIPESTATUS[0]}}"], env=environment, capture_output=True, timeout=60
    )
    assert run.returncode == 2 and (tmp_path / "ended").read_text() == "ended", run.stderr[-2000:]
    shown = "2>" in where or b"error: --x" in run.stderr
    assert shown and b"Traceback" not in run.stderr and b"Exception ignored" not in run.stderr
    assert (b"warning: standard output: No space left" in run.stderr) == (where == "> /dev/full")
