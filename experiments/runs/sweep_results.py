# SPDX-License-Identifier: Apache-2.0
"""What a sweep has measured: a row for each thing that merges, and the file that holds them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cost_tome_perceiver import Merging, forward_cost
from experiments.errors import BadInput
from experiments.merging.arguments import WAYS
from experiments.runs.sweep_arguments import Variant
from experiments.tasks.base import Source
from experiments.training.identity import CONTENT, Noted
from experiments.training.output_folder import (
    SWEEP_FILE,
    check_no_other_experiment,
    check_same_experiment,
    read_json,
    write_json,
)
from frontier_tome_perceiver import GROUPS

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
        config = variant.merging.asked_of(model.config)
        cost = forward_cost(config, input_shape, type(model).__name__)
        # Groups in the layers, or of the learned latents with nothing matched after them.
        only_groups = config.merge_groups or (config.latent_groups and not any(config.merge_schedule))
        return {
            "name": variant.name,
            "series": variant.series,
            "fields": asdict(variant.merging),
            "r": config.merge_schedule,
            "num_blocks": config.num_blocks,
            **{name: getattr(config, name) for name in WAYS},
            **({"merge_method": GROUPS} if only_groups else {}),
            "gflops": cost.total_with_matching / 1e9,
            "self_attention_gflops": (sum(cost.self_attention) + sum(cost.matching)) / 1e9,
            "latents_left": config.latents_per_layer[-1],
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


@dataclass(kw_only=True)
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
        frontier: of the checkpoint, as its config holds it; `None` if it has none.
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
    frontier: dict[str, Any] | None = None

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
        self.timing, self.frontier = earlier.get("timing"), earlier.get("frontier")
        return True

    def spend(self, what: str, since: float) -> None:
        """Add the seconds since a `time.perf_counter()`."""
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since
