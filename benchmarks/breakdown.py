# SPDX-License-Identifier: Apache-2.0
"""Where the time of a merged forward pass goes, and what of it matching and merging take.

A clock changes hands at the borders of the parts: hooks on the modules, and the functions that match and merge, wrapped
from outside; what is inside a part and is a part itself counts there alone, so the parts are of the whole pass and sum
to it. On a GPU the clock waits at every border until the device is done, so that the parts are the device's; a pass
without the clock, timed in the same rounds, stands beside their sum. A part's time is the median over the rounds. The
models have the published shapes and random weights.

    python benchmarks/breakdown.py --small
    python benchmarks/breakdown.py --batch_size 1 8 --rounds 5
    python benchmarks/breakdown.py --device cuda --dtype bfloat16 --shapes vision --batch_size 32

By default --batch_size 8 --r 0 8 16 --flops_ratio 0.325 --rounds 10. With --small, 6 layers of the published widths,
--batch_size 1 --flops_ratio 0.4 --rounds 5. OUTPUT_DIR gets breakdown.json and breakdown.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import layers_tome_perceiver
from benchmarks.published_models import DTYPES
from benchmarks.speed_rows import Cell, SpeedArguments, Table, run_cells, spread
from cost_tome_perceiver import Merging
from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.measurement import Quartiles, time_interleaved
from experiments.publishing.tables import markdown_table
from layers_tome_perceiver import MatchLatents
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

CROSS_ATTENTION, DECODER = "cross-attention", "decoder"
PROJECTIONS, ATTENTION, MLP, NORMS = "projections", "attention products", "MLP", "layer norms"
MATCHING, MERGING, REST = "matching", "merging", "the rest"
PARTS = (PROJECTIONS, ATTENTION, MLP, NORMS, MATCHING, MERGING, CROSS_ATTENTION, DECODER, REST)
"""The parts of a pass: six of the self-attention layers, the encoder's cross-attention layer and the decoder as wholes,
and the rest, which is the preprocessing, the residuals, and Python between the parts."""


@dataclass
class BreakdownArguments(SpeedArguments):
    """Settings of this benchmark."""

    usual: ClassVar[dict[str, Any]] = {"batch_size": [8], "r": [0, 8, 16], "flops_ratio": [0.325], "rounds": 10}
    reduced: ClassVar[dict[str, Any]] = {"batch_size": [1], "r": [0, 8, 16], "flops_ratio": [0.4], "rounds": 5}

    output_dir: str = field(default="outputs/breakdown", metadata={"help": "Where the results go."})


class PartClock:
    """Seconds of each part of one pass: at any time one part, the innermost that was entered, is running.

    Args:
        synchronize: waits for the device; called at every border.
    """

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronize = synchronize
        self._entered = [REST]
        self._since = self._now()

    def enter(self, part: str) -> None:
        """Charge a part from here on."""
        self.charge()
        self._entered.append(part)

    def leave(self) -> None:
        """Charge the part around the one that was entered last from here on."""
        self.charge()
        self._entered.pop()

    def charge(self) -> None:
        """Charge what went by since the last border."""
        now = self._now()
        self.seconds[self._entered[-1]] += now - self._since
        self._since = now

    def charging(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` such that its calls are charged to a part."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.enter(part)
            result = function(*arguments, **keywords)
            self.leave()
            return result

        return call

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


def module_parts(model: ToMePerceiverPreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Return the modules that are parts."""
    base = model.base_model
    parts: list[tuple[nn.Module, str]] = [(base.encoder.cross_attention, CROSS_ATTENTION), (base.decoder, DECODER)]
    for layer in base.encoder.self_attends:
        attention = layer.attention.self
        parts += [(attention, ATTENTION), (layer.mlp, MLP), (layer.layernorm, NORMS), (attention.layernorm1, NORMS)]
        parts += [(each, PROJECTIONS) for each in (attention.query, attention.key, attention.value)]
        parts.append((layer.attention.output, PROJECTIONS))
    return parts


