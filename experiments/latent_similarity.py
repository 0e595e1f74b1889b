# SPDX-License-Identifier: Apache-2.0
"""How alike the latents are that reach a self-attention layer, input by input.

Letters: B batch, H heads, N latents that reach a layer, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.task import Batch
from layers_tome_perceiver import AttentionOutput
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

Similarity = Callable[[ToMePerceiverPreTrainedModel, Batch, Collection[int]], list[Tensor]]
"""From a model in evaluation mode, a batch on its device, and layers in rising order (counted from 0 as they run) to
how alike each two latents are that reach each of these layers, (B, N, N) for each of them."""


def attention_similarity(
    model: ToMePerceiverPreTrainedModel,
    batch: Batch,
    layers: Collection[int],
    compared: Callable[[AttentionOutput], Tensor],
) -> list[Tensor]:
    """Cosine similarity of something that attention hands on.

    Args:
        model, batch, layers: as for `Similarity`.
        compared: from what a layer's attention hands on to what is compared of each latent, (B, N, C).
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
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return similarities


SIMILARITIES: dict[str, Similarity] = {
    # What matching at run time compares.
    "key": partial(attention_similarity, compared=lambda attended: attended.keys.mean(dim=1)),
    # What is merged.
    "hidden": partial(attention_similarity, compared=lambda attended: attended.hidden_states),
}
