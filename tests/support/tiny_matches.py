# SPDX-License-Identifier: Apache-2.0
"""Random metrics, their matches by every method, and functions that read a match.

Letters: B batch, N latents, M latents left, R = N - M latents merged away, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import experiments.merging.controls  # noqa: F401  registers the controls
import merging_tome_perceiver as merging
from merging_tome_perceiver import Match

METHODS = sorted(merging.MERGE_METHODS)
"""Every method of the registry."""
MERGING_METHODS = [method for method in METHODS if method != "prune"]
"""Methods that merge, and drop nothing."""


class Drawn(NamedTuple):
    """Arguments of a matching method (metric (B, N, C), R, sizes (B, N) or `None`, depth), its match, and a seed for
    other random draws of the test."""

    metric: Tensor
    r: int
    sizes: Tensor | None
    depth: float
    match: Match
    seed: int


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unequal_sizes(batch: int, num_latents: int, seed: int) -> Tensor:
    return torch.randint(1, 1000, (batch, num_latents), generator=torch.Generator().manual_seed(seed)).float()


def match_by(method: str, metric: Tensor, r: int, sizes: Tensor | None = None, depth: float = 0.0) -> Match:
    return merging.MERGE_METHODS[method](metric, r, sizes, depth)


@st.composite
def matches(draw: Any, methods: Sequence[str] = MERGING_METHODS, batch: int | None = None, channels: int = 1) -> Drawn:
    """Draw a match by one of the methods, of a metric with `channels` or more channels.

    With one channel every similarity is 1 or -1, except for rounding, so nearly all edges tie.
    """
    seed = draw(st.integers(0, 2**31))
    rows, num_latents = batch or draw(st.integers(1, 3)), draw(st.integers(2, 24))
    r = draw(st.integers(1, num_latents // 2))
    metric = randn(rows, num_latents, draw(st.integers(channels, 8)), seed=seed)
    sizes = unequal_sizes(rows, num_latents, seed) if draw(st.booleans()) else None
    depth = draw(st.sampled_from([0.0, 0.5, 0.95]))
    match = match_by(draw(st.sampled_from(methods)), metric, r, sizes, depth)
    return Drawn(metric, r, sizes, depth, match, seed)


def cosines(metric: Any) -> np.ndarray:
    """Return the cosine similarities (N, N) of one row (N, C); a zero vector is orthogonal to all, itself included."""
    metric = np.asarray(metric, dtype=np.float64)
    unit = metric / np.maximum(np.linalg.norm(metric, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def edges(match: Match, row: int) -> dict[int, int]:
    """Return {merged: target} of one row, as positions among the N latents."""
    one = row_of(match, row)
    assert one.into is not None
    kept = one.kept[0].tolist()
    return {position: kept[into] for position, into in zip(one.merged[0].tolist(), one.into[0].tolist(), strict=True)}


def row_of(match: Match, row: int) -> Match:
    """Return the match of one row, as a batch of one."""
    return Match(*(None if part is None else part[min(row, len(part) - 1)][None] for part in match))


def signed_basis_vectors(num_latents, channels, seed):
    """Return (2, N, C), zero vectors among them: similarities are exactly -1, 0 or 1, so nearly all edges tie."""
    vectors = torch.cat([torch.eye(channels), -torch.eye(channels), torch.zeros(1, channels)])
    choice = torch.randint(len(vectors), (2, num_latents), generator=torch.Generator().manual_seed(seed))
    return vectors[choice] * 3
