# SPDX-License-Identifier: Apache-2.0
"""Try a case, and return the verdict on it.

A case is a dataclass with a `kind` (the promise that it tries; the report has a table for each), a `row` (its line of
that table), a unique `id`, and `attempt(inputs, folder)`, which tries it in a new folder and returns an `Attempt`.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.inputs import Inputs
from tests.reliability.running import Outcome

# A sentence and one of `FAULTS`; two empty strings if nothing is wrong.
Finding = tuple[str, str]
PASSED: Finding = ("", "")
FAULTS = ("silently wrong", "traceback", "hang", "other")


@dataclass(frozen=True)
class Attempt:
    """Command of a case, and what was wrong with its outcome."""

    command: str  # to repeat the case
    finding: Finding  # the fault, if any
    detail: str  # for the log
    stages: tuple[str, ...] = ()  # stages of the run that were killed


@dataclass(frozen=True)
class Verdict:
    """Result of a case; attributes are those of the case and of `Attempt`."""

    kind: str
    row: str
    id: str
    wrong: str
    fault: str
    command: str
    detail: str
    stages: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.wrong


def try_case(case: Any, inputs: Inputs, folder: Path) -> Verdict:
    """Return the verdict on a case, also if trying it fails, and remove its folder."""
    try:
        attempt = case.attempt(inputs, folder)
    except Exception:
        attempt = Attempt("", ("could not be tried", "other"), traceback.format_exc())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(case.kind, case.row, case.id, *attempt.finding, attempt.command, attempt.detail, attempt.stages)


def shown(script: str, arguments: Sequence[object]) -> str:
    """Return a command as a user types it."""
    return f"python {script} {shlex.join(map(str, arguments))}"


def said(outcome: Outcome) -> str:
    """Return the error lines of a run, or the end of its output."""
    return " / ".join(outcome.errors) or outcome.stderr[-1500:]


def contents(folder: Path) -> dict[str, str]:
    """Return every file, folder and link in a folder, with a hash of its content."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            content = f"link to {path.readlink()}"
        elif path.is_dir():
            content = "folder"
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = content
    return found


def changed_paths(before: dict[str, str], after: dict[str, str]) -> str:
    """Return the first paths that differ between two `contents`."""
    return ", ".join(sorted(path for path, _ in before.items() ^ after.items())[:4])
