# SPDX-License-Identifier: Apache-2.0
"""Measure the speed-up of a merged Perceiver over stock transformers, beside the speed-up that its FLOPs imply.

Models of the published shapes share random weights and take turns in one process: each round runs every variant once,
and each round starts with another variant. The speed-up is stock's time over the variant's time in the same round, as
median and quartiles, so that neither a slow phase of the machine nor the order favours a variant.

Variants are: stock itself (the quartiles of its speed-up over itself show the noise); r latents merged in every layer;
schedules at shares of the FLOPs; and the same schedules with fixed groups of consecutive latents, which need no
matching. (Which latents merge does not change the time.) A matrix product of (batch x latents, C) with (C, C), where C
is the width of a latent, is timed too: its rate is the most that the machine reaches on such work.

    python benchmarks/throughput.py --small                                       # two minutes on two cores
    python benchmarks/throughput.py --batch_size 1 --length 128 2048 --output_dir out
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --batch_size 1 8 32 --compile layers
    python benchmarks/throughput.py --shapes vision --training --batch_size 1 --r 0 8

By default --batch_size 1 8 --r 0 2 4 8 16 --flops_ratio 0.59 0.325 --rounds 10; a round of these takes a minute on two
cores. With --small, 6 layers of the published widths, --batch_size 1 4 --r 0 8 32 --flops_ratio 0.59 0.4
--rounds 5. OUTPUT_DIR gets throughput.json, throughput.md and throughput.png.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib import pyplot as plt

from benchmarks import speed_rows
from benchmarks.published_models import DTYPES, check_outputs
from benchmarks.speed_rows import (
    Cell,
    Fields,
    StepArguments,
    Table,
    check_names,
    error_bars,
    format_quartiles,
    run_cells,
)  # fmt: skip
from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.measurement import Quartiles, peak_memory_mb, time_interleaved
from experiments.publishing import picture_style
from experiments.publishing.picture_style import MERGED, POINT_STYLE, add_legend, save_picture
from experiments.publishing.tables import markdown_table
from merging_tome_perceiver import product_flops
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

STOCK = "stock"
COMPILERS: dict[str, Callable[..., None]] = {
    # Works for stock models too: it uses only attributes that they have.
    "layers": ToMePerceiverPreTrainedModel.compile_repeated_blocks,
    "model": partial(PreTrainedModel.compile, dynamic=False),
}
"""Functions that compile a model in place, by value of --compile."""
PRODUCTS = 32
"""Matrix products in a turn: a single one is too short to time."""


@dataclass
class ThroughputArguments(StepArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {
        "batch_size": [1, 8], "r": [0, 2, 4, 8, 16], "flops_ratio": [0.59, 0.325], "rounds": 10
    }  # fmt: skip
    small_defaults: ClassVar[dict[str, Any]] = {
        "batch_size": [1, 4], "r": [0, 8, 32], "flops_ratio": [0.59, 0.4], "rounds": 5
    }  # fmt: skip

    compile: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Also time each variant compiled, and record the time of its first call. layers: compile the "
            "self-attention layers for any number of latents (compile_repeated_blocks); model: compile the whole model "
            "for its own numbers of latents. Settings are compiled in order, so the first call of the second setting "
            "shows what a change of r costs."
        },
    )
    output_dir: str = field(default="outputs/throughput", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("compile", self.compile, COMPILERS)


@dataclass(frozen=True)
class Variant:
    """One model to time."""

    name: str
    model: PreTrainedModel  # stock, or ours with `fields` in its config
    fields: Fields  # merging fields of its config
    checkpointing: bool = False  # whether activation checkpointing is on
    compiled: str = ""  # key of `COMPILERS`; "" if not compiled


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one variant."""

    name: str
    latents_per_layer: list[int]  # left after each layer; the decoder reads the last of them
    gflops: float  # FLOPs of a turn, matching included
    milliseconds: Quartiles  # of a turn
    speedup: Quartiles  # stock's time over this variant's in the same round
    implied_speedup: float  # stock's FLOPs over this variant's
    share_of_implied: float  # median speed-up over the implied one
    gflops_per_second: float  # rate at the median time
    share_of_product_rate: float  # rate relative to that of the matrix product
    peak_memory_mb: float  # peak memory of all tensors, the shared parameters included
    first_call_seconds: float | None  # compilation included; `None` if not compiled


