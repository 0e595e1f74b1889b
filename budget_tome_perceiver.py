# SPDX-License-Identifier: Apache-2.0
"""What merges, how it is spread over the layers, and how it comes down to a share of the unmerged model's cost.

A schedule is a family of `Merging` with one parameter, its strength: at 0 nothing merges, at 1 as much as its shape
allows. A budget becomes the weakest member that keeps to it, always as an explicit list of r, one entry a layer.

Letters: N latents, L self-attention layers.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

# As in the module of the layers, which says why.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig  # type: ignore[import-not-found]
    from .cost_tome_perceiver import forward_cost  # type: ignore[import-not-found]
    from .merging_tome_perceiver import check_merge_method  # type: ignore[import-not-found]
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from cost_tome_perceiver import forward_cost
    from merging_tome_perceiver import check_merge_method


@dataclass(frozen=True)
class Merging:
    """All that decides what merges, and how many of its weight-shared blocks a model runs: fields of its config.

    Attributes:
        r, r_inflection, min_latents, proportional_attention, merge_method, merge_metric, merge_groups, latent_groups,
            num_blocks: as `ToMePerceiverConfig` has them.
    """

    r: int | list[int]
    r_inflection: float
    min_latents: int
    proportional_attention: bool
    merge_method: str
    merge_metric: str
    merge_groups: list[list[int] | None] | None
    latent_groups: list[int] | None
    num_blocks: int

    @classmethod
    def of(cls, config: ToMePerceiverConfig) -> Merging:
        """What a config says."""
        return cls(**{field.name: copy.deepcopy(getattr(config, field.name)) for field in fields(cls)})

    @classmethod
    def none(cls, config: ToMePerceiverConfig) -> Merging:
        """Nothing merges and all blocks run; how it would merge stays as the config says."""
        return cls.of(config).by(0)

    def by(self, r: int | list[int], **changed: Any) -> Merging:
        """The same with this r and nothing else that merges.

        Args:
            r: latents merged in each layer.
            changed: other fields.
        """
        return replace(self, **{"r": r, "r_inflection": 0.0, "merge_groups": None, "latent_groups": None} | changed)

    def apply(self, config: ToMePerceiverConfig) -> None:
        """Set it on a config, whatever that merged before.

        Raises:
            ValueError: naming the field, the value and what is allowed; the config stays as it was.
        """
        before = {field.name: getattr(config, field.name) for field in fields(self)}
        try:
            for field in fields(self):
                setattr(config, field.name, copy.deepcopy(getattr(self, field.name)))
            config.check_merging()
            check_merge_method(config.merge_method)
        except ValueError:
            for name, value in before.items():
                setattr(config, name, value)
            raise

    @contextmanager
    def applied(self, config: ToMePerceiverConfig) -> Iterator[None]:
        """Merge so inside; after it, the config says what it said before.

        Raises:
            ValueError: as `apply`.
        """
        before = Merging.of(config)
        self.apply(config)
        try:
            yield
        finally:
            before.apply(config)

    def asked_of(self, config: ToMePerceiverConfig) -> ToMePerceiverConfig:
        """A copy of a config that merges so.

        Raises:
            ValueError: as `apply`.
        """
        asked = copy.copy(config)
        self.apply(asked)
        return asked

    def merges(self, config: ToMePerceiverConfig) -> bool:
        """Whether it changes anything of a model that runs all blocks of `config`."""
        asked = self.asked_of(config)
        return self.num_blocks != config.num_blocks or asked.latents_per_layer[-1] < config.num_latents

    def at_start(self, config: ToMePerceiverConfig) -> int:
        """How many latents read the inputs, in a model of this config."""
        return self.asked_of(config).latents_at_start

    @property
    def key(self) -> str:
        """The same for the same fields, in files and caches."""
        return json.dumps(asdict(self), sort_keys=True)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; after it, merging and mode are as they were, module by module."""
    before = Merging.of(model.config)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        before.apply(model.config)
        for module, mode in modes:
            module.training = mode


Schedule = Callable[[int, int, float], list[float]]
"""From N, L and a strength to the latents that are left after each of the L layers, not yet whole numbers."""

Family = Callable[[float], Merging]
"""From a strength to a member."""

CostRatio = Callable[[Merging], float]
"""From a merging to its cost, as a share of the unmerged model's."""

BISECTIONS = 30
# How many more of its latents a layer keeps when merging is postponed.
STEP = 1.25
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


