# SPDX-License-Identifier: Apache-2.0
"""Cases of files that were damaged between two runs: cut, or with one changed bit.

A run resumes from an older checkpoint and says so, refuses in one line, or mends the file.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.case import PASSED, Attempt, Finding, said, shown
from tests.reliability.inputs import OUTPUT, Inputs, Scenario, cut
from tests.reliability.kills import SCENARIOS
from tests.reliability.left import broken, differences, left
from tests.reliability.running import Outcome, run_forked

# Files that a finished folder must not serve damaged.
FINISHED_FILES = (
    "model.safetensors", "config.json", "arguments.json", "trainer_state.json", "tokenizer_config.json",
    "preprocessor_config.json",
)  # fmt: skip
# Scripts whose checkpoints have a file; other files are in all of them.
ONLY_OF = {"tokenizer_config.json": "run_glue.py", "preprocessor_config.json": "run_image.py"}
TRAININGS = tuple(scenario for scenario in SCENARIOS if "training" in scenario.base)


@dataclass(frozen=True)
class DamagedFileCase:
    """A training that is called again after one of its files was damaged.

    Attributes:
        file: name of a file in the newest checkpoint, or in the finished folder.
        how: "cut" or "one bit".
        finished: whether the training had ended; else it was killed after its newest checkpoint.
    """

    scenario: Scenario
    file: str
    how: str
    finished: bool

    kind = "faults"

    @property
    def row(self) -> str:
        return f"damaged files: {'finished folder' if self.finished else 'newest checkpoint'}, {self.how}"

    @property
    def id(self) -> str:
        return f"{self.row}: {self.scenario.id}: {self.file}"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        whole, expected = inputs.finished(self.scenario)
        if expected.exit_code:
            raise RuntimeError(f"fails without damage: {expected.stderr[-1500:]}")
        output_dir, command = folder / OUTPUT, (*self.scenario.command(inputs), *self.scenario.resume)
        shutil.copytree(whole / OUTPUT, output_dir)
        path = output_dir / self.file
        if not self.finished:
            _forget_end(output_dir)
            path = newest_checkpoint(output_dir) / self.file
        damage(path, self.how, random.Random(self.id))
        outcome = run_forked(self.scenario.script, command, folder)
        finding = self._judge(outcome, output_dir, whole / OUTPUT)
        return Attempt(shown(self.scenario.script, command), finding, f"{outcome.exit_code}: {said(outcome)}")

    def _judge(self, outcome: Outcome, output_dir: Path, whole: Path) -> Finding:
        if outcome.fault != PASSED:
            return outcome.fault
        if outcome.exit_code == 2 and len(outcome.errors) == 1:
            steps = outcome.training_steps + outcome.evaluation_steps
            return ("refused after work began", "other") if steps else PASSED
        if outcome.exit_code:
            return f"exit code {outcome.exit_code}: {said(outcome)}", "other"
        if not self.finished and "is skipped" not in outcome.stderr:
            return "the damaged checkpoint was used", "silently wrong"
        if wrong := [*broken(output_dir), *differences(left(output_dir), left(whole))]:
            return "; ".join(wrong[:3]), "silently wrong"
        return PASSED


def damage(path: Path, how: str, chance: random.Random) -> None:
    """Cut a file, or change one of its bits."""
    if how == "cut":
        cut(path)
        return
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def newest_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def _forget_end(output_dir: Path) -> None:
    """Remove what a training writes after its newest checkpoint."""
    for path in output_dir.iterdir():
        if path.is_file() and path.name != "arguments.json":
            path.unlink()


def damaged_file_cases() -> Iterator[DamagedFileCase]:
    files = (
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
        "run_record.json", "tokenizer_config.json", "preprocessor_config.json", "training_args.bin",
    )  # fmt: skip
    for at, file in enumerate(files):
        for number, how in enumerate(("one bit", "cut")):
            of_script = [each for each in TRAININGS if file not in ONLY_OF or each.script == ONLY_OF[file]]
            yield DamagedFileCase(of_script[(at + number) % len(of_script)], file, how, finished=False)
    for at, file in enumerate(FINISHED_FILES):
        for number, how in enumerate(("one bit", "cut")):
            of_script = [each for each in TRAININGS if file not in ONLY_OF or each.script == ONLY_OF[file]]
            yield DamagedFileCase(of_script[(2 * at + number) % len(of_script)], file, how, finished=True)
