# SPDX-License-Identifier: Apache-2.0
"""Train one checkpoint for every r and budget: each step draws a merging at random and distils the unmerged model.

In each step the unmerged forward pass learns the task, and a merged one learns the unmerged outputs. This is the
in-place distillation of Yu & Huang (2019), "Universally slimmable networks", with latents in place of channels.

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
from experiments.tasks.scores import IGNORE_INDEX
from experiments.training.trainer import TaskTrainer
from frontier_tome_perceiver import output_divergence

# Smallest budget that is drawn, as a share of the self-attention layers' FLOPs.
SMALLEST_FLOPS_SHARE = 1 / 8


class MergingDraw:
    """Random merging for each training step: a schedule drawn uniformly, within a budget drawn log-uniformly.

    The schedules are those of `cost_tome_perceiver.SCHEDULES` at each strength, among them every constant r. The budget
    is a share of the FLOPs of the self-attention layers, not counting the matching. Its lower end is the larger of
    `SMALLEST_FLOPS_SHARE` and the smallest share that the schedule reaches; its upper end is 1. It is log-uniform
    because strong merging is harder to learn.

    Args:
        config: config of the model; of its merging settings only `min_latents` has an effect.
        seed: seed of the draws. A draw depends only on seed and step, so resuming does not change it and all processes
            draw the same.
    """

    def __init__(self, config: ToMePerceiverConfig, seed: int) -> None:
        self.seed = seed
        latents = config.num_latents
        # A layer merges between attention and MLP, so the MLP runs on fewer latents.
        attention = [self_attention_layer_flops(config, count, 0) for count in range(latents + 1)]
        mlp = [self_attention_layer_flops(config, 0, count) for count in range(latents + 1)]

        def flops_share(removed: Sequence[int]) -> float:
            left = list(accumulate(removed, sub, initial=latents))
            spent = sum(attention[count] for count in left[:-1]) + sum(mlp[count] for count in left[1:])
            return spent / (len(removed) * (attention[latents] + mlp[latents]))

        # For each schedule, the FLOPs share and the r of each strength, the weakest merging first.
        self.schedules: list[list[tuple[float, tuple[int, ...]]]] = []
        for name in sorted(SCHEDULES):
            strengths = (strength / (2 * latents) for strength in range(2 * latents + 1))
            r_lists = {tuple(merging_at(config, name, strength).r) for strength in strengths}  # type: ignore[arg-type]
            self.schedules.append(sorted(((flops_share(r), r) for r in r_lists), reverse=True))

    def at(self, step: int) -> tuple[float, list[int]]:
        """Return the merging of a step: its FLOPs share, and its `config.r` as a list with an entry for each layer."""
        random = np.random.default_rng([self.seed, step])
        strengths = self.schedules[random.integers(len(self.schedules))]
        budget = max(SMALLEST_FLOPS_SHARE, strengths[-1][0]) ** random.random()
        share, r = next((strength for strength in strengths if strength[0] <= budget), strengths[-1])
        return share, list(r)


def distillation_loss(merged: Tensor, unmerged: Tensor, labels: Tensor, regression: bool) -> Tensor:
    """Return the mean divergence of the merged from the unmerged outputs at labelled positions, a scalar.

    Args:
        merged, unmerged: (B, K) logits, or (B, S, K).
        labels: (B,) or (B, S), `IGNORE_INDEX` at positions without a label.
        regression: as for `output_divergence`.
    """
    if not regression:
        merged, unmerged = (logits[labels != IGNORE_INDEX] for logits in (merged, unmerged))
    return output_divergence(merged, unmerged, regression).mean()


class ElasticTrainer(TaskTrainer):
    """`TaskTrainer` that trains one model for all mergings.

    Modifications: the training loss is the task's loss of the unmerged outputs plus `distillation_weight` times the
    `distillation_loss` of merged outputs. `MergingDraw` draws one merging for each step, shared by all batches that
    accumulate gradients for it. The distillation loss gives the unmerged outputs no gradient. Evaluation uses the
    merging of the config, which stays unchanged.
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
            # A copy, because upstream removes the labels from its inputs for label smoothing.
            loss, unmerged = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        _, r = self.draw.at(self.state.global_step)
        with own.by(r).applied(config):
            merged = model(**{name: value for name, value in inputs.items() if name != "labels"})
        regression = config.problem_type == "regression"
        distillation = distillation_loss(merged.logits, unmerged.logits.detach(), inputs["labels"], regression)
        loss = loss + self.distillation_weight * distillation
        return (loss, unmerged) if return_outputs else loss
