# SPDX-License-Identifier: Apache-2.0
"""A user's mistake is one line and exit code 2; only a fault of the program shows a traceback."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from experiments.errors import BadInput, Stopped, exit_on_bad_input, naming, one_line
from tests.support.script_run import ROOT

Usage = namedtuple("Usage", ["total", "used", "free"])


def shown(capsys, error: BaseException) -> tuple[int | str | None, str]:
    """Exit code and standard error of a script in which an error comes."""
    with pytest.raises(SystemExit) as exit_info, exit_on_bad_input():
        raise error
    return exit_info.value.code, capsys.readouterr().err


def test_bad_input_exits_with_code_2_and_one_line(capsys):
    assert shown(capsys, BadInput("--r -1: must be 0 or more\nand more")) == (
        2,
        "error: --r -1: must be 0 or more\n",
    )
    assert shown(capsys, Stopped("training has diverged")) == (1, "error: training has diverged\n")


def test_ctrl_c_is_one_line(capsys):
    code, line = shown(capsys, KeyboardInterrupt())
    assert code == 130 and line.startswith("error: interrupted") and line.count("\n") == 1


def test_of_several_processes_the_first_one_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert shown(capsys, BadInput("--r -1: must be 0 or more")) == (2, "")


def test_what_stopped_a_library_is_found_behind_its_own_error(capsys):
    outer = RuntimeError("generation failed")
    outer.__cause__ = BadInput("row 3: has no label")
    assert shown(capsys, outer) == (2, "error: row 3: has no label\n")


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR])
def test_a_place_that_cannot_be_used_is_one_line(capsys, number):
    code, line = shown(capsys, OSError(number, os.strerror(number), "out/model.safetensors"))
    assert code == 2 and line.count("\n") == 1 and os.strerror(number) in line and "out/model.safetensors" in line


def test_a_full_disk_that_a_library_hides_is_one_line(capsys):
    code, line = shown(capsys, RuntimeError("I/O error: No space left on device (os error 28)"))
    assert code == 2 and "No space left on device" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_a_memory_that_is_full_is_one_line(capsys, error):
    code, line = shown(capsys, error)
    assert code == 2 and line.startswith("error: out of memory (") and line.count("\n") == 1


def test_a_full_disk_is_not_said_of_the_argument_that_was_read(capsys):
    with pytest.raises(OSError), naming("--train_file x", Exception):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_naming_adds_the_argument_to_the_first_line():
    with pytest.raises(BadInput, match=r"^--file x: no such file$"), naming("--file x", OSError):
        raise OSError("\n  no such file\nlong explanation")


def test_naming_lets_what_is_explained_already_pass():
    with pytest.raises(BadInput, match=r"^row 3$"), naming("--file x", Exception):
        raise BadInput("row 3")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(), "ValueError"),
        (KeyError("label"), "KeyError: 'label'"),
        (IndexError("7"), "IndexError: 7"),
        (ValueError("not a number"), "not a number"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch for x\n\tand y"),
            "Error(s) in loading: size mismatch for x",
        ),
        (
            ValueError("Validation error for field 'r':\n    TypeError: expected int"),
            "Validation error for field 'r': TypeError: expected int",
        ),
    ],
)
def test_an_error_in_one_line_says_what_is_wrong(error, line):
    assert one_line(error) == line


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), exit_on_bad_input(), naming("--file x", OSError):
        raise ZeroDivisionError


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
    """A character that the terminal lacks, a pipe whose reader has left, a full disk behind it, a closed stream."""
    command = shlex.join([sys.executable, "-c", PRINTING, str(tmp_path / "ended")])
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "-c", f"{command} {where}; exit ${{PIPESTATUS[0]}}"], env=environment, capture_output=True, timeout=60
    )
    assert run.returncode == 2 and (tmp_path / "ended").read_text() == "ended", run.stderr[-2000:]
    shown = "2>" in where or b"error: --x" in run.stderr
    assert shown and b"Traceback" not in run.stderr and b"Exception ignored" not in run.stderr
    assert (b"warning: standard output: No space left" in run.stderr) == (where == "> /dev/full")
