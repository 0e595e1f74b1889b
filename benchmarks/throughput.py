# SPDX-License-Identifier: Apache-2.0
"""How fast a merged Perceiver is against stock transformers, and how much of what the FLOPs promise it keeps.

Models of the published shapes with random weights, all on the same tensors, take turns in one process: in each round
every variant runs once, the next round starts with the next variant. A speed-up is the median, with quartiles, of
stock's time over the variant's within a round, so neither a machine that slows down nor a place in the order favours a
variant. Variants are stock itself (how far it is from 1 against itself is the noise), r latents merged in every layer,
schedules at shares of the FLOPs, and the same schedules in fixed groups, which match nothing; these are groups of
consecutive latents, since which latents merge does not matter to the time. A product of (batch x latents, C) with
(C, C), C the width of a latent, takes its turn too: its rate is what the machine does of such work.

    python benchmarks/throughput.py --small                                       # two minutes on two cores
    python benchmarks/throughput.py --batch_size 1 --length 128 2048 --output_dir out
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --batch_size 1 8 32 --compile layers
    python benchmarks/throughput.py --shapes vision --training --batch_size 1 --r 0 8

By default --batch_size 1 8 --r 0 2 4 8 16 --flops_ratio 0.59 0.325 --rounds 10: a round of all that takes a minute on
two cores. With --small, 6 layers of the published widths, --batch_size 1 4 --r 0 8 32 --flops_ratio 0.59 0.4
--rounds 5. OUTPUT_DIR gets throughput.json, throughput.md and throughput.png.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib import pyplot as plt

from benchmarks.published_models import DTYPES, check_outputs
from benchmarks.speed_rows import Cell, Fields, SpeedArguments, check_backend, check_names, read_back, write_results
from cost_tome_perceiver import ForwardCost, forward_cost
from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.measurement import (
    Quartiles,
    Timing,
    peak_memory_mb,
    time_interleaved,
)
from experiments.publishing import picture_style
from experiments.publishing.picture_style import MERGED, POINTS, add_legend, save_picture
from experiments.publishing.tables import markdown_table
from merging_tome_perceiver import product_flops
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

STOCK = "stock"
PICTURE = "throughput.png"
COMPILERS: dict[str, Callable[..., None]] = {
    # It takes a stock model too: nothing that it asks for is ours.
    "layers": ToMePerceiverPreTrainedModel.compile_repeated_blocks,
    "model": partial(PreTrainedModel.compile, dynamic=False),
}
"""For each value of --compile: compiles a model in place."""
PRODUCTS = 32  # in a turn: one would be over before it can be timed


@dataclass
class ThroughputArguments(SpeedArguments):
    """What runs, and how."""

    usual: ClassVar[dict[str, Any]] = {
        "batch_size": [1, 8], "r": [0, 2, 4, 8, 16], "flops_ratio": [0.59, 0.325], "rounds": 10
    }  # fmt: skip
    reduced: ClassVar[dict[str, Any]] = {
        "batch_size": [1, 4], "r": [0, 8, 32], "flops_ratio": [0.59, 0.4], "rounds": 5
    }  # fmt: skip

    training: bool = field(
        default=False,
        metadata={"help": "Time a forward and backward pass; ours with activation checkpointing and without."},
    )
    autocast: bool = field(default=False, metadata={"help": "Under autocast to bfloat16, as training with --bf16."})
    compile: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Time each variant also compiled, and note its first call. layers: the self-attention layers, for "
            "any number of latents (compile_repeated_blocks); model: as a whole, for its numbers of latents alone. "
            "Settings are compiled in their order, so that the second one's first call is what a change of r costs."
        },
    )
    compile_backend: str = field(default="inductor", metadata={"help": "Of --compile."})
    output_dir: str = field(default="outputs/throughput", metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("compile", self.compile, COMPILERS)
        check_backend(self.compile_backend if self.compile else None)

    def described(self) -> dict[str, Any]:
        """What stands beside the figures."""
        return super().described() | {"each turn": turn_words(self.training, self.autocast)}


@dataclass(frozen=True)
class Variant:
    """What takes a turn.

    Attributes:
        name: in the table.
        model: stock, or ours with what it merges in its config.
        fields: of a config, that say what it merges.
        checkpointing: whether its layers are computed again in the backward pass.
        compiled: which of `COMPILERS` compiles it, in its first call; "" for none.
    """

    name: str
    model: PreTrainedModel
    fields: Fields
    checkpointing: bool = False
    compiled: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a variant took.

    Attributes:
        name: of the variant.
        latents_per_layer: left after each layer; the decoder reads the last of them.
        gflops: of a turn of the batch, the matching included.
        milliseconds: of a turn.
        speedup: stock's time over this one's in the same round.
        implied_speedup: stock's FLOPs over this one's.
        share_of_implied: of the two medians.
        gflops_per_second: in the median time.
        share_of_product_rate: of what a matrix product reaches in the same rounds.
        peak_memory_mb: most that tensors hold at once, the parameters, which all variants share, among them.
        first_call_seconds: of a compiled model, with its compilation.
    """

    name: str
    latents_per_layer: list[int]
    gflops: float
    milliseconds: Quartiles
    speedup: Quartiles
    implied_speedup: float
    share_of_implied: float
    gflops_per_second: float
    share_of_product_rate: float
    peak_memory_mb: float
    first_call_seconds: float | None


