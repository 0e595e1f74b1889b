# SPDX-License-Identifier: Apache-2.0
"""A sweep over r: what each cell is, how it is measured, and the file that holds what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer

from budget_tome_perceiver import Merging
from cost_tome_perceiver import forward_cost
from experiments.errors import BadInput
from experiments.files import write_whole
from experiments.measurement import describe_environment, peak_memory_mb, time_interleaved
from experiments.merging.arguments import WAYS
from experiments.publishing.card import scores
from experiments.runs.sweep_arguments import SweepArguments, Variant
from experiments.tasks.base import Batch, PreparedTask, Source
from experiments.training.identity import CONTENT, Noted
from experiments.training.output_folder import (
    SWEEP_FILE,
    check_no_other_experiment,
    check_same_experiment,
    read_json,
    write_json,
)
from experiments.training.stage import Evaluation, changes, evaluate

PREDICTIONS = "predictions"
# Timing may be left out at first, or be repeated with more rounds.
NOT_COMPARED = ("timing_rounds",)

Row = dict[str, Any]


def plan_rows(
    model: PreTrainedModel, variants: list[Variant], baseline: Variant, input_shape: tuple[int, ...]
) -> list[Row]:
    """A row for each variant, with what is known before anything runs.

    Args:
        model: its config and class say the cost.
        variants: what the rows merge.
        baseline: merges nothing.
        input_shape: of one input, (1, S) or (1, 3, height, width).

    Raises:
        BadInput: for a variant that the config cannot mean.
    """

    def row(variant: Variant) -> Row:
        variant.merging.apply(model.config)
        cost = forward_cost(model.config, input_shape, type(model).__name__)
        return {
            "name": variant.name,
            "series": variant.series,
            "fields": asdict(variant.merging),
            "r": model.config.merge_schedule,
            "num_blocks": model.config.num_blocks,
            **{name: getattr(model.config, name) for name in WAYS},
            "gflops": cost.total_with_matching / 1e9,
            "self_attention_gflops": (sum(cost.self_attention) + sum(cost.matching)) / 1e9,
            "latents_left": model.config.latents_per_layer[-1],
        }

    unmerged = row(baseline)
    return [
        planned
        | {
            "flops_ratio": planned["gflops"] / unmerged["gflops"],
            "self_attention_flops_ratio": planned["self_attention_gflops"] / unmerged["self_attention_gflops"],
        }
        for planned in map(row, variants)
    ]


@dataclass
class SweepResults:
    """What `sweep_results.json` holds; written whole after every cell.

    Attributes:
        arguments: that decide a cell's value.
        content: fingerprints of the weights and the data, which decide it too.
        environment: that the sweep was begun in.
        source: of the data.
        evaluated_on: number of examples.
        input_shape: of one input of the timed batch; `gflops` are for it.
        metric: that tables and pictures show; `merged` and `retrained` hold all of the task's.
        rows: one for each r.
        seconds: what went by, by what it was spent on; of every run that filled cells.
        timing: how the rows were timed, and where if that is another environment; `None` if they were not.
    """

    arguments: dict[str, Any]
    content: dict[str, str]
    environment: dict[str, Any]
    source: Source
    evaluated_on: int
    input_shape: tuple[int, ...]
    metric: str
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    timing: dict[str, Any] | None = None

    @property
    def noted(self) -> Noted:
        """What decides every cell."""
        return self.arguments | {CONTENT: self.content}

    @property
    def variants(self) -> list[Variant]:
        """What the rows merge, as it was resolved when the sweep began."""
        return [Variant(row["name"], row["series"], Merging(**row["fields"])) for row in self.rows]

    def save(self, output_dir: Path) -> None:
        """Write the file, whole or not at all."""
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / SWEEP_FILE, asdict(self))

    def take_over(self, output_dir: Path) -> bool:
        """Take over the cells that an earlier run of the same sweep left in `output_dir`.

        Returns:
            Whether there was one.

        Raises:
            BadInput: if what is there is another experiment.
        """
        check_no_other_experiment(output_dir, SWEEP_FILE)
        path = output_dir / SWEEP_FILE
        if not path.exists():
            return False
        earlier = read_json(path)
        # As the file of an older version, which did not say of which weights and data it was.
        if not isinstance(earlier, dict) or not {"arguments", "content", "environment", "rows", "seconds"} <= set(
            earlier
        ):
            raise BadInput(
                f"--output_dir {output_dir}: its {SWEEP_FILE} does not say what was measured; allowed is the file as a "
                "sweep wrote it, or another folder"
            )
        noted = earlier["arguments"] | {CONTENT: earlier["content"]}
        check_same_experiment(output_dir, noted, self.noted, NOT_COMPARED)
        self.environment, self.rows, self.seconds = earlier["environment"], earlier["rows"], earlier["seconds"]
        self.timing = earlier.get("timing")
        return True

    def spend(self, what: str, since: float) -> None:
        """Add the seconds since a `time.perf_counter()`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class Cells:
    """How cells are filled.

    Attributes:
        results: whose rows are filled.
        variants: of the rows.
        baseline: merges nothing; what the others are compared with.
        task: to evaluate on.
        output_dir: where the results go.
        writes: whether this process is the one that writes.
    """

    results: SweepResults
    variants: list[Variant]
    baseline: Variant
    task: PreparedTask
    output_dir: Path
    writes: bool

    def fill(
        self,
        stage: str,
        trainer_for: Callable[[Variant], Trainer],
        done: Callable[[Variant, Row, Trainer], None] | None = None,
    ) -> None:
        """Evaluate every row that lacks a stage, and save after each.

        Args:
            stage: `"merged"` or `"retrained"`.
            trainer_for: the Trainer to evaluate for a variant, trained if the stage says so.
            done: called, in the process that writes, with each variant, its row and its trainer.
        """
        missing = [
            (row, variant) for row, variant in zip(self.results.rows, self.variants, strict=True) if stage not in row
        ]
        # What all are compared with comes first.
        missing.sort(key=lambda cell: not self._is_unmerged(cell[0]))
        for row, variant in (bar := tqdm(missing, desc=stage, unit="cell", disable=not self.writes)):
            bar.set_description(f"{stage} {variant.name}")
            trainer = trainer_for(variant)
            start = time.perf_counter()
            evaluation = evaluate(trainer, self.task, stage)
            row[stage] = scores(evaluation.metrics, stage) | self._change(evaluation, stage, variant, row)
            self.results.spend(f"evaluating {stage}", start)
            if self.writes:
                # A cell that is saved is not filled again, so what is done for it comes before.
                if done is not None:
                    done(variant, row, trainer)
                self.results.save(self.output_dir)

    def measure(self, model: PreTrainedModel, arguments: SweepArguments, batch: Batch) -> None:
        """Time a forward pass for every row, interleaved, all together since they are compared, and its memory."""
        rows = self.results.rows
        timed = self.results.timing is not None and self.results.timing["rounds"] == arguments.timing_rounds
        if not self.writes or arguments.timing_rounds == 0 or timed:
            return
        start = time.perf_counter()
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        size = len(next(iter(inputs.values())))
        model.eval()

        def forward(variant: Variant) -> None:
            variant.merging.apply(model.config)
            with torch.inference_mode():
                model(**inputs)

        timings = time_interleaved(forward, self.variants, baseline=self.baseline, rounds=arguments.timing_rounds)
        self.results.timing = {"rounds": arguments.timing_rounds, "batch_size": size}
        if (here := describe_environment()) != self.results.environment:
            self.results.timing["environment"] = here
        for row, variant, timing in zip(rows, self.variants, timings, strict=True):
            row["latency_ms"], row["speedup"] = asdict(timing.latency_ms), asdict(timing.speedup)
            row["throughput"] = 1e3 * size / timing.latency_ms.median
            row["peak_memory_mb"] = peak_memory_mb(lambda variant=variant: forward(variant), model)  # type: ignore[misc]
        self.results.spend("timing", start)
        self.results.save(self.output_dir)

    def _change(self, evaluation: Evaluation, stage: str, variant: Variant, row: Row) -> dict[str, float]:
        """What has changed from the unmerged checkpoint, example by example; predictions stay on disk for it."""
        folder = self.output_dir / PREDICTIONS
        compared = stage == "merged" and self._is_unmerged(row)
        before: dict[str, np.ndarray] = {}
        for suffix, predicted in evaluation.predictions.items():
            unmerged = folder / f"unmerged{suffix}.npy"
            if self.writes:
                _save_array(folder / f"{stage}_{variant.branch}{suffix}.npy", predicted)
                if compared:
                    _save_array(unmerged, predicted)
            if not compared and unmerged.exists():
                before[suffix] = np.load(unmerged)
        return changes(self.task.kind, evaluation, before)

    def _is_unmerged(self, row: Row) -> bool:
        return not sum(row["r"]) and row["num_blocks"] == self.baseline.merging.num_blocks


def _save_array(path: Path, array: np.ndarray) -> None:
    def save(partial: Path) -> None:
        # By a name that does not end in .npy, numpy would write to another.
        with partial.open("wb") as file:
            np.save(file, array)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save)
