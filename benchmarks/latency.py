# SPDX-License-Identifier: Apache-2.0
"""Measure the latency of single requests of mixed lengths, each with its own merging setting.

A model of the published shapes with random weights answers a stream of requests. Each request has a random length from
--length and a random merging setting, which applies to its call alone (`model(inputs, r=...)`): r latents merged in
every layer, or a schedule that keeps to a share of the FLOPs. Every variant answers every request, in an order that
rotates, so that a slow phase of the machine slows all variants. The variants are stock, each setting used for all
requests, and `changing`, which uses each request's own setting. Reported are the 50th and the 99th percentile of the
latency and the requests per second, served one after another.

In a real service, requests arrive at random and wait for earlier ones. So the measured times also go through a
simulated queue with one server: requests arrive as a Poisson process at 0.7 times the rate that stock can serve, at the
same moments for every variant. The percentiles of the queue are of waiting plus service time.

    python benchmarks/latency.py --small                                           # two minutes on two cores
    python benchmarks/latency.py --dtype bfloat16 --requests 100 --output_dir out
    python benchmarks/latency.py --small --compile --length 128
    python benchmarks/latency.py --device cuda --dtype bfloat16 --compile --requests 1000

By default --batch_size 1 --length 32 128 512 2048 --r 0 4 8 16 --flops_ratio 0.325 --requests 200. Images have no
--length. With --small, 6 layers of the published widths, --r 0 8 32 --flops_ratio 0.5 --requests 100. OUTPUT_DIR gets
latency.json, latency.md and latency.png.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import speed_rows
from benchmarks.published_models import DTYPES, check_outputs
from benchmarks.speed_rows import Cell, SpeedArguments, format_quartiles, write_results
from experiments.command_line import parse_arguments
from experiments.errors import BadInput, exit_on_bad_input
from experiments.measurement import Quartiles
from experiments.publishing import picture_style
from experiments.publishing.picture_style import CONTROL, MERGED, add_legend, save_picture, shades
from experiments.publishing.tables import markdown_table

STOCK, UNMERGED, CHANGING, COMPILED = "stock", "r = 0", "changing", ", layers compiled"
PERCENTILES = (50, 99)
LOAD = 0.7
"""Arrival rate at the simulated queue, as a share of the rate that stock can serve."""


@dataclass
class LatencyArguments(SpeedArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {
        "batch_size": [1], "r": [0, 4, 8, 16], "flops_ratio": [0.325], "requests": 200
    }  # fmt: skip
    small_defaults: ClassVar[dict[str, Any]] = {
        "batch_size": [1], "r": [0, 8, 32], "flops_ratio": [0.5], "requests": 100
    }  # fmt: skip

    requests: int | None = field(default=None, metadata={"help": "Number of requests in the stream (see above)."})
    compile: bool = field(
        default=False,
        metadata={"help": "Also time each variant with compiled self-attention layers (compile_repeated_blocks)."},
    )
    output_dir: str = field(default="outputs/latency", metadata={"help": "Output folder."})

    def __post_init__(self) -> None:
        if self.length is None and self.shapes == "language":
            self.length = [32, 128, 512, 2048]
        super().__post_init__()
        if self.rounds is not None:
            raise BadInput(f"--rounds {self.rounds}: does not apply here; use --requests")
        if self.requests is None or self.requests < 1:
            raise BadInput(f"--requests {self.requests}: must be 1 or more")

    def streams(self) -> list[list[Cell]]:
        """Group the cells by dtype and batch size; one stream mixes all lengths of a group."""
        return [list(cells) for _, cells in groupby(self.cells(), key=lambda cell: (cell.dtype, cell.input_shape[0]))]

    def described(self) -> dict[str, Any]:
        described = super().described() | {"lengths": self.length or "one size of images", "load": LOAD}
        return described | {"rounds": f"{self.requests} requests, after one warm-up request of each length and setting"}


@dataclass(frozen=True)
class Request:
    """One input, and the merging settings that may apply to it."""

    inputs: Tensor  # (B, S) or (B, 3, height, width)
    settings: dict[str, int | list[int]]  # the argument r of the call, by name of the setting
    asks: str  # name of the setting that this request uses in the variant `changing`


@dataclass(frozen=True)
class Variant:
    """A model that answers requests."""

    name: str
    model: PreTrainedModel  # stock or ours
    setting: str | None  # name; `CHANGING` for each request's own, `None` for stock

    def answer(self, request: Request) -> None:
        """Run a forward pass, and wait for the device."""
        called = {}
        if self.setting is not None:
            called["r"] = request.settings[request.asks if self.setting == CHANGING else self.setting]
        with torch.inference_mode():
            self.model(inputs=request.inputs, **called)
        if request.inputs.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of a variant."""

    name: str
    milliseconds: list[float]  # 50th and 99th percentile
    requests_per_second: float  # served one after another
    speedup: Quartiles  # stock's time over this variant's for the same request
    queued_milliseconds: list[float]  # 50th and 99th percentile of waiting plus service time
    busy: float  # share of the time in which the server of the queue is busy


