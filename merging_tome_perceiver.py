# SPDX-License-Identifier: Apache-2.0
"""Functions on tensors that merge latents, and the registry of matching methods, which decide what merges.

Written from Bolya et al. (2023), "Token Merging: Your ViT But Faster", section 3 (arXiv:2210.09461), except for the
class token: a Perceiver has none, so every latent may merge. Each other matching method names its paper. The layers
and the cost model import this module; it needs only torch.

Letters: B batch size, N latents, M latents left, R = N - M latents merged away, C channels. Indices are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Slices of the N latents. Bipartite matching merges latents at even positions into latents at odd positions.
ALL, EVENS, ODDS = slice(None), slice(0, None, 2), slice(1, None, 2)
# Smallest norm that a vector is divided by when it is normalised; a zero vector stays zero.
MIN_NORM = 1e-12
# Names of control methods, which `experiments/merging/controls.py` registers and no checkpoint contains.
EXPERIMENT_ONLY_METHODS = ("energy", "prune", "random", "size_penalty")


class Match(NamedTuple):
    """Result of a matching: the latents that stay, and those that merge into them.

    Matching methods and `match_groups` return it. All tensors may have 1 row in place of B, for the same merge in every
    row of the batch.

    Attributes:
        kept: (B, M) positions, among the N latents, of the latents that stay, in their new order.
        merged: (B, R) positions, among the N latents, of the latents that are merged away.
        into: (B, R) target of each merged latent, as a position among the M kept; `None` drops the merged latents.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor | None


MergeMethod = Callable[[Tensor, int, Tensor | None, float], Match]
"""A matching method: `method(metric, r, sizes, depth)` returns the `Match` of one layer.

    metric: (B, N, C), the vectors to compare. The methods here use their cosine similarity, in float32 or wider; a zero
        vector has similarity 0 to everything. Ties go to the lower position, both between latents to merge and between
        targets.
    r: R, the number of latents to merge away, from 1 to N // 2.
    sizes: (B, N) in float32, the number of original latents in each latent; `None` for 1 each.
    depth: index of the layer divided by the number of layers, in [0, 1).
"""

MERGE_METHODS: dict[str, MergeMethod] = {}
"""Matching methods by name, the value of `config.merge_method`."""

MatchingFlops = Callable[[int, int], int]
"""Returns the FLOPs of one matching of one row, given N and the channels of the metric."""

MATCHING_FLOPS: dict[str, MatchingFlops] = {}
"""FLOPs of one matching, by method name; methods registered without a cost are missing."""


def register_merge_method(name: str, flops: MatchingFlops | None = None) -> Callable[[MergeMethod], MergeMethod]:
    """Return a decorator that registers a matching method, so that `config.merge_method` can name it.

    Args:
        name: name of the method; a method already registered under it is replaced.
        flops: cost of the method. Without it the method can merge, but its FLOPs cannot be counted, so it cannot be
            used with a FLOPs budget.
    """

    def register(method: MergeMethod) -> MergeMethod:
        MERGE_METHODS[name] = method
        if flops is not None:
            MATCHING_FLOPS[name] = flops
        return method

    return register


def check_merge_method(name: str) -> None:
    """Check that `name` is a registered matching method.

    Raises:
        ValueError: if it is not; the message lists the registered methods.
    """
    if name not in MERGE_METHODS:
        why = "is for experiments only" if name in EXPERIMENT_ONLY_METHODS else "is not registered"
        raise ValueError(f"merge_method={name!r} {why}; choose from {', '.join(sorted(MERGE_METHODS))}")


def get_method(name: str) -> MergeMethod:
    """Return the matching method registered as `name`.

    Raises:
        ValueError: if no method has that name.
    """
    check_merge_method(name)
    return MERGE_METHODS[name]


def matching_flops(name: str, latents: int, channels: int) -> int:
    """Return the FLOPs of one matching of one row.

    Args:
        name: matching method.
        latents: N.
        channels: channels of the metric.

    Raises:
        ValueError: if the method was registered without a cost.
    """
    if name not in MATCHING_FLOPS:
        raise ValueError(
            f"merge_method={name!r} was registered without a cost; choose from {', '.join(sorted(MATCHING_FLOPS))}, "
            "or register it with flops=..."
        )
    return MATCHING_FLOPS[name](latents, channels)


def product_flops(rows: int, in_channels: int, out_channels: int) -> int:
    """Return the FLOPs of a (rows, in_channels) by (in_channels, out_channels) product; a multiply-add counts as 2."""
    return 2 * rows * in_channels * out_channels


