# SPDX-License-Identifier: Apache-2.0
"""Merging latents: pure functions on tensors, and the registry of methods that decide what merges.

Written from Bolya et al. (2023), "Token Merging: Your ViT But Faster", section 3 (arXiv:2210.09461), without a class
token: a Perceiver's latents have none, so every latent may merge.

Letters: B batch, N latents, M latents left, R = N - M latents merged away, C channels. Indices are int64.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Match(NamedTuple):
    """Which latents stay and which merge into them; the one form in which every source of merges is given.

    Attributes:
        kept: (B, M) positions, among the N latents, of those that stay, in their new order. B may be 1 for all rows.
        merged: (B, R) positions of those that are merged away.
        into: (B, R) where each merged one goes, as a position among the M kept; `None` drops them instead.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor | None


MergeMethod = Callable[[Tensor, int, Tensor | None, float], Match]
"""`method(metric, r, sizes, depth)`: what merges, from what the latents are compared by, (B, N, C); R, with
0 < R <= N // 2; the sizes (B, N) in float32, `None` for 1 each; and the layer's index over the number of layers, in
[0, 1). A method takes what it needs of them."""

MERGE_METHODS: dict[str, MergeMethod] = {}
"""The merging methods by the name that `config.merge_method` holds."""


def register_merge_method(name: str) -> Callable[[MergeMethod], MergeMethod]:
    """Decorator: make a merging method available as `config.merge_method = name`."""

    def register(method: MergeMethod) -> MergeMethod:
        MERGE_METHODS[name] = method
        return method

    return register


def check_merge_method(name: str) -> None:
    """Check that `name` is in the registry.

    Raises:
        ValueError: in one line naming the value and what is allowed.
    """
    if name not in MERGE_METHODS:
        raise ValueError(f"merge_method = {name!r}: allowed are {', '.join(map(repr, sorted(MERGE_METHODS)))}")


