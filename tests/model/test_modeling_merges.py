# SPDX-License-Identifier: Apache-2.0
"""Tests of merging in models with random weights, for every head.

Sizes and sources account for every latent, exact duplicates merge without any change, and batches do not matter.
"""

import pytest
import torch

import configuration_tome_perceiver as configuration
import merging_tome_perceiver as merging
from tests.support.tiny_merges import (
    DUPLICATES,
    MERGES_AND_PRUNE,
    R_LIST,
    assert_same,
    every_attention,
    every_head,
    every_head_and_every_merge,
)
from tests.support.tiny_models import (
    HEADS,
    NUM_LATENTS,
    relative_difference,
    repeat_latents,
    run,
    stock_model,
    take_row,
    tiny_inputs,
    tiny_model,
    unmerge,
)

# Sizes and sources account for every latent


@every_head_and_every_merge
def test_sizes_and_sources_account_for_every_latent_that_is_not_dropped(head, merge):
    model, dropped = tiny_model(head, **MERGES_AND_PRUNE[merge]), NUM_LATENTS - 5 if merge == "prune" else 0
    base = run(model, tiny_inputs(head)).base
    left = model.config.latents_per_layer[-1]
    assert base.last_hidden_state.shape == (2, left, 16)
    assert base.latent_sizes.shape == (2, left) and base.latent_sizes.dtype == torch.float32
    assert base.latent_sizes.sum(dim=1).tolist() == [NUM_LATENTS - dropped] * 2
    assert base.latent_sources.shape == (2, left, NUM_LATENTS)
    assert set(base.latent_sources.unique().tolist()) == {0.0, 1.0}
    assert (base.latent_sources.sum(dim=1) == 0).sum(dim=1).tolist() == [dropped] * 2
    assert torch.equal(base.latent_sources.sum(dim=2), base.latent_sizes)
    assert (len(base.latent_sizes.unique()) > 1) == (merge != "prune")


def test_sources_are_returned_only_when_asked_for():
    model, inputs = tiny_model("Model", r=1), tiny_inputs("Model")
    with torch.no_grad():
        assert model(**inputs).latent_sources is None
        assert model(**inputs, output_latent_sources=True).latent_sources.shape == (2, 6, 12)


@every_attention
@pytest.mark.parametrize("metric", configuration.MERGE_METRICS)
def test_merge_is_the_size_weighted_mean_between_attention_and_mlp(metric, attention):
    """Compute a layer step by step: attention over all latents, merging by the metric, the MLP on the latents left."""
    widths = dict(qk_channels=8, v_channels=16)
    model = tiny_model("Model", r=[0, 0, 0, 0, 0, 3], merge_metric=metric, attn_implementation=attention, **widths)
    inputs = tiny_inputs("Model")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        layer, latents = model.encoder.self_attends[2], output.hidden_states[-2]
        normed = layer.attention.self.layernorm1(latents)
        context = stock_model("Model", **widths).encoder.self_attends[2].attention(latents)[0]
        compared = {
            # (B, N, heads x D), split into heads by hand and averaged over them
            "key": layer.attention.self.key(normed).view(2, NUM_LATENTS, 2, 4).mean(dim=2),
            "value": layer.attention.self.value(normed).view(2, NUM_LATENTS, 2, 8).mean(dim=2),
            "hidden": context,
        }
        matches = {name: merging.match_bipartite(what, 3) for name, what in compared.items()}
        merged, sizes = merging.merge_latents(context, None, matches[metric])
        expected = merged + layer.mlp(layer.layernorm(merged))
    # Each metric merges other latents, so this shows that the model uses the metric of the config.
    assert len({str([part.tolist() for part in match]) for match in matches.values()}) == 3
    assert torch.equal(output.latent_sizes, sizes)
    assert_same(output.last_hidden_state, expected)