def bipartite_flops(latents: int, channels: int) -> int:
    """Return the FLOPs of the similarities between all even and all odd positions, for one row."""
    return product_flops((latents + 1) // 2, channels, latents // 2)


def all_pairs_flops(latents: int, channels: int) -> int:
    """Return the FLOPs of the similarities between all pairs of latents, for one row."""
    return product_flops(latents, channels, latents)


@register_merge_method("bipartite", flops=bipartite_flops)
@torch.no_grad()
def match_bipartite(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Bipartite soft matching: pair each even position with its most similar odd position, and merge the R best pairs.

    Source: Bolya et al. (2023), section 3.
    """
    edge_score, edge_target = best_edges(cosine_similarity(metric, EVENS, ODDS))
    return match_edges(edge_score, edge_target, metric.shape[1], r)


@register_merge_method("k_center", flops=all_pairs_flops)
@torch.no_grad()
def match_k_center(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Farthest-point selection: keep M latents far from each other, and merge each other latent into the most similar.

    The first latent is kept; each of M - 1 further steps keeps the latent that is least similar to its nearest kept
    latent. Any two latents can merge. If the latents have at most M distinct directions, only latents of equal
    direction merge. The largest distance between normalised latents and their targets is at most twice that of the best
    choice of M latents. The M steps are sequential, and `torch.compile` unrolls them.

    Source: Gonzalez (1985), "Clustering to minimize the maximum intercluster distance"; as the selection of a
    core-set: Sener and Savarese (2018), "Active Learning for Convolutional Neural Networks" (arXiv:1708.00489).
    """
    similarity = cosine_similarity(metric)
    # Similarity of each latent to the nearest kept one, at first latent 0; +inf for a kept latent itself.
    nearest = similarity[:, 0].masked_fill(torch.arange(metric.shape[1], device=metric.device) == 0, math.inf)
    for _ in range(metric.shape[1] - r - 1):
        farthest = nearest.argmin(dim=1, keepdim=True)
        nearest = nearest.maximum(_take_rows(similarity, farthest)[:, 0]).scatter(1, farthest, math.inf)
    order = order_by_flag(nearest.isinf())
    merged, kept = order[:, :r], order[:, r:]
    return Match(kept=kept, merged=merged, into=take_pairs(similarity, merged, kept).argmax(dim=-1))


@register_merge_method("leader", flops=all_pairs_flops)
@torch.no_grad()
def match_leader(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Leader clustering: merge the R latents that are most similar to a latent at a lower position.

    Each merges into the most similar kept latent. All pairs are compared in one pass. The first latent always stays,
    and of several exact duplicates the first stays.

    Source: after the leader algorithm of Hartigan (1975), "Clustering Algorithms", chapter 3, with a number of clusters
    in place of its distance threshold.
    """
    similarity = cosine_similarity(metric)
    positions = torch.arange(metric.shape[1], device=metric.device)
    # The first latent has none before it, so its maximum is -inf and it is sorted last.
    nearest_before = similarity.masked_fill(positions[:, None] <= positions, -math.inf).amax(dim=-1)
    order = torch.sort(nearest_before, dim=1, descending=True, stable=True).indices
    merged, kept = order[:, :r], order[:, r:].sort(dim=1).values
    return Match(kept=kept, merged=merged, into=take_pairs(similarity, merged, kept).argmax(dim=-1))


@register_merge_method("ward", flops=all_pairs_flops)
@torch.no_grad()
def match_ward(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Ward clustering: R times, merge the two clusters that increase the within-cluster sum of squares least.

    Distances are between normalised vectors, weighted by size. Each cluster, of any number of latents, merges into its
    latent at the lowest position. The R steps are sequential, which is slow for large R.

    Source: Ward (1963), "Hierarchical grouping to optimize an objective function", with the distance update of Lance
    and Williams (1967).
    """
    batch, num_latents = metric.shape[:2]
    rows, positions = torch.arange(batch, device=metric.device), torch.arange(num_latents, device=metric.device)
    similarity = cosine_similarity(metric)
    squared_norm = similarity.diagonal(dim1=1, dim2=2)
    size = similarity.new_ones(batch, num_latents) if sizes is None else sizes.to(similarity.dtype)
    # A matrix product need not be symmetric to the last bit; the loop below relies on an exactly symmetric cost.
    similarity = (similarity + similarity.transpose(1, 2)) / 2
    distance = squared_norm[:, :, None] + squared_norm[:, None, :] - 2 * similarity
    cost = distance * (size[:, :, None] * size[:, None, :] / (size[:, :, None] + size[:, None, :]))
    cost = cost.masked_fill(positions[:, None] == positions, torch.inf)
    cluster = positions.expand(batch, -1)
    is_merged = torch.zeros(batch, num_latents, dtype=torch.bool, device=metric.device)
    for _ in range(r):
        pair = cost.flatten(1).argmin(dim=1)
        # The cost is symmetric, so argmin finds the pair with first < second.
        first, second = pair // num_latents, pair % num_latents
        is_first, is_second = positions == first[:, None], positions == second[:, None]
        size_first, size_second = size[rows, first][:, None], size[rows, second][:, None]
        pair_cost = cost[rows, first, second][:, None]
        # The update of Lance and Williams: cost of merging the new cluster with each other one.
        updated = (size_first + size) * cost[rows, first] + (size_second + size) * cost[rows, second] - size * pair_cost
        is_merged = is_merged | is_second
        updated = (updated / (size_first + size_second + size)).masked_fill(is_merged | is_first, torch.inf)
        cost = torch.where(is_first[:, :, None], updated[:, None, :], cost)
        cost = torch.where(is_first[:, None, :], updated[:, :, None], cost)
        cost = cost.masked_fill(is_second[:, :, None] | is_second[:, None, :], torch.inf)
        size = torch.where(is_first, size_first + size_second, size)
        cluster = torch.where(cluster == second[:, None], first[:, None], cluster)
    order = order_by_flag(is_merged)
    kept, merged = order[:, : num_latents - r], order[:, num_latents - r :]
    index_among_kept = (~is_merged).to(torch.int64).cumsum(dim=1) - 1
    return Match(kept=kept, merged=merged, into=index_among_kept.gather(1, cluster.gather(1, merged)))


def match_groups(groups: Sequence[int], device: torch.device) -> Match:
    """Return the `Match` that merges fixed groups, as one row for the whole batch.

    Args:
        groups: group number of each of the N latents, from 0 to M - 1 with none left out. The first latent of each
            group stays, at the position of the group's number.
        device: where the positions are put.
    """
    first = {group: position for position, group in reversed(list(enumerate(groups)))}
    kept = [first[group] for group in range(len(first))]
    merged = [position for position, group in enumerate(groups) if first[group] != position]
    into = [groups[position] for position in merged]

    def row(values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=device)

    return Match(kept=row(kept), merged=row(merged), into=row(into))


def cosine_similarity(metric: Tensor, rows: slice = ALL, columns: slice = ALL) -> Tensor:
    """Return the cosine similarities (B, K, J) between K latents and J latents of (B, N, C), in float32 or wider."""
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(MIN_NORM)
    # Autocast would run the product in half precision, and rounding would change which latents merge. The meta device
    # does not support asking whether autocast is on.
    autocast = metric.device.type != "meta" and torch.is_autocast_enabled(metric.device.type)
    with torch.autocast(metric.device.type, enabled=False) if autocast else nullcontext():
        return torch.bmm(metric[:, rows], metric[:, columns].transpose(1, 2))


def order_by_flag(flags: Tensor) -> Tensor:
    """Return the positions (B, N) whose flag (B, N) is false, then those whose flag is true, each in ascending order.

    The sorted keys are unique, because a runtime of an exported model may reorder equal ones.
    """
    length = flags.shape[1]
    keys = flags.to(torch.int64) * length + torch.arange(length, device=flags.device)
    return keys.sort(dim=1).values % length


def best_edges(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best score and the index of its target, both (B, K), for K positions with scores (B, K, J)."""
    if score.shape[2] == 1:
        # Two or three latents have one odd position. PyTorch 2.13, compiled with dynamic shapes, fails on a maximum
        # over one entry.
        return score[:, :, 0], torch.zeros_like(score[:, :, 0], dtype=torch.int64)
    return score.max(dim=2)


def match_edges(edge_score: Tensor, edge_target: Tensor, num_latents: int, r: int) -> Match:
    """Return the `Match` of the R best edges between even and odd positions.

    Args:
        edge_score: (B, ceil(N / 2)) score of the single edge that starts at each even position.
        edge_target: (B, ceil(N / 2)) end of that edge, as an index among the odd positions.
        num_latents: N.
        r: R, the number of edges along which latents merge.
    """
    rows, evens = edge_score.shape
    # The stable sort resolves ties the same way on every device.
    order = torch.sort(edge_score, dim=1, descending=True, stable=True).indices
    even_positions = 2 * order
    odds = torch.arange(1, num_latents, 2, device=edge_score.device)
    kept = torch.cat([even_positions[:, r:], odds.expand(rows, -1)], dim=1)
    into = edge_target.gather(1, order[:, :r]) + (evens - r)
    return Match(kept=kept, merged=even_positions[:, :r], into=into)


def merge_latents(latents: Tensor, sizes: Tensor | None, match: Match) -> tuple[Tensor, Tensor]:
    """Replace each kept latent by the size-weighted mean of itself and the latents that merge into it.

    Merging preserves the sum of the latents times their sizes, except for dropped latents. A latent that nothing merges
    into keeps its value to the last bit. Means are computed in float32 or wider, with weights size / total, so
    half-precision inputs do not overflow. Each latent receives the gradient of its mean times its weight; none
    flows through the match.

    Args:
        latents: (B, N, C).
        sizes: (B, N), the number of original latents in each latent; `None` for 1 each.
        match: which of the N latents merge.

    Returns:
        The M latents left, (B, M, C) in the dtype of `latents`, and their sizes, (B, M) in float32.

    Source: Bolya et al. (2023), section 3.
    """
    batch, num_latents, channels = latents.shape
    dtype = torch.promote_types(latents.dtype, torch.float32)
    # With the batch flattened into one dimension, `index_select` copies whole vectors, and latents and sizes share
    # the same positions.
    latents = latents.flatten(0, 1)
    sizes = latents.new_ones(latents.shape[0], dtype=torch.float32) if sizes is None else sizes.flatten()
    kept = _flat_rows(match.kept, batch, num_latents)
    means, total = latents.index_select(0, kept).to(dtype), sizes.index_select(0, kept)
    if match.into is not None:
        merged, into = _flat_rows(match.merged, batch, num_latents), _flat_rows(match.into, batch, match.kept.shape[1])
        merged_sizes = sizes.index_select(0, merged)
        total.index_add_(0, into, merged_sizes)
        weight = merged_sizes.to(dtype) / total.index_select(0, into)
        # Move each kept latent towards those that merge into it. Latents that nothing merges into are not touched.
        steps = latents.index_select(0, merged).to(dtype) - means.index_select(0, into)
        means.index_add_(0, into, steps * weight.unsqueeze(-1))
    # Explicit sizes, because `view` cannot infer -1 for an empty batch.
    left = match.kept.shape[1]
    return means.to(latents.dtype).view(batch, left, channels), total.view(batch, left)


def log_size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of proportional attention: with it, a merged key has the weight of all latents in it.

    Args:
        sizes: (B, M).
        dtype: dtype of the attention scores.

    Returns:
        The log of the sizes, (B, 1, 1, M), to broadcast over heads and queries.

    Source: Bolya et al. (2023), section 3, "proportional attention".
    """
    return sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)[:, None, None, :]


def merge_sources(sources: Tensor, match: Match) -> Tensor:
    """Return the sources of the latents after one more merge.

    Args:
        sources: (B, N, N0) of 0 and 1: which of the N0 original latents each of the N latents contains.
        match: which of the N latents merge.

    Returns:
        (B, M, N0), the same for the M latents left; a dropped latent's originals are in none of them.
    """
    left = _take_rows(sources, match.kept)
    if match.into is None:
        return left
    into = match.into[..., None].expand(left.shape[0], -1, left.shape[2])
    return left.scatter_add(1, into, _take_rows(sources, match.merged))


def _flat_rows(positions: Tensor, batch: int, length: int) -> Tensor:
    """Convert positions (B or 1, K) within rows of `length` to positions (B * K) in the B rows laid end to end."""
    if batch == 1:
        return positions.flatten()
    offsets = torch.arange(0, batch * length, length, device=positions.device)
    return (positions + offsets[:, None]).flatten()


def _take_rows(latents: Tensor, positions: Tensor) -> Tensor:
    """Return the latents (B, K, C) at positions (B, K) of (B, N, C). Copies whole vectors, unlike `gather`."""
    batch, num_latents, channels = latents.shape
    rows = latents.flatten(0, 1).index_select(0, _flat_rows(positions, batch, num_latents))
    return rows.view(batch, positions.shape[1], channels)


def take_pairs(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the similarities (B, K, J) at row positions (B, K) and column positions (B, J) of (B, N, N)."""
    return _take_rows(similarity, rows).gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
