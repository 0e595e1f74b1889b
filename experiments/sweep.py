# SPDX-License-Identifier: Apache-2.0
"""A sweep over r: what each cell is, how it is measured, and the file that holds what was measured."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput
from experiments.cost import forward_cost
from experiments.measurement import peak_memory_mb, time_interleaved
from experiments.model_arguments import apply_merging, parse_r, spelled_r
from experiments.model_card import scores
from experiments.output_folder import check_no_other_experiment, check_same_experiment, write_json
from experiments.schedule import DEFAULT_SCHEDULE, SCHEDULES, schedule_for_flops
from experiments.schedule import UNMERGED as UNMERGED_FIELDS
from experiments.task import Batch, PreparedTask, Source
from experiments.training import Evaluation, changes, evaluate
from experiments.whole_file import write_whole

PREDICTIONS = "predictions"
RESULTS_FILE = "sweep_results.json"
# Timing may be left out at first, or be repeated with more rounds.
NOT_COMPARED = ("timing_rounds",)

Row = dict[str, Any]


@dataclass(frozen=True)
class Merge:
    """What one row of a sweep merges.

    Attributes:
        name: of the row.
        series: rows of the same one are joined by a line.
        fields: of the config, all that decide what merges.
    """

    name: str
    series: str
    fields: dict[str, Any]

    @property
    def branch(self) -> str:
        """Of the Hub repository, and folder below `retrained/`."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name.replace("=", ""))

    def apply(self, config: ToMePerceiverConfig) -> None:
        """Set it on a config, whatever that merged before.

        Raises:
            BadInput: for what the config cannot mean.
        """
        apply_merging(config, UNMERGED_FIELDS | self.fields)


UNMERGED = Merge("r=0", "r", {"r": 0})


@dataclass
class SweepArguments:
    """Which merges to try, and how to time them."""

    _argument_group_name: ClassVar[str] = "sweep"

    r: list[str] = field(
        default_factory=list,
        metadata={"help": "Each an integer, or a comma-separated list, one a layer. Without any budget: 0."},
    )
    flops_ratio: list[float] = field(
        default_factory=list,
        metadata={"help": "Each a share of the unmerged model's FLOPs, for a row with every --schedule."},
    )
    schedule: list[str] = field(
        default_factory=lambda: [DEFAULT_SCHEDULE],
        metadata={"help": f"How a share of the FLOPs is spread over the layers: {', '.join(sorted(SCHEDULES))}."},
    )
    merge_method: list[str] = field(
        default_factory=list,
        metadata={"help": "What merges with what. Several: every row with each, such as with the controls."},
    )
    r_inflection: float | None = field(default=None, metadata={"help": "Shape of the schedule of an integer r."})
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    timing_rounds: int = field(default=15, metadata={"help": "Rounds in which every row is timed once. 0: no timing."})
    timing_batch_size: int = field(
        default=32, metadata={"help": "Inputs in a timed batch: the first ones that are evaluated."}
    )

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1)):
            if getattr(self, name) < smallest:
                raise BadInput(f"--{name} {getattr(self, name)}: allowed is an integer of {smallest} or more")
        self.r = [spelled_r(r) for r in self.r] or ([] if self.flops_ratio else ["0"])
        for name in ("r", "flops_ratio", "schedule", "merge_method"):
            values = getattr(self, name)
            if repeated := {value for value in values if values.count(value) > 1}:
                raise BadInput(f"--{name} {min(repeated)}: stands there twice; allowed is each once")

    def merges(self, config: ToMePerceiverConfig, input_shape: tuple[int, ...], architecture: str) -> list[Merge]:
        """What each row merges: every r, then every budget with every schedule; all that with every method.

        Args:
            config: of the model.
            input_shape: of one input, (1, S) or (1, 3, height, width); a share of the FLOPs is for it.
            architecture: name of the model class.

        Raises:
            BadInput: for what the config cannot mean.
        """
        given = {"r_inflection": self.r_inflection, "min_latents": self.min_latents}
        common = {name: value for name, value in given.items() if value is not None}
        rows = [(f"r={r}", "r", {"r": parse_r(r), **common}) for r in self.r]
        for name in self.schedule if self.flops_ratio else []:
            for ratio in self.flops_ratio:
                r = schedule_for_flops(config, ratio, name, input_shape, architecture)
                rows.append((f"flops={ratio:g} {name}", name, {"r": r}))
        if len(self.merge_method) < 2:
            method = {"merge_method": self.merge_method[0]} if self.merge_method else {}
            return [Merge(name, series, {**fields, **method}) for name, series, fields in rows]
        return [
            Merge(f"{name} {method}", f"{series} {method}", {**fields, "merge_method": method})
            for method in self.merge_method
            for name, series, fields in rows
        ]


def plan_rows(model: PreTrainedModel, merges: list[Merge], input_shape: tuple[int, ...]) -> list[Row]:
    """A row for each merge, with what is known before anything runs.

    Args:
        model: its config and class say the cost.
        merges: what the rows merge.
        input_shape: of one input, (1, S) or (1, 3, height, width).

    Raises:
        BadInput: for a merge that the config cannot mean.
    """

    def row(merge: Merge) -> Row:
        merge.apply(model.config)
        cost = forward_cost(model.config, input_shape, type(model).__name__)
        return {
            "name": merge.name,
            "series": merge.series,
            "r": model.config.merge_schedule,
            "merge_method": model.config.merge_method,
            "gflops": cost.total_with_matching / 1e9,
            "self_attention_gflops": (sum(cost.self_attention) + sum(cost.matching)) / 1e9,
            "latents_left": model.config.latents_per_layer[-1],
        }

    unmerged = row(UNMERGED)
    return [
        planned
        | {
            "flops_ratio": planned["gflops"] / unmerged["gflops"],
            "self_attention_flops_ratio": planned["self_attention_gflops"] / unmerged["self_attention_gflops"],
        }
        for planned in map(row, merges)
    ]


