# SPDX-License-Identifier: Apache-2.0
"""Measure how the time of a forward pass grows with the length of the input and falls with merging.

A Perceiver reads the S bytes of its input once, in the encoder's cross-attention, and then computes on its latents
(Jaegle et al., 2022, section 3.1). So its FLOPs are a constant, which merging lowers, plus a multiple of S, which
merging does not change. This benchmark compares the time with that: in each round, stock transformers and our model,
with r latents merged in every layer, run once at every length. The model has the widths of the published language
model, random weights, and positions for the longest text.

A line in S is fitted to the medians of each variant, by least squares of the relative residuals, so that short texts
count as much as long ones. FLOPs are converted to times by one rate for all: the GFLOP/s of stock on the shortest text.

    python benchmarks/scaling.py --small                                # about a minute on two cores
    python benchmarks/scaling.py --output_dir out                       # five or six minutes
    python benchmarks/scaling.py --device cuda --dtype bfloat16 --rounds 30

By default --length 128 512 2048 8192 32768 65536 --r 0 8 16 --rounds 5 --batch_size 1. With --small, 6 layers of the
published widths, --length 128 512 2048 8192 --r 0 8 32 --rounds 8. OUTPUT_DIR gets scaling.json, scaling.md and
scaling.png.

Letters: B batch, S bytes of a text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from tqdm import tqdm

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published_models import DTYPES, PublishedModel, check_outputs
from benchmarks.speed_rows import Cell, Fields, SpeedArguments, error_bars, format_quartiles, write_results
from cost_tome_perceiver import interleaved_seconds
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input, naming
from experiments.measurement import Quartiles, peak_memory_mb
from experiments.publishing import picture_style
from experiments.publishing.picture_style import MARKERS, MERGED, POINT_STYLE, add_legend, save_picture, shades
from experiments.publishing.tables import markdown_table

STOCK, UNMERGED = "stock", "r = 0"
COLORS: dict[str, Any] = {STOCK: picture_style.STOCK, UNMERGED: picture_style.UNMERGED}


@dataclass
class ScalingArguments(SpeedArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {
        "batch_size": [1], "length": [128, 512, 2048, 8192, 32768, 65536], "r": [0, 8, 16], "rounds": 5
    }  # fmt: skip
    small_defaults: ClassVar[dict[str, Any]] = {"length": [128, 512, 2048, 8192], "r": [0, 8, 32], "rounds": 8}

    # Not arguments here: images have one size, and a share of the FLOPs gives a different schedule at each length.
    shapes: str = field(default="language", init=False)
    flops_ratio: list[float] | None = field(default_factory=list, init=False)
    schedule: list[str] = field(default_factory=list, init=False)

    length: list[int] | None = field(
        default=None, metadata={"help": "Lengths of a text in bytes, two or more (see above)."}
    )
    output_dir: str = field(default="outputs/scaling", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("dtype", self.dtype), ("batch_size", self.batch_size)):
            if len(values) != 1:
                raise BadInput(f"--{name} {' '.join(map(str, values))}: must be one value")
        self.length = sorted(set(self.length))
        if len(self.length) < 2:
            raise BadInput(f"--length {self.length[0]}: must be two or more different lengths, to fit a line")

    @property
    def model(self) -> PublishedModel:
        """Model of `shapes` with as many positions as the longest text has bytes."""
        published = super().model
        return replace(published, fields={**published.fields, "max_position_embeddings": max(self.length)})

    def described(self) -> dict[str, Any]:
        positions = self.model.config().max_position_embeddings
        return super().described() | {"dtype": self.dtype[0], "batch size": self.batch_size[0], "positions": positions}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one variant at one length, for the whole batch."""

    length: int
    name: str
    latents_left: int  # after the last layer
    gflops: float  # by the cost function, matching included
    milliseconds: Quartiles  # of a forward pass
    predicted_milliseconds: float  # GFLOPs of this row at the rate of stock on the shortest texts
    speedup: Quartiles  # stock's time over this variant's, at this length and in the same round
    implied_speedup: float  # stock's FLOPs over this variant's
    peak_memory_mb: float  # peak memory of all tensors, the shared parameters included


