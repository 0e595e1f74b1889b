# SPDX-License-Identifier: Apache-2.0
"""A sweep over r: what each cell is, how it is measured, and the file that holds what was measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput
from experiments.cost import forward_cost
from experiments.measurement import peak_memory_mb, time_interleaved
from experiments.model_arguments import MergeArguments, apply_merging, spelled_r
from experiments.model_card import scores
from experiments.output_folder import check_no_other_experiment, check_same_experiment, write_json
from experiments.task import Batch, PreparedTask, Source
from experiments.training import evaluate

UNMERGED = "0"
RESULTS_FILE = "sweep_results.json"
# Timing may be left out at first, or be repeated with more rounds.
NOT_COMPARED = ("timing_rounds",)

Row = dict[str, Any]


@dataclass
class SweepArguments:
    """Which merges to try, and how to time them."""

    _argument_group_name: ClassVar[str] = "sweep"

    r: list[str] = field(
        default_factory=lambda: [UNMERGED],
        metadata={"help": "Each an integer, or a comma-separated list, one a layer."},
    )
    r_inflection: float | None = field(default=None, metadata={"help": "Shape of the schedule of an integer r."})
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    merge_method: str | None = field(default=None, metadata={"help": "What merges with what."})
    timing_rounds: int = field(default=15, metadata={"help": "Rounds in which every r is timed once. 0: no timing."})
    timing_batch_size: int = field(
        default=32, metadata={"help": "Inputs in a timed batch: the first ones that are evaluated."}
    )

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1)):
            if getattr(self, name) < smallest:
                raise BadInput(f"--{name} {getattr(self, name)}: allowed is an integer of {smallest} or more")
        self.r = [spelled_r(r) for r in self.r]
        if repeated := {r for r in self.r if self.r.count(r) > 1}:
            raise BadInput(f"--r {min(repeated)}: stands there twice; allowed is each r once")

    def merge(self, config: ToMePerceiverConfig, r: str) -> None:
        """Set the merging that one `r` of the command line means, whatever the checkpoint's own was.

        Raises:
            BadInput: for an r that the config cannot mean.
        """
        merging = MergeArguments(r, self.r_inflection, self.min_latents, self.merge_method).config_fields()
        apply_merging(config, {"merge_groups": None, "r_inflection": 0.0} | merging)


def plan_rows(model: PreTrainedModel, arguments: SweepArguments, input_shape: tuple[int, ...]) -> list[Row]:
    """A row for each r, with what is known before anything runs.

    Args:
        model: its config and class say the cost.
        arguments: the r to try.
        input_shape: of one input, (1, S) or (1, 3, height, width).

    Raises:
        BadInput: for an r that the config cannot mean.
    """

    def row(r: str) -> Row:
        arguments.merge(model.config, r)
        cost = forward_cost(model.config, input_shape, type(model).__name__)
        return {
            "name": f"r={r}",
            "r": model.config.merge_schedule,
            "gflops": cost.total_with_matching / 1e9,
            "latents_left": model.config.latents_per_layer[-1],
        }

    unmerged = row(UNMERGED)["gflops"]
    rows = [row(r) for r in arguments.r]
    return [planned | {"flops_ratio": planned["gflops"] / unmerged} for planned in rows]


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
        r: of the rows, as on the command line.
        task: to evaluate on.
        output_dir: where the results go.
        writes: whether this process is the one that writes.
    """

    results: SweepResults
    r: list[str]
    task: PreparedTask
    output_dir: Path
    writes: bool

    def fill(
        self, stage: str, trainer_for: Callable[[str], Trainer], done: Callable[[str, Row, Trainer], None] | None = None
    ) -> None:
        """Evaluate every row that lacks a stage, and save after each.

        Args:
            stage: `"merged"` or `"retrained"`.
            trainer_for: the Trainer to evaluate for an r, trained if the stage says so.
            done: called, in the process that writes, with each r, its row and its trainer.
        """
        missing = [(row, r) for row, r in zip(self.results.rows, self.r, strict=True) if stage not in row]
        for row, r in (bar := tqdm(missing, desc=stage, unit="cell", disable=not self.writes)):
            bar.set_description(f"{stage} {row['name']}")
            trainer = trainer_for(r)
            start = time.perf_counter()
            row[stage] = scores(evaluate(trainer, self.task, stage), stage)
            self.results.spend(f"evaluating {stage}", start)
            if self.writes:
                self.results.save(self.output_dir)
                if done is not None:
                    done(r, row, trainer)

    def measure(self, model: PreTrainedModel, arguments: SweepArguments, batch: Batch) -> None:
        """Time a forward pass for every r, interleaved, all rows together since they are compared, and its memory."""
        rows = self.results.rows
        if not self.writes or arguments.timing_rounds == 0 or all("speedup" in row for row in rows):
            return
        start = time.perf_counter()
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        size = len(next(iter(inputs.values())))
        model.eval()

        def forward(r: str) -> None:
            arguments.merge(model.config, r)
            with torch.inference_mode():
                model(**inputs)

        timings = time_interleaved(forward, self.r, baseline=UNMERGED, rounds=arguments.timing_rounds)
        for row, r, timing in zip(rows, self.r, timings, strict=True):
            row["latency_ms"], row["speedup"] = asdict(timing.latency_ms), asdict(timing.speedup)
            row["throughput"] = 1e3 * size / timing.latency_ms.median
            row["peak_memory_mb"] = peak_memory_mb(lambda r=r: forward(r), model)  # type: ignore[misc]
        self.results.spend("timing", start)
        self.results.save(self.output_dir)