@dataclass(frozen=True)
class ThroughputTable(Table):
    """Results of one cell, and figures that its rows share."""

    outputs_difference: float  # between stock's and ours at r = 0, relative to the largest output
    product_shape: tuple[int, int]  # (B x N, C), first factor of the matrix products
    product_gflops_per_second: float  # rate of these products


def build_variants(
    arguments: ThroughputArguments, stock: PreTrainedModel, settings: dict[str, Fields]
) -> list[Variant]:
    """Build stock and our model with each setting; with --training also checkpointed, with --compile also compiled."""

    def ours(fields: Fields) -> PreTrainedModel:
        return arguments.model.build_merging(stock, **fields)

    variants = [Variant(STOCK, stock, {})]
    variants += [Variant(name, ours(fields), fields) for name, fields in settings.items()]
    if arguments.training:
        for name, fields in settings.items():
            variants.append(Variant(f"{name}, checkpointed", ours(fields), fields, checkpointing=True))
            variants[-1].model.gradient_checkpointing_enable()
    for compiled in arguments.compile:
        again = arguments.model.build_stock_again(stock)
        variants.append(Variant(f"{STOCK}, {compiled} compiled", again, {}, compiled=compiled))
        variants += [
            Variant(f"{name}, {compiled} compiled", ours(fields), fields, compiled=compiled)
            for name, fields in settings.items()
        ]
    for variant in variants:
        if variant.compiled:
            COMPILERS[variant.compiled](variant.model, backend=speed_rows.COMPILE_BACKEND)
        variant.model.train(arguments.training).requires_grad_(arguments.training)
    return variants


def time_first_calls(variants: list[Variant], step: Callable[[PreTrainedModel], object]) -> dict[str, float]:
    """Return the seconds of each compiled variant's first call, compilation included, by name."""
    seconds = {}
    torch.compiler.reset()
    # Dynamo limits recompilations per function, and all variants compile the same functions.
    with torch._dynamo.config.patch(recompile_limit=2 * len(variants) + 8):
        for variant in variants:
            if variant.compiled:
                start = time.perf_counter()
                step(variant.model)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[variant.name] = time.perf_counter() - start
    return seconds


def measure(arguments: ThroughputArguments, cell: Cell) -> ThroughputTable:
    """Time one cell."""
    published, dtype = arguments.model, DTYPES[cell.dtype]
    stock = published.build_stock(dtype, arguments.device)
    inputs = published.draw_inputs(cell.input_shape, dtype, arguments.device)
    difference = check_outputs(stock, published.build_merging(stock), inputs)
    variants = build_variants(arguments, stock, cell.settings)
    step = partial(arguments.take_turn, inputs=inputs)
    compilations = time_first_calls(variants, step) if arguments.compile else {}
    width = stock.config.d_latents
    product_shape = cell.input_shape[0] * stock.config.num_latents, width
    factors = [torch.randn(shape, device=arguments.device).to(dtype) for shape in (product_shape, (width, width))]

    def multiply() -> None:
        with torch.inference_mode():
            for _ in range(PRODUCTS):
                F.linear(*factors)

    turns: list[Callable[[], object]] = [*(partial(step, variant.model) for variant in variants), multiply]
    timings = time_interleaved(lambda turn: turn(), turns, turns[0], arguments.rounds or 1, desc=cell.name)
    product_rate = PRODUCTS * product_flops(*product_shape, width) / timings[-1].latency_ms.median / 1e6
    stock_flops = arguments.turn_flops({}, cell.input_shape)
    rows = []
    for variant, turn, timing in zip(variants, turns, timings, strict=False):
        flops = arguments.turn_flops(variant.fields, cell.input_shape, variant.checkpointing)
        rate = flops / timing.latency_ms.median / 1e6
        rows.append(
            Row(
                name=variant.name,
                latents_per_layer=published.config(**variant.fields).latents_per_layer,
                gflops=flops / 1e9,
                milliseconds=timing.latency_ms,
                speedup=timing.speedup,
                implied_speedup=stock_flops / flops,
                share_of_implied=timing.speedup.median * flops / stock_flops,
                gflops_per_second=rate,
                share_of_product_rate=rate / product_rate,
                peak_memory_mb=peak_memory_mb(turn, variant.model),
                first_call_seconds=compilations.get(variant.name),
            )
        )
    return ThroughputTable(cell.name, rows, difference, product_shape, product_rate)


