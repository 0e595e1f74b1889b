# SPDX-License-Identifier: Apache-2.0
"""Running a script, in a process of its own or in this one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What tests run in other processes.
PROGRAMS = Path(__file__).resolve().parent / "programs"


def run_script(name: str | Path, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python NAME ARGUMENTS` as a user does."""
    command = [sys.executable, str(name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def call_script(name: str, *arguments: object) -> None:
    """The same within this process, without the seconds that imports take."""
    module = importlib.import_module(name.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with module.exit_on_bad_input():
            module.main()


def bad_input_line(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """The one line that a script prints for a user's mistake, having exited with code 2."""
    with pytest.raises(SystemExit) as exit_info:
        call_script(name, *arguments)
    assert exit_info.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    return errors[0]
