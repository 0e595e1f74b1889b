# SPDX-License-Identifier: Apache-2.0
"""Measure how much time each part of a merged forward pass takes, matching and merging among them.

Hooks on the modules, and wrappers around the functions that match and merge, charge the time to the innermost part that
is running, so the times of all parts sum to the time of the pass. On a GPU the clock synchronises with the device
whenever a part begins or ends. Each round also times a pass without the clock, which shows what the clock costs. The
time of a part is the median over the rounds. The models have the published shapes and random weights.

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

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import layers_tome_perceiver
from benchmarks.published_models import DTYPES
from benchmarks.speed_rows import Cell, SpeedArguments, Table, format_quartiles, run_cells
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
"""Parts of a pass: six within the self-attention layers, then the encoder's cross-attention layer, the decoder, and the
rest, which is preprocessing, residuals and Python overhead."""


@dataclass
class BreakdownArguments(SpeedArguments):
    """Settings of this benchmark."""

    defaults: ClassVar[dict[str, Any]] = {"batch_size": [8], "r": [0, 8, 16], "flops_ratio": [0.325], "rounds": 10}
    small_defaults: ClassVar[dict[str, Any]] = {"batch_size": [1], "r": [0, 8, 16], "flops_ratio": [0.4], "rounds": 5}

    output_dir: str = field(default="outputs/breakdown", metadata={"help": "Output folder."})


class PartClock:
    """Stopwatch that charges each moment of one pass to the innermost part that is running.

    Args:
        synchronize: waits for the device; called whenever a part begins or ends.
    """

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronize = synchronize
        self._entered = [REST]
        self._since = self._now()

    def enter(self, part: str) -> None:
        """Begin a part: charge time to it from now on."""
        self.charge()
        self._entered.append(part)

    def leave(self) -> None:
        """End the innermost part: charge time to the part around it from now on."""
        self.charge()
        self._entered.pop()

    def charge(self) -> None:
        """Charge the time since the last change to the running part."""
        now = self._now()
        self.seconds[self._entered[-1]] += now - self._since
        self._since = now

    def charge_calls(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that the time of its calls is charged to a part."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.enter(part)
            result = function(*arguments, **keywords)
            self.leave()
            return result

        return call

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


def list_module_parts(model: ToMePerceiverPreTrainedModel) -> list[tuple[nn.Module, str]]:
    """List the modules that are timed, each with its part."""
    base = model.base_model
    parts: list[tuple[nn.Module, str]] = [(base.encoder.cross_attention, CROSS_ATTENTION), (base.decoder, DECODER)]
    for layer in base.encoder.self_attends:
        attention = layer.attention.self
        parts += [(attention, ATTENTION), (layer.mlp, MLP), (layer.layernorm, NORMS), (attention.layernorm1, NORMS)]
        parts += [(each, PROJECTIONS) for each in (attention.query, attention.key, attention.value)]
        parts.append((layer.attention.output, PROJECTIONS))
    return parts


@contextmanager
def charge_parts(model: ToMePerceiverPreTrainedModel, clock: PartClock) -> Iterator[None]:
    """Charge the model's forward passes to their parts while the context lasts."""

    def matchers(*arguments: Any) -> list[MatchLatents | None]:
        return [None if each is None else clock.charge_calls(MATCHING, each) for each in layer_matchers(*arguments)]

    layers = layers_tome_perceiver
    layer_matchers = layers.layer_matchers
    with ExitStack() as stack:
        for module, part in list_module_parts(model):
            stack.callback(module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part)).remove)
            stack.callback(module.register_forward_hook(lambda *_: clock.leave()).remove)
        for name, function in (
            ("layer_matchers", matchers),
            # Fixed groups are turned into tensors before the layers run.
            ("match_groups", clock.charge_calls(MATCHING, layers.match_groups)),
            ("merge_latents", clock.charge_calls(MERGING, layers.merge_latents)),
            # Adding the log of the sizes to the attention scores is needed only because latents merged.
            ("latent_bias", clock.charge_calls(MERGING, layers.latent_bias)),
        ):
            stack.enter_context(patch.object(layers, name, function))
        yield


@dataclass(frozen=True)
class Row:
    """Figures of one merging setting."""

    name: str
    latents_per_layer: list[int]  # left after each layer; the decoder reads the last of them
    milliseconds: Quartiles  # of a pass without the clock
    part_milliseconds: dict[str, float]  # by part, in a pass with the clock
    part_shares: dict[str, float]  # of the sum of `part_milliseconds`
    matching_and_merging_share: Quartiles  # quartiles over the rounds
    matching_flops_share: float  # of the FLOPs of the pass


def measure(arguments: BreakdownArguments, cell: Cell) -> Table:
    """Time one cell: in each round, every setting runs once without the clock and once with it."""
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
        with charge_parts(model, clock):
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
    """Return a heading and a table with the share of each part, one row for each setting."""
    columns = ["", "ms", "with the clock", *PARTS, "matching and merging", "matching, of the FLOPs"]
    cells = [
        (
            row.name,
            f"{row.milliseconds.median:.4g}",
            f"{sum(row.part_milliseconds.values()):.4g}",
            *(f"{row.part_shares[part]:.1%}" for part in PARTS),
            "{} ({})".format(*format_quartiles(row.matching_and_merging_share, ".1%")),
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