def as_markdown(table: ThroughputTable) -> str:
    """Return a heading, a table of the variants, and the rate of the matrix product."""
    compiled = any(row.first_call_seconds is not None for row in table.rows)
    columns = ["", "latents left", "GFLOPs", "ms", "times stock", "quartiles", "FLOPs imply", "share", "GFLOP/s"]
    columns += ["of the product's", "peak MB"] + (["first call, s"] if compiled else [])

    def cells(row: Row) -> list[object]:
        first_call = "" if row.first_call_seconds is None else f"{row.first_call_seconds:.1f}"
        return [
            row.name,
            row.latents_per_layer[-1],
            f"{row.gflops:.4g}",
            f"{row.milliseconds.median:.4g}",
            *format_quartiles(row.speedup),
            f"{row.implied_speedup:.2f}",
            f"{row.share_of_implied:.0%}",
            f"{row.gflops_per_second:.4g}",
            f"{row.share_of_product_rate:.0%}",
            f"{row.peak_memory_mb:.0f}",
            *([first_call] if compiled else []),
        ]

    rows, width = table.product_shape
    return f"""## {table.cell}

{markdown_table(columns, map(cells, table.rows), "lr")}

A matrix product of ({rows}, {width}) with ({width}, {width}) ran at {table.product_gflops_per_second:.4g} GFLOP/s. \
Outputs at r = 0 differ from stock's by {table.outputs_difference:.1e} of the largest.
"""


def draw(tables: list[ThroughputTable], path: Path) -> None:
    """Draw the measured and the implied speed-up of each variant, one panel for each cell."""
    longest = max(len(table.rows) for table in tables)
    figure, panels = plt.subplots(
        1, len(tables), figsize=(3 + 4 * len(tables), 1.5 + 0.3 * longest), squeeze=False, layout="constrained"
    )
    for axes, table in zip(panels[0], tables, strict=True):
        for place, row in enumerate(table.rows):
            color, label = _color_and_label(row.name)
            error = error_bars([row.speedup])
            axes.errorbar(row.speedup.median, place, xerr=error, fmt="o", color=color, label=label, **POINT_STYLE)
        implied = [row.implied_speedup for row in table.rows]
        axes.plot(implied, range(len(implied)), "|", color="black", markersize=12, label="implied by its FLOPs")
        axes.axvline(1, color="lightgray", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(table.rows)), [row.name for row in table.rows], fontsize=9)
        axes.set(title=table.cell, xlabel="times as fast as stock, median and quartiles", xlim=(0, None))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    add_legend(figure, panels[0], columns=4)
    save_picture(figure, path)


def _color_and_label(name: str) -> tuple[Any, str]:
    """Return the color and the legend entry of a row by its name."""
    if name.startswith(STOCK):
        return picture_style.STOCK, "stock"
    return (picture_style.UNMERGED, "unmerged") if name.startswith("r = 0") else (MERGED(0.75), "merged")


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", ThroughputArguments)
    run_cells(arguments, "throughput", measure, as_markdown, draw)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