def test_a_method_of_ones_own_runs(monkeypatch):
    """It gets the keys averaged over heads, R, the sizes and the depth of the layer."""
    asked = []

    def match_last(metric, r, sizes, depth):
        asked.append((tuple(metric.shape), r, None if sizes is None else sizes.tolist(), depth))
        assert not metric.requires_grad
        return merging.match_groups([*range(metric.shape[1] - r), *[0] * r], metric.device)

    monkeypatch.setitem(merging.MERGE_METHODS, "last", match_last)
    model, inputs = tiny_model("Model", merge_method="last", r=R_LIST), tiny_inputs("Model")
    with torch.enable_grad():
        model(**inputs)
    # qk_channels = 16 in two heads
    assert asked == [
        ((2, 12, 8), 3, None, 0.0),
        ((2, 9, 8), 2, [[4, *[1] * 8]] * 2, 2 / 6),
        ((2, 7, 8), 1, [[6, *[1] * 6]] * 2, 3 / 6),
        ((2, 6, 8), 1, [[7, *[1] * 5]] * 2, 5 / 6),
    ]
    base = run(model, inputs).base
    assert base.latent_sizes.tolist() == [[8, 1, 1, 1, 1]] * 2


# Exact duplicates merge without any change


def merged_and_whole(head, merge, duplicates, **changes):
    """Return the outputs of a model with duplicate latents, with merging and without."""
    model = repeat_latents(tiny_model(head, **changes, **merge), duplicates)
    inputs = tiny_inputs(head)
    merged = run(model, inputs)
    model.config.merge_groups, model.config.latent_groups = None, None
    model.r = 0
    whole = run(model, inputs)
    assert whole.base.last_hidden_state.shape[1] == NUM_LATENTS
    return merged, whole


@every_attention
@pytest.mark.parametrize(
    "head, kind",
    [*((head, "matched at once") for head in HEADS), *(("ForMaskedLM", kind) for kind in DUPLICATES)],
)
def test_duplicates_merge_without_any_change(head, attention, kind):
    """Without proportional attention the output changes, so the test also covers the bias."""
    merge, duplicates = DUPLICATES[kind]
    merged, whole = merged_and_whole(head, merge, duplicates, attn_implementation=attention)
    # Only duplicates merge, and sizes differ, because a wrong bias would not show with equal sizes.
    for row in range(2):
        sources = {frozenset(line.nonzero()[:, 0].tolist()) for line in merged.base.latent_sources[row]}
        assert sources == {frozenset(i for i in range(12) if duplicates[i] == g) for g in set(duplicates)}
        assert len(merged.base.latent_sizes[row].unique()) > 1
    assert relative_difference(unmerge(merged.base), whole.base.last_hidden_state) <= 1e-9
    unweighted, _ = merged_and_whole(head, {**merge, "proportional_attention": False}, duplicates)
    assert relative_difference(unmerge(unweighted.base), whole.base.last_hidden_state) > 1e-3
    if head != "Model":
        assert relative_difference(merged.logits, whole.logits) <= 1e-9
        assert relative_difference(unweighted.logits, whole.logits) > 1e-3


# A row's output is the same alone and in any batch


@every_head_and_every_merge
def test_a_row_alone_is_as_in_a_batch(head, merge):
    """A text alone has no padding."""
    model, inputs = tiny_model(head, **MERGES_AND_PRUNE[merge]), tiny_inputs(head, batch=3)
    together = run(model, inputs)
    for row in range(3):
        alone = run(model, take_row(inputs, row))
        assert relative_difference(alone.logits, together.logits[row : row + 1]) <= 1e-9
        assert torch.equal(alone.base.latent_sources[0], together.base.latent_sources[row])


# What a head's outputs look like with merging


@every_head
@every_attention
def test_hidden_states_and_attentions_have_the_lengths_of_the_schedule(head, attention):
    """A layer attends over the latents that reach it; the last state of a block is listed twice, as upstream does."""
    model = tiny_model(head, attn_implementation=attention, r=R_LIST)
    output = run(model, tiny_inputs(head), output_hidden_states=True, output_attentions=True)
    base = output.base
    reaching = [NUM_LATENTS, *model.config.latents_per_layer]
    assert [tuple(weights.shape) for weights in base.attentions] == [(2, 2, n, n) for n in reaching[:-1]]
    assert [state.shape[1] for state in base.hidden_states] == [*reaching[:3], reaching[3], *reaching[3:6], reaching[6]]
    assert torch.equal(base.hidden_states[-1], base.last_hidden_state)
    assert len(base.cross_attentions) == (1 if head == "Model" else 2)
    assert base.cross_attentions[0].shape[:3] == (2, 2, NUM_LATENTS)
    if head != "Model":
        assert base.cross_attentions[1].shape[-1] == reaching[-1]
    for weights in (*base.attentions, *base.cross_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert relative_difference(output.logits, run(model, tiny_inputs(head)).logits) <= 1e-12
