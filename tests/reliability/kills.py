# SPDX-License-Identifier: Apache-2.0
"""Cases of runs that are killed, at random times and while they write: resumed, they must end with the same results."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.case import PASSED, Attempt, Finding, shown
from tests.reliability.inputs import LAST, OUTPUT, Command, Inputs, Scenario
from tests.reliability.left import broken, differences, left
from tests.reliability.running import Kill, Outcome, run_forked

# A run is killed at most this many times.
MOST_KILLS = 3
RETRAINED: Command = ("--r", 2, "--retrain_epochs", 1)
SEARCHED: Command = ("--flops_ratio", 0.985, "--schedule", "search", "--calibration_samples", 4)
SWEPT: Command = ("--per_device_train_batch_size", 6, "--learning_rate", 3e-3, "--save_strategy", "steps",
                  "--save_steps", 3, "--retrain_epochs", 1)  # fmt: skip
BEST: Command = (
    "--eval_strategy", "steps", "--eval_steps", 3, "--load_best_model_at_end", "--save_total_limit", 2,
)  # fmt: skip
AUGMENTED: Command = ("--crop_scale", 0.5, "--horizontal_flip", 0.5)
METHODS: Command = (
    "--r", 0, 1, "--flops_ratio", 0.985, "--schedule", "floor", "linear", "--merge_method", "bipartite", "prune",
)  # fmt: skip
GROUPED: Command = (*SEARCHED, "--merge_method", "groups")
SCENARIOS = (
    Scenario("one stage", "run_glue.py", "text_training", ("--do_predict",), LAST),
    Scenario("two stages", "run_glue.py", "text_training", RETRAINED, LAST),
    Scenario(
        "a searched schedule, retrained", "run_glue.py", "text_training", (*SEARCHED, "--retrain_epochs", 1), LAST
    ),
    Scenario("a share of changed answers", "run_glue.py", "text_training", ("--max_changed", 1), LAST),
    Scenario("the best checkpoint", "run_glue.py", "text_training", BEST, LAST),
    Scenario("evaluation and prediction", "run_glue.py", "text_evaluation", ("--do_predict",)),
    Scenario("two stages, augmented", "run_image.py", "image_training", (*RETRAINED, *AUGMENTED), LAST),
    Scenario("every r", "run_image.py", "image_training", ("--elastic",), LAST),
    Scenario("two stages", "run_mlm.py", "mlm_training", RETRAINED, LAST),
    Scenario("retrained cells", "eval_sweep.py", "text_sweep", (*SWEPT, "--r", 0, 1, 2)),
    Scenario(
        "a searched schedule, one checkpoint for every r", "eval_sweep.py", "image_sweep",
        (*SWEPT, *SEARCHED, "--r", 0, 1, "--elastic"),
    ),
    Scenario("methods and schedules", "eval_sweep.py", "mlm_sweep", METHODS),
    Scenario("fixed groups, without training", "run_glue.py", "text_evaluation", GROUPED),
    Scenario("fixed groups, retrained", "run_image.py", "image_training", (*GROUPED, "--retrain_epochs", 1), LAST),
)  # fmt: skip
# Functions of libraries that write files or separate stages, where a kill may do harm. True: the file that it writes is
# cut to half, as by a crash of the machine.
WRITING: tuple[tuple[str, bool], ...] = (
    ("transformers.trainer:Trainer._save_optimizer_and_scheduler", False),
    ("transformers.trainer:Trainer._save_rng_state", False),
    ("transformers.trainer:Trainer.save_state", False),
    ("transformers.trainer:TrainerState.save_to_json", False),
    ("transformers.trainer:Trainer.predict", False),
    ("transformers.modeling_utils:PreTrainedModel.save_pretrained", False),
    ("transformers.modeling_utils:safe_save_file", True),
    ("torch:save", True),
    ("pathlib:Path.write_text", True),
    ("pathlib:Path.replace", False),
    ("os:replace", False),
    ("shutil:copyfile", True),
    ("matplotlib.figure:Figure.savefig", True),
    ("numpy:save", False),
    ("datasets:Dataset.map", False),
)
# Functions on the stack that identify a stage; the first match counts.
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("writing a checkpoint", ("_save_checkpoint", "save_model", "save_state", "_copy_code", "save_pretrained")),
    ("writing a card or report", ("write_card", "_write_retrained_card", "write_report")),
    ("training", ("_inner_training_loop", "train_and_save")),
    ("timing", ("time_interleaved", "peak_memory_mb")),
    ("searching for what merges", ("calibrate", "choose")),
    ("evaluating", ("predict", "evaluation_loop", "evaluate")),
    ("preparing data", ("prepared", "map")),
    ("loading data", ("load_dataset", "load_glue_task", "load_image_task", "load_mlm_task", "load_sweep_task")),
    ("loading the model", ("load_model_and_task", "load_model", "from_pretrained")),
    ("reading arguments", ("parse_arguments", "__post_init__")),
)


@dataclass(frozen=True)
class KillCase:
    """A run that is killed, and called again until it ends."""

    scenario: Scenario
    seed: int  # random seed of the kills
    function: str | None = None  # as in `Kill`; `None`: at a random time
    half: bool = False

    kind = "kills"

    @property
    def row(self) -> str:
        return self.scenario.id

    @property
    def id(self) -> str:
        where = f"at {self.function}{', half written' if self.half else ''}" if self.function else "at a random time"
        return f"{self.scenario.id}: {where}, seed {self.seed}"

    def attempt(self, inputs: Inputs, folder: Path) -> Attempt:
        scenario, chance = self.scenario, random.Random(self.id)
        command = scenario.command(inputs)
        whole, expected = inputs.finished(scenario)
        if expected.exit_code or (wrong := broken(whole / OUTPUT)):
            finding = f"fails without a kill: exit code {expected.exit_code}", "other"
            return Attempt(shown(scenario.script, command), finding, expected.stderr[-1500:] or str(wrong))
        outcomes = [self._first_kill(chance, command, expected.seconds, folder)]
        stages = [_stage(outcome, self.function) for outcome in outcomes if outcome.killed]
        started_over = False
        while outcomes[-1].killed:
            again = len(stages) < MOST_KILLS and chance.random() < 0.4
            kill = Kill(seconds=chance.uniform(0.05, 0.9) * expected.seconds) if again else None
            # Sometimes without --resume_from_checkpoint: the run starts over, or is refused and called with it below.
            resume = scenario.resume if started_over or chance.random() < 0.75 else ()
            started_over = True
            outcome = run_forked(scenario.script, (*command, *resume), folder, kill)
            if outcome.exit_code == 2 and not resume and len(outcome.errors) == 1 and scenario.resume:
                outcome = run_forked(scenario.script, (*command, *scenario.resume), folder)
            if outcome.killed:
                stages.append(_stage(outcome))
            outcomes.append(outcome)
        finding = _judge(outcomes, folder / OUTPUT, whole / OUTPUT)
        detail = f"killed while {', '.join(stages) or 'never'}; {outcomes[-1].stderr[-1500:] if finding[0] else ''}"
        return Attempt(shown(scenario.script, command), finding, detail, tuple(stages))

    def _first_kill(self, chance: random.Random, command: Command, seconds: float, folder: Path) -> Outcome:
        """Run until it is killed; if the run ends before that, run again with an earlier kill."""
        fraction, call = chance.uniform(0.03, 0.97), chance.choice((1, 2, 3, 5, 8, 13))
        while True:
            folder.mkdir(parents=True)
            kill = Kill(None if self.function else fraction * seconds, self.function, call, self.half)
            outcome = run_forked(self.scenario.script, command, folder, kill)
            if outcome.killed or (self.function is not None and call == 1) or outcome.exit_code:
                return outcome
            fraction, call = fraction * 0.7, call // 2
            shutil.rmtree(folder)


def kill_cases() -> Iterator[KillCase]:
    """Yield six kills at random times for every scenario, and a kill in each function for four of the scenarios."""
    for scenario in SCENARIOS:
        for seed in range(6):
            yield KillCase(scenario, seed)
    for number, (function, half) in enumerate(WRITING):
        for offset in (0, 1, 2, 3):
            # Steps of four, so that every function is killed in scenarios of several scripts.
            scenario = SCENARIOS[(number + 4 * offset) % len(SCENARIOS)]
            yield KillCase(scenario, offset, function, half)


def _judge(outcomes: list[Outcome], output_dir: Path, whole: Path) -> Finding:
    if fault := next((outcome.fault for outcome in outcomes if outcome.fault != PASSED), None):
        return fault
    last = outcomes[-1]
    if last.exit_code:
        return f"exit code {last.exit_code}: {' / '.join(last.errors)}", "other"
    if wrong := broken(output_dir):
        return "not whole: " + "; ".join(wrong[:3]), "silently wrong"
    if wrong := differences(left(output_dir), left(whole)):
        return "; ".join(wrong[:3]), "silently wrong"
    return PASSED


def _stage(outcome: Outcome, function: str | None = None) -> str:
    if function is not None:
        return f"calling {function.partition(':')[2]}"
    for stage, functions in STAGES:
        if set(functions) & set(outcome.stack):
            return stage
    return "between stages"