@dataclass(frozen=True)
class Stream:
    """Figures of a stream."""

    stream: str
    # Longest warm-up request, compilation included, for eager and for compiled layers.
    warm_up_seconds: dict[str, float]
    # Cost of changing r between requests, for eager and for compiled layers: time of a request in the variant
    # `changing` over its time in the variant that uses the same r for all requests.
    change: dict[str, Quartiles]
    rows: list[Row]


def draw_requests(arguments: LatencyArguments, cells: Sequence[Cell]) -> list[Request]:
    """Draw one warm-up request of each length and setting, then the stream."""
    published, generator = arguments.model, np.random.default_rng(0)
    # Fixed groups cannot be given as `r` of a call, so they are left out.
    settings = [{name: fields["r"] for name, fields in cell.settings.items() if "r" in fields} for cell in cells]
    every = [(place, name) for place, names in enumerate(settings) for name in names]
    drawn = generator.integers(len(every), size=arguments.requests)
    return [
        Request(
            published.draw_inputs(cells[place].input_shape, DTYPES[cells[place].dtype], arguments.device),
            settings[place],
            name,
        )
        for place, name in [*every, *(every[index] for index in drawn)]
    ]


def build_variants(arguments: LatencyArguments, stock: PreTrainedModel, settings: Sequence[str]) -> list[Variant]:
    """Build stock, our model with each setting and with changing settings; with --compile, ours again compiled."""
    variants = [Variant(STOCK, stock, None)]
    for ending in ("", COMPILED) if arguments.compile else ("",):
        model = arguments.model.build_merging(stock)
        if ending:
            model.compile_repeated_blocks(backend=speed_rows.COMPILE_BACKEND)
        variants += [Variant(f"{name}{ending}", model, name) for name in [*settings, CHANGING]]
    return variants


def answer_all(variants: Sequence[Variant], requests: Sequence[Request], bar: tqdm) -> np.ndarray:
    """Return the seconds of each answer, as an array (requests, variants)."""
    seconds = np.zeros((len(requests), len(variants)))
    for index, request in enumerate(requests):
        for offset in range(len(variants)):
            turn = (index + offset) % len(variants)
            start = time.perf_counter()
            variants[turn].answer(request)
            seconds[index, turn] = time.perf_counter() - start
        bar.update()
    return seconds


