# SPDX-License-Identifier: Apache-2.0
"""Runs that get SIGKILL, at random times and inside what they write, and must end as if nothing had happened."""

from __future__ import annotations

import random
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.bad_input_case import OUTPUT
from tests.reliability.forked import Kill, Outcome, run_forked
from tests.reliability.inputs import LAST, Command, Inputs
from tests.reliability.left import broken, differences, left
from tests.reliability.verdicts import Verdict

# A run is killed at most so often before it may end.
MOST_KILLS = 3
RETRAINED: Command = ("--r", 2, "--retrain_epochs", 1)
SEARCHED: Command = ("--flops_ratio", 0.985, "--schedule", "search", "--calibration_samples", 4)
SWEPT: Command = ("--per_device_train_batch_size", 6, "--learning_rate", 3e-3, "--save_strategy", "steps",
                  "--save_steps", 3, "--retrain_epochs", 1)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A command with several stages.

    Attributes:
        name: what is special in it.
        script: that is called.
        base: attribute of `Inputs` that is the start of its arguments.
        added: the rest of them, but for `--output_dir`.
        resume: what is added when it is called again.
    """

    name: str
    script: str
    base: str
    added: Command = ()
    resume: Command = ()

    @property
    def id(self) -> str:
        return f"{self.script.removesuffix('.py')}: {self.name}"

    def command(self, inputs: Inputs) -> Command:
        return (*getattr(inputs, self.base), *self.added)


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
        "a searched schedule, retrained", "run_glue.py", "text_training", (*SEARCHED, "--retrain_epochs", 1), LAST,
    ),
    Scenario(
        "a share of changed answers", "run_glue.py", "text_training",
        ("--max_changed", 1), LAST,
    ),
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
# Functions of libraries that write, or stand between stages; each is where a kill may do harm. With "half" the file
# that it writes is cut, as by a crash of the machine.
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
# Functions that stages are known by, innermost first.
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
    """A run that is killed.

    Attributes:
        scenario: what runs.
        seed: of the moment, and of whether it is killed again.
        function, half: as of `Kill`, in place of a random moment.
    """

    scenario: Scenario
    seed: int
    function: str | None = None
    half: bool = False

    @property
    def row(self) -> str:
        return self.scenario.id

    @property
    def id(self) -> str:
        where = f"at {self.function}{', half written' if self.half else ''}" if self.function else "at a random time"
        return f"{self.scenario.id}: {where}, seed {self.seed}"


def kill_cases(at_random: int) -> Iterator[KillCase]:
    """Every scenario killed `at_random` times at random moments, and each function in some scenarios."""
    for scenario in SCENARIOS:
        for seed in range(at_random):
            yield KillCase(scenario, seed)
    for number, (function, half) in enumerate(WRITING):
        for offset in (0, 1, 2, 3):
            # 4 and 13 have no common divisor: every function meets scenarios of every script.
            scenario = SCENARIOS[(number + 4 * offset) % len(SCENARIOS)]
            yield KillCase(scenario, offset, function, half)


@dataclass(frozen=True)
class Whole:
    """What a run leaves that was never killed, and how long it takes."""

    left: dict[str, Any]
    seconds: float


def run_whole(scenario: Scenario, inputs: Inputs, folder: Path) -> Whole:
    """Run a scenario to its end.

    Raises:
        RuntimeError: if it fails, or leaves what is broken.
    """
    folder.mkdir(parents=True)
    outcome = run_forked(scenario.script, (*scenario.command(inputs), "--output_dir", OUTPUT), folder)
    wrong = broken(folder / OUTPUT)
    if outcome.exit_code or wrong:
        raise RuntimeError(f"{scenario.id} does not work: {outcome.exit_code} {wrong} {outcome.stderr[-1500:]}")
    return Whole(left(folder / OUTPUT), outcome.seconds)


def try_kill(case: KillCase, inputs: Inputs, folder: Path, whole: Whole) -> Verdict:
    """Kill a run, and call it again until it ends."""
    chance = random.Random(f"{case.id}")
    scenario = case.scenario
    command = (*scenario.command(inputs), "--output_dir", OUTPUT)
    outcomes = _first_kill(case, chance, command, whole.seconds, folder)
    stages = [_stage(case, outcome) for outcome in outcomes if outcome.killed]
    started_over = False
    while not outcomes or outcomes[-1].killed:
        again = len(stages) < MOST_KILLS and chance.random() < 0.4
        kill = Kill(seconds=chance.uniform(0.05, 0.9) * whole.seconds) if again else None
        # Once in a while without --resume_from_checkpoint: it starts over, and a later resume goes on with that.
        resume = scenario.resume if started_over or chance.random() < 0.75 else ()
        started_over = True
        outcome = run_forked(scenario.script, (*command, *resume), folder, kill)
        if outcome.exit_code == 2 and not resume and len(outcome.errors) == 1 and scenario.resume:
            outcome = run_forked(scenario.script, (*command, *scenario.resume), folder)
        if outcome.killed:
            stages.append(_stage(KillCase(scenario, case.seed), outcome))
        outcomes.append(outcome)
    wrong, fault = _judged(outcomes, folder / OUTPUT, whole)
    shown = f"python {scenario.script} {shlex.join(map(str, command))}"
    detail = f"killed while {', '.join(stages) or 'never'}; {outcomes[-1].stderr[-1500:] if wrong else ''}"
    return Verdict("kills", case.row, case.id, wrong, fault, shown, detail, tuple(stages))


def _first_kill(case: KillCase, chance: random.Random, command: Command, seconds: float, folder: Path) -> list[Outcome]:
    """Run until it is killed; what has ended before that begins anew, to be killed earlier."""
    fraction, call = chance.uniform(0.03, 0.97), chance.choice((1, 2, 3, 5, 8, 13))
    while True:
        folder.mkdir(parents=True)
        if case.function is None:
            kill = Kill(seconds=fraction * seconds)
        else:
            kill = Kill(function=case.function, call=call, half=case.half)
        outcome = run_forked(case.scenario.script, command, folder, kill)
        if outcome.killed or (case.function is not None and call == 1) or outcome.exit_code:
            return [outcome]
        fraction, call = fraction * 0.7, call // 2
        shutil.rmtree(folder)


def _judged(outcomes: list[Outcome], output_dir: Path, whole: Whole) -> tuple[str, str]:
    last = outcomes[-1]
    hung = next((outcome for outcome in outcomes if outcome.hung), None)
    if hung is not None:
        return f"hangs in {' '.join(hung.stack[-3:])}", "hang"
    if any(outcome.has_traceback for outcome in outcomes):
        return "a traceback", "traceback"
    if last.exit_code:
        return f"exit code {last.exit_code}: {' / '.join(last.errors)}", "other"
    if wrong := broken(output_dir):
        return "not whole: " + "; ".join(wrong[:3]), "wrong in silence"
    if wrong := differences(left(output_dir), whole.left):
        return "; ".join(wrong[:3]), "wrong in silence"
    return "", ""


def _stage(case: KillCase, outcome: Outcome) -> str:
    if case.function is not None:
        return f"calling {case.function.partition(':')[2]}"
    for stage, functions in STAGES:
        if set(functions) & set(outcome.stack):
            return stage
    return "between stages"