@dataclass(frozen=True)
class Table:
    """What was measured in a cell.

    Attributes:
        cell: its name.
        outputs_difference: between stock's outputs and ours at r = 0, as a part of the largest.
        product_shape: (B x N, C) of the matrix products.
        product_gflops_per_second: their rate.
        rows: the variants.
    """

    cell: str
    outputs_difference: float
    product_shape: tuple[int, int]
    product_gflops_per_second: float
    rows: list[Row]


def step_flops(cost: ForwardCost, training: bool, checkpointing: bool) -> int:
    """FLOPs of a turn.

    A backward pass has two products for each one of the forward pass, for the gradients of its two factors, and none
    for the matching, which is without gradients. (The convolution on an image has one, since pixels need no gradient.)
    With checkpointing every layer, its matching included, runs once more.
    """
    if not training:
        return cost.total_with_matching
    layers = cost.cross_attention + sum(cost.self_attention) + sum(cost.matching) + cost.decoder
    return 3 * cost.total + sum(cost.matching) + (layers if checkpointing else 0)


def turn_words(training: bool, autocast: bool) -> str:
    """What a turn is."""
    turn = "forward and backward pass, without an optimizer" if training else "forward pass"
    return f"{turn}, under autocast to bfloat16" if autocast else turn


def infer(model: PreTrainedModel, inputs: Tensor, autocast: bool = False) -> None:
    """A forward pass."""
    with torch.inference_mode(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
        model(inputs=inputs)


def train(model: PreTrainedModel, inputs: Tensor, autocast: bool = False) -> None:
    """A forward and a backward pass, whose gradients are dropped. There is no optimizer."""
    labels = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=autocast):
        loss = model(inputs=inputs, labels=labels).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def build_variants(
    arguments: ThroughputArguments, stock: PreTrainedModel, settings: dict[str, Fields]
) -> list[Variant]:
    """Stock and each setting; again checkpointed if training, and again compiled if asked for."""

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
            COMPILERS[variant.compiled](variant.model, backend=arguments.compile_backend)
        variant.model.train(arguments.training).requires_grad_(arguments.training)
    return variants


def first_calls(variants: list[Variant], step: Callable[[PreTrainedModel], object]) -> dict[str, float]:
    """Seconds that the first call of each compiled variant takes, with its compilation, by name."""
    seconds = {}
    torch.compiler.reset()
    # Every variant has a graph of its own, and all are compiled from the code of the same functions.
    with torch._dynamo.config.patch(recompile_limit=2 * len(variants) + 8):
        for variant in variants:
            if variant.compiled:
                start = time.perf_counter()
                step(variant.model)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[variant.name] = time.perf_counter() - start
    return seconds