def queued_seconds(service: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Return the waiting plus service time of each request at one server that takes requests in order.

    Args:
        service: (requests,), service time in seconds.
        gaps: (requests,), seconds since the arrival of the previous request.
    """
    waited, taken = 0.0, []
    for index, seconds in enumerate(service):
        # The previous request arrived `gaps[index]` ago, and leaves after its own waiting and service time.
        waited = max(0.0, taken[-1] - gaps[index]) if index else 0.0
        taken.append(waited + seconds)
    return np.array(taken)


def measure(arguments: LatencyArguments, cells: Sequence[Cell]) -> tuple[Stream, dict[str, np.ndarray]]:
    """Time one stream.

    Returns:
        The table, and the milliseconds of each request by name of the variant.
    """
    dtype = DTYPES[cells[0].dtype]
    stock = arguments.model.build_stock(dtype, arguments.device)
    requests = draw_requests(arguments, cells)
    check_outputs(stock, arguments.model.build_merging(stock), requests[0].inputs)
    variants = build_variants(arguments, stock, list(requests[0].settings))
    name = f"{cells[0].dtype}, batch {cells[0].input_shape[0]}"
    # Warm-up needs one variant of each model, because the variants of our model share it.
    warming = [variant for variant in variants if variant.setting in (None, CHANGING)]
    torch.compiler.reset()
    with tqdm(total=len(requests), desc=name) as bar:
        warm_up = answer_all(warming, requests[: -arguments.requests], bar).max(axis=0)
        seconds = answer_all(variants, requests[-arguments.requests :], bar)

    gaps = np.random.default_rng(0).exponential(seconds[:, 0].mean() / LOAD, len(seconds))
    rows = [
        Row(
            name=variant.name,
            milliseconds=list(1e3 * np.percentile(own, PERCENTILES)),
            requests_per_second=1 / own.mean(),
            speedup=Quartiles.of(seconds[:, 0] / own),
            queued_milliseconds=list(1e3 * np.percentile(queued_seconds(own, gaps), PERCENTILES)),
            busy=own.mean() / gaps.mean(),
        )
        for variant, own in zip(variants, seconds.T, strict=True)
    ]
    places = {(variant.model, variant.setting): index for index, variant in enumerate(variants)}
    change = {}
    for variant in warming[1:]:
        kept = [places[variant.model, request.asks] for request in requests[-arguments.requests :]]
        same = seconds[np.arange(len(seconds)), kept]
        change[variant.name] = Quartiles.of(seconds[:, places[variant.model, CHANGING]] / same)
    first = {variant.name: float(most) for variant, most in zip(warming, warm_up, strict=True)}
    milliseconds = {variant.name: 1e3 * seconds[:, index] for index, variant in enumerate(variants)}
    return Stream(name, first, change, rows), milliseconds


def as_markdown(table: Stream) -> str:
    """Return a heading, a table of the variants, and the cost of changing r between requests."""
    columns = ["", "p50, ms", "p99, ms", "requests/s", "times stock", "quartiles"]
    columns += ["queued: p50, ms", "p99, ms", "server busy"]

    rows = [
        (
            row.name,
            *(f"{each:.4g}" for each in row.milliseconds),
            f"{row.requests_per_second:.3g}",
            *format_quartiles(row.speedup),
            *(f"{each:.4g}" for each in row.queued_milliseconds),
            f"{row.busy:.0%}",
        )
        for row in table.rows
    ]
    change = "; ".join(
        "{}: {} ({})".format(name, *format_quartiles(times, ".3f")) for name, times in table.change.items()
    )
    first = "; ".join(f"{name}: {seconds:.2f}" for name, seconds in table.warm_up_seconds.items())
    return f"""## {table.stream}

{markdown_table(columns, rows, "lr")}

Time of a request whose r changes from request to request, over its time with the same r for all requests, median and \
quartiles: {change}. Longest warm-up request, in seconds: {first}.
"""


def draw(streams: Sequence[tuple[Stream, dict[str, np.ndarray]]], path: Path) -> None:
    """Draw the cumulative distribution of the latency, one panel for each stream."""
    figure, panels = plt.subplots(
        1, len(streams), figsize=(6.5 * len(streams), 4.5), squeeze=False, constrained_layout=True
    )
    for axes, (table, milliseconds) in zip(panels[0], streams, strict=True):
        kinds = {name: name.removesuffix(COMPILED) for name in milliseconds}
        merged = list(dict.fromkeys(kind for kind in kinds.values() if kind not in (STOCK, UNMERGED, CHANGING)))
        colors = {STOCK: picture_style.STOCK, UNMERGED: picture_style.UNMERGED, CHANGING: CONTROL(0.7)}
        colors |= zip(merged, shades(MERGED, len(merged)), strict=True)
        for name, taken in milliseconds.items():
            share, style = np.arange(1, len(taken) + 1) / len(taken), "-" if kinds[name] == name else "--"
            axes.step(np.sort(taken), share, style, color=colors[kinds[name]], label=name, where="post")
        axes.axhline(0.99, color="lightgray", linewidth=0.8)
        axes.set(title=table.stream, xlabel="ms from the call to the answer", ylabel="share of the requests")
        axes.grid(alpha=0.3)
    add_legend(figure, panels[0], columns=4)
    save_picture(figure, path)


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", LatencyArguments)
    measured = [measure(arguments, cells) for cells in arguments.streams()]
    tables = [table for table, _ in measured]
    figures = {"percentiles": PERCENTILES, "streams": [asdict(table) for table in tables]}
    print(write_results(arguments, "latency", figures, map(as_markdown, tables), partial(draw, measured)))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
