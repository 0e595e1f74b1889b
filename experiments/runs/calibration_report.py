# SPDX-License-Identifier: Apache-2.0
"""What a calibration leaves on disk beside the checkpoint: its results and its card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.publishing.card import SET_R, TOKEN_MERGING, Card, Measured, WhatMerges, metric_name
from experiments.publishing.tables import markdown_table, with_error
from experiments.tasks.base import Source, Task
from experiments.training.output_folder import write_json

RESULTS_FILE = "calibration_results.json"
DROP_GROUPS = "model.config.merge_groups = None  # merge nothing; then model.r = 8 matches as it runs"
# What of the arguments a card says.
SHOWN = ("model_name_or_path", "num_groups", "flops_ratio", "merge_layer", "similarity", "seed")
WHAT = """whose latents are merged ({merging}) in fixed groups, made from {base_model} without training. {kind}"""
GROUPED = """Which latents merge was decided once, from {samples:,} training samples of {source} without their labels, \
and stands in `config.merge_groups`: nothing is matched as the model runs."""
FEWER = """Its learned latents are means of groups of that model's, found in {samples:,} training samples of {source} \
without their labels. It merges nothing as it runs. How many latents each one stands for is lost, so train it on."""


@dataclass(kw_only=True)
class CalibrationResults:
    """What `calibration_results.json` holds.

    Attributes:
        arguments: that decide the groups.
        environment: that they were found in.
        source: of the data.
        calibrated_on: number of training samples.
        evaluated_on: number of examples behind `unmerged` and `calibrated`; 0 without them.
        input_shape: of one input; `gflops` are for it.
        latents_left: after each of the L layers.
        gflops: of a forward pass with the groups.
        flops_ratio: of what the unmerged model takes.
        unmerged, calibrated: figures, each with its standard error under NAME_stderr; `calibrated` also has their
            changes, example by example, under NAME_change.
        seconds: what went by, by what it was spent on.
    """

    arguments: dict[str, Any]
    environment: dict[str, Any]
    source: Source
    calibrated_on: int
    evaluated_on: int
    input_shape: tuple[int, ...]
    latents_left: list[int]
    gflops: float
    flops_ratio: float
    unmerged: dict[str, float] = field(default_factory=dict)
    calibrated: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def save(self, output_dir: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(output_dir / RESULTS_FILE, asdict(self))

    def summary(self) -> str:
        """What came out: the cost, and the figures if there are any."""
        cost = (
            f"Latents left after each layer: {','.join(map(str, self.latents_left))}. GFLOPs for an input of shape "
            f"{self.input_shape[1:]}: {self.gflops:.4g}, {self.flops_ratio:.1%} of those without merging."
        )
        return f"{cost}\n\n{self.figures_table()}".strip()

    def figures_table(self) -> str:
        """A table of every metric, unmerged and with groups, and what it is of; nothing if nothing was evaluated."""

        def shown(stage: dict[str, float], metric: str, form: str = ".4f") -> str:
            return with_error(stage[metric], stage[f"{metric}_stderr"], form)

        if not self.unmerged:
            return ""
        rows = [
            (
                metric_name(metric),
                shown(self.unmerged, metric),
                shown(self.calibrated, metric),
                shown(self.calibrated, f"{metric}_change", "+.4f"),
            )
            for metric in self.unmerged
            if f"{metric}_stderr" in self.unmerged
        ]
        table = markdown_table(["", "unmerged", "with groups", "change, paired by example"], rows)
        return f"{table}\n\nOn {self.evaluated_on:,} examples of the split '{self.source.split}', with standard errors."

    def write_card(
        self, output_dir: Path, config: ToMePerceiverConfig, unmerged: ToMePerceiverConfig, task: Task, base_model: str
    ) -> None:
        """Write the card of the calibrated checkpoint, and its picture.

        Args:
            output_dir: with the checkpoint.
            config: of the checkpoint, with its groups or, if they merged at the start, with fewer latents.
            unmerged: of the model without them.
            task: that it is for.
            base_model: what was calibrated.
        """
        at_start = config.num_latents < unmerged.num_latents
        name, kind = ("fewer latents", FEWER) if at_start else ("fixed groups", GROUPED)
        kind = kind.format(samples=self.calibrated_on, source=self.source.name)
        stages = {"unmerged": self.unmerged, name: self.calibrated}
        card = Card(
            model_id=str(output_dir),
            source=task.source,
            hub_task=task.hub_task,
            base_model=base_model,
            what=WHAT.format(merging=TOKEN_MERGING, base_model=Path(base_model).name, kind=kind),
            merging=WhatMerges(config, self.input_shape, start=unmerged),
            other_merging=SET_R if at_start else DROP_GROUPS,
            measured=[Measured(stage, 0, metrics) for stage, metrics in stages.items()],
            report=self.figures_table(),
            steps={"Calibration": {name: self.arguments.get(name) for name in SHOWN}},
            trained_on=self.calibrated_on,
            environment=self.environment,
        )
        card.write(output_dir)
