# SPDX-License-Identifier: Apache-2.0
"""Tests of merging on tensors, for any match: means, sizes, gradients, attention, sources."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merging_tome_perceiver as merging
from tests.support.tiny_matches import METHODS, match_by, matches, randn, row_of, unequal_sizes


def plain_merge(latents, sizes, match):
    """Merge one row by definition: the mean of each cluster, weighted by size."""
    latents, sizes = np.asarray(latents, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    clusters = [[position] for position in match.kept[0].tolist()]
    for position, target in zip(match.merged[0].tolist(), match.into[0].tolist(), strict=True):
        clusters[target].append(position)
    means = [np.average(latents[cluster], axis=0, weights=sizes[cluster]) for cluster in clusters]
    return np.stack(means), np.array([sizes[cluster].sum() for cluster in clusters])


# Merging


@given(matches())
def test_merged_latents_are_the_means_weighted_by_size(drawn):
    """The sums of size x latent and of the sizes stay the same. Without sizes, all sizes are 1."""
    metric, match, seed = drawn.metric, drawn.match, drawn.seed
    batch, num_latents = metric.shape[:2]
    latents = randn(batch, num_latents, 3, seed=seed + 1)
    sizes = None if drawn.sizes is None else unequal_sizes(batch, num_latents, seed)
    merged, merged_sizes = merging.merge_latents(latents, sizes, match)
    assert merged_sizes.dtype == torch.float32
    sizes = torch.ones(batch, num_latents) if sizes is None else sizes
    for row in range(batch):
        expected, expected_sizes = plain_merge(latents[row], sizes[row], row_of(match, row))
        np.testing.assert_allclose(merged[row], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(merged_sizes[row], expected_sizes)


@given(matches(), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_a_latent_into_which_nothing_merges_keeps_every_bit(drawn, dtype):
    metric, match, seed = drawn.metric, drawn.match, drawn.seed
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
    """1000 x 300 and the sum of two latents of 60000 exceed 65504, the largest float16."""
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
    metric, match, seed = drawn.metric, drawn.match, drawn.seed
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
    """The metric only decides indices, so no gradient flows through it, even if latents and metric are one tensor."""
    latents = randn(1, 12, 4, seed=1).requires_grad_()
    match = match_by(method, latents * 2, 4)
    assert not any(part.requires_grad for part in match if part is not None)
    merged, _ = merging.merge_latents(latents, None, match)
    merged.sum().backward()
    # Gradients are 1 / size in each cluster, and 0 for pruned latents; a gradient of the metric would change that.
    sizes = merging.merge_latents(latents.detach(), None, match)[1][0]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[match.kept[0]] = 1 / sizes.double()
    if match.into is not None:
        expected[match.merged[0]] = 1 / sizes.double()[match.into[0]]
    torch.testing.assert_close(latents.grad[0], expected[:, None].expand(-1, 4))


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
    """70000 overflows float16, but its logarithm does not."""
    sizes = torch.tensor([[1.0, 2.0, 257.0], [3.0, 1.0, 70000.0]])
    bias = merging.log_size_bias(sizes, dtype)
    assert bias.shape == (2, 1, 1, 3)
    assert bias.dtype == dtype
    np.testing.assert_allclose(
        bias[:, 0, 0].double().numpy(), np.log(sizes.double().numpy()), rtol=torch.finfo(dtype).eps
    )
    assert bias[0, 0, 0, 0] == 0


# Following latents through merges


@given(matches())
def test_sources_after_two_merges(drawn):
    """The rows of the source matrix partition the latents, sum to the sizes, and give the means."""
    batch, num_latents = drawn.metric.shape[:2]
    first = randn(batch, num_latents, 3, seed=7)
    latents, sizes, sources = first, None, torch.eye(num_latents).expand(batch, -1, -1)
    pairs = [position // 2 for position in range(drawn.match.kept.shape[1])]
    for match in (drawn.match, merging.match_groups(pairs, torch.device("cpu"))):
        latents, sizes = merging.merge_latents(latents, sizes, match)
        sources = merging.merge_sources(sources, match)
    assert sources.dtype == torch.float32 and set(sources.unique().tolist()) <= {0.0, 1.0}
    assert (sources.sum(dim=1) == 1).all() and torch.equal(sources.sum(dim=2), sizes)
    torch.testing.assert_close(latents, sources.double() @ first / sizes[..., None], rtol=1e-6, atol=1e-6)