def measure(arguments: ThroughputArguments, cell: Cell) -> Table:
    """Run the rounds of one cell."""
    published, dtype = arguments.model, DTYPES[cell.dtype]
    stock = published.build_stock(arguments.seed, dtype, arguments.device)
    inputs = published.draw_inputs(cell.input_shape, dtype, arguments.device)
    difference = check_outputs(stock, published.build_merging(stock), inputs)
    variants = build_variants(arguments, stock, cell.settings)

    def step(model: PreTrainedModel) -> None:
        return (train if arguments.training else infer)(model, inputs, arguments.autocast)

    compilations = first_calls(variants, step) if arguments.compile else {}
    width = stock.config.d_latents
    rows, square = (cell.input_shape[0] * stock.config.num_latents, width), (width, width)
    factors = [torch.randn(shape, device=arguments.device).to(dtype) for shape in (rows, square)]

    def multiply() -> None:
        with torch.inference_mode():
            for _ in range(PRODUCTS):
                F.linear(*factors)

    turns: list[Callable[[], object]] = [*(partial(step, variant.model) for variant in variants), multiply]
    timings = time_interleaved(lambda turn: turn(), turns, turns[0], arguments.rounds or 1, desc=cell.name)
    *timings, product = timings
    peaks = [peak_memory_mb(turn, variant.model) for variant, turn in zip(variants, turns, strict=False)]
    product_rate = PRODUCTS * product_flops(*rows, width) / product.latency_ms.median / 1e6

    def row(variant: Variant, timing: Timing, peak: float) -> Row:
        flops = variant_flops(arguments, cell, variant)
        implied = variant_flops(arguments, cell, variants[0]) / flops
        rate = flops / timing.latency_ms.median / 1e6
        return Row(
            name=variant.name,
            latents_per_layer=published.config(**variant.fields).latents_per_layer,
            gflops=flops / 1e9,
            milliseconds=timing.latency_ms,
            speedup=timing.speedup,
            implied_speedup=implied,
            share_of_implied=timing.speedup.median / implied,
            gflops_per_second=rate,
            share_of_product_rate=rate / product_rate,
            peak_memory_mb=peak,
            first_call_seconds=compilations.get(variant.name),
        )

    measured = [row(*each) for each in zip(variants, timings, peaks, strict=True)]
    return Table(cell.name, difference, rows, product_rate, measured)


def variant_flops(arguments: ThroughputArguments, cell: Cell, variant: Variant) -> int:
    """FLOPs of a variant's turn."""
    config = arguments.model.config(**variant.fields)
    cost = forward_cost(config, cell.input_shape, arguments.model.architecture)
    return step_flops(cost, arguments.training, variant.checkpointing)


def as_markdown(table: Table) -> str:
    """A heading, the variants, and what the machine does of matrix products."""
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
            f"{row.speedup.median:.2f}",
            f"{row.speedup.lower:.2f} to {row.speedup.upper:.2f}",
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


def draw(tables: list[Table], path: Path) -> None:
    """A panel for each cell: the speed-up of each variant, and the one that its FLOPs imply."""
    longest = max(len(table.rows) for table in tables)
    figure, panels = plt.subplots(
        1, len(tables), figsize=(3 + 4 * len(tables), 1.5 + 0.3 * longest), squeeze=False, layout="constrained"
    )
    for axes, table in zip(panels[0], tables, strict=True):
        for place, row in enumerate(table.rows):
            speedup = row.speedup
            error = [[speedup.median - speedup.lower], [speedup.upper - speedup.median]]
            color, label = _color_and_label(row.name)
            axes.errorbar(speedup.median, place, xerr=error, fmt="o", color=color, label=label, **POINTS)
        implied = [row.implied_speedup for row in table.rows]
        axes.plot(implied, range(len(implied)), "|", color="black", markersize=12, label="all that its FLOPs imply")
        axes.axvline(1, color="lightgray", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(table.rows)), [row.name for row in table.rows], fontsize=9)
        axes.set(title=table.cell, xlabel="times as fast as stock, median and quartiles", xlim=(0, None))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    add_legend(figure, panels[0], columns=4)
    save_picture(figure, path)


def _color_and_label(name: str) -> tuple[Any, str]:
    """Of a row by its name, as in all pictures."""
    if name.startswith(STOCK):
        return picture_style.STOCK, "stock"
    return (picture_style.UNMERGED, "unmerged") if name.startswith("r = 0") else (MERGED(0.75), "merged")


def redraw(folder: Path) -> Path:
    """Draw the picture anew from the `throughput.json` in a folder, and return where it is."""
    report = json.loads((folder / "throughput.json").read_text())
    tables = []
    for cell in report["cells"]:
        rows = [read_back(Row, Quartiles, row) for row in cell.pop("rows")]
        tables.append(Table(**cell, rows=rows))
    draw(tables, folder / PICTURE)
    return folder / PICTURE


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", ThroughputArguments)
    # All that can be wrong with the arguments shows here, before any model is built.
    cells = arguments.cells()
    arguments.use_device()
    tables: list[Table] = []
    for cell in cells:
        tables.append(measure(arguments, cell))
        # After each cell, so that a stop in a long one leaves what was measured before.
        figures = {"cells": [asdict(each) for each in tables]}
        text = write_results(arguments, "throughput", figures, map(as_markdown, tables))
        draw(tables, Path(arguments.output_dir) / PICTURE)
    print(text, end="")
    print(f"written to {arguments.output_dir}: throughput.json, throughput.md and {PICTURE}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
