# SPDX-License-Identifier: Apache-2.0
"""Fixed groups: which latents merge is decided once, from a few unlabelled samples, and stored in the config.

Latents are learned parameters, the same for every input. So which of them say the same can be read off their mean
similarity over samples, and nothing has to be matched as the model runs.

Letters: B batch, N latents that reach a layer, M groups that are left of them, L self-attention layers, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# As in the module of the layers, which says why.
try:
    from .budget_tome_perceiver import Merging, undisturbed  # type: ignore[import-not-found]
    from .layers_tome_perceiver import AttentionOutput  # type: ignore[import-not-found]
except ImportError:
    if __package__:
        raise
    from budget_tome_perceiver import Merging, undisturbed
    from layers_tome_perceiver import AttentionOutput

Batch = Mapping[str, Tensor]
"""What a model takes by name, B rows each."""

Similarity = Callable[[Any, Batch, Collection[int]], list[Tensor]]
"""From a model, a batch and layers to how alike each two latents are that reach each of these layers, (B, N, N) each.

The model is in evaluation mode and merges in fixed groups before these layers, if at all; the batch is on its device;
the layers are counted from 0 as they run, and rise. Larger is more alike, on whatever scale."""


class _Reached(Exception):
    """The last layer that was asked for has run, and what comes after it is not needed."""


def latent_similarities(
    model: Any, batch: Batch, layers: Collection[int], compared: Callable[[AttentionOutput], Tensor]
) -> list[Tensor]:
    """Cosine similarity of something that attention hands on; the model runs no further than the last of the layers.

    Args:
        model, batch, layers: as for `Similarity`.
        compared: from what a layer's attention hands on to what is compared of each latent, (B, N, C), such as
            `METRICS` of `layers_tome_perceiver.py`.
    """
    similarities: list[Tensor] = []
    # A module runs once in each block: a layer is one of the calls of all modules.
    calls = count()

    def note(module: nn.Module, arguments: object, attended: AttentionOutput) -> None:
        if next(calls) in layers:
            each = compared(attended)
            # As in matching: half precision is too coarse to compare in.
            each = F.normalize(each.to(torch.promote_types(each.dtype, torch.float32)), dim=-1)
            similarities.append(each @ each.transpose(1, 2))
            if len(similarities) == len(layers):
                raise _Reached

    hooks = [module.attention.register_forward_hook(note) for module in model.base_model.encoder.self_attends]
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return similarities


def fixed_groups(
    model: Any, batches: Iterable[Batch], left_after: Sequence[int], similarity: Similarity
) -> list[list[int] | None]:
    """Group latents by their mean similarity over samples, layer by layer, each with the layers before it merged.

    Args:
        model: a head or a base model; afterwards it is as it was. Its `latent_groups`, if any, merge before.
        batches: what the model takes, without labels; gone through anew for each layer that merges.
        left_after: M for each of the L layers; the same as before it where nothing is to merge.
        similarity: of the latents that reach a layer.

    Returns:
        What `config.merge_groups` takes.

    Raises:
        ValueError: for a number of latents that cannot be left, or no batches.
        FloatingPointError: for similarities that are not finite.
    """
    config = model.config
    reaching = [config.latents_at_start, *left_after]
    if len(left_after) != config.num_self_attention_layers or any(
        not 1 <= after <= before for before, after in pairwise(reaching)
    ):
        raise ValueError(
            f"left_after = {list(left_after)}: allowed are {config.num_self_attention_layers} numbers, one a layer, "
            f"that never rise, from {config.latents_at_start} to 1"
        )
    groups: list[list[int] | None] = [None] * len(left_after)
    before_layers = Merging.of(config)
    with undisturbed(model):
        for layer, (before, after) in enumerate(pairwise(reaching)):
            if after < before:
                before_layers.by(0, merge_groups=groups, latent_groups=before_layers.latent_groups).apply(config)
                groups[layer] = average_linkage(mean_similarity(model, batches, layer, similarity), after)
    return groups


def mean_similarity(model: Any, batches: Iterable[Batch], layer: int, similarity: Similarity) -> Tensor:
    """How alike each two latents are that reach a layer, (N, N) in float64, as the mean over samples.

    Args:
        model: in evaluation mode, with the merging of the layers before set.
        batches: what the model takes.
        layer: counted from 0 in the order in which they run.
        similarity: of the latents that reach a layer.

    Raises:
        ValueError: if there are no batches.
        FloatingPointError: if similarities are not finite.
    """
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        on_device = {name: value.to(model.device) for name, value in batch.items()}
        (each,) = similarity(model, on_device, [layer])
        total = total + each.sum(dim=0).to("cpu", torch.float64)
        rows += len(each)
    if rows == 0:
        raise ValueError("batches: there are none; allowed is what can be gone through anew for each layer that merges")
    if not total.isfinite().all():
        raise FloatingPointError(
            f"the similarities of the latents that reach layer {layer} are not finite: the weights of the model are "
            "damaged or training has diverged"
        )
    return total / rows


def average_linkage(similarity: Tensor, num_groups: int) -> list[int]:
    """Cluster by average linkage: the two clusters whose members are most similar on average merge first.

    Args:
        similarity: (N, N).
        num_groups: M, from 1 to N. So many come out, whatever is tied.

    Returns:
        The group of each of the N latents, numbered in the order of their first latent.

    Source: Sokal & Michener (1958), with the update of Lance & Williams (1967).
    """
    latents = len(similarity)
    alike = ((similarity + similarity.T) / 2).to(torch.float64)
    alike.fill_diagonal_(-math.inf)
    members = {latent: [latent] for latent in range(latents)}
    for _ in range(latents - num_groups):
        one, other = sorted(divmod(int(alike.argmax()), latents))
        sizes = len(members[one]), len(members[other])
        joined = (sizes[0] * alike[one] + sizes[1] * alike[other]) / sum(sizes)
        joined[one] = -math.inf
        alike[one], alike[:, one] = joined, joined
        alike[other], alike[:, other] = -math.inf, -math.inf
        members[one] += members.pop(other)
    groups = [0] * latents
    for number, cluster in enumerate(sorted(members.values(), key=min)):
        for latent in cluster:
            groups[latent] = number
    return groups
