# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmarks of speed: arguments, cells, merging settings and reports.

A cell is one combination of dtype, batch size and length. In each cell the model runs with several merging settings: r
latents merged in every layer, schedules that keep to a share of the FLOPs, and fixed groups that leave as many latents
as those schedules, so that the difference in time is the cost of matching.

Letters: B batch, N latents, M latents left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.published_models import DTYPES, PUBLISHED_MODELS, PublishedModel
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import DEFAULT_SCHEDULE, SCHEDULES, FlopsShare, merging_within
from experiments.command_line import shown_command
from experiments.errors import BadInput, naming
from experiments.files import write_json, write_text
from experiments.measurement import Quartiles, describe_environment, environment_line
from experiments.merging.arguments import naming_arguments

Fields = dict[str, Any]
"""Merging fields of a config that differ from their defaults."""

COMPILE_BACKEND = "inductor"
"""Backend of `torch.compile` that `--compile` uses."""


@dataclass(frozen=True)
class Cell:
    """Combination of dtype, batch size and length; the report has one table for each."""

    dtype: str  # of weights and activations
    input_shape: tuple[int, ...]  # of a forward pass, (B, S) or (B, 3, height, width)
    settings: dict[str, Fields]  # merging settings by name

    @property
    def name(self) -> str:
        return f"{self.dtype}, inputs {' x '.join(map(str, self.input_shape))}"


@dataclass(frozen=True)
class Table:
    """Results of one cell, one row for each variant."""

    cell: str
    rows: list[Any]


