# SPDX-License-Identifier: Apache-2.0
"""Tests of matching on tensors, for every registered method: which latents merge, and into which."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merging_tome_perceiver as merging
from experiments.merging import controls
from tests.support.tiny_matches import (
    MERGING_METHODS,
    METHODS,
    cosines,
    edges,
    match_by,
    matches,
    randn,
    row_of,
    signed_basis_vectors,
    unequal_sizes,
)


def plain_bipartite(score, r):
    """Return one row's edges {merged: target}, from scores (N, N): evens propose their best odd, the R best merge."""
    proposals = []
    for even in range(0, len(score), 2):
        target = max(range(1, len(score), 2), key=lambda odd: (score[even, odd], -odd))
        proposals.append((-score[even, target], even, target))
    return {even: target for _, even, target in sorted(proposals)[:r]}


def plain_size_penalty(metric, r, sizes, depth):
    return plain_bipartite((cosines(metric) + 1) / 2 * (1 / np.outer(sizes, sizes)) ** (1 / 40), r)


def plain_energy(metric, r, sizes, depth):
    """Return one row's edges by definition: sort by energy, alternate, merge into the most similar."""
    similarity, margin = cosines(metric), 0.9 - 0.9 * depth
    num_latents = len(similarity)
    energy = []
    for i in range(num_latents):
        others = [similarity[i, j] for j in range(num_latents) if j != i]
        energy.append(sum(x if x >= margin else np.exp(x - margin) - 1 for x in others) / num_latents)
    crowded = sorted(range(num_latents), key=lambda i: -energy[i])[: 2 * r]
    return {i: max(crowded[1::2], key=lambda j: similarity[i, j]) for i in crowded[::2]}


def plain_k_center(metric, r, sizes, depth):
    """Return one row's edges by definition: repeatedly keep the latent least similar to the kept ones."""
    similarity = cosines(metric)
    kept, others = [0], list(range(1, len(similarity)))
    while len(others) > r:
        kept.append(min(others, key=lambda i: max(similarity[i, j] for j in kept)))
        others.remove(kept[-1])
    return {i: max(sorted(kept), key=lambda j: similarity[i, j]) for i in others}


def plain_ward(metric, r, sizes, depth):
    """Return one row's edges by definition: merge the two groups that add least to the squared distances from their
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


def plain_leader(metric, r, sizes, depth):
    """Return one row's edges by definition: latents most similar to an earlier one merge into the most similar kept."""
    similarity = cosines(metric)
    rest = range(1, len(similarity))
    merged = sorted(rest, key=lambda i: -max(similarity[i, j] for j in range(i)))[:r]
    kept = [i for i in range(len(similarity)) if i not in merged]
    return {i: max(kept, key=lambda j: similarity[i, j]) for i in merged}


PLAIN = {
    "bipartite": lambda metric, r, sizes, depth: plain_bipartite(cosines(metric), r),
    "energy": plain_energy,
    "k_center": plain_k_center,
    "leader": plain_leader,
    "size_penalty": plain_size_penalty,
    "ward": plain_ward,
}


def same(one, other):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(one, other, strict=True))


# Every method


@given(matches(METHODS))
def test_kept_and_merged_partition_the_latents(drawn):
    metric, r, match = drawn.metric, drawn.r, drawn.match
    num_latents = metric.shape[1]
    assert match.kept.shape[1] == num_latents - r
    assert match.merged.shape[1] == r
    for part in (match.kept, match.merged):
        assert part.dtype == torch.int64
        assert part.shape[0] in (1, metric.shape[0])
    everyone = torch.cat([match.kept, match.merged], dim=1).sort(dim=1).values
    assert (everyone == torch.arange(num_latents)).all()
    if match.into is not None:
        assert match.into.shape == match.merged.shape
        assert match.into.dtype == torch.int64
        assert match.into.min() >= 0 and match.into.max() < num_latents - r


