# SPDX-License-Identifier: Apache-2.0
"""Cases of bad input: refused in one line, before any work, without any change on disk."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.case import PASSED, Attempt, Finding, changed_paths, contents, said, shown
from tests.reliability.inputs import OUTPUT, Command, Inputs
from tests.reliability.running import TIME_LIMIT, Outcome, run_forked
from tests.support.script_run import ROOT

# Marks a command that is complete: no `--output_dir` is added.
ONLY = "only"
Make = Callable[[Inputs, Path], Command]


@dataclass(frozen=True)
class BadInputCase:
    """A command with a mistake."""

    row: str  # class of the mistake
    name: str  # unique in this class and script
    script: str
    # Function that writes the case's files to an empty folder, and returns the arguments of the command. They follow
    # `--output_dir out` (in that folder), so they can override it.
    make: Make
    says: tuple[str, ...]  # what the message must contain
    exit_code: int = 2  # 2 for a user's mistake, 1 for any other reason to stop
    works: bool = False  # whether the mistake shows only in training or evaluation, when files may be left
    fresh: bool = False  # run in a new interpreter instead of a fork, to cover imports and the interpreter's exit

    @property
    def kind(self) -> str:
        return "some of them in an interpreter of their own" if self.fresh else "bad inputs"

    @property
    def id(self) -> str:
        return f"{self.script.removesuffix('.py')}: {self.row}: {self.name}"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        folder.mkdir(parents=True)
        made = self.make(inputs, folder)
        command: Command = made[1:] if made[0] == ONLY else ("--output_dir", folder / OUTPUT, *made)
        before = contents(folder)
        outcome = _run_fresh(self.script, command) if self.fresh else run_forked(self.script, command, folder)
        finding = self._judge(outcome, changed_paths(before, contents(folder)))
        return Attempt(shown(self.script, command), finding, said(outcome))

    def _judge(self, outcome: Outcome, changed: str) -> Finding:
        if outcome.fault != PASSED:
            return outcome.fault
        if outcome.exit_code == 0:
            return "exit code 0", "silently wrong"
        if outcome.exit_code != self.exit_code:
            return f"exit code {outcome.exit_code}, not {self.exit_code}", "other"
        if len(outcome.errors) != 1:
            return f"{len(outcome.errors)} lines that start with 'error: '", "other"
        if missing := [part for part in self.says if not _names(outcome.errors[0], part)]:
            return f"the line does not say {missing}", "other"
        if self.works:
            return PASSED
        if outcome.training_steps or outcome.evaluation_steps:
            steps = f"{outcome.training_steps} training and {outcome.evaluation_steps} evaluation steps"
            return f"{steps} before the line", "other"
        return (f"written or changed: {changed}", "other") if changed else PASSED


def usual(script: str, *words: object) -> Make:
    """Make a working command with more arguments."""
    return lambda inputs, folder: (*inputs.usual(script), *words)


def _names(line: str, part: str) -> bool:
    """Return whether a line contains a part; numbers match in any spelling, lists with or without brackets."""
    line, part = line.lower(), part.lower()
    if part in line or part in line.replace(", ", ","):
        return True
    try:
        number = float(part)
    except ValueError:
        return False
    return any(float(found) == number for found in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", line))


def _run_fresh(script: str, command: Command) -> Outcome:
    words = [sys.executable, script, *map(str, command)]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return Outcome(-9, "", "", TIME_LIMIT, hung=True)
    return Outcome(done.returncode, done.stdout, done.stderr)