@register_merge_method("bipartite")
@torch.no_grad()
def match_bipartite(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Bipartite soft matching: each even position proposes its most similar odd one; the best R proposals merge.

    Args:
        metric: (B, N, C) compared by cosine similarity, in float32 or wider. A zero vector is as similar to everything
            as an orthogonal one (0). Ties: the lower position merges first, into the lowest of equals.
        r: R, latents to merge away, from 1 to N // 2.
        sizes, depth: without effect.

    Source: Bolya et al. (2023), section 3.
    """
    metric = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    # Under autocast the product would run in half precision and the schedule of merges would depend on it.
    with torch.autocast(metric.device.type, enabled=False):
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    edge_score, edge_target = similarity.max(dim=-1)
    return _match_edges(edge_score, edge_target, metric.shape[1], r)


@register_merge_method("random")
@torch.no_grad()
def match_random(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """A control for the matching: the same bipartite form, but the edges are drawn at random.

    The draw depends on N alone and is the same for every input, so that a row's output does not depend on its batch
    and activation checkpointing recomputes the same merges.
    """
    num_latents = metric.shape[1]
    evens, odds = (num_latents + 1) // 2, num_latents // 2
    generator = random.Random(num_latents)
    score = torch.tensor([generator.random() for _ in range(evens)], device=metric.device)
    target = torch.tensor([generator.randrange(odds) for _ in range(evens)], device=metric.device)
    rows = metric.shape[0]
    return _match_edges(score.expand(rows, -1), target.expand(rows, -1), num_latents, r)


@register_merge_method("prune")
def match_prune(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """A control for the merging: the latents that `bipartite` would merge away are dropped instead."""
    return match_bipartite(metric, r, sizes, depth)._replace(into=None)


def match_groups(groups: Sequence[int], device: torch.device) -> Match:
    """Fixed groups as a `Match` that serves every row.

    Args:
        groups: for each of the N latents its group, numbered 0 to M - 1 with none left out. The first latent of each
            group stays, at its group's number.
    """
    positions = range(len(groups))
    kept = [groups.index(group) for group in range(max(groups) + 1)]
    merged = [position for position in positions if kept[groups[position]] != position]
    into = [groups[position] for position in merged]

    def row(values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=device)

    return Match(kept=row(kept), merged=row(merged), into=row(into))


def _match_edges(edge_score: Tensor, edge_target: Tensor, num_latents: int, r: int) -> Match:
    """Merge along the R best edges of a bipartite graph between even and odd positions.

    Args:
        edge_score: (B, ceil(N / 2)) score of the one edge that starts at each even position.
        edge_target: (B, ceil(N / 2)) where it ends, counted among the odd positions.
        num_latents: N.
        r: R, edges to merge along.
    """
    rows, evens = edge_score.shape
    # A stable sort, so that ties are defined on every device.
    order = torch.sort(edge_score, dim=1, descending=True, stable=True).indices
    chosen, unmerged = order[:, :r], order[:, r:]
    odds = torch.arange(1, num_latents, 2, device=edge_score.device)
    kept = torch.cat([2 * unmerged, odds.expand(rows, -1)], dim=1)
    return Match(kept=kept, merged=2 * chosen, into=edge_target.gather(1, chosen) + (evens - r))


def merge_latents(latents: Tensor, sizes: Tensor | None, match: Match) -> tuple[Tensor, Tensor]:
    """Merge latents into the mean of the latents that they stand for, weighted by size.

    The sum of size x latent over the latents is left as it is (but for dropped ones), and a latent into which nothing
    merges keeps its value to the last bit. Weights are size / total, so that nothing overflows half precision, and the
    sum runs in float32 or wider. Gradients flow to every merged latent with its weight, none through the indices.

    Args:
        latents: (B, N, C).
        sizes: (B, N) how many of the first latents each one stands for; `None` for 1 each.
        match: of the N latents.

    Returns:
        The latents left (B, M, C), in the dtype of `latents`, and their sizes (B, M) in float32.

    Source: Bolya et al. (2023), section 3.
    """
    batch, num_latents, channels = latents.shape
    if sizes is None:
        sizes = latents.new_ones((batch, num_latents), dtype=torch.float32)
    kept = match.kept.expand(batch, -1)
    kept_latents, kept_sizes = _take_rows(latents, kept), sizes.gather(1, kept)
    if match.into is None:
        return kept_latents, kept_sizes
    merged, into = match.merged.expand(batch, -1), match.into.expand(batch, -1)
    merged_sizes = sizes.gather(1, merged)
    total = kept_sizes.scatter_add(1, into, merged_sizes)
    dtype = torch.promote_types(latents.dtype, torch.float32)
    weight = merged_sizes.to(dtype) / total.gather(1, into)
    # The mean as a step from the latent that stays towards those that merge: it touches R rows and leaves the others.
    means, into_rows = kept_latents.to(dtype).flatten(0, 1), _flat_rows(into, kept.shape[1])
    steps = _take_rows(latents, merged).to(dtype).flatten(0, 1) - means.index_select(0, into_rows)
    means.index_add_(0, into_rows, steps * weight.flatten().unsqueeze(-1))
    return means.view(batch, -1, channels).to(latents.dtype), total


def log_size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """What proportional attention adds to the scores, so that a merged key counts as often as the latents in it.

    Args:
        sizes: (B, M).
        dtype: of the scores.

    Returns:
        (B, 1, 1, M), to be broadcast over heads and queries.

    Source: Bolya et al. (2023), section 3, "proportional attention".
    """
    return sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)[:, None, None, :]


def follow_latents(positions: Tensor, match: Match) -> Tensor:
    """Follow the first latents through one more merge.

    Args:
        positions: (B, N0) where each of the N0 first latents stands among the N that reach this merge, -1 if dropped.
        match: of those N.

    Returns:
        (B, N0) where each stands among the M left, -1 if dropped.
    """
    batch, device = positions.shape[0], positions.device
    kept, merged = match.kept.expand(batch, -1), match.merged.expand(batch, -1)
    moved_to = torch.full((batch, kept.shape[1] + merged.shape[1]), -1, dtype=torch.int64, device=device)
    moved_to = moved_to.scatter(1, kept, torch.arange(kept.shape[1], device=device).expand(batch, -1))
    if match.into is not None:
        moved_to = moved_to.scatter(1, merged, match.into.expand(batch, -1))
    return torch.where(positions < 0, positions, moved_to.gather(1, positions.clamp(min=0)))


def source_matrix(positions: Tensor, num_left: int) -> Tensor:
    """Which of the first latents each latent left stands for.

    Args:
        positions: (B, N0) as `follow_latents` gives them.
        num_left: M.

    Returns:
        (B, M, N0) of 0 and 1 in float32; the rows partition the latents that were not dropped.
    """
    left = torch.arange(num_left, device=positions.device)
    return (positions[:, None, :] == left[None, :, None]).to(torch.float32)


def _flat_rows(positions: Tensor, length: int) -> Tensor:
    """(B, K) positions within rows of `length`, as (B * K) positions in the rows laid end to end."""
    offsets = torch.arange(0, positions.shape[0] * length, length, device=positions.device)
    return (positions + offsets[:, None]).flatten()


def _take_rows(latents: Tensor, positions: Tensor) -> Tensor:
    """(B, K, C): the latents (B, N, C) at positions (B, K). Whole rows are copied, unlike with `gather`."""
    batch, num_latents, channels = latents.shape
    rows = latents.flatten(0, 1).index_select(0, _flat_rows(positions, num_latents))
    return rows.view(batch, -1, channels)
