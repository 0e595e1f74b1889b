# SPDX-License-Identifier: Apache-2.0
"""What a benchmark of speed runs: its arguments, its cells and the merging settings that are compared in each.

A cell is one dtype, one batch size and one length. In each, the model of published shapes runs unmerged and merged: r
latents in every layer, schedules that keep to a share of the FLOPs, and fixed groups that leave the same latents as
those schedules, so that they differ by the matching alone.

Letters: B batch, N latents, M latents left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from benchmarks.published_models import DTYPES, PUBLISHED_MODELS, PublishedModel
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import DEFAULT_SCHEDULE, SCHEDULES, FlopsShare, merging_within
from experiments.command_line import shown_command
from experiments.errors import BadInput, naming
from experiments.files import write_json, write_text
from experiments.measurement import describe_environment, environment_line
from experiments.merging.arguments import naming_arguments

Fields = dict[str, Any]
"""Of a config, what merges; the others are as they are by default."""

Figures = TypeVar("Figures")
DEFAULT_LENGTH = [128]


@dataclass(frozen=True)
class Cell:
    """What one table is of.

    Attributes:
        dtype: of weights and activations.
        input_shape: of a forward pass, (B, S) or (B, 3, height, width).
        settings: by name, the fields of a config that say what merges.
    """

    dtype: str
    input_shape: tuple[int, ...]
    settings: dict[str, Fields]

    @property
    def name(self) -> str:
        """In a heading."""
        return f"{self.dtype}, inputs {' x '.join(map(str, self.input_shape))}"


@dataclass
class SpeedArguments:
    """Which model, which cells, which merging settings."""

    _argument_group_name: ClassVar[str] = "benchmark"
    # What an argument is if it is not given, and with --small.
    usual: ClassVar[dict[str, Any]] = {}
    reduced: ClassVar[dict[str, Any]] = {}

    shapes: str = field(default="language", metadata={"help": f"Of the model: {', '.join(sorted(PUBLISHED_MODELS))}."})
    small: bool = field(
        default=False,
        metadata={"help": "The published widths with 6 layers, and fewer cells, settings and rounds by default."},
    )
    dtype: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={"help": f"Of weights and activations, one or more of {', '.join(DTYPES)}."},
    )
    batch_size: list[int] | None = field(
        default=None, metadata={"help": "Inputs in a forward pass, one or more (see above)."}
    )
    length: list[int] | None = field(default=None, metadata={"help": "Bytes in a text, one or more (default: 128)."})
    r: list[int] | None = field(
        default=None, metadata={"help": "Latents merged in each layer, one or more (see above)."}
    )
    flops_ratio: list[float] | None = field(
        default=None,
        metadata={"help": "Shares of the unmerged FLOPs that a schedule keeps to, one or more (see above)."},
    )
    schedule: list[str] = field(
        default_factory=lambda: [DEFAULT_SCHEDULE],
        metadata={"help": f"That keep to --flops_ratio, one or more of {', '.join(sorted(SCHEDULES))}."},
    )
    rounds: int | None = field(default=None, metadata={"help": "Each runs every variant once (see above)."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; by default as many as PyTorch chooses."})
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})
    output_dir: str = field(default="outputs/speed", metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        check_names("shapes", [self.shapes], PUBLISHED_MODELS)
        if self.flops_ratio is None and self.model.flops_ratio is not None:
            self.flops_ratio = list(self.model.flops_ratio)
        for name, value in {**self.usual, **(self.reduced if self.small else {})}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_names("dtype", self.dtype, DTYPES)
        check_names("schedule", self.schedule, SCHEDULES)
        if self.model.takes_text:
            self.length = DEFAULT_LENGTH if self.length is None else self.length
        elif self.length is not None:
            raise BadInput(f"--length {_spelled(self.length)}: allowed only with the shapes of a model of texts")
        for name, least, most in (
            ("batch_size", 1, math.inf),
            ("length", 1, self.max_length),
            ("r", 0, math.inf),
            ("rounds", 1, math.inf),
            ("threads", 1, math.inf),
        ):
            _check_range(name, getattr(self, name), least, most)
        with naming(f"--device {self.device}", RuntimeError, AssertionError):
            torch.empty(0, device=self.device)

    @property
    def model(self) -> PublishedModel:
        """The model of those shapes, with fewer layers if it is to be small."""
        published = PUBLISHED_MODELS[self.shapes]
        return published.small() if self.small else published

    @property
    def max_length(self) -> int:
        """Bytes that a text may have."""
        return self.model.config().max_position_embeddings

    def cells(self) -> list[Cell]:
        """Every combination of dtype, batch size and length.

        Raises:
            BadInput: for a share of the FLOPs that a schedule cannot come down to.
        """
        assert self.batch_size is not None
        cells = []
        lengths: list[int] | list[None] = self.length or [None]
        for dtype, batch_size, length in product(self.dtype, self.batch_size, lengths):
            input_shape = self.model.input_shape(batch_size, length)
            cells.append(Cell(dtype, input_shape, self._settings(input_shape)))
        return cells

    def _settings(self, input_shape: tuple[int, ...]) -> dict[str, Fields]:
        assert self.r is not None and self.flops_ratio is not None
        config = self.model.config()
        settings: dict[str, Fields] = {f"r = {r}": {"r": r} for r in self.r}
        share = FlopsShare(config, input_shape, self.model.architecture)
        for schedule, ratio in product(self.schedule, self.flops_ratio):
            with naming_arguments():
                fields = asdict(merging_within(config, schedule, ratio, share))
            settings[f"{schedule} {ratio}"] = fields
            settings[f"{schedule} {ratio}, fixed groups"] = consecutive_groups(self.model.config(**fields))
        return settings

    def use_device(self) -> None:
        """Make the device, and the number of threads, those of what follows."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    def described(self) -> dict[str, Any]:
        """What stands beside the figures."""
        return {
            "shapes": f"{self.model.hub_id}, random weights",
            "self-attention layers": self.model.config().num_self_attention_layers,
            "device": self.device,
            "rounds": f"{self.rounds} after one of warm-up",
        }


