# SPDX-License-Identifier: Apache-2.0
"""Cases of a second run that starts in a folder in which another one works: it is refused, and the first unharmed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.reliability.case import PASSED, Attempt, Finding, said, shown
from tests.reliability.inputs import LAST, OUTPUT, SCRIPTS, Command, Inputs, Scenario
from tests.reliability.kills import RETRAINED, SCENARIOS
from tests.reliability.left import broken, differences, left
from tests.reliability.running import Outcome, run_forked
from tests.support.script_run import at_call

# The first run waits this many seconds in a training or evaluation step, while the second one starts.
PAUSE_SECONDS = 20.0
STEPS = ("transformers.trainer:Trainer.training_step", "transformers.trainer:Trainer.prediction_step")


@dataclass(frozen=True)
class TwoRunsCase:
    """A run, and a second one of another script in its folder.

    Attributes:
        first: the first run.
        second: script of the second one.
        below: folder of the second run, inside that of the first one.
    """

    first: Scenario
    second: str
    below: str = ""

    kind = "faults"
    row = "two runs in one folder"

    @property
    def id(self) -> str:
        return f"{self.row}: {self.first.id}, then {self.second} in {OUTPUT}/{self.below}"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        whole, expected = inputs.finished(self.first)
        if expected.exit_code:
            raise RuntimeError(f"fails alone: {expected.stderr[-1500:]}")
        folder.mkdir(parents=True)
        paused, go_on = folder / "paused", folder / "go_on"
        step = STEPS[0] if expected.training_steps else STEPS[1]
        prepare = partial(at_call, step, 2, partial(_pause, paused, go_on))
        command = self.first.command(inputs)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(run_forked, self.first.script, command, folder, prepare=prepare)
            while not paused.exists() and not first.done():
                time.sleep(0.05)
            second = run_forked(self.second, self._second_command(inputs), folder)
            go_on.touch()
        finding = self._judge(first.result(), second, folder / OUTPUT, whole / OUTPUT)
        return Attempt(shown(self.second, self._second_command(inputs)), finding, said(second))

    def _second_command(self, inputs: Inputs) -> Command:
        if self.below:  # the same training as the first stage of the first run
            command = (*getattr(inputs, self.first.base), *LAST)
        else:
            command = (*inputs.usual(self.second), *(("--r", 1) if self.second == "eval_sweep.py" else LAST))
        return (*command, "--output_dir", f"{OUTPUT}/{self.below}")

    def _judge(self, first: Outcome, second: Outcome, output_dir: Path, whole: Path) -> Finding:
        for outcome in (first, second):
            if outcome.fault != PASSED:
                return outcome.fault
        if second.exit_code != 2 or len(second.errors) != 1 or "another run is writing" not in second.errors[0]:
            return f"exit code {second.exit_code}: {said(second)}", "silently wrong"
        if first.exit_code:
            return f"the first run ends with exit code {first.exit_code}: {said(first)}", "other"
        if wrong := [*broken(output_dir), *differences(left(output_dir), left(whole))]:
            return "; ".join(wrong[:3]), "silently wrong"
        return PASSED


def _pause(paused: Path, go_on: Path) -> None:
    paused.touch()
    until = time.monotonic() + PAUSE_SECONDS
    while not go_on.exists() and time.monotonic() < until:
        time.sleep(0.05)


def two_runs_cases() -> Iterator[TwoRunsCase]:
    for at, first in enumerate(SCENARIOS):
        yield TwoRunsCase(first, SCRIPTS[at % len(SCRIPTS)])
    for first in SCENARIOS:
        if first.added == RETRAINED:
            yield TwoRunsCase(first, first.script, "finetuned")
