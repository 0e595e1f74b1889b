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
from dataclasses import asdict, dataclass, field, replace
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
from benchmarks.speed_rows import Cell, Fields, SpeedArguments, write_results
from cost_tome_perceiver import Merging, forward_cost
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
    """What runs, and how."""

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
        """From here on time is this part's."""
        self._charge()
        self._entered.append(part)

    def leave(self) -> None:
        """From here on time is that of the part around the one that was entered last."""
        self._charge()
        self._entered.pop()

    def stop(self) -> None:
        """Charge what went by since the last border."""
        self._charge()

    def charging(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls are this part."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.enter(part)
            try:
                return function(*arguments, **keywords)
            finally:
                self.leave()

        return call

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self._entered[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


def module_parts(model: ToMePerceiverPreTrainedModel) -> list[tuple[nn.Module, str]]:
    """The modules that are parts."""
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
    """Inside, a pass of the model is charged to its parts; afterwards all is as before."""

    def enter(part: str) -> Callable[..., None]:
        return lambda module, arguments: clock.enter(part)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        clock.leave()

    def matchers(*arguments: Any) -> list[MatchLatents | None]:
        return [None if each is None else clock.charging(MATCHING, each) for each in layer_matchers(*arguments)]

    layer_matchers = layers_tome_perceiver.layer_matchers
    latent_bias = clock.charging(MERGING, layers_tome_perceiver.latent_bias)
    with ExitStack() as stack:
        for module, part in module_parts(model):
            stack.callback(module.register_forward_pre_hook(enter(part)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for owner, name, function in (
            (layers_tome_perceiver, "layer_matchers", matchers),
            # Fixed groups become tensors before the layers run.
            (layers_tome_perceiver, "match_groups", clock.charging(MATCHING, layers_tome_perceiver.match_groups)),
            (layers_tome_perceiver, "merge_latents", clock.charging(MERGING, layers_tome_perceiver.merge_latents)),
            # The log of the sizes, which only what was merged needs.
            (layers_tome_perceiver, "latent_bias", latent_bias),
        ):
            stack.enter_context(patch.object(owner, name, function))
        yield


@dataclass(frozen=True)
class Breakdown:
    """What a setting took.

    Attributes:
        name: of the setting.
        latents_per_layer: left after each layer; the decoder reads the last of them.
        milliseconds: of a pass without the clock.
        part_milliseconds: of each of `PARTS` in a pass with it.
        part_shares: of their sum.
        matching_and_merging_share: the share of these two in each round.
        matching_flops_share: of the FLOPs of the pass.
    """

    name: str
    latents_per_layer: list[int]
    milliseconds: Quartiles
    part_milliseconds: dict[str, float]
    part_shares: dict[str, float]
    matching_and_merging_share: Quartiles
    matching_flops_share: float


def measure(arguments: BreakdownArguments, cell: Cell) -> list[Breakdown]:
    """Run the rounds of one cell, in which every setting runs once without the clock and once with it."""
    published, dtype = arguments.model, DTYPES[cell.dtype]
    model = published.build_merging(published.build_stock(arguments.seed, dtype, arguments.device))
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
            clock.stop()
        charges[name].append(clock.seconds)

    plain = [(name, False) for name in cell.settings]
    variants = [*plain, *((name, True) for name in cell.settings)]
    with torch.inference_mode():
        timings = time_interleaved(run, variants, variants[0], rounds=arguments.rounds or 1, desc=cell.name)
    return [
        # The first round is warm-up.
        breakdown(arguments, cell, name, timing.latency_ms, charges[name][1:])
        for (name, _), timing in zip(plain, timings, strict=False)
    ]


def breakdown(
    arguments: BreakdownArguments, cell: Cell, name: str, plain_ms: Quartiles, rounds: list[dict[str, float]]
) -> Breakdown:
    """The rounds of one setting as the figures that are reported."""
    fields: Fields = cell.settings[name]
    config = arguments.model.config(**fields)
    cost = forward_cost(config, cell.input_shape, arguments.model.architecture)
    milliseconds = {part: 1e3 * float(np.median([each[part] for each in rounds])) for part in PARTS}
    whole = sum(milliseconds.values())
    overhead = [(each[MATCHING] + each[MERGING]) / sum(each.values()) for each in rounds]
    return Breakdown(
        name=name,
        latents_per_layer=config.latents_per_layer,
        milliseconds=plain_ms,
        part_milliseconds=milliseconds,
        part_shares={part: spent / whole for part, spent in milliseconds.items()},
        matching_and_merging_share=Quartiles.of(np.array(overhead)),
        matching_flops_share=sum(cost.matching) / cost.total_with_matching,
    )


def as_markdown(cell: Cell, breakdowns: list[Breakdown]) -> str:
    """A heading and a table of shares, a line for each setting."""
    columns = ["", "ms", "with the clock", *PARTS, "matching and merging", "matching, of the FLOPs"]

    def cells(each: Breakdown) -> list[str]:
        overhead = each.matching_and_merging_share
        return [
            each.name,
            f"{each.milliseconds.median:.4g}",
            f"{sum(each.part_milliseconds.values()):.4g}",
            *(f"{each.part_shares[part]:.1%}" for part in PARTS),
            f"{overhead.median:.1%} ({overhead.lower:.1%} to {overhead.upper:.1%})",
            f"{each.matching_flops_share:.2%}",
        ]

    return f"## {cell.name}\n\n{markdown_table(columns, map(cells, breakdowns), 'lr')}\n"


def main() -> None:
    (arguments,) = parse_arguments(__doc__ or "", BreakdownArguments)
    # All that can be wrong with the arguments shows here, before any model is built.
    cells = arguments.cells()
    arguments.use_device()
    measured = [(cell, measure(arguments, cell)) for cell in cells]
    cells_measured = [{"cell": cell.name, "rows": [asdict(each) for each in rows]} for cell, rows in measured]
    tables = [as_markdown(*each) for each in measured]
    print(write_results(arguments, "breakdown", {"cells": cells_measured}, tables), end="")
    print(f"written to {arguments.output_dir}: breakdown.json and breakdown.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