@contextmanager
def charged(model: ToMePerceiverPreTrainedModel, clock: PartClock) -> Iterator[None]:
    """Charge passes of the model inside to their parts."""

    def matchers(*arguments: Any) -> list[MatchLatents | None]:
        return [None if each is None else clock.charging(MATCHING, each) for each in layer_matchers(*arguments)]

    layers = layers_tome_perceiver
    layer_matchers = layers.layer_matchers
    with ExitStack() as stack:
        for module, part in module_parts(model):
            stack.callback(module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part)).remove)
            stack.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        for name, function in (
            ("layer_matchers", matchers),
            # Fixed groups become tensors before the layers run.
            ("match_groups", clock.charging(MATCHING, layers.match_groups)),
            ("merge_latents", clock.charging(MERGING, layers.merge_latents)),
            # The log of the sizes, which only what was merged needs.
            ("latent_bias", clock.charging(MERGING, layers.latent_bias)),
        ):
            stack.enter_context(patch.object(layers, name, function))
        yield


@dataclass(frozen=True)
class Row:
    """Figures of a setting."""

    name: str
    latents_per_layer: list[int]  # left after each layer; the decoder reads the last of them
    milliseconds: Quartiles  # time of a pass without the clock
    part_milliseconds: dict[str, float]  # time of each of `PARTS` in a pass with the clock
    part_shares: dict[str, float]  # shares of the sum of these times
    matching_and_merging_share: Quartiles  # the share of these two in each round
    matching_flops_share: float  # share of the pass's FLOPs


def measure(arguments: BreakdownArguments, cell: Cell) -> Table:
    """Run the rounds of one cell, in which every setting runs once without the clock and once with it."""
    published, dtype = arguments.model, DTYPES[cell.dtype]
    model = published.build_merging(published.build_stock(dtype, arguments.device))
    inputs = published.draw_inputs(cell.input_shape, dtype, arguments.device)
    synchronize = torch.cuda.synchronize if inputs.is_cuda else lambda: None
    unmerged = Merging.none(published.config())
    charges: dict[str, list[dict[str, float]]] = {name: [] for name in cell.settings}

    def run(variant: tuple[str, bool]) -> None:
        name, with_clock = variant
        replace(unmerged, **cell.settings[name]).apply(model.config)
        if not with_clock:
            model(inputs=inputs)
            return
        clock = PartClock(synchronize)
        with charged(model, clock):
            model(inputs=inputs)
            clock.charge()
        charges[name].append(clock.seconds)

    variants = [(name, with_clock) for with_clock in (False, True) for name in cell.settings]
    with torch.inference_mode():
        timings = time_interleaved(run, variants, variants[0], rounds=arguments.rounds or 1, desc=cell.name)
    rows = []
    for (name, fields), timing in zip(cell.settings.items(), timings, strict=False):
        config = published.config(**fields)
        cost = published.cost(cell.input_shape, **fields)
        rounds = charges[name][1:]  # the first round is warm-up
        milliseconds = {part: 1e3 * float(np.median([each[part] for each in rounds])) for part in PARTS}
        whole = sum(milliseconds.values())
        overhead = [(each[MATCHING] + each[MERGING]) / sum(each.values()) for each in rounds]
        rows.append(
            Row(
                name=name,
                latents_per_layer=config.latents_per_layer,
                milliseconds=timing.latency_ms,
                part_milliseconds=milliseconds,
                part_shares={part: spent / whole for part, spent in milliseconds.items()},
                matching_and_merging_share=Quartiles.of(np.array(overhead)),
                matching_flops_share=sum(cost.matching) / cost.total_with_matching,
            )
        )
    return Table(cell.name, rows)


def as_markdown(table: Table) -> str:
    """Return a heading and a table of shares, a line for each setting."""
    columns = ["", "ms", "with the clock", *PARTS, "matching and merging", "matching, of the FLOPs"]
    cells = [
        (
            row.name,
            f"{row.milliseconds.median:.4g}",
            f"{sum(row.part_milliseconds.values()):.4g}",
            *(f"{row.part_shares[part]:.1%}" for part in PARTS),
            "{} ({})".format(*spread(row.matching_and_merging_share, ".1%")),
            f"{row.matching_flops_share:.2%}",
        )
        for row in table.rows
    ]
    return f"## {table.cell}\n\n{markdown_table(columns, cells, 'lr')}\n"


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", BreakdownArguments)
    run_cells(arguments, "breakdown", measure, as_markdown)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
