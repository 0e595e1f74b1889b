# SPDX-License-Identifier: Apache-2.0
"""How alike the latents are that reach a self-attention layer, input by input.

Letters: B batch, H heads, N latents that reach a layer, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import combinations, count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from experiments.tasks.base import Batch
from layers_tome_perceiver import AttentionOutput
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

Similarity = Callable[[ToMePerceiverPreTrainedModel, Batch, Collection[int]], list[Tensor]]
"""From a model, a batch and layers to how alike each two latents are that reach each of these layers, (B, N, N) each.

The model is in evaluation mode and merges in fixed groups before these layers, if at all; the batch is on its device;
the layers are counted from 0 as they run, and rise. Larger is more alike, on whatever scale."""


def attention_similarity(
    model: ToMePerceiverPreTrainedModel,
    batch: Batch,
    layers: Collection[int],
    compared: Callable[[AttentionOutput], Tensor],
    **asked: Any,
) -> list[Tensor]:
    """Cosine similarity of something that attention hands on.

    Args:
        model, batch, layers: as for `Similarity`.
        compared: from what a layer's attention hands on to what is compared of each latent, (B, N, C).
        asked: of the model, for what it does not hand on by itself.
    """
    similarities: list[Tensor] = []
    # A module runs once in each block: a layer is one of the calls of all modules.
    calls = count()

    def note(module: torch.nn.Module, arguments: object, attended: AttentionOutput) -> None:
        if next(calls) in layers:
            # As in matching: half precision is too coarse to compare in.
            each = compared(attended)
            each = F.normalize(each.to(torch.promote_types(each.dtype, torch.float32)), dim=-1)
            similarities.append(each @ each.transpose(1, 2))

    hooks = [module.attention.register_forward_hook(note) for module in model.base_model.encoder.self_attends]
    try:
        model(**batch, **asked)
    finally:
        for hook in hooks:
            hook.remove()
    return similarities


def received_attention(attended: AttentionOutput) -> Tensor:
    """How much attention a latent gets from each one in each head, (B, N, H N): its columns of the weights.

    Their cosine is indifferent to sizes: proportional attention multiplies a column by its latent's size.
    """
    assert attended.weights is not None
    return attended.weights.permute(0, 3, 1, 2).flatten(2)


def output_similarity(model: ToMePerceiverPreTrainedModel, batch: Batch, layers: Collection[int]) -> list[Tensor]:
    """By how little the output changes if two latents alone merge in a layer, the layers before as they are.

    Minus the Kullback-Leibler divergence of the merged model's classes from the unmerged one's, in nats, or minus the
    squared error for regression. A forward pass for each pair: quadratic in the latents.

    Args:
        model: a head with logits; afterwards its merging is as it was.
        batch, layers: as for `Similarity`.

    Raises:
        ValueError: for a model without logits, or with several kinds of them.
    """
    config = model.config
    before = config.r, config.merge_groups
    latents = [config.num_latents, *config.latents_per_layer]
    similarities = []
    expected = _logits(model, batch)
    try:
        for layer in layers:
            reaching = latents[layer]
            similarity = expected.new_zeros((len(expected), reaching, reaching), dtype=torch.float64)
            pairs = list(combinations(range(reaching), 2))
            for one, other in tqdm(pairs, desc=f"merging pairs in layer {layer}", unit="pair", leave=False):
                groups: list[list[int] | None] = [None] * config.num_self_attention_layers
                groups[:layer] = (before[1] or groups)[:layer]
                # The other joins the one, and those behind it move up.
                groups[layer] = [one if latent == other else latent - (latent > other) for latent in range(reaching)]
                config.r, config.merge_groups = 0, groups
                change = _output_change(_logits(model, batch), expected, config.problem_type == "regression")
                similarity[:, one, other] = similarity[:, other, one] = -change
            similarities.append(similarity)
    finally:
        config.r, config.merge_groups = before
    return similarities


def _logits(model: ToMePerceiverPreTrainedModel, batch: Batch) -> Tensor:
    logits = model(**batch).get("logits")
    if not isinstance(logits, Tensor):
        raise ValueError(f"similarity = 'output': {type(model).__name__} has no logits of one kind; allowed is a head")
    return logits.double()


def _output_change(logits: Tensor, expected: Tensor, regression: bool) -> Tensor:
    """(B,), the mean over outputs where there are several for an input."""
    if regression:
        change = (logits - expected) ** 2
    else:
        change = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return change.reshape(len(change), -1).mean(dim=1)


SIMILARITIES: dict[str, Similarity] = {
    # What matching at run time compares.
    "key": partial(attention_similarity, compared=lambda attended: attended.keys.mean(dim=1)),
    # What is merged.
    "hidden": partial(attention_similarity, compared=lambda attended: attended.hidden_states),
    # What the latents are to one another.
    "attention": partial(attention_similarity, compared=received_attention, output_attentions=True),
    # What merging is not to change.
    "output": output_similarity,
}
