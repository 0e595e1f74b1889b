# SPDX-License-Identifier: Apache-2.0
"""Train one checkpoint for every r and every budget: each step draws a merging, and the unmerged model teaches it.

In every step the unmerged forward pass learns the task, and a merged one learns the unmerged outputs: the in-place
distillation of Yu & Huang (2019), "Universally slimmable networks", with latents in the place of channels.

Letters: B batch, S positions, K labels, N latents, L self-attention layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import sub
from typing import Any

import numpy as np
from torch import Tensor, nn

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import SCHEDULES, Merging, merging_at, self_attention_layer_flops
from experiments.training.trainer import TaskTrainer
from frontier_tome_perceiver import output_divergence

# Share of the self-attention layers' FLOPs that the strongest merging drawn leaves.
LEAST_SHARE = 1 / 8
# Label of a position that no loss counts.
UNLABELLED = -100


class MergingDraw:
    """The merging of each training step: a schedule of any shape, within a budget drawn log-uniformly.

    The shapes are `cost_tome_perceiver.SCHEDULES`, with the constant numbers of the source paper down to one latent
    left. The budget is a share of the FLOPs of the self-attention layers without the matching, from `LEAST_SHARE`, or
    the least share of the shape, up to 1; log-uniform, because strong merging is harder to learn.

    Args:
        config: config of the model; of its own merging only `min_latents` counts.
        seed: seed of the draws. A draw depends on seed and step only, so it is the same after resuming and in every
            process.
    """

    def __init__(self, config: ToMePerceiverConfig, seed: int) -> None:
        self.seed = seed
        latents = config.num_latents
        # The attention of a layer runs on the latents that reach it, its MLP on those that leave it.
        attention = [self_attention_layer_flops(config, count, 0) for count in range(latents + 1)]
        mlp = [self_attention_layer_flops(config, 0, count) for count in range(latents + 1)]

        def share(removed: Sequence[int]) -> float:
            left = list(accumulate(removed, sub, initial=latents))
            spent = sum(attention[count] for count in left[:-1]) + sum(mlp[count] for count in left[1:])
            return spent / (len(removed) * (attention[latents] + mlp[latents]))

        # Share and schedule of each member of each shape, the weakest first.
        self.shapes: list[list[tuple[float, tuple[int, ...]]]] = []
        for name in sorted(SCHEDULES):
            strengths = (strength / (2 * latents) for strength in range(2 * latents + 1))
            members = {tuple(merging_at(config, name, each).r) for each in strengths}  # type: ignore[arg-type]
            self.shapes.append(sorted(((share(member), member) for member in members), reverse=True))

    def at(self, step: int) -> tuple[float, list[int]]:
        """Return the merging of a step: its share of the FLOPs, and its `config.r` with an entry for each layer."""
        random = np.random.default_rng([self.seed, step])
        members = self.shapes[random.integers(len(self.shapes))]
        budget = max(LEAST_SHARE, members[-1][0]) ** random.random()
        share, r = next((member for member in members if member[0] <= budget), members[-1])
        return share, list(r)


def distance(merged: Tensor, unmerged: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Return the mean divergence of merged from unmerged outputs at labelled positions, a scalar.

    Args:
        merged, unmerged: (B, K) logits, or (B, S, K).
        labels: (B,) or (B, S), `UNLABELLED` at positions without a label.
        regression: as for `output_divergence`.
    """
    if not regression:
        merged, unmerged = (logits[labels != UNLABELLED] for logits in (merged, unmerged))
    return output_divergence(merged, unmerged, regression).mean()


class ElasticTrainer(TaskTrainer):
    """A `TaskTrainer` for every merging at once.

    Modifications: the training loss is the unmerged loss of the task plus `distillation_weight` times the distance
    of the outputs merged by `MergingDraw` from the unmerged ones, which get no gradient from it. All batches of an
    accumulated step merge alike. The config keeps its own merging, by which evaluation merges.
    """

    def __init__(self, *args: Any, distillation_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation_weight = distillation_weight
        self.draw = MergingDraw(self.model.config, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config = self.model.config
        own = Merging.of(config)
        with own.by(0).applied(config):
            # A copy: upstream removes the labels if it smooths them.
            loss, unmerged = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        _, r = self.draw.at(self.state.global_step)
        with own.by(r).applied(config):
            merged = model(**{name: value for name, value in inputs.items() if name != "labels"})
        regression = config.problem_type == "regression"
        apart = distance(merged.logits, unmerged.logits.detach(), inputs["labels"], regression)
        loss = loss + self.distillation_weight * apart
        return (loss, unmerged) if return_outputs else loss