@pytest.mark.parametrize("method", METHODS)
@given(drawn=matches(["random"], batch=4, channels=2))
def test_a_row_is_matched_alone_as_in_a_batch(method, drawn):
    metric, r, sizes, depth = drawn.metric, drawn.r, drawn.sizes, drawn.depth
    together = match_by(method, metric, r, sizes, depth)
    for row in range(4):
        one = slice(row, row + 1)
        assert same(
            match_by(method, metric[one], r, None if sizes is None else sizes[one], depth), row_of(together, row)
        )


@pytest.mark.parametrize("method", [method for method in MERGING_METHODS if method != "random"])
@pytest.mark.parametrize("metric", [torch.zeros(2, 9, 4), torch.tensor([1.0, 0, 0, 0]).repeat(2, 9, 1)])
def test_all_equal_metric(method, metric):
    """Equal vectors, zeros included, merge in the order of their positions, all into one, and nothing is NaN."""
    for r in range(1, 5):
        match = match_by(method, metric, r)
        for row in range(2):
            # k-center chooses what is kept; leader and ward keep the first latent of a group.
            last, first = {9 - r + i: 0 for i in range(r)}, {1 + i: 0 for i in range(r)}
            pairs = {2 * i: 1 for i in range(r)}
            assert edges(match, row) == {"k_center": last, "leader": first, "ward": first}.get(method, pairs)
    merged, sizes = merging.merge_latents(torch.ones(2, 9, 4), None, match)
    assert torch.equal(merged, torch.ones(2, 5, 4))
    assert sorted(sizes[0].tolist()) == [1, 1, 1, 1, 5]