def consecutive_groups(config: ToMePerceiverConfig) -> Fields:
    """Fixed groups of consecutive latents that leave as many in each layer as a config does by matching.

    They cost the same FLOPs but for the matching. Which latents merge does not matter to the time.
    """
    reaching = [config.num_latents, *config.latents_per_layer]
    groups = [
        None if after == before else [position * after // before for position in range(before)]
        for before, after in pairwise(reaching)
    ]
    return {"merge_groups": groups}


def write_results(arguments: SpeedArguments, name: str, figures: Mapping[str, Any], tables: Iterable[str]) -> str:
    """Write what was measured, with the settings, the command and the machine, as NAME.json and NAME.md.

    Args:
        arguments: of the benchmark; the files go to its `output_dir`.
        name: of the benchmark.
        figures: for the JSON file.
        tables: in Markdown.

    Returns:
        The text of NAME.md.
    """
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings, environment = arguments.described() | {"command": shown_command()}, describe_environment()
    write_json(output_dir / f"{name}.json", {"settings": settings, "environment": environment, **figures})
    notes = [f"- {name}: {value}" for name, value in settings.items()] + [f"- {environment_line(environment)}"]
    text = "\n".join([*tables, *notes]) + "\n"
    write_text(output_dir / f"{name}.md", text)
    return text


def read_back(kind: type[Figures], part: type, fields: Mapping[str, Any]) -> Figures:
    """A dataclass again from what `asdict` made of it; its values that are mappings are all of one other dataclass."""
    return kind(**{name: part(**value) if isinstance(value, dict) else value for name, value in fields.items()})


def check_names(argument: str, names: Sequence[str], allowed: Collection[str]) -> None:
    """Check that each name is one of those allowed.

    Raises:
        BadInput: naming the argument, the value and what is allowed.
    """
    for name in names:
        if name not in allowed:
            raise BadInput(f"--{argument} {name}: allowed are {', '.join(sorted(allowed))}")


def check_backend(name: str | None) -> None:
    """Check that `torch.compile` has a backend of that name; `None` if nothing is compiled.

    Raises:
        BadInput: naming the argument, the value and what is allowed.
    """
    # Only if asked for: to list them takes seconds of imports.
    if name is not None and name not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise BadInput(f"--compile_backend {name}: allowed are {', '.join(known)}")


def _check_range(argument: str, value: list[int] | int | None, least: int, most: float) -> None:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for each in values:
        if not least <= each <= most:
            upper = "" if math.isinf(most) else f" to {most}"
            raise BadInput(f"--{argument} {each}: allowed are integers from {least}{upper}")


def _spelled(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))
