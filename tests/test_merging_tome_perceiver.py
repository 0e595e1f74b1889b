# SPDX-License-Identifier: Apache-2.0
"""The laws of matching and merging, on tensors alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merging_tome_perceiver as merging
from merging_tome_perceiver import Match

METHODS = ["bipartite", "random", "prune"]


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unequal_sizes(batch, num_latents, seed):
    return torch.randint(1, 1000, (batch, num_latents), generator=torch.Generator().manual_seed(seed)).float()


def match_by(method, metric, r):
    return merging.MERGE_METHODS[method](metric, r, None, 0.0)


@st.composite
def matches(draw, methods=("bipartite", "random"), batch=None):
    """A metric (B, N, C), R and the match that a method makes of them, with a seed for whatever else is drawn."""
    seed = draw(st.integers(0, 2**31))
    num_latents = draw(st.integers(2, 24))
    r = draw(st.integers(1, num_latents // 2))
    metric = randn(batch or draw(st.integers(1, 3)), num_latents, draw(st.integers(1, 8)), seed=seed)
    return metric, r, match_by(draw(st.sampled_from(methods)), metric, r), seed


def plain_bipartite(metric, r):
    """One row's edges {merged: target}, from the definition: evens propose their best odd, the R best merge."""
    metric = np.asarray(metric, dtype=np.float64)
    unit = metric / np.maximum(np.linalg.norm(metric, axis=1, keepdims=True), 1e-12)
    proposals = []
    for even in range(0, len(metric), 2):
        best, target = -np.inf, None
        for odd in range(1, len(metric), 2):
            score = float(np.dot(unit[even], unit[odd]))
            if score > best:
                best, target = score, odd
        proposals.append((-best, even, target))
    return {even: target for _, even, target in sorted(proposals)[:r]}


def edges(match, row):
    """{merged: target} of one row, as positions among the N latents."""
    kept, merged, into = (part[min(row, len(part) - 1)].tolist() for part in match)
    return {position: kept[target] for position, target in zip(merged, into, strict=True)}


