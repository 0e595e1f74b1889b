# SPDX-License-Identifier: Apache-2.0
"""What a calibration leaves on disk beside the checkpoint: its results and its card."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.measurement import environment_line
from experiments.merging.cost import forward_cost
from experiments.publishing.card import (
    SCHEDULE_FILE,
    Measured,
    card_data,
    figures,
    metric_name,
    usage_section,
    write_card,
)
from experiments.publishing.schedule_picture import draw_schedule
from experiments.tasks.base import Source, Task
from experiments.training.output_folder import write_json

RESULTS_FILE = "calibration_results.json"
DROP_GROUPS = "model.config.merge_groups = None  # merge nothing; then model.r = 8 matches as it runs"
GROUPED = """Which latents merge was decided once, from {samples:,} training samples of {source} without their labels,
and stands in `config.merge_groups`: nothing is matched as the model runs."""
FEWER = """Its learned latents are means of groups of that model's, found in {samples:,} training samples of {source}
without their labels. It merges nothing as it runs. How many latents each one stands for is lost, so train it on."""


@dataclass
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
        """What came out, a line for each thing."""
        lines = [
            f"latents left after each layer: {','.join(map(str, self.latents_left))}",
            f"GFLOPs for an input of shape {self.input_shape[1:]}: {self.gflops:.4g}, {self.flops_ratio:.1%} of those "
            "without merging",
        ]
        if self.unmerged:
            lines.append(f"Evaluated on {self.evaluated_on:,} examples of the split '{self.source.split}'")
        for metric, unmerged in self.unmerged.items():
            if f"{metric}_stderr" in self.unmerged:
                lines.append(
                    f"{metric_name(metric)}: unmerged {unmerged:.4f} ± "
                    f"{self.unmerged[f'{metric}_stderr']:.4f}, with groups {self.calibrated[metric]:.4f} ± "
                    f"{self.calibrated[f'{metric}_stderr']:.4f}; change, paired by example, "
                    f"{self.calibrated[f'{metric}_change']:+.4f} ± {self.calibrated[f'{metric}_change_stderr']:.4f}"
                )
        return "\n".join(f"- {line}" for line in lines)


def write_calibrated_card(
    output_dir: Path,
    config: ToMePerceiverConfig,
    unmerged: ToMePerceiverConfig,
    results: CalibrationResults,
    task: Task,
    base_model: str,
) -> None:
    """Write the card of a calibrated checkpoint and its picture, `schedule.png`.

    Args:
        output_dir: with the checkpoint.
        config: of the checkpoint, with its groups or, if they merged at the start, with fewer latents.
        unmerged: of the model without them.
        results: what is known of it.
        task: that it is for.
        base_model: what was calibrated.
    """
    cost, unmerged_cost = (
        forward_cost(each, results.input_shape, config.architectures[0]) for each in (config, unmerged)
    )
    draw_schedule(config, cost, unmerged_cost, output_dir / SCHEDULE_FILE)
    name = output_dir.resolve().name
    shown = ("model_name_or_path", "num_groups", "flops_ratio", "merge_layer", "similarity", "seed")
    arguments = "\n".join(
        f"- `{key}`: {results.arguments[key]}" for key in shown if results.arguments.get(key) is not None
    )
    at_start = config.num_latents < unmerged.num_latents
    what = (FEWER if at_start else GROUPED).format(samples=results.calibrated_on, source=task.source.name)
    usage = usage_section(task.hub_task, str(output_dir), **({} if at_start else {"other_merging": DROP_GROUPS}))
    body = f"""# {name}

A [Perceiver IO](https://arxiv.org/abs/2107.14795) whose latents are merged
([Token Merging](https://arxiv.org/abs/2210.09461)) in fixed groups, made from {Path(base_model).name} without training.
{what}

{results.summary()}

![Latents that are left after each layer, and the FLOPs of each layer]({SCHEDULE_FILE})

{usage}

## Calibration

{arguments}

{environment_line(results.environment)}.
"""
    measured = [
        Measured("unmerged", 0, results.unmerged),
        Measured("fewer latents" if at_start else "fixed groups", 0, figures(results.calibrated)),
    ]
    write_card(output_dir, card_data(task.source, task.hub_task, name, measured, base_model), body)
