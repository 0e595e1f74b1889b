# SPDX-License-Identifier: Apache-2.0
"""Merging latents: pure functions on tensors, and the registry of methods that decide what merges.

Written from Bolya et al. (2023), "Token Merging: Your ViT But Faster", section 3 (arXiv:2210.09461), without a class
token: a Perceiver's latents have none, so every latent may merge. Other ways to match are from the papers that their
functions name.

Letters: B batch, N latents, M latents left, R = N - M latents merged away, C channels. Indices are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Positions of the N latents: bipartite matching merges even ones into odd ones.
EVERY, EVENS, ODDS = slice(None), slice(0, None, 2), slice(1, None, 2)
# What a vector is divided by to make it of length 1, at least.
SHORTEST = 1e-12
# Methods that `experiments/merging/controls.py` registers to compare with; no checkpoint carries them.
EXPERIMENTS_ONLY = ("energy", "prune", "random", "size_penalty")


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
"""`method(metric, r, sizes, depth)` decides what merges.

    metric: (B, N, C), what latents are compared by: cosine similarity in float32 or wider, in which a zero vector is
        orthogonal to everything. Ties go to the lower position, of those that merge and of those merged into.
    r: R, latents to merge away, from 1 to N // 2.
    sizes: (B, N) in float32; `None` for 1 each.
    depth: index of the layer over the number of layers, in [0, 1).
"""

MERGE_METHODS: dict[str, MergeMethod] = {}
"""The merging methods by the name that `config.merge_method` holds."""

MatchingFlops = Callable[[int, int], int]
"""From N and the channels of the metric to the FLOPs of matching them, for one row."""

MATCHING_FLOPS: dict[str, MatchingFlops] = {}
"""FLOPs of one matching, by method name; methods registered without a cost are missing."""


def register_merge_method(name: str, flops: MatchingFlops | None = None) -> Callable[[MergeMethod], MergeMethod]:
    """Decorator: make a merging method available as `config.merge_method = name`.

    Args:
        name: of the method.
        flops: of its matching; without them it merges, and no budget can be kept with it.
    """

    def register(method: MergeMethod) -> MergeMethod:
        MERGE_METHODS[name] = method
        if flops is not None:
            MATCHING_FLOPS[name] = flops
        return method

    return register


def check_merge_method(name: str) -> None:
    """Check that `name` is in the registry.

    Raises:
        ValueError: in one line naming the value and the methods there are.
    """
    if name not in MERGE_METHODS:
        why = "is a method of the experiments, not of a checkpoint" if name in EXPERIMENTS_ONLY else "is not registered"
        raise ValueError(f"merge_method={name!r}: {why}; choose from {', '.join(sorted(MERGE_METHODS))}")


def merge_method(name: str) -> MergeMethod:
    """Return the method of the registry called `name`, after `check_merge_method`."""
    check_merge_method(name)
    return MERGE_METHODS[name]


def matching_flops(name: str, latents: int, channels: int) -> int:
    """Return the FLOPs of one matching of a row, for N latents and the channels of the metric.

    Raises:
        ValueError: if the method was registered without a cost.
    """
    if name not in MATCHING_FLOPS:
        raise ValueError(
            f"merge_method={name!r}: has no known cost; choose from {', '.join(sorted(MATCHING_FLOPS))}, or register "
            "it with flops=..."
        )
    return MATCHING_FLOPS[name](latents, channels)


def product_flops(rows: int, in_channels: int, out_channels: int) -> int:
    """A linear layer, or any product of (rows, in_channels) with (in_channels, out_channels): 2 for a multiply-add."""
    return 2 * rows * in_channels * out_channels


def bipartite_flops(latents: int, channels: int) -> int:
    """Similarities of each even position with each odd one."""
    return product_flops((latents + 1) // 2, channels, latents // 2)


def all_pairs_flops(latents: int, channels: int) -> int:
    """Similarities of every latent with every one."""
    return product_flops(latents, channels, latents)


@register_merge_method("bipartite", flops=bipartite_flops)
@torch.no_grad()
def match_bipartite(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Bipartite soft matching: each even position proposes its most similar odd one; the best R proposals merge.

    Source: Bolya et al. (2023), section 3.
    """
    edge_score, edge_target = best_edges(cosine_similarity(metric, EVENS, ODDS))
    return match_edges(edge_score, edge_target, metric.shape[1], r)