def family_of(
    config: ToMePerceiverConfig, base: Merging, left_after: Callable[[float], Sequence[float]], num_blocks: int
) -> Family:
    """The members of a schedule.

    Args:
        config: of the model; its own merging does not count.
        base: how they merge; its `min_latents` are always left, and its `latent_groups` merge before the layers.
        left_after: from a strength to the latents that are left after each layer of so many blocks.
        num_blocks: blocks that run.
    """
    at_start = base.at_start(config)
    return lambda strength: base.by(
        whole_schedule(at_start, left_after(strength), base.min_latents),
        num_blocks=num_blocks,
        latent_groups=base.latent_groups,
    )


def named_family(config: ToMePerceiverConfig, name: str, base: Merging | None = None) -> Family:
    """The members of the schedule called `name`, of `SCHEDULES` or `SKIP_BLOCKS`, for this model.

    Args:
        config: of the model; its own merging does not count.
        name: of the schedule.
        base: how they merge; by default as the config says.
    """
    base, layers = base or Merging.none(config), config.num_self_attention_layers
    if name != SKIP_BLOCKS:
        schedule = SCHEDULES[name]
        at_start = base.at_start(config)
        return family_of(config, base, lambda strength: schedule(at_start, layers, strength), config.num_blocks)

    def fewer_blocks(strength: float) -> Merging:
        num_blocks = max(1, round(config.num_blocks * (1 - strength)))
        return base.by([0] * (num_blocks * config.num_self_attends_per_block), num_blocks=num_blocks)

    return fewer_blocks


def floor_from(config: ToMePerceiverConfig, start: int, layers: int, num_blocks: int, base: Merging) -> Family:
    """`floor`, from a layer on.

    Args:
        config: of the model.
        start: the first layer that merges, counted from 0.
        layers, num_blocks: that run.
        base: how they merge.
    """
    latents = base.at_start(config)
    return family_of(
        config,
        base,
        lambda strength: [latents] * start + [latents ** (1 - strength)] * (layers - start),
        num_blocks,
    )


def postponed(config: ToMePerceiverConfig, merging: Merging) -> Iterator[Family]:
    """For each layer the schedules in which more latents stay there, and fewer, down to a floor, in those after it.

    Args:
        config: of the model.
        merging: to start from.
    """
    left = merging.asked_of(config).latents_per_layer
    for layer, here in enumerate(left):
        reaching = left[layer - 1] if layer else merging.at_start(config)
        kept = min(reaching, math.ceil(here * STEP))
        if kept > here:
            yield family_of(config, merging, _capped_after(left, layer, kept), merging.num_blocks)


def fewer(config: ToMePerceiverConfig, merging: Merging) -> Family:
    """The schedules that leave a share of the latents that this one leaves, the same in every layer."""
    left = merging.asked_of(config).latents_per_layer
    return family_of(config, merging, lambda strength: [each * (1 - strength) for each in left], merging.num_blocks)


def _capped_after(left: Sequence[int], layer: int, kept: int) -> Callable[[float], list[float]]:
    def left_after(strength: float) -> list[float]:
        cap = kept ** (1 - strength)
        return [*left[:layer], kept, *(min(each, cap) for each in left[layer + 1 :])]

    return left_after


def weakest_member(family: Family, ratio: float, cost_ratio: CostRatio) -> Merging | None:
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


def scheduled(config: ToMePerceiverConfig, name: str, flops_ratio: float, cost_ratio: CostRatio) -> Merging:
    """The weakest member of the schedule called `name` within a share of the FLOPs, merging as the config says.

    Raises:
        ValueError: in one line, if the schedule does not come down to it.
    """
    family = named_family(config, name)
    found = weakest_member(family, flops_ratio, cost_ratio)
    if found is None:
        raise beyond(flops_ratio, cost_ratio(family(1.0)), f"schedule {name}")
    return found


def beyond(flops_ratio: float, least: float, ending: str) -> ValueError:
    """The error for a share that nothing comes down to.

    Args:
        flops_ratio: the share.
        least: what something comes down to.
        ending: what does.
    """
    return ValueError(f"flops_ratio = {flops_ratio}: allowed are {least:.3f}, where {ending} ends, to 1, no merging")


def flops_ratios(
    config: ToMePerceiverConfig, input_shape: Sequence[int] | Mapping[str, Sequence[int]], architecture: str
) -> CostRatio:
    """FLOPs of the whole forward pass with its matching.

    Args:
        config: of the model; its own merging does not count.
        input_shape: as `forward_cost` takes it.
        architecture: name of the model class.
    """
    counted: dict[str, int] = {}

    def flops(merging: Merging) -> int:
        if merging.key not in counted:
            counted[merging.key] = forward_cost(merging.asked_of(config), input_shape, architecture).total_with_matching
        return counted[merging.key]

    unmerged = flops(Merging.none(config))
    return lambda merging: flops(merging) / unmerged