@dataclass(frozen=True)
class Line:
    """Straight line: `constant` + `slope` x S."""

    constant: float
    slope: float

    @classmethod
    def fit(cls, lengths: Sequence[int], values: Sequence[float]) -> Line:
        """Fit a line by least squares of the relative residuals."""
        slope, constant = np.polyfit(lengths, values, 1, w=1 / np.array(values))
        return cls(float(constant), float(slope))

    def at(self, length: float) -> float:
        """Return the value at a length."""
        return self.constant + self.slope * length

    def largest_deviation(self, lengths: Sequence[int], values: Sequence[float]) -> float:
        """Return the largest relative distance of a value from the line."""
        return max(abs(self.at(length) / value - 1) for length, value in zip(lengths, values, strict=True))


@dataclass(frozen=True)
class Growth:
    """Growth of the FLOPs and the time of one variant with S, for the whole batch."""

    name: str
    flops: Line  # by the cost function; exact
    milliseconds: Line  # fitted to the medians
    predicted_milliseconds: Line  # the FLOPs at the rate of stock on the shortest texts
    largest_deviation: float  # relative distance of a median from the fitted line


@dataclass(frozen=True)
class Scaling:
    """All figures of the benchmark."""

    # Between stock's outputs and ours at r = 0 on the shortest texts, relative to the largest output.
    outputs_difference: float
    gflops_per_second: float  # rate of stock on the shortest texts, used for all predictions
    rows: list[Row]  # all variants at the shortest length, then at the next length
    growth: list[Growth]


def flops_line(published: PublishedModel, fields: Fields, batch_size: int) -> Line:
    """Return the exact line in S that gives the FLOPs."""
    one, two = (published.cost((batch_size, length), **fields).total_with_matching for length in (1, 2))
    return Line(2 * one - two, two - one)


@torch.inference_mode()
def measure(arguments: ScalingArguments, cells: list[Cell]) -> Scaling:
    """Time all cells: in each round, every variant runs once at every length.

    Args:
        arguments: the model, the rounds, the device.
        cells: one for each length, the shortest first, all with the same settings.
    """
    published, dtype = arguments.model, DTYPES[cells[0].dtype]
    stock = published.build_stock(dtype, arguments.device)
    inputs = [published.draw_inputs(cell.input_shape, dtype, arguments.device) for cell in cells]
    difference = check_outputs(stock, published.build_merging(stock), inputs[0])

    settings = {STOCK: {}, **cells[0].settings}
    models = [stock, *(published.build_merging(stock, **fields) for fields in cells[0].settings.values())]
    pairs = list(product(inputs, models))
    turns = [partial(model, inputs=texts) for texts, model in pairs]
    rounds = arguments.rounds or 1
    with tqdm(total=rounds + 1, desc="rounds") as bar:
        seconds = np.array(interleaved_seconds(lambda turn: turn(), turns, rounds, bar)).T  # (turns, rounds)

    stock_flops = {cell.input_shape: published.cost(cell.input_shape).total_with_matching for cell in cells}
    rate = stock_flops[cells[0].input_shape] / np.median(seconds[0])
    rows = []
    for index, (cell, (name, fields)) in enumerate(product(cells, settings.items())):
        # Rows are ordered by length, and stock comes first at each length.
        stocks = seconds[index - index % len(settings)]
        flops = published.cost(cell.input_shape, **fields).total_with_matching
        rows.append(
            Row(
                length=cell.input_shape[1],
                name=name,
                latents_left=published.config(**fields).latents_per_layer[-1],
                gflops=flops / 1e9,
                milliseconds=Quartiles.of(1e3 * seconds[index]),
                predicted_milliseconds=1e3 * flops / rate,
                speedup=Quartiles.of(stocks / seconds[index]),
                implied_speedup=stock_flops[cell.input_shape] / flops,
                peak_memory_mb=peak_memory_mb(turns[index], pairs[index][1]),
            )
        )
    lengths, growth = [cell.input_shape[1] for cell in cells], []
    for name, fields in settings.items():
        medians = [row.milliseconds.median for row in rows if row.name == name]
        flops, line = flops_line(published, fields, len(inputs[0])), Line.fit(lengths, medians)
        predicted = Line(1e3 * flops.constant / rate, 1e3 * flops.slope / rate)
        growth.append(Growth(name, flops, line, predicted, line.largest_deviation(lengths, medians)))
    return Scaling(difference, rate / 1e9, rows, growth)


