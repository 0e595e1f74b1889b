# SPDX-License-Identifier: Apache-2.0
"""How many groups of latents a calibration is to leave, and in which layers.

Letters: L self-attention layers, N latents that reach a layer, M groups that are left of them.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from budget_tome_perceiver import Merging
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import forward_cost
from experiments.errors import BadInput
from experiments.merging.arguments import spelled_r
from experiments.merging.similarity import SIMILARITIES

START = "start"
"""As `--merge_layer`: before the first layer, in the learned latents themselves."""


@dataclass
class CalibrationArguments:
    """How many groups, where, and by what."""

    _argument_group_name: ClassVar[str] = "calibration"

    num_groups: str | None = field(
        default=None,
        metadata={"help": "Latents that a merge leaves; comma-separated for several, one for each --merge_layer."},
    )
    flops_ratio: float | None = field(
        default=None,
        metadata={"help": "In place of --num_groups: the most FLOPs, as a share of those of the unmerged model."},
    )
    merge_layer: str = field(
        default="0",
        metadata={
            "help": "Self-attention layer that merges, counted from 0; comma-separated for several merges. 'start': "
            "the learned latents themselves, before inputs are read. A smaller model comes out, without merge_groups; "
            "how many latents each one stands for is lost, so train it on."
        },
    )
    similarity: str = field(
        default="hidden",
        metadata={
            "help": f"What of the latents is compared: {', '.join(sorted(SIMILARITIES))}. 'output' is how little the "
            "model's output changes when two latents merge: a forward pass for each pair, quadratic in the latents, so "
            "give it few --calibration_samples."
        },
    )
    calibration_samples: int = field(
        default=256, metadata={"help": "Training samples that are looked at, without their labels."}
    )

    def __post_init__(self) -> None:
        # From a JSON or YAML file they are numbers or lists.
        self.merge_layer = spelled_r(self.merge_layer)
        self.num_groups = None if self.num_groups is None else spelled_r(self.num_groups)
        if self.similarity not in SIMILARITIES:
            raise BadInput(f"--similarity {self.similarity}: allowed are {', '.join(sorted(SIMILARITIES))}")
        if self.calibration_samples < 1:
            raise BadInput(f"--calibration_samples {self.calibration_samples}: allowed is an integer of 1 or more")
        if self.flops_ratio is not None and not 0 < self.flops_ratio < 1:
            raise BadInput(f"--flops_ratio {self.flops_ratio}: allowed is a share above 0 and below 1")
        layers = self._layers()
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise BadInput(f"--merge_layer {self.merge_layer}: allowed are layers in rising order")
        counts = 1 if self.num_groups is None else len(_integers("num_groups", self.num_groups))
        if counts != len(layers):
            given = (
                f"--flops_ratio {self.flops_ratio}" if self.num_groups is None else f"--num_groups {self.num_groups}"
            )
            raise BadInput(f"--merge_layer {self.merge_layer}: allowed are as many layers as in {given}, {counts}")

    @property
    def at_start(self) -> bool:
        """Whether the learned latents themselves are to merge, and no layer does."""
        return self.merge_layer == START

    def _layers(self) -> list[int]:
        """The layers that merge; for the start the first one, whose latents are compared."""
        return [0] if self.at_start else _integers("merge_layer", self.merge_layer, f"; or '{START}' alone")

    def check_given(self) -> None:
        """Check that the arguments say how many groups there are to be. Only pushing needs none.

        Raises:
            BadInput: if they do not, or twice.
        """
        if (self.num_groups is None) == (self.flops_ratio is None):
            given = "neither is" if self.num_groups is None else "both are"
            raise BadInput(f"--num_groups, --flops_ratio: {given} given; allowed is one of them")

    def left_after(self, config: ToMePerceiverConfig, input_shape: Sequence[int], architecture: str) -> list[int]:
        """Latents that are to be left after each of the L layers.

        Args:
            config: of the model.
            input_shape, architecture: as for `groups_for_flops`.

        Raises:
            BadInput: for a layer or a number of groups that the model has not.
        """
        num_layers, left = config.num_self_attention_layers, config.num_latents
        layers = self._layers()
        if not 0 <= min(layers) <= max(layers) < num_layers:
            raise BadInput(f"--merge_layer {self.merge_layer}: allowed are 0 to {num_layers - 1}, counted from 0")
        if self.flops_ratio is None:
            counts = _integers("num_groups", str(self.num_groups))
        else:
            layer = None if self.at_start else layers[0]
            counts = [groups_for_flops(config, self.flops_ratio, layer, input_shape, architecture)]
        after = []
        for layer in range(num_layers):
            if layer in layers:
                count = counts[layers.index(layer)]
                if not config.min_latents <= count < left:
                    raise BadInput(
                        f"--num_groups {self.num_groups}: of the {left} latents that reach layer {layer}, allowed are "
                        f"{config.min_latents} to {left - 1} groups, not {count}"
                    )
                left = count
            after.append(left)
        return after


def _integers(argument: str, text: str, otherwise: str = "") -> list[int]:
    try:
        return [int(entry) for entry in text.split(",")]
    except ValueError:
        raise BadInput(
            f"--{argument} {text}: allowed is an integer, or a comma-separated list of them, one for each merge"
            f"{otherwise}"
        ) from None


def groups_for_flops(
    config: ToMePerceiverConfig, flops_ratio: float, layer: int | None, input_shape: Sequence[int], architecture: str
) -> int:
    """The largest number of groups that one merge may leave within a share of the unmerged model's FLOPs.

    Args:
        config: of the model; its own merging does not count.
        flops_ratio: the share, of the whole forward pass.
        layer: that merges, counted from 0; `None` for fewer latents from the start.
        input_shape: as `cost_tome_perceiver.forward_cost` takes it.
        architecture: name of the model class.

    Returns:
        M, from `config.min_latents` to N - 1.

    Raises:
        BadInput: for a share that one merge in this layer cannot come down to, or that asks for none.
    """
    latents = config.num_latents
    unmerged = Merging.none(config).asked_of(config)

    def flops(count: int) -> int:
        asked = copy.copy(unmerged)
        if layer is not None:
            merge_groups: list[list[int] | None] = [None] * config.num_self_attention_layers
            # Which latents merge makes no difference.
            merge_groups[layer] = [min(latent, count - 1) for latent in range(latents)]
            asked.merge_groups = merge_groups
        else:
            asked.num_latents = count
        return forward_cost(asked, input_shape, architecture).total_with_matching

    counts = range(config.min_latents, latents)
    most = flops(latents)
    # FLOPs grow with the number of groups.
    fitting = bisect_right(counts, flops_ratio * most, key=flops) if flops_ratio < 1 else 0
    if fitting == 0:
        where = "at the start" if layer is None else f"in layer {layer}"
        least = f"{flops(counts[0]) / most:.3f}, where {counts[0]} of {latents} latents are left" if counts else "1"
        raise BadInput(
            f"--flops_ratio {flops_ratio}: allowed for one merge {where} are {least}, to below 1, no merging"
        )
    return counts[fitting - 1]