@dataclass
class SweepResults:
    """What `sweep_results.json` holds; written whole after every cell.

    Attributes:
        arguments: that decide a cell's value.
        environment: that it was measured in.
        source: of the data.
        evaluated_on: number of examples.
        input_shape: of one input of the timed batch; `gflops` are for it.
        metric: that tables and pictures show; `merged` and `retrained` hold all of the task's.
        rows: one for each r.
        seconds: what went by, by what it was spent on; of every run that filled cells.
    """

    arguments: dict[str, Any]
    environment: dict[str, Any]
    source: Source
    evaluated_on: int
    input_shape: tuple[int, ...]
    metric: str
    rows: list[Row]
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, output_dir: Path) -> None:
        """Write the file, whole or not at all."""
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RESULTS_FILE, asdict(self))

    def take_over(self, output_dir: Path) -> bool:
        """Take over the cells that an earlier run of the same sweep left in `output_dir`.

        Returns:
            Whether there was one.

        Raises:
            BadInput: if what is there is another experiment.
        """
        check_no_other_experiment(output_dir, RESULTS_FILE)
        path = output_dir / RESULTS_FILE
        if not path.exists():
            return False
        earlier = json.loads(path.read_text())
        compared = {name: value for name, value in self.arguments.items() if name not in NOT_COMPARED}
        check_same_experiment(output_dir, earlier["arguments"], compared)
        self.environment, self.rows, self.seconds = earlier["environment"], earlier["rows"], earlier["seconds"]
        return True

    def spend(self, what: str, since: float) -> None:
        """Add the seconds since a `time.perf_counter()`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class Cells:
    """How cells are filled.

    Attributes:
        results: whose rows are filled.
        merges: of the rows.
        task: to evaluate on.
        output_dir: where the results go.
        writes: whether this process is the one that writes.
    """

    results: SweepResults
    merges: list[Merge]
    task: PreparedTask
    output_dir: Path
    writes: bool

    def fill(
        self,
        stage: str,
        trainer_for: Callable[[Merge], Trainer],
        done: Callable[[Merge, Row, Trainer], None] | None = None,
    ) -> None:
        """Evaluate every row that lacks a stage, and save after each.

        Args:
            stage: `"merged"` or `"retrained"`.
            trainer_for: the Trainer to evaluate for a merge, trained if the stage says so.
            done: called, in the process that writes, with each merge, its row and its trainer.
        """
        missing = [(row, merge) for row, merge in zip(self.results.rows, self.merges, strict=True) if stage not in row]
        # What all are compared with comes first.
        missing.sort(key=lambda cell: not _is_unmerged(cell[0]))
        for row, merge in (bar := tqdm(missing, desc=stage, unit="cell", disable=not self.writes)):
            bar.set_description(f"{stage} {merge.name}")
            trainer = trainer_for(merge)
            start = time.perf_counter()
            evaluation = evaluate(trainer, self.task, stage)
            row[stage] = scores(evaluation.metrics, stage) | self._change(evaluation, stage, merge, row)
            self.results.spend(f"evaluating {stage}", start)
            if self.writes:
                self.results.save(self.output_dir)
                if done is not None:
                    done(merge, row, trainer)

    def measure(self, model: PreTrainedModel, arguments: SweepArguments, batch: Batch) -> None:
        """Time a forward pass for every row, interleaved, all together since they are compared, and its memory."""
        rows = self.results.rows
        if not self.writes or arguments.timing_rounds == 0 or all("speedup" in row for row in rows):
            return
        start = time.perf_counter()
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        size = len(next(iter(inputs.values())))
        model.eval()

        def forward(merge: Merge) -> None:
            merge.apply(model.config)
            with torch.inference_mode():
                model(**inputs)

        timings = time_interleaved(forward, self.merges, baseline=UNMERGED, rounds=arguments.timing_rounds)
        for row, merge, timing in zip(rows, self.merges, timings, strict=True):
            row["latency_ms"], row["speedup"] = asdict(timing.latency_ms), asdict(timing.speedup)
            row["throughput"] = 1e3 * size / timing.latency_ms.median
            row["peak_memory_mb"] = peak_memory_mb(lambda merge=merge: forward(merge), model)  # type: ignore[misc]
        self.results.spend("timing", start)
        self.results.save(self.output_dir)

    def _change(self, evaluation: Evaluation, stage: str, merge: Merge, row: Row) -> dict[str, float]:
        """What has changed from the unmerged checkpoint, example by example; predictions stay on disk for it."""
        folder = self.output_dir / PREDICTIONS
        compared = stage == "merged" and _is_unmerged(row)
        before: dict[str, np.ndarray] = {}
        for suffix, predicted in evaluation.predictions.items():
            unmerged = folder / f"unmerged{suffix}.npy"
            if self.writes:
                _save_array(folder / f"{stage}_{merge.branch}{suffix}.npy", predicted)
                if compared:
                    _save_array(unmerged, predicted)
            if not compared and unmerged.exists():
                before[suffix] = np.load(unmerged)
        return changes(self.task.kind, evaluation, before)


def _is_unmerged(row: Row) -> bool:
    return sum(row["r"]) == 0


def _save_array(path: Path, array: np.ndarray) -> None:
    def save(partial: Path) -> None:
        # By a name that does not end in .npy, numpy would write to another.
        with partial.open("wb") as file:
            np.save(file, array)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save)
