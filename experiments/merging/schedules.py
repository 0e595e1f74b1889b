# SPDX-License-Identifier: Apache-2.0
"""Schedules: how merging is spread over the layers.

A schedule is a family with one parameter, its strength: at 0 nothing merges, at 1 as much as its shape allows. A budget
(`experiments.merging.budget`) becomes the weakest member that keeps to it, always as an explicit list, one entry a
layer.

Letters: N latents, L self-attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import naming
from merging_tome_perceiver import check_merge_method

Schedule = Callable[[int, int, float], list[float]]
"""From N, L and a strength to the latents that are left after each of the L layers, not yet whole numbers."""

Fields = dict[str, Any]
"""Fields of a config, all that decide what merges."""

Family = Callable[[float], Fields]
"""From a strength to a member."""

CostRatio = Callable[[Fields], float]
"""From a member to its cost, as a share of the unmerged model's."""

UNMERGED: Fields = {"r": 0, "r_inflection": 0.0, "merge_groups": None}
"""Fields of a config that merges nothing; with another r, of one that merges by that and by nothing else."""

BISECTIONS = 40
STAGES = 3


def constant(latents: int, layers: int, strength: float) -> list[float]:
    """The same number in every layer, as the source paper: at the end, few are left however small the savings."""
    r = strength * latents / 2
    return [latents - r * (layer + 1) for layer in range(layers)]


def linear(latents: int, layers: int, strength: float) -> list[float]:
    """From 2r in the first layer down to none in the last (Bolya et al., 2023, appendix D: inflection -1)."""
    r = strength * latents / 2
    falling = [2 * r * (1 - layer / max(layers - 1, 1)) for layer in range(layers)]
    return [latents - sum(falling[: layer + 1]) for layer in range(layers)]


def floor(latents: int, layers: int, strength: float) -> list[float]:
    """As many as possible from the first layer on, down to a number that then stays."""
    return [latents ** (1 - strength)] * layers


def geometric(latents: int, layers: int, strength: float) -> list[float]:
    """The same share of what is left in every layer."""
    return [latents * (1 - strength / 2) ** (layer + 1) for layer in range(layers)]


def staged(latents: int, layers: int, strength: float) -> list[float]:
    """The same share at the first layer and after each third of the others: three matchings only."""
    return [latents * (1 - strength / 2) ** (1 + layer * STAGES // layers) for layer in range(layers)]


DEFAULT_SCHEDULE = "floor"
SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "floor": floor,
    "geometric": geometric,
    "staged": staged,
}
SKIP_BLOCKS = "skip_blocks"
"""A control: nothing merges, and weight-shared blocks run fewer times."""


def whole_schedule(latents: int, left_after: Sequence[float], min_latents: int = 1) -> list[int]:
    """Latents to remove in each layer so that about as many are left as asked, at least `min_latents`, at least half of
    each."""
    removed, left = [], latents
    for wanted in left_after:
        removed.append(max(0, min(left - max(min_latents, round(wanted)), left // 2)))
        left -= removed[-1]
    return removed


def family_of(config: ToMePerceiverConfig, left_after: Callable[[float], Sequence[float]], num_blocks: int) -> Family:
    """The members of a schedule as fields of a config.

    Args:
        config: of the model; its `min_latents` are always left.
        left_after: from a strength to the latents that are left after each layer of so many blocks.
        num_blocks: blocks that run.
    """

    def member(strength: float) -> Fields:
        r = whole_schedule(config.num_latents, left_after(strength), config.min_latents)
        return UNMERGED | {"r": r, "num_blocks": num_blocks}

    return member


def named_family(config: ToMePerceiverConfig, name: str) -> Family:
    """The members of the schedule called `name`, of `SCHEDULES` or `SKIP_BLOCKS`, for this model."""
    layers = config.num_self_attention_layers
    if name != SKIP_BLOCKS:
        return family_of(
            config, lambda strength: SCHEDULES[name](config.num_latents, layers, strength), config.num_blocks
        )

    def fewer_blocks(strength: float) -> Fields:
        num_blocks = max(1, round(config.num_blocks * (1 - strength)))
        return UNMERGED | {"r": [0] * (num_blocks * config.num_self_attends_per_block), "num_blocks": num_blocks}

    return fewer_blocks


def weakest_member(family: Family, ratio: float, cost_ratio: CostRatio) -> Fields | None:
    """The weakest member that costs at most a share of the unmerged model's cost; `None` if the strongest costs more.

    Args:
        family: whose cost falls as the strength rises.
        ratio: the share.
        cost_ratio: of a member.
    """
    if cost_ratio(family(0.0)) <= ratio:
        return family(0.0)
    if cost_ratio(family(1.0)) > ratio:
        return None
    weak, strong = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (weak + strong) / 2
        weak, strong = (weak, middle) if cost_ratio(family(middle)) <= ratio else (middle, strong)
    return family(strong)


def unmerged_fields(config: ToMePerceiverConfig) -> Fields:
    """The fields with which this model merges nothing and runs all of its blocks."""
    return UNMERGED | {"num_blocks": config.num_blocks}


def apply_merging(config: ToMePerceiverConfig, fields: Fields) -> None:
    """Set merging fields on a config and check what they mean together.

    Raises:
        BadInput: naming the field, the value and what is allowed.
    """
    for name, value in fields.items():
        setattr(config, name, value)
    with naming("merging", ValueError):
        config.check_merging()
        check_merge_method(config.merge_method)