def test_matching_is_done_in_full_precision_under_autocast():
    """Latents merge by similarities that half precision cannot tell apart."""
    angles = 0.2 * randn(48, seed=5)
    metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None].float()
    sizes = unequal_sizes(1, 48, seed=6)
    expected = plain_bipartite(cosines(metric[0]), 12)
    assert edges(merging.match_bipartite(metric, 12), 0) == expected
    halved = metric[0].bfloat16()
    targets = 2 * (halved[::2] @ halved[1::2].T).float().argmax(dim=1) + 1
    assert any(targets[even // 2] != odd for even, odd in expected.items())
    for method in METHODS:
        whole = match_by(method, metric, 12, sizes, 0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(match_by(method, metric, 12, sizes, 0.5), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_gives_nan(dtype):
    """The squares of these keys overflow float16; the match is that of the same numbers in float32."""
    metric = (randn(2, 12, 8, seed=3) * 3e4).clamp(-6e4, 6e4).to(dtype)
    match = merging.match_bipartite(metric, 4)
    for row in range(2):
        assert edges(match, row) == plain_bipartite(cosines(metric[row].double()), 4)
    for method in METHODS:
        assert same(match_by(method, metric, 4), match_by(method, metric.float(), 4))


# Each method


@pytest.mark.parametrize("method", PLAIN)
@given(data=st.data())
def test_edges_are_those_of_a_plain_reference(method, data):
    drawn = data.draw(matches([method], channels=2))
    for row, metric in enumerate(drawn.metric):
        sizes = np.ones(len(metric)) if drawn.sizes is None else drawn.sizes[row].double().numpy()
        assert edges(drawn.match, row) == PLAIN[method](metric, drawn.r, sizes, drawn.depth)


@pytest.mark.parametrize("method", ["bipartite", "leader", "k_center"])
@given(seed=st.integers(0, 2**31), num_latents=st.integers(2, 24), channels=st.integers(1, 4), data=st.data())
def test_ties_go_to_the_lower_position_and_into_the_lowest_of_equals(method, seed, num_latents, channels, data):
    r = data.draw(st.integers(1, num_latents // 2))
    metric = signed_basis_vectors(num_latents, channels, seed)
    match = match_by(method, metric, r)
    for row in range(2):
        assert edges(match, row) == PLAIN[method](metric[row], r, None, 0)


def test_zero_vector_is_as_similar_as_an_orthogonal_one():
    """Similarity 0 is more than -1: the zero vector at 0 merges before the opposed vector at 2, after the equal one."""
    metric = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert edges(merging.match_bipartite(metric, 1), 0) == {4: 1}
    assert edges(merging.match_bipartite(metric, 2), 0) == {4: 1, 0: 1}


@given(matches(["bipartite"]))
def test_prune_drops_what_bipartite_merges(drawn):
    metric, bipartite = drawn.metric, drawn.match
    prune = controls.match_prune(metric, drawn.r)
    assert prune.into is None
    assert torch.equal(prune.kept, bipartite.kept) and torch.equal(prune.merged, bipartite.merged)
    latents = randn(metric.shape[0], metric.shape[1], 3, seed=drawn.seed + 1)
    sizes = unequal_sizes(*metric.shape[:2], drawn.seed)
    left, left_sizes = merging.merge_latents(latents, sizes, prune)
    for row in range(metric.shape[0]):
        assert torch.equal(left[row], latents[row, prune.kept[row]])
        assert torch.equal(left_sizes[row], sizes[row, prune.kept[row]])


def test_random_is_the_same_for_every_row_and_every_metric():
    """It depends only on N and R, and neither uses nor changes the global random state."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    match = controls.match_random(randn(3, 24, 4, seed=1), 7)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    torch.manual_seed(1234)
    random.seed(99)
    other = controls.match_random(randn(2, 24, 9, seed=2, dtype=torch.float32), 7)
    assert len({tuple(sorted(edges(match, row).items())) for row in range(3)}) == 1
    assert edges(match, 0) == edges(other, 0)


# Fixed groups


@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_groups_against_a_plain_reference(groups):
    """The first latent of each group is kept at the index of the group, and the others merge into it."""
    numbers = sorted(set(groups))
    groups = [numbers.index(group) for group in groups]
    match = merging.match_groups(groups, torch.device("cpu"))
    firsts = [next(i for i, group in enumerate(groups) if group == number) for number in range(len(numbers))]
    assert match.kept.tolist() == [firsts]
    others = [position for position in range(len(groups)) if position not in firsts]
    assert dict(zip(match.merged[0].tolist(), match.into[0].tolist(), strict=True)) == {
        position: groups[position] for position in others
    }
    assert match.merged.dtype == match.into.dtype == match.kept.dtype == torch.int64


# The registry


def test_a_checkpoint_refuses_the_methods_of_the_experiments(monkeypatch):
    carried = {
        name: method for name, method in merging.MERGE_METHODS.items() if name not in merging.EXPERIMENT_ONLY_METHODS
    }
    assert set(merging.EXPERIMENT_ONLY_METHODS) < set(METHODS)
    monkeypatch.setattr(merging, "MERGE_METHODS", carried)
    for name, why in (("prune", "is for experiments only"), ("best", "is not registered")):
        message = f"^merge_method='{name}' {why}.*; choose from {', '.join(sorted(carried))}$"
        with pytest.raises(ValueError, match=message):
            merging.check_merge_method(name)


def test_a_method_of_ones_own_can_be_registered(monkeypatch):
    monkeypatch.setattr(merging, "MERGE_METHODS", dict(merging.MERGE_METHODS))
    with pytest.raises(ValueError):
        merging.check_merge_method("neighbours")

    @merging.register_merge_method("neighbours")
    def match_neighbours(metric, r, sizes, depth):
        return merging.match_groups([max(0, i - r) for i in range(metric.shape[1])], metric.device)

    merging.check_merge_method("neighbours")
    assert merging.MERGE_METHODS["neighbours"] is match_neighbours
    assert match_by("neighbours", torch.zeros(1, 5, 2), 2).merged.tolist() == [[1, 2]]
