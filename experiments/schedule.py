# SPDX-License-Identifier: Apache-2.0
"""From a budget of FLOPs to the latents that go in each layer, by a schedule of a given shape.

A schedule is a family with one parameter, its strength: at 0 nothing merges, at 1 as much as its shape allows. A budget
is resolved to the weakest member that keeps to it, always as an explicit list, one entry a layer.

Letters: N latents, L self-attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput
from experiments.cost import forward_cost

Schedule = Callable[[int, int, float], list[float]]
"""From N, L and a strength to the latents that are left after each of the L layers, not yet whole numbers."""

UNMERGED: dict[str, Any] = {"r": 0, "r_inflection": 0.0, "merge_groups": None}
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


def whole_schedule(latents: int, left_after: Sequence[float]) -> list[int]:
    """Latents to remove in each layer so that about as many are left as asked, at least one, at least half of each."""
    removed, left = [], latents
    for wanted in left_after:
        removed.append(max(0, min(left - max(1, round(wanted)), left // 2)))
        left -= removed[-1]
    return removed


def schedule_for_flops(
    config: ToMePerceiverConfig, flops_ratio: float, name: str, input_shape: Sequence[int], architecture: str
) -> list[int]:
    """The weakest member of a schedule that takes at most a share of the unmerged model's FLOPs.

    Args:
        config: of the model; its own merging does not count.
        flops_ratio: the share, of the whole forward pass with its matching.
        name: of the schedule, a key of `SCHEDULES`.
        input_shape: as `experiments.cost.forward_cost` takes it.
        architecture: name of the model class.

    Returns:
        What `config.r` takes: the latents to merge in each of the L layers.

    Raises:
        BadInput: for a schedule that is not there, or a share that it cannot come down to.
    """
    if name not in SCHEDULES:
        raise BadInput(f"--schedule {name}: allowed are {', '.join(sorted(SCHEDULES))}")
    layers = config.num_self_attention_layers

    def member(strength: float) -> list[int]:
        return whole_schedule(config.num_latents, SCHEDULES[name](config.num_latents, layers, strength))

    def flops(r: list[int]) -> int:
        changed = UNMERGED | {"r": r, "min_latents": 1}
        return forward_cost(
            type(config).from_dict(config.to_dict() | changed), input_shape, architecture
        ).total_with_matching

    budget = flops_ratio * flops([0] * layers)
    strongest = member(1.0)
    if not 0 < flops_ratio <= 1 or flops(strongest) > budget:
        least = flops(strongest) / flops([0] * layers)
        raise BadInput(
            f"--flops_ratio {flops_ratio}: allowed are {least:.3f}, where schedule {name} ends, to 1, no merging"
        )
    weak, strong = 0.0, 1.0
    if flops(member(weak)) <= budget:
        return member(weak)
    for _ in range(BISECTIONS):
        middle = (weak + strong) / 2
        weak, strong = (weak, middle) if flops(member(middle)) <= budget else (middle, strong)
    return member(strong)