def as_markdown(scaling: Scaling) -> str:
    """Return a table of every variant at every length, and a table of the lines."""
    columns = ["bytes", "", "latents left", "GFLOPs", "ms", "quartiles", "FLOPs imply", "times stock", "quartiles"]
    columns += ["FLOPs imply", "peak MB"]
    rows = [
        (
            row.length,
            row.name,
            row.latents_left,
            f"{row.gflops:.4g}",
            *format_quartiles(row.milliseconds, ".4g"),
            f"{row.predicted_milliseconds:.4g}",
            *format_quartiles(row.speedup),
            f"{row.implied_speedup:.2f}",
            f"{row.peak_memory_mb:.0f}",
        )
        for row in scaling.rows
    ]
    times = markdown_table(columns, rows, "rlr")
    columns = ["", "GFLOPs at 0 bytes", "MFLOPs a byte", "ms at 0 bytes", "FLOPs imply", "µs a byte", "FLOPs imply"]
    columns += ["largest deviation of a median"]
    growth = [
        (
            each.name,
            f"{each.flops.constant / 1e9:.4g}",
            f"{each.flops.slope / 1e6:.4g}",
            f"{each.milliseconds.constant:.4g}",
            f"{each.predicted_milliseconds.constant:.4g}",
            f"{1e3 * each.milliseconds.slope:.4g}",
            f"{1e3 * each.predicted_milliseconds.slope:.4g}",
            f"{each.largest_deviation:.1%}",
        )
        for each in scaling.growth
    ]
    return f"""## Times

{times}

## Lines

{markdown_table(columns, growth, "lr")}

Times that the FLOPs imply assume {scaling.gflops_per_second:.4g} GFLOP/s, the rate of stock on the shortest texts. \
Outputs at r = 0 differ from stock's there by {scaling.outputs_difference:.1e} of the largest.
"""


def draw(scaling: Scaling, title: str, path: Path) -> None:
    """Draw time over length for each variant: medians, quartiles, the fitted line and, dashed, what FLOPs imply."""
    figure, axes = plt.subplots(figsize=(7.5, 6), constrained_layout=True)
    lengths = sorted({row.length for row in scaling.rows})
    between = np.geomspace(lengths[0], lengths[-1], 100)
    merged = [growth.name for growth in scaling.growth if growth.name not in COLORS]
    # More merging, darker color.
    colors = COLORS | dict(zip(merged, reversed(shades(MERGED, len(merged))), strict=True))
    for growth, marker in zip(scaling.growth, cycle(MARKERS)):
        color = colors[growth.name]
        times = [row.milliseconds for row in scaling.rows if row.name == growth.name]
        medians = [each.median for each in times]
        label = {STOCK: "stock transformers", UNMERGED: "r = 0, unmerged"}.get(growth.name, growth.name)
        axes.errorbar(lengths, medians, error_bars(times), fmt=marker, color=color, label=label, **POINT_STYLE)
        for line, style in ((growth.milliseconds, "-"), (growth.predicted_milliseconds, "--")):
            # Stock has the FLOPs of r = 0, so its dashed line would hide that of r = 0.
            if style == "-" or growth.name != STOCK:
                axes.plot(between, [line.at(length) for length in between], style, color=color, linewidth=1.2)
    axes.plot([], [], "-", color="lightgray", label="line fitted to the medians")
    axes.plot([], [], "--", color="lightgray", label=f"FLOPs at {scaling.gflops_per_second:.4g} GFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="bytes in a text", ylabel="milliseconds of a forward pass", title=title)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    # Ticks between powers of ten, because all times may lie within one power of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    add_legend(figure, [axes], 3, "Points: medians of the timed rounds; bars: quartiles")
    save_picture(figure, path)


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", ScalingArguments)
    cells = arguments.cells()
    output_dir = Path(arguments.output_dir)
    with naming(f"--output_dir {output_dir}", OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
    scaling = measure(arguments, cells)
    settings = arguments.described()
    title = f"{settings['shapes']}\n{settings['dtype']}, batch size {settings['batch size']}"
    picture = partial(draw, scaling, title)
    print(write_results(arguments, "scaling", asdict(scaling), [as_markdown(scaling)], picture))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