@dataclass
class SpeedArguments:
    """Which model, cells and merging settings to time."""

    _argument_group_name: ClassVar[str] = "benchmark"
    # Defaults of the arguments, and the defaults that differ with --small.
    defaults: ClassVar[dict[str, Any]] = {}
    small_defaults: ClassVar[dict[str, Any]] = {}
    # Values that --dtype accepts.
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    shapes: str = field(
        default="language", metadata={"help": f"Shapes of the model: {', '.join(sorted(PUBLISHED_MODELS))}."}
    )
    small: bool = field(
        default=False,
        metadata={"help": "Use 6 layers of the published widths, and fewer cells, settings and rounds by default."},
    )
    dtype: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={"help": f"Dtypes of weights and activations, one or more of {', '.join(DTYPES)}."},
    )
    batch_size: list[int] | None = field(default=None, metadata={"help": "Batch sizes, one or more (see above)."})
    length: list[int] | None = field(
        default=None, metadata={"help": "Lengths of a text in bytes, one or more (default: 128)."}
    )
    r: list[int] | None = field(
        default=None, metadata={"help": "Numbers of latents merged in each layer, one or more (see above)."}
    )
    flops_ratio: list[float] | None = field(
        default=None,
        metadata={"help": "Budgets for the schedules, as shares of the unmerged FLOPs, one or more (see above)."},
    )
    schedule: list[str] = field(
        default_factory=lambda: [DEFAULT_SCHEDULE],
        metadata={"help": f"Schedules that keep to --flops_ratio, one or more of {', '.join(sorted(SCHEDULES))}."},
    )
    rounds: int | None = field(
        default=None, metadata={"help": "Timed rounds; each runs every variant once (see above)."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    output_dir: str = field(default="outputs/speed", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        check_names("shapes", [self.shapes], PUBLISHED_MODELS)
        if self.flops_ratio is None and self.model.flops_ratio is not None:
            self.flops_ratio = list(self.model.flops_ratio)
        for name, value in {**self.defaults, **(self.small_defaults if self.small else {})}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_names("dtype", self.dtype, self.dtypes)
        check_names("schedule", self.schedule, SCHEDULES)
        if self.model.takes_text:
            self.length = [128] if self.length is None else self.length
        elif self.length is not None:
            raise BadInput(
                f"--length {' '.join(map(str, self.length))}: --shapes {self.shapes} reads images; leave --length out"
            )
        longest = self.model.config().max_position_embeddings
        for each in self.length or []:
            if not 1 <= each <= longest:
                raise BadInput(f"--length {each}: must be 1 to {longest}")
        rounds = None if self.rounds is None else [self.rounds]
        for name, least, values in (("batch_size", 1, self.batch_size), ("r", 0, self.r), ("rounds", 1, rounds)):
            for each in values or []:
                if each < least:
                    raise BadInput(f"--{name} {each}: must be {least} or more")
        with naming(f"--device {self.device}", RuntimeError, AssertionError):
            torch.empty(0, device=self.device)
            if self.device.startswith("cuda:"):
                torch.cuda.set_device(self.device)

    @property
    def model(self) -> PublishedModel:
        """Model of `shapes`, with fewer layers if `small`."""
        published = PUBLISHED_MODELS[self.shapes]
        return published.small() if self.small else published

    def cells(self) -> list[Cell]:
        """Build every combination of dtype, batch size and length.

        Raises:
            BadInput: for a share of the FLOPs that a schedule cannot reach.
        """
        cells = []
        for dtype, batch_size, length in product(self.dtype, self.batch_size, self.length or [None]):
            input_shape = self.model.input_shape(batch_size, length)
            settings: dict[str, Fields] = {f"r = {r}": {"r": r} for r in self.r}
            share = FlopsShare(self.model.config(), input_shape, self.model.architecture)
            for schedule, ratio in product(self.schedule, self.flops_ratio):
                with naming_arguments():
                    fields = asdict(merging_within(self.model.config(), schedule, ratio, share))
                settings[f"{schedule} {ratio}"] = fields
                settings[f"{schedule} {ratio}, fixed groups"] = consecutive_groups(self.model.config(**fields))
            cells.append(Cell(dtype, input_shape, settings))
        return cells

    def described(self) -> dict[str, Any]:
        """Return the settings that the report lists beside the figures."""
        return {
            "shapes": f"{self.model.hub_id}, random weights",
            "self-attention layers": self.model.config().num_self_attention_layers,
            "device": self.device,
            "rounds": f"{self.rounds} after one warm-up round",
        }


@dataclass
class StepArguments(SpeedArguments):
    """Arguments of a benchmark that times forward passes, or forward and backward passes."""

    training: bool = field(
        default=False,
        metadata={"help": "Time forward and backward passes; our model also with activation checkpointing."},
    )
    autocast: bool = field(
        default=False, metadata={"help": "Run under autocast to bfloat16, as training with --bf16 does."}
    )

    def described(self) -> dict[str, Any]:
        turn = "forward and backward pass, without an optimizer" if self.training else "forward pass"
        return super().described() | {"each turn": f"{turn}, under autocast to bfloat16" if self.autocast else turn}

    def take_turn(self, model: PreTrainedModel, inputs: Tensor) -> None:
        """Run a forward pass; with --training also a backward pass, and drop its gradients."""
        autocast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast)
        if not self.training:
            with torch.inference_mode(), autocast:
                model(inputs=inputs)
            return
        labels = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        with autocast:
            loss = model(inputs=inputs, labels=labels).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    def turn_flops(self, fields: Fields, input_shape: tuple[int, ...], checkpointing: bool = False) -> int:
        """Return the FLOPs of one turn.

        The backward pass has two matrix products for each one of the forward pass, one for the gradient of each factor,
        and none for the matching, which has no gradient. (The convolution on images has one, because pixels need no
        gradient.) With activation checkpointing, every layer and its matching run once more.
        """
        cost = self.model.cost(input_shape, **fields)
        if not self.training:
            return cost.total_with_matching
        layers = cost.cross_attention + sum(cost.self_attention) + sum(cost.matching) + cost.decoder
        return 3 * cost.total + sum(cost.matching) + (layers if checkpointing else 0)


def consecutive_groups(config: ToMePerceiverConfig) -> Fields:
    """Return fixed groups of consecutive latents that leave as many latents in each layer as a config does by matching.

    They cost the same FLOPs without the matching. Which latents merge does not change the time.
    """
    latents_left = [config.num_latents, *config.latents_per_layer]
    groups = [
        None if after == before else [position * after // before for position in range(before)]
        for before, after in pairwise(latents_left)
    ]
    return {"merge_groups": groups}


def run_cells(
    arguments: SpeedArguments,
    name: str,
    measure: Callable[[Any, Cell], Table],
    as_markdown: Callable[[Any], str],
    draw: Callable[[list[Any], Path], None] | None = None,
) -> None:
    """Measure every cell, and write NAME.json, NAME.md and, with `draw`, NAME.png.

    The files are written after each cell, so a stopped benchmark keeps the cells that it has finished.
    """
    tables: list[Table] = []
    for cell in arguments.cells():
        tables.append(measure(arguments, cell))
        figures = {"cells": [asdict(table) for table in tables]}
        picture = None if draw is None else partial(draw, tables)
        text = write_results(arguments, name, figures, map(as_markdown, tables), picture)
    print(text)


def write_results(
    arguments: SpeedArguments,
    name: str,
    figures: Mapping[str, Any],
    tables: Iterable[str],
    draw: Callable[[Path], None] | None = None,
) -> str:
    """Write figures to NAME.json and tables to NAME.md, and call `draw` with the path of NAME.png.

    NAME.json and NAME.md also record the settings, the command and the machine.

    Returns:
        The text of NAME.md, and a line that names the files.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings, environment = arguments.described() | {"command": shown_command()}, describe_environment()
    write_json(output_dir / f"{name}.json", {"settings": settings, "environment": environment, **figures})
    notes = [f"- {name}: {value}" for name, value in settings.items()] + [f"- {environment_line(environment)}"]
    text = "\n".join([*tables, *notes]) + "\n"
    write_text(output_dir / f"{name}.md", text)
    if draw is None:
        return f"{text}written to {output_dir}: {name}.json and {name}.md"
    draw(output_dir / f"{name}.png")
    return f"{text}written to {output_dir}: {name}.json, {name}.md and {name}.png"


def format_quartiles(quartiles: Quartiles, form: str = ".2f") -> tuple[str, str]:
    """Format the median and the quartiles as two cells of a table."""
    return f"{quartiles.median:{form}}", f"{quartiles.lower:{form}} to {quartiles.upper:{form}}"


def error_bars(quartiles: Iterable[Quartiles]) -> list[list[float]]:
    """Return the distances of lower and upper quartiles from the medians, as matplotlib's `xerr` takes them."""
    bars = list(quartiles)
    return [[bar.median - bar.lower for bar in bars], [bar.upper - bar.median for bar in bars]]


def check_names(argument: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise BadInput(f"--{argument} {name}: choose from {', '.join(sorted(known))}")
