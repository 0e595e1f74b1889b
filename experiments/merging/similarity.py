# SPDX-License-Identifier: Apache-2.0
"""How alike the latents are that reach a self-attention layer, input by input.

Letters: B batch, H heads, N latents that reach a layer, C channels.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

from budget_tome_perceiver import Merging
from groups_tome_perceiver import Batch, Similarity, latent_similarities
from layers_tome_perceiver import METRICS, AttentionOutput
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel
from search_tome_perceiver import output_divergence


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
    before = Merging.of(config)
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
                groups[:layer] = (before.merge_groups or groups)[:layer]
                # The other joins the one, and those behind it move up.
                groups[layer] = [one if latent == other else latent - (latent > other) for latent in range(reaching)]
                before.by(0, merge_groups=groups).apply(config)
                change = output_divergence(_logits(model, batch), expected, config.problem_type == "regression")
                change = change.reshape(len(change), -1)
                # The mean where an input has several outputs.
                similarity[:, one, other] = similarity[:, other, one] = -change.mean(dim=1)
            similarities.append(similarity)
    finally:
        before.apply(config)
    return similarities


def _logits(model: ToMePerceiverPreTrainedModel, batch: Batch) -> Tensor:
    logits = model(**batch).get("logits")
    if not isinstance(logits, Tensor):
        raise ValueError(f"similarity = 'output': {type(model).__name__} has no logits of one kind; allowed is a head")
    return logits.double()


SIMILARITIES: dict[str, Similarity] = {
    # What matching at run time compares.
    "key": partial(latent_similarities, compared=METRICS["key"]),
    # What is merged.
    "hidden": partial(latent_similarities, compared=METRICS["hidden"]),
    # What the latents are to one another.
    "attention": partial(latent_similarities, compared=received_attention, output_attentions=True),
    # What merging is not to change.
    "output": output_similarity,
}
