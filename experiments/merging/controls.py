# SPDX-License-Identifier: Apache-2.0
"""Matching methods for comparison: controls, and published methods that win no comparison.

Importing this module registers them.

They are not part of the code in a checkpoint, so only this repository can run a checkpoint with them.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from merging_tome_perceiver import (
    EVENS,
    ODDS,
    Match,
    all_pairs_flops,
    best_edges,
    bipartite_flops,
    cosine_similarity,
    match_bipartite,
    match_edges,
    register_merge_method,
    take_pairs,
)

# Margin of the energy at the first layer; it falls linearly to 0 over the layers (Tran et al., 2024).
LARGEST_MARGIN = 0.9
# Temperature of the size criterion (Lee et al., 2024).
SIZE_TEMPERATURE = 1 / 40


@register_merge_method("size_penalty", flops=bipartite_flops)
@torch.no_grad()
def match_size_penalty(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Bipartite soft matching that prefers latents of small size.

    The attraction of latents i and j is (cos + 1) / 2 x (1 / (s_i s_j)) ^ (1 / 40). If all sizes are equal, this is
    `bipartite`; otherwise a pair of small, less similar latents may merge before a pair of exact duplicates.

    Args:
        metric: (B, N, C). Zero vectors and ties are treated as in `match_bipartite`.
        r: R, latents to merge away, from 1 to N // 2.
        sizes: (B, N), s; `None` for 1 each.
        depth: without effect.

    Source: Lee et al. (2024), "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
    Transformers" (arXiv:2403.10030), section 3.2: its similarity and size criteria, without the informativeness.
    """
    attraction = (cosine_similarity(metric, EVENS, ODDS) + 1) / 2
    if sizes is not None:
        attraction = attraction * (sizes[:, EVENS, None] * sizes[:, None, ODDS]) ** -SIZE_TEMPERATURE
    edge_score, edge_target = best_edges(attraction)
    return match_edges(edge_score, edge_target, metric.shape[1], r)


@register_merge_method("energy", flops=all_pairs_flops)
@torch.no_grad()
def match_energy(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Merge the 2R latents of highest energy in pairs, and protect the others.

    In order of energy, the 2R latents go alternately into two sets, and each latent of the first set merges into the
    most similar latent of the second. High energy means many similar latents, so isolated latents stay. Exact
    duplicates may stay apart: energy alone decides which latents are protected and which set a latent is in.

    Args:
        metric: (B, N, C) compared by cosine similarity, in float32 or wider; a zero vector is orthogonal to everything.
            Ties of the energy go to the lower position, ties of the similarity to the higher energy.
        r: R, latents to merge away, from 1 to N // 2.
        sizes: without effect.
        depth: depth of the layer, in [0, 1); the margin of the energy is 0.9 (1 - depth).

    Source: Tran et al. (2024), "Accelerating Transformers with Spectrum-Preserving Token Merging" (PiToMe,
    arXiv:2405.16148), section 3.
    """
    similarity = cosine_similarity(metric)
    energy = energy_scores(similarity, LARGEST_MARGIN * (1 - depth))
    order = torch.sort(energy, dim=1, descending=True, stable=True).indices
    merged, targets, protected = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    nearest = take_pairs(similarity, merged, targets).argmax(dim=-1)
    return Match(kept=torch.cat([protected, targets], dim=1), merged=merged, into=protected.shape[1] + nearest)


def energy_scores(similarity: Tensor, margin: float) -> Tensor:
    """Return the energy of each latent: how crowded its neighbourhood is.

    E_i is the sum over the other latents j of f(cos_ij), divided by N, where f(x) = x if x >= margin, else
    exp(x - margin) - 1.

    Args:
        similarity: (B, N, N).
        margin: in [-1, 1].

    Returns:
        Energies, (B, N).

    Source: Tran et al. (2024), section 3, with their alpha = 1.
    """
    scores = torch.where(similarity >= margin, similarity, torch.expm1(similarity - margin))
    itself = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    return scores.masked_fill(itself, 0).mean(dim=-1)


@register_merge_method("random", flops=lambda latents, channels: 0)
@torch.no_grad()
def match_random(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Match along random edges, and otherwise as `bipartite`: a control for the matching.

    The draw depends on N alone and is the same for every input, so that a row's output does not depend on its batch
    and activation checkpointing recomputes the same merges.
    """
    # In a compiled layer the shape is symbolic and cannot be a seed, so N is counted on a list.
    num_latents = len([*range(metric.shape[1])])
    evens, odds = (num_latents + 1) // 2, num_latents // 2
    generator = random.Random(num_latents)
    score = torch.tensor([generator.random() for _ in range(evens)], device=metric.device)
    target = torch.tensor([generator.randrange(odds) for _ in range(evens)], device=metric.device)
    rows = metric.shape[0]
    return match_edges(score.expand(rows, -1), target.expand(rows, -1), num_latents, r)


@register_merge_method("prune", flops=bipartite_flops)
def match_prune(metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    """Drop the latents that `bipartite` would merge away: a control for the merging."""
    return match_bipartite(metric, r, sizes, depth)._replace(into=None)