def plain_merge(latents, sizes, match):
    """One row's merge from the definition: the mean of each cluster, weighted by size."""
    latents, sizes = np.asarray(latents, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    clusters = [[position] for position in match.kept[0].tolist()]
    for position, target in zip(match.merged[0].tolist(), match.into[0].tolist(), strict=True):
        clusters[target].append(position)
    means = [np.average(latents[cluster], axis=0, weights=sizes[cluster]) for cluster in clusters]
    return np.stack(means), np.array([sizes[cluster].sum() for cluster in clusters])


def row_of(match, row):
    return Match(*(None if part is None else part[min(row, len(part) - 1)][None] for part in match))


# Matching


@given(matches(METHODS))
def test_kept_and_merged_partition_the_latents(drawn):
    metric, r, match, _ = drawn
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


@given(matches())
def test_even_positions_merge_into_odd_ones(drawn):
    """The graph is bipartite, so nothing merges into a latent that is itself merged away."""
    metric, _, match, _ = drawn
    for row in range(metric.shape[0]):
        assert all(merged % 2 == 0 and target % 2 == 1 for merged, target in edges(match, row).items())


@given(matches(["bipartite"]))
def test_bipartite_takes_the_best_edges(drawn):
    metric, r, match, _ = drawn
    for row in range(metric.shape[0]):
        # With one channel, every similarity is 1 or -1 but for the rounding: all is ties.
        if metric.shape[2] > 1:
            assert edges(match, row) == plain_bipartite(metric[row], r)


@given(seed=st.integers(0, 2**31), num_latents=st.integers(2, 24), channels=st.integers(1, 4), data=st.data())
def test_ties_go_to_the_lower_position_and_into_the_lowest_of_equals(seed, num_latents, channels, data):
    """On signed basis vectors and zeros every similarity is exactly -1, 0 or 1, so nearly all edges tie."""
    r = data.draw(st.integers(1, num_latents // 2))
    vectors = torch.cat([torch.eye(channels), -torch.eye(channels), torch.zeros(1, channels)])
    choice = torch.randint(len(vectors), (2, num_latents), generator=torch.Generator().manual_seed(seed))
    metric = vectors[choice] * 3
    match = merging.match_bipartite(metric, r)
    for row in range(2):
        assert edges(match, row) == plain_bipartite(metric[row], r)
    assert all(torch.equal(*pair) for pair in zip(match, merging.match_bipartite(metric, r), strict=True))


@pytest.mark.parametrize("metric", [torch.zeros(2, 9, 4), torch.tensor([1.0, 0, 0, 0]).repeat(2, 9, 1)])
def test_all_equal_metric(metric):
    """Zero vectors included: evens merge in order, all into the first odd position, and nothing is NaN."""
    for r in range(1, 5):
        match = merging.match_bipartite(metric, r)
        for row in range(2):
            assert edges(match, row) == {2 * i: 1 for i in range(r)}
    merged, sizes = merging.merge_latents(torch.ones(2, 9, 4), None, match)
    assert torch.equal(merged, torch.ones(2, 5, 4))
    assert sorted(sizes[0].tolist()) == [1, 1, 1, 1, 5]


def test_zero_vector_is_as_similar_as_an_orthogonal_one():
    """0 is more than opposed: the zero vector at 0 merges before its opposed neighbour at 2, after the equal one."""
    metric = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert edges(merging.match_bipartite(metric, 1), 0) == {4: 1}
    assert edges(merging.match_bipartite(metric, 2), 0) == {4: 1, 0: 1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_latents", [2, 3, 9, 24, 25])
def test_half_of_the_latents_can_merge_even_of_an_odd_number(method, num_latents):
    r = num_latents // 2
    match = match_by(method, randn(2, num_latents, 5, seed=1), r)
    latents, sizes = merging.merge_latents(randn(2, num_latents, 3, seed=2), None, match)
    assert latents.shape == (2, num_latents - r, 3)
    assert sizes.shape == (2, num_latents - r)
    assert latents.isfinite().all()


@given(matches(METHODS, batch=4))
def test_a_row_is_matched_alone_as_in_a_batch(drawn):
    metric, r, _, _ = drawn
    for method in METHODS:
        together = match_by(method, metric, r)
        for row in range(4):
            alone = match_by(method, metric[row : row + 1], r)
            if metric.shape[2] > 1 or method == "random":
                for one, all_rows in zip(alone, row_of(together, row), strict=True):
                    assert one is all_rows is None or torch.equal(one, all_rows)


@given(matches(["bipartite"]))
def test_prune_drops_what_bipartite_merges(drawn):
    metric, r, bipartite, seed = drawn
    prune = merging.match_prune(metric, r)
    assert prune.into is None
    assert torch.equal(prune.kept, bipartite.kept) and torch.equal(prune.merged, bipartite.merged)
    latents = randn(metric.shape[0], metric.shape[1], 3, seed=seed + 1)
    sizes = unequal_sizes(*metric.shape[:2], seed)
    left, left_sizes = merging.merge_latents(latents, sizes, prune)
    for row in range(metric.shape[0]):
        assert torch.equal(left[row], latents[row, prune.kept[row]])
        assert torch.equal(left_sizes[row], sizes[row, prune.kept[row]])


def test_random_is_the_same_for_every_row_and_every_metric():
    """It depends on N and R alone, and neither reads nor moves anyone's random state."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    match = merging.match_random(randn(3, 24, 4, seed=1), 7)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    torch.manual_seed(1234)
    random.seed(99)
    other = merging.match_random(randn(2, 24, 9, seed=2, dtype=torch.float32), 7)
    assert len({tuple(sorted(edges(match, row).items())) for row in range(3)}) == 1
    assert edges(match, 0) == edges(other, 0)


def test_random_is_no_order_in_disguise():
    """What merges is spread over the positions, and what it merges into too."""
    match = merging.match_random(torch.zeros(1, 256, 1), 32)
    merged, targets = edges(match, 0).keys(), edges(match, 0).values()
    assert sorted(merged) != list(range(0, 64, 2))
    assert 80 < np.mean(list(merged)) < 176
    assert len(set(targets)) > 16


def test_matching_is_done_in_full_precision_under_autocast():
    """Similarities that half precision cannot tell apart still decide which latents merge."""
    angles = 0.2 * randn(48, seed=5)
    metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None].float()
    expected = plain_bipartite(metric[0], 12)
    assert edges(merging.match_bipartite(metric, 12), 0) == expected
    halved = metric[0].bfloat16()
    targets = 2 * (halved[::2] @ halved[1::2].T).float().argmax(dim=1) + 1
    assert any(targets[even // 2] != odd for even, odd in expected.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert edges(merging.match_bipartite(metric, 12), 0) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_neither_overflow_nor_give_nan(dtype):
    """The squares of such keys overflow float16; the match is the one of the same numbers in float32."""
    metric = (randn(2, 12, 8, seed=3) * 3e4).clamp(-6e4, 6e4).to(dtype)
    match = merging.match_bipartite(metric, 4)
    for row in range(2):
        assert edges(match, row) == plain_bipartite(metric[row].double(), 4)


@given(groups=st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_groups_against_a_plain_reference(groups):
    """The first latent of each group stays at the group's number, the others of the group merge into it."""
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
    latents = randn(3, len(groups), 4, seed=len(groups))
    merged, sizes = merging.merge_latents(latents, None, match)
    for number in range(len(numbers)):
        members = [position for position in range(len(groups)) if groups[position] == number]
        torch.testing.assert_close(merged[:, number], latents[:, members].mean(dim=1), rtol=1e-12, atol=1e-12)
        assert (sizes[:, number] == len(members)).all()


# Merging


@given(matches())
def test_mass_and_sizes_are_conserved(drawn):
    metric, r, match, seed = drawn
    batch, num_latents = metric.shape[:2]
    latents, sizes = randn(batch, num_latents, 3, seed=seed + 1), unequal_sizes(batch, num_latents, seed)
    merged, merged_sizes = merging.merge_latents(latents, sizes, match)
    assert merged.shape == (batch, num_latents - r, 3)
    assert merged_sizes.dtype == torch.float32
    assert torch.equal(merged_sizes.sum(dim=1), sizes.sum(dim=1))
    mass, merged_mass = ((s.double()[..., None] * x).sum(dim=1) for s, x in ((sizes, latents), (merged_sizes, merged)))
    scale = (sizes.double()[..., None] * latents).abs().sum(dim=1)
    assert ((merged_mass - mass).abs() <= 1e-14 * num_latents * scale).all()


@given(matches())
def test_merged_latents_are_the_means_weighted_by_size(drawn):
    metric, _, match, seed = drawn
    batch, num_latents = metric.shape[:2]
    latents, sizes = randn(batch, num_latents, 3, seed=seed + 1), unequal_sizes(batch, num_latents, seed)
    merged, merged_sizes = merging.merge_latents(latents, sizes, match)
    for row in range(batch):
        expected, expected_sizes = plain_merge(latents[row], sizes[row], row_of(match, row))
        np.testing.assert_allclose(merged[row], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(merged_sizes[row], expected_sizes)


@given(matches())
def test_no_sizes_are_sizes_of_one(drawn):
    metric, _, match, seed = drawn
    latents = randn(*metric.shape[:2], 3, seed=seed + 1, dtype=torch.float32)
    without = merging.merge_latents(latents, None, match)
    ones = merging.merge_latents(latents, torch.ones(metric.shape[:2]), match)
    assert torch.equal(without[0], ones[0]) and torch.equal(without[1], ones[1])


@given(matches(), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_a_latent_into_which_nothing_merges_keeps_every_bit(drawn, dtype):
    metric, _, match, seed = drawn
    batch, num_latents = metric.shape[:2]
    latents = randn(batch, num_latents, 3, seed=seed + 1).to(dtype)
    merged, sizes = merging.merge_latents(latents, unequal_sizes(batch, num_latents, seed), match)
    assert merged.dtype == dtype
    for row in range(batch):
        one = row_of(match, row)
        alone = [i for i in range(merged.shape[1]) if i not in set(one.into[0].tolist())]
        assert torch.equal(merged[row, alone], latents[row, one.kept[0, alone]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_sizes_and_latents_do_not_overflow_half_precision(dtype):
    """1000 x 300 is beyond float16's 65504; so is the sum of two latents of 60000."""
    for value, size in ((300.0, 1000.0), (60000.0, 1.0), (60000.0, 70000.0)):
        latents = (value * (1 - 0.1 * randn(2, 12, 5, seed=1).sigmoid())).to(dtype)
        sizes = size * unequal_sizes(2, 12, seed=2)
        match = merging.match_bipartite(randn(2, 12, 4, seed=3), 6)
        merged, merged_sizes = merging.merge_latents(latents, sizes, match)
        assert merged.dtype == dtype
        assert merged.isfinite().all() and merged_sizes.isfinite().all()
        for row in range(2):
            expected, _ = plain_merge(latents[row].double(), sizes[row], row_of(match, row))
            # Rounded once, from float32.
            np.testing.assert_allclose(merged[row].double(), expected, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing_of_a_merge(dtype):
    latents, sizes = randn(2, 12, 5, seed=1).to(dtype), unequal_sizes(2, 12, seed=2)
    match = merging.match_bipartite(randn(2, 12, 4, seed=3), 5)
    expected = merging.merge_latents(latents, sizes, match)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = merging.merge_latents(latents, sizes, match)
    assert torch.equal(merged[0], expected[0]) and torch.equal(merged[1], expected[1])


@given(matches())
def test_gradient_of_each_latent_is_its_size_over_the_total(drawn):
    metric, _, match, seed = drawn
    batch, num_latents = metric.shape[:2]
    latents = randn(batch, num_latents, 3, seed=seed + 1).requires_grad_()
    sizes = unequal_sizes(batch, num_latents, seed)
    merged, totals = merging.merge_latents(latents, sizes, match)
    assert not totals.requires_grad
    handed_back = randn(*merged.shape, seed=seed + 2)
    merged.backward(handed_back)
    for row in range(batch):
        one = row_of(match, row)
        goes_to = dict(zip(one.kept[0].tolist(), range(merged.shape[1]), strict=True))
        goes_to |= dict(zip(one.merged[0].tolist(), one.into[0].tolist(), strict=True))
        assert len(goes_to) == num_latents
        for position, target in goes_to.items():
            weight = sizes[row, position].double() / totals[row, target].double()
            torch.testing.assert_close(latents.grad[row, position], weight * handed_back[row, target])


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_through_what_is_matched(method):
    """The metric decides indices, and nothing flows through those, even if latents and metric are one tensor."""
    latents = randn(1, 12, 4, seed=1).requires_grad_()
    match = match_by(method, latents * 2, 4)
    assert not any(part.requires_grad for part in match if part is not None)
    merged, _ = merging.merge_latents(latents, None, match)
    merged.sum().backward()
    # A constant within each cluster: 1 / its size, for pruned ones 0. Anything from the metric would disturb it.
    sizes = merging.merge_latents(latents.detach(), None, match)[1][0]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[match.kept[0]] = 1 / sizes.double()
    if match.into is not None:
        expected[match.merged[0]] = 1 / sizes.double()[match.into[0]]
    torch.testing.assert_close(latents.grad[0], expected[:, None].expand(-1, 4))


def test_gradient_against_finite_differences():
    sizes = unequal_sizes(2, 9, seed=1)
    match = merging.match_bipartite(randn(2, 9, 4, seed=2), 4)
    latents = randn(2, 9, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: merging.merge_latents(x, sizes, match)[0], latents)


# Proportional attention


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_a_merged_key_counts_as_often_as_the_latents_in_it(sizes, seed):
    """Softmax over repeated keys equals softmax over the keys once with the bias."""
    queries, keys, values = (randn(1, 2, n, 4, seed=seed + i) for i, n in enumerate((3, len(sizes), len(sizes))))
    repeats = torch.tensor(sizes)
    attend = torch.nn.functional.scaled_dot_product_attention
    repeated = attend(queries, keys.repeat_interleave(repeats, dim=2), values.repeat_interleave(repeats, dim=2))
    bias = merging.log_size_bias(repeats[None].float(), torch.float64)
    torch.testing.assert_close(attend(queries, keys, values, attn_mask=bias), repeated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bias_is_the_log_in_the_dtype_of_the_scores(dtype):
    """70000 is infinite in float16, but its logarithm is not."""
    sizes = torch.tensor([[1.0, 2.0, 257.0], [3.0, 1.0, 70000.0]])
    bias = merging.log_size_bias(sizes, dtype)
    assert bias.shape == (2, 1, 1, 3)
    assert bias.dtype == dtype
    np.testing.assert_allclose(
        bias[:, 0, 0].double().numpy(), np.log(sizes.double().numpy()), rtol=torch.finfo(dtype).eps
    )
    assert bias[0, 0, 0, 0] == 0


# Following latents through merges


@st.composite
def histories(draw):
    """B, N and merges one after another: fixed groups or a method with its R and a seed for the metric."""
    batch, num_latents = draw(st.integers(1, 3)), draw(st.integers(2, 20))
    left, steps = num_latents, []
    for _ in range(draw(st.integers(1, 4))):
        method = draw(st.sampled_from([*METHODS, "groups"]))
        seed = draw(st.integers(0, 2**31))
        if method == "groups":
            count = draw(st.integers(1, left))
            # Each number at least once, in any order.
            groups = draw(st.permutations([*range(count), *[seed % count] * (left - count)]))
            steps.append((method, list(groups), seed))
            left = count
        elif left > 1:
            r = draw(st.integers(1, left // 2))
            steps.append((method, r, seed))
            left -= r
    return batch, num_latents, steps


@given(histories())
def test_sources_after_several_merges(drawn):
    """The rows of the source matrix partition the latents not dropped, sum to the sizes, and say what was averaged."""
    batch, num_latents, steps = drawn
    first = randn(batch, num_latents, 3, seed=7)
    latents, sizes = first, torch.ones(batch, num_latents)
    positions = torch.arange(num_latents).expand(batch, -1)
    clusters = [[{i} for i in range(num_latents)] for _ in range(batch)]
    for method, argument, seed in steps:
        if method == "groups":
            match = merging.match_groups(argument, torch.device("cpu"))
        else:
            match = match_by(method, randn(batch, latents.shape[1], 4, seed=seed), argument)
        latents, sizes = merging.merge_latents(latents, sizes, match)
        positions = merging.follow_latents(positions, match)
        for row in range(batch):
            one, before = row_of(match, row), clusters[row]
            clusters[row] = [before[i] for i in one.kept[0].tolist()]
            if one.into is not None:
                for i, target in zip(one.merged[0].tolist(), one.into[0].tolist(), strict=True):
                    clusters[row][target] = clusters[row][target] | before[i]
    sources = merging.source_matrix(positions, latents.shape[1])
    assert sources.shape == (batch, latents.shape[1], num_latents)
    assert sources.dtype == torch.float32
    assert [[set(line.nonzero()[:, 0].tolist()) for line in row] for row in sources] == clusters
    dropped = positions < 0
    assert torch.equal(sources.sum(dim=1), (~dropped).float())
    assert dropped.any() == any(method == "prune" for method, _, _ in steps)
    assert torch.equal(sources.sum(dim=2), sizes)
    averages = sources.double() @ first / sources.double().sum(dim=2, keepdim=True)
    torch.testing.assert_close(latents, averages, rtol=1e-6, atol=1e-6)


def test_sources_of_no_merge_are_the_latents_themselves():
    positions = torch.arange(5).expand(2, -1)
    assert torch.equal(merging.source_matrix(positions, 5), torch.eye(5).expand(2, -1, -1))


# The registry


def test_registry_has_the_method_and_its_two_controls():
    assert set(METHODS) <= set(merging.MERGE_METHODS)
    for method in METHODS:
        merging.check_merge_method(method)


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


def test_unknown_method_is_one_line_naming_it_and_what_is_allowed():
    with pytest.raises(ValueError, match=r"^merge_method = 'best': allowed are [^\n]*$") as error:
        merging.check_merge_method("best")
    assert all(repr(method) in str(error.value) for method in METHODS)
