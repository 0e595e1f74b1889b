# SPDX-License-Identifier: Apache-2.0
"""A sweep over r: what each cell is, how it is measured, and the file that holds what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput
from experiments.cost import forward_cost
from experiments.measurement import time_interleaved
from experiments.model_arguments import MergeArguments, apply_merging
from experiments.whole_file import write_whole

UNMERGED = "0"
RESULTS_FILE = "sweep_results.json"

Row = dict[str, Any]


@dataclass
class SweepArguments:
    """Which merges to try, and how to time them."""

    r: list[str] = field(
        default_factory=lambda: [UNMERGED],
        metadata={"help": "Each an integer, or a comma-separated list, one a layer."},
    )
    r_inflection: float | None = field(default=None, metadata={"help": "Shape of the schedule of an integer r."})
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    merge_method: str | None = field(default=None, metadata={"help": "What merges with what."})
    timing_rounds: int = field(default=15, metadata={"help": "Rounds in which every r is timed once. 0: no timing."})
    timing_batch_size: int = field(default=32, metadata={"help": "Inputs in a timed batch."})

    def __post_init__(self) -> None:
        for name, smallest in (("timing_rounds", 0), ("timing_batch_size", 1)):
            if getattr(self, name) < smallest:
                raise BadInput(f"--{name} {getattr(self, name)}: allowed is an integer of {smallest} or more")

    def merge(self, config: ToMePerceiverConfig, r: str) -> None:
        """Set the merging that one `r` of the command line means, whatever the checkpoint's own was.

        Raises:
            BadInput: for an r that the config cannot mean.
        """
        merging = MergeArguments(r, self.r_inflection, self.min_latents, self.merge_method).config_fields()
        apply_merging(config, {"merge_groups": None, "r_inflection": 0.0} | merging)


def plan_rows(model: PreTrainedModel, arguments: SweepArguments, image_shape: tuple[int, ...]) -> list[Row]:
    """A row for each r, with what is known before anything runs.

    Args:
        model: its config and class say the cost.
        arguments: the r to try.
        image_shape: (3, height, width) of what the model sees.

    Raises:
        BadInput: for an r that the config cannot mean.
    """

    def row(r: str) -> Row:
        arguments.merge(model.config, r)
        cost = forward_cost(model.config, (1, *image_shape), type(model).__name__)
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
        dataset, evaluated_on, metric: name, number of examples, and the metric that stands in `merged`, `retrained`.
        rows: one for each r.
    """

    arguments: dict[str, Any]
    environment: dict[str, Any]
    dataset: str
    evaluated_on: int
    metric: str
    rows: list[Row]

    def save(self, output_dir: Path) -> None:
        """Write the file, whole or not at all."""
        output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(output_dir / RESULTS_FILE, lambda partial: partial.write_text(text))

    def take_over(self, output_dir: Path) -> None:
        """Take over the cells that an earlier run of the same sweep left in `output_dir`.

        Raises:
            BadInput: if what is there is another sweep.
        """
        path = output_dir / RESULTS_FILE
        if not path.exists():
            return
        earlier = json.loads(path.read_text())
        # Through JSON, as the earlier ones went.
        for name, value in json.loads(json.dumps(self.arguments)).items():
            if earlier["arguments"].get(name) != value:
                raise BadInput(
                    f"--output_dir {output_dir}: holds another sweep, whose {name} is "
                    f"{earlier['arguments'].get(name)} and not {value}; allowed is the same command, to continue it, "
                    "or another folder"
                )
        self.environment, self.rows = earlier["environment"], earlier["rows"]


def fill_cells(
    results: SweepResults, stage: str, trainer_for: Callable[[str], Trainer], r: list[str], output_dir: Path
) -> None:
    """Evaluate every row that lacks `stage`, and save after each.

    Args:
        results: its rows are filled.
        stage: `"merged"` or `"retrained"`.
        trainer_for: the Trainer to evaluate for an r, trained if the stage says so.
        r: of the rows, as on the command line.
        output_dir: where the results go.
    """
    for row, row_r in tqdm(list(zip(results.rows, r, strict=True)), desc=stage):
        if stage not in row:
            metrics = trainer_for(row_r).evaluate(metric_key_prefix=stage)
            names = (results.metric, f"{results.metric}_stderr")
            row[stage] = {name: metrics[f"{stage}_{name}"] for name in names}
            results.save(output_dir)


def time_rows(
    results: SweepResults, model: PreTrainedModel, arguments: SweepArguments, image_shape: tuple[int, ...]
) -> None:
    """Time a forward pass on random images for every r, interleaved; all rows together, since they are compared."""
    if arguments.timing_rounds == 0 or all("speedup" in row for row in results.rows):
        return
    batch = torch.randn(arguments.timing_batch_size, *image_shape, device=model.device)
    model.eval()

    def forward(r: str) -> None:
        arguments.merge(model.config, r)
        with torch.inference_mode():
            model(pixel_values=batch)

    timings = time_interleaved(forward, arguments.r, baseline=UNMERGED, rounds=arguments.timing_rounds)
    for row, timing in zip(results.rows, timings, strict=True):
        row["latency_ms"], row["speedup"] = asdict(timing.latency_ms), asdict(timing.speedup)
        row["throughput"] = 1e3 * len(batch) / timing.latency_ms.median
