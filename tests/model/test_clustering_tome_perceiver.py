# SPDX-License-Identifier: Apache-2.0
"""The laws of the methods that cluster, with no halves of the latents that may not merge among themselves."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merging_tome_perceiver as merging
from tests.support.tiny_matches import cosines, edges, matches, randn, signed_basis_vectors, unequal_sizes


def plain_k_center(metric, r):
    """One row's edges from the definition: the least similar to those that stay stays too."""
    similarity = cosines(metric)
    kept, others = [0], list(range(1, len(similarity)))
    while len(others) > r:
        kept.append(min(others, key=lambda i: max(similarity[i, j] for j in kept)))
        others.remove(kept[-1])
    return {i: max(sorted(kept), key=lambda j: similarity[i, j]) for i in others}


def plain_ward(metric, r, sizes):
    """One row's edges from the definition: the two groups whose merge adds least to the squared distances from their
    means, R times, with the means taken anew."""
    vectors = torch.nn.functional.normalize(metric.double(), dim=-1).numpy()
    members = {position: [position] for position in range(len(vectors))}

    def added(pair):
        weights = [sum(sizes[i] for i in members[group]) for group in pair]
        means = [sum(sizes[i] * vectors[i] for i in members[group]) / w for group, w in zip(pair, weights, strict=True)]
        return weights[0] * weights[1] / sum(weights) * np.square(means[0] - means[1]).sum()

    for _ in range(r):
        one, other = min(itertools.combinations(sorted(members), 2), key=added)
        members[one] = members[one] + members.pop(other)
    return {i: group for group, inside in members.items() for i in inside if i != group}


def plain_leader(metric, r):
    """One row's edges from the definition: those most similar to any before them go, each to the most similar left."""
    similarity = cosines(metric)
    rest = range(1, len(similarity))
    merged = sorted(rest, key=lambda i: -max(similarity[i, j] for j in range(i)))[:r]
    kept = [i for i in range(len(similarity)) if i not in merged]
    return {i: max(kept, key=lambda j: similarity[i, j]) for i in merged}


# leader


@given(matches(["leader"], channels=2))
def test_leader_against_a_plain_reference(drawn):
    for row, metric in enumerate(drawn.metric):
        assert edges(drawn.match, row) == plain_leader(metric, drawn.r)


@given(seed=st.integers(0, 2**31), num_latents=st.integers(2, 24), channels=st.integers(1, 4), data=st.data())
def test_ties_of_leader_go_to_the_lower_position(seed, num_latents, channels, data):
    r = data.draw(st.integers(1, num_latents // 2))
    metric = signed_basis_vectors(num_latents, channels, seed)
    match = merging.match_leader(metric, r)
    for row in range(2):
        assert edges(match, row) == plain_leader(metric[row], r)


# k-center


@pytest.mark.parametrize(
    "num_left, kept", [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 2, 3, 5]), (5, [0, 2, 3, 4, 5])]
)
def test_farthest_latents_stay_by_hand(num_left, kept):
    """Angles on a circle: from 0 the farthest is 180, then 100 is 80 away from both, then 300 60, then 195 15."""
    angles = torch.tensor([0.0, 10.0, 100.0, 180.0, 195.0, 300.0]).deg2rad()
    match = merging.match_k_center(torch.stack([angles.cos(), angles.sin()], dim=-1)[None], 6 - num_left)
    assert match.kept.tolist() == [kept]
    targets = {1: 0, 2: 0, 3: 0, 4: 0, 5: 0} if num_left == 1 else {1: 0, 2: 3, 4: 3, 5: 0}
    assert edges(match, 0) == {merged: target for merged, target in targets.items() if merged not in kept}


@given(matches(["k_center"], channels=2))
def test_k_center_against_a_plain_reference(drawn):
    for row, metric in enumerate(drawn.metric):
        assert edges(drawn.match, row) == plain_k_center(metric, drawn.r)


@given(seed=st.integers(0, 2**31), num_latents=st.integers(2, 24), channels=st.integers(1, 4), data=st.data())
def test_ties_of_k_center_go_to_the_lower_position(seed, num_latents, channels, data):
    r = data.draw(st.integers(1, num_latents // 2))
    metric = signed_basis_vectors(num_latents, channels, seed)
    match = merging.match_k_center(metric, r)
    for row in range(2):
        assert edges(match, row) == plain_k_center(metric[row], r)


@given(seed=st.integers(0, 2**31), num_latents=st.integers(2, 8), channels=st.integers(2, 4), data=st.data())
def test_k_center_is_within_twice_the_best_radius(seed, num_latents, channels, data):
    """Gonzalez' bound: the largest distance to a target, against every choice of as many latents."""
    r = data.draw(st.integers(1, num_latents - 1))
    metric = randn(1, num_latents, channels, seed=seed)
    distance = np.sqrt(np.maximum(2 - 2 * cosines(metric[0]), 0))
    choices = itertools.combinations(range(num_latents), num_latents - r)
    best = min(distance[:, list(choice)].min(axis=1).max() for choice in choices)
    assert max(distance[edge] for edge in edges(merging.match_k_center(metric, r), 0).items()) <= 2 * best + 1e-7


# Ward


@given(
    seed=st.integers(0, 2**31),
    num_latents=st.integers(2, 14),
    channels=st.integers(2, 5),
    sized=st.booleans(),
    data=st.data(),
)
def test_ward_against_a_plain_reference(seed, num_latents, channels, sized, data):
    r = data.draw(st.integers(1, num_latents // 2))
    metric = randn(2, num_latents, channels, seed=seed)
    sizes = unequal_sizes(2, num_latents, seed) if sized else None
    match = merging.match_ward(metric, r, sizes)
    for row in range(2):
        weights = np.ones(num_latents) if sizes is None else sizes[row].double().numpy()
        assert edges(match, row) == plain_ward(metric[row], r, weights)


def test_ward_by_hand():
    """At 0, 10 and 14 degrees, and opposite: the last two of the three merge, then the first joins them."""
    angles = torch.tensor([0.0, 180.0, 10.0, 14.0]).deg2rad()
    metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert edges(merging.match_ward(metric, 1), 0) == {3: 2}
    assert edges(merging.match_ward(metric, 2), 0) == {2: 0, 3: 0}


def test_large_groups_are_costlier_to_merge():
    """Two pairs as far apart: the one of small latents merges; with the sizes the other way round, the other."""
    metric = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.0, 0.1, 0.9]]])
    assert edges(merging.match_ward(metric, 1, torch.tensor([[5.0, 5.0, 1.0, 1.0]])), 0) == {3: 2}
    assert edges(merging.match_ward(metric, 1, torch.tensor([[1.0, 1.0, 5.0, 5.0]])), 0) == {1: 0}


@given(seed=st.integers(0, 2**31), num_latents=st.integers(4, 24))
def test_ward_changes_the_compared_vectors_less_than_bipartite(seed, num_latents):
    """In its first step, by its own measure: the squared distance that a merge takes latents from where they were."""
    metric = randn(1, num_latents, 4, seed=seed)
    distance = 2 - 2 * cosines(metric[0])
    costs = {
        name: sum(distance[edge] for edge in edges(match(metric, 1), 0).items())
        for name, match in (("ward", merging.match_ward), ("bipartite", merging.match_bipartite))
    }
    assert costs["ward"] <= costs["bipartite"] + 1e-9