@register_merge_method("k_center", flops=all_pairs_flops)
@torch.no_grad()
def match_k_center(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Farthest-point selection: M latents stay, far from each other; each other one merges into its most similar.

    The first position stays; then, again and again, the latent that is least similar to all that stay already. No split
    limits what merges with what: as long as the latents are of M directions or fewer, only those of the same direction
    merge. On the sphere, no latent is further from its target than twice the least that any choice of M could do. The M
    steps run one after another, which `torch.compile` unrolls.

    Source: Gonzalez (1985), "Clustering to minimize the maximum intercluster distance"; as the selection of a
    core-set: Sener and Savarese (2018), "Active Learning for Convolutional Neural Networks" (arXiv:1708.00489).
    """
    similarity = cosine_similarity(metric)
    # To the nearest of those that stay: nothing at first, and infinite for these themselves.
    nearest = torch.full_like(similarity[:, 0], -math.inf)
    for _ in range(metric.shape[1] - r):
        farthest = nearest.argmin(dim=1, keepdim=True)
        nearest = nearest.maximum(_take_rows(similarity, farthest)[:, 0]).scatter(1, farthest, math.inf)
    # A stable sort: those that merge, then those that stay, each in the order of their positions.
    order = torch.sort(nearest.isinf().int(), dim=1, stable=True).indices
    merged, kept = order[:, :r], order[:, r:]
    return Match(kept=kept, merged=merged, into=take_pairs(similarity, merged, kept).argmax(dim=-1))


@register_merge_method("leader", flops=all_pairs_flops)
@torch.no_grad()
def match_leader(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """The R latents that are most similar to any lower position merge, each into its most similar of those that stay.

    One pass over all pairs, without a split into two halves: of any number of exact duplicates the first one stays. The
    first position always does.

    Source: after the leader algorithm of Hartigan (1975), "Clustering Algorithms", chapter 3, with a number of clusters
    in place of a threshold.
    """
    similarity = cosine_similarity(metric)
    places = torch.arange(metric.shape[1], device=metric.device)
    # The first one has none before it, and so the least similarity of all.
    nearest_before = similarity.masked_fill(places[:, None] <= places, -math.inf).amax(dim=-1)
    order = torch.sort(nearest_before, dim=1, descending=True, stable=True).indices
    merged, kept = order[:, :r], order[:, r:].sort(dim=1).values
    return Match(kept=kept, merged=merged, into=take_pairs(similarity, merged, kept).argmax(dim=-1))


@register_merge_method("ward", flops=all_pairs_flops)
@torch.no_grad()
def match_ward(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Agglomerative clustering: R times the two groups merge that add least to the squared distances from their means.

    Distances are between vectors of length 1, weighted by the sizes. A group may take up any number of others, and
    stays where its lowest position is. R steps that depend on each other: costly where R is large and a step slow.

    Source: Ward (1963), "Hierarchical grouping to optimize an objective function", with the update of distances of
    Lance & Williams (1967).
    """
    batch, num_latents = metric.shape[:2]
    rows, places = torch.arange(batch, device=metric.device), torch.arange(num_latents, device=metric.device)
    similarity = cosine_similarity(metric)
    squared = similarity.diagonal(dim1=1, dim2=2)
    size = similarity.new_ones(batch, num_latents) if sizes is None else sizes.to(similarity.dtype)
    # Symmetric to the last bit, which a product of matrices need not be.
    similarity = (similarity + similarity.transpose(1, 2)) / 2
    distance = squared[:, :, None] + squared[:, None, :] - 2 * similarity
    cost = distance * (size[:, :, None] * size[:, None, :] / (size[:, :, None] + size[:, None, :]))
    cost = cost.masked_fill(places[:, None] == places, torch.inf)
    group, gone = places.expand(batch, -1), torch.zeros(batch, num_latents, dtype=torch.bool, device=metric.device)
    for _ in range(r):
        pair = cost.flatten(1).argmin(dim=1)
        # The cost is symmetric, so the first of equals stands above the diagonal.
        one, other = pair // num_latents, pair % num_latents
        at_one, at_other = places == one[:, None], places == other[:, None]
        size_one, size_other = size[rows, one][:, None], size[rows, other][:, None]
        between = cost[rows, one, other][:, None]
        merged = (size_one + size) * cost[rows, one] + (size_other + size) * cost[rows, other] - size * between
        gone = gone | at_other
        merged = (merged / (size_one + size_other + size)).masked_fill(gone | at_one, torch.inf)
        cost = torch.where(at_one[:, :, None], merged[:, None, :], cost)
        cost = torch.where(at_one[:, None, :], merged[:, :, None], cost)
        cost = cost.masked_fill(at_other[:, :, None] | at_other[:, None, :], torch.inf)
        size = torch.where(at_one, size_one + size_other, size)
        group = torch.where(group == other[:, None], one[:, None], group)
    order = torch.sort(gone.to(torch.int64), dim=1, stable=True).indices
    kept, merged_away = order[:, : num_latents - r], order[:, num_latents - r :]
    place_among_kept = (~gone).to(torch.int64).cumsum(dim=1) - 1
    return Match(kept=kept, merged=merged_away, into=place_among_kept.gather(1, group.gather(1, merged_away)))


def match_groups(groups: Sequence[int], device: torch.device) -> Match:
    """Fixed groups as a `Match` that serves every row.

    Args:
        groups: for each of the N latents its group, numbered 0 to M - 1 with none left out. The first latent of each
            group stays, at its group's number.
    """
    first = {group: position for position, group in reversed(list(enumerate(groups)))}
    kept = [first[group] for group in range(len(first))]
    merged = [position for position, group in enumerate(groups) if first[group] != position]
    into = [groups[position] for position in merged]

    def row(values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=device)

    return Match(kept=row(kept), merged=row(merged), into=row(into))


def cosine_similarity(metric: Tensor, rows: slice = EVERY, columns: slice = EVERY) -> Tensor:
    """(B, K, J): between the latents at positions `rows` and at `columns` of (B, N, C), in float32 or wider."""
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(SHORTEST)
    # Under autocast the product would run in half precision and the schedule of merges would depend on it.
    # The meta device has no autocast to ask about.
    autocast = metric.device.type != "meta" and torch.is_autocast_enabled(metric.device.type)
    with torch.autocast(metric.device.type, enabled=False) if autocast else nullcontext():
        return torch.bmm(metric[:, rows], metric[:, columns].transpose(1, 2))


def best_edges(score: Tensor) -> tuple[Tensor, Tensor]:
    """For each of K positions the best of J edges and where it ends, both (B, K); scores are (B, K, J)."""
    if score.shape[2] == 1:
        # Of two or three latents. Compiled for any number of them, PyTorch 2.13 fails on a maximum over one entry.
        return score[:, :, 0], torch.zeros_like(score[:, :, 0], dtype=torch.int64)
    return score.max(dim=2)


def match_edges(edge_score: Tensor, edge_target: Tensor, num_latents: int, r: int) -> Match:
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
    even_positions = 2 * order
    odds = torch.arange(1, num_latents, 2, device=edge_score.device)
    kept = torch.cat([even_positions[:, r:], odds.expand(rows, -1)], dim=1)
    into = edge_target.gather(1, order[:, :r]) + (evens - r)
    return Match(kept=kept, merged=even_positions[:, :r], into=into)


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
    dtype = torch.promote_types(latents.dtype, torch.float32)
    # The rows of the batch laid end to end: whole rows are copied, and one set of positions serves latents and sizes.
    latents = latents.flatten(0, 1)
    sizes = latents.new_ones(latents.shape[0], dtype=torch.float32) if sizes is None else sizes.flatten()
    kept = _flat_rows(match.kept, batch, num_latents)
    means, total = latents.index_select(0, kept).to(dtype), sizes.index_select(0, kept)
    if match.into is not None:
        merged, into = _flat_rows(match.merged, batch, num_latents), _flat_rows(match.into, batch, match.kept.shape[1])
        merged_sizes = sizes.index_select(0, merged)
        total.index_add_(0, into, merged_sizes)
        weight = merged_sizes.to(dtype) / total.index_select(0, into)
        # The mean as a step from the latent that stays towards those that merge: it touches R rows and leaves the rest.
        steps = latents.index_select(0, merged).to(dtype) - means.index_select(0, into)
        means.index_add_(0, into, steps * weight.unsqueeze(-1))
    # By numbers rather than -1, which a batch of no rows leaves open.
    left = match.kept.shape[1]
    return means.to(latents.dtype).view(batch, left, channels), total.view(batch, left)


def log_size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of proportional attention, by which a merged key counts as often as the latents in it.

    Args:
        sizes: (B, M).
        dtype: of the scores.

    Returns:
        (B, 1, 1, M), to be broadcast over heads and queries.

    Source: Bolya et al. (2023), section 3, "proportional attention".
    """
    return sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)[:, None, None, :]


def merge_sources(sources: Tensor, match: Match) -> Tensor:
    """Follow the first latents through one more merge.

    Args:
        sources: (B, N, N0) of 0 and 1, the first latents in each of the N that reach this merge.
        match: of those N.

    Returns:
        (B, M, N0), the first latents in each of the M left; a dropped one is in none.
    """
    left = _take_rows(sources, match.kept)
    if match.into is None:
        return left
    into = match.into[..., None].expand(left.shape[0], -1, left.shape[2])
    return left.scatter_add(1, into, _take_rows(sources, match.merged))


def _flat_rows(positions: Tensor, batch: int, length: int) -> Tensor:
    """(B or 1, K) positions within rows of `length`, as (B * K) positions in B such rows laid end to end."""
    if batch == 1:
        return positions.flatten()
    offsets = torch.arange(0, batch * length, length, device=positions.device)
    return (positions + offsets[:, None]).flatten()


def _take_rows(latents: Tensor, positions: Tensor) -> Tensor:
    """(B, K, C): the latents (B, N, C) at positions (B, K). Whole rows are copied, unlike with `gather`."""
    batch, num_latents, channels = latents.shape
    rows = latents.flatten(0, 1).index_select(0, _flat_rows(positions, batch, num_latents))
    return rows.view(batch, positions.shape[1], channels)


def take_pairs(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, K, J): the similarities (B, N, N) of the latents at positions (B, K) to those at positions (B, J)."""
    return _take_rows(similarity, rows).gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
