# SPDX-License-Identifier: Apache-2.0
"""Fixed groups of latents: exact for duplicates, as many as wanted, and what a direct computation gives.

Letters: B batch, N latents (12), C channels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from transformers import DataCollatorWithPadding, PerceiverTokenizer

from experiments.tasks.base import PreparedTask
from experiments.tasks.images import collate_images
from groups_tome_perceiver import average_linkage, fixed_groups, latent_similarities, mean_similarity
from layers_tome_perceiver import METRICS
from tests.support.tiny_models import (
    NUM_LATENTS,
    NUM_LAYERS,
    repeat_latents,
    run,
    take_row,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

TEXT, IMAGE = "ForSequenceClassification", "ForImageClassificationConvProcessing"
MODULES = 3  # of the six layers; the two blocks share them
DUPLICATES = [0, 1, 2, 1, 3, 0, 1, 4, 4, 0, 1, 2]
SIMILARITIES = {name: partial(latent_similarities, compared=compared) for name, compared in METRICS.items()}


def groups_left(model, batches, left_after, similarity="key"):
    return fixed_groups(model, batches, left_after, SIMILARITIES[similarity])


def merging_once(layer: int, left: int) -> list[int]:
    """Latents left after each layer when one merges."""
    return [NUM_LATENTS] * layer + [left] * (NUM_LAYERS - layer)


def ordered(groups: list[int]) -> list[int]:
    """Any numbering of groups as one in the order of their first latent."""
    return [list(dict.fromkeys(groups)).index(group) for group in groups]


def direct_similarity(model, inputs: dict, layer: int, similarity: str, groups: list[int] | None = None) -> np.ndarray:
    """(N, N), from the states between the layers and the parts of one layer; `groups` have merged in layer 0."""
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        # The state between two blocks stands there twice.
        state = states[layer + layer // MODULES]
        attention = model.base_model.encoder.self_attends[layer % MODULES].attention
        if similarity == "key":
            keys = attention.self.key(attention.self.layernorm1(state))
            compared = keys.unflatten(-1, (model.config.num_self_attention_heads, -1)).mean(dim=2)
        else:
            bias = None if groups is None else torch.tensor(np.bincount(groups), dtype=state.dtype).log()
            compared = attention(state, None, None if bias is None else bias[None, None, None], False).hidden_states
    pairs = torch.cosine_similarity(compared[:, :, None], compared[:, None, :], dim=-1)
    return pairs.mean(dim=0).numpy()


def direct_groups(similarity: np.ndarray, count: int) -> list[int]:
    """Average linkage as scipy cuts it."""
    distance = 1 - similarity
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average")
    return ordered(fcluster(tree, count, criterion="maxclust").tolist())


@pytest.mark.parametrize("similarity", sorted(SIMILARITIES))
@pytest.mark.parametrize(("head", "layer"), [(TEXT, 0), (TEXT, 4), (IMAGE, 1), ("ForMaskedLM", 5)])
def test_exact_duplicates_are_grouped_and_the_logits_stay(head, layer, similarity):
    model = repeat_latents(tiny_model(head), DUPLICATES)
    inputs = tiny_inputs(head, batch=3)
    unmerged = run(model, inputs)
    merge_groups = groups_left(model, [inputs], merging_once(layer, 5), similarity)
    assert merge_groups[layer] == DUPLICATES
    model.config.merge_groups = merge_groups
    merged = run(model, inputs)
    assert merged.base.last_hidden_state.shape[1] == 5
    assert (merged.logits - unmerged.logits).abs().max() < 1e-12


@pytest.mark.parametrize("similarity", sorted(SIMILARITIES))
def test_layers_are_told_apart_and_the_same_whichever_are_asked_for(similarity):
    """Layers 0 and 3, 1 and 4, 2 and 5 are calls of the same module."""
    model, inputs = tiny_model(TEXT).requires_grad_(False), tiny_inputs(TEXT)
    every = SIMILARITIES[similarity](model, inputs, range(NUM_LAYERS))
    some = SIMILARITIES[similarity](model, inputs, [1, 4])
    assert len(every) == NUM_LAYERS and len(some) == 2
    assert some[0].equal(every[1]) and some[1].equal(every[4])
    assert all((every[layer] - every[layer + 3]).abs().max() > 1e-4 for layer in range(3))


def test_a_model_runs_no_further_than_the_layers_that_are_compared():
    model, inputs = tiny_model(TEXT).requires_grad_(False), tiny_inputs(TEXT)
    ran = []
    modules = [*model.base_model.encoder.self_attends, model.base_model.decoder]
    hooks = [module.register_forward_hook(lambda *of: ran.append(of[0])) for module in modules]
    SIMILARITIES["key"](model, inputs, [1, 2])
    for hook in hooks:
        hook.remove()
    # Of the last one, attention alone.
    assert ran == modules[:2]
    assert len(run(model, inputs).logits) == len(inputs["input_ids"])


@pytest.mark.parametrize("similarity", sorted(SIMILARITIES))
def test_a_row_is_the_same_alone_and_in_a_batch(similarity):
    """Texts are padded in the batch and not alone."""
    model, inputs = tiny_model(TEXT).requires_grad_(False), tiny_inputs(TEXT, batch=3)
    (together,) = SIMILARITIES[similarity](model, inputs, [2])
    for row in range(3):
        (alone,) = SIMILARITIES[similarity](model, take_row(inputs, row), [2])
        assert (alone[0] - together[row]).abs().max() < 1e-12


@pytest.mark.parametrize("similarity", ["key", "hidden"])
@pytest.mark.parametrize("layer", [0, 1, 3, 4])
@pytest.mark.parametrize("head", [TEXT, IMAGE])
def test_groups_are_those_of_a_direct_computation(head, layer, similarity):
    """Layers 0 and 3, and 1 and 4, are calls of the same module."""
    model, inputs = tiny_model(head), tiny_inputs(head, batch=4)
    direct = direct_similarity(model, inputs, layer, similarity)
    assert (
        np.abs(
            mean_similarity(model.requires_grad_(False), [inputs], layer, SIMILARITIES[similarity]).numpy() - direct
        ).max()
        < 1e-12
    )
    for left in (2, 5, 11):
        merge_groups = groups_left(model, [inputs], merging_once(layer, left), similarity)
        assert merge_groups == [direct_groups(direct, left) if index == layer else None for index in range(NUM_LAYERS)]


def test_what_is_compared_and_which_call_of_a_module_it_is_makes_a_difference():
    """Or else the test above would show less than it says."""
    model, inputs = tiny_model(TEXT), tiny_inputs(TEXT, batch=4)
    every = [
        direct_similarity(model, inputs, layer, similarity) for layer in (1, 4) for similarity in ("key", "hidden")
    ]
    assert len({tuple(direct_groups(each, 5)) for each in every}) == 4


@pytest.mark.parametrize("similarity", ["key", "hidden"])
@pytest.mark.parametrize("second", [1, 3])
def test_a_second_merge_sees_the_latents_that_the_first_one_left(second, similarity):
    """Layer 3 is another call of the module that runs in layer 0."""
    model, inputs = tiny_model(TEXT), tiny_inputs(TEXT, batch=4)
    left_after = [8] * second + [3] * (NUM_LAYERS - second)
    merge_groups = groups_left(model, [inputs], left_after, similarity)
    first = direct_groups(direct_similarity(model, inputs, 0, similarity), 8)
    assert merge_groups[0] == first
    model.config.merge_groups = [first, *[None] * (NUM_LAYERS - 1)]
    # Without the sizes of the first merge the hidden states would be others.
    direct = direct_similarity(model, inputs, second, similarity, first)
    assert merge_groups[second] == direct_groups(direct, 3)
    model.config.merge_groups = merge_groups
    model.config.check_merging()
    assert model.config.latents_per_layer == left_after


def test_every_sample_counts_the_same_however_they_are_batched():
    model, inputs = tiny_model(IMAGE).requires_grad_(False), tiny_inputs(IMAGE, batch=5)
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, 5))]
    whole, split = (mean_similarity(model, batches, 2, SIMILARITIES["key"]).numpy() for batches in ([inputs], parts))
    assert np.abs(whole - split).max() < 1e-14
    assert np.abs(whole - mean_similarity(model, parts[:1], 2, SIMILARITIES["key"]).numpy()).max() > 1e-3


def test_half_precision_is_compared_in_float32():
    """bfloat16 has three digits: too coarse for a mean over many samples."""
    model, inputs = tiny_model(IMAGE, torch.bfloat16).requires_grad_(False), tiny_inputs(IMAGE, dtype=torch.bfloat16)
    seen = []
    attention = model.base_model.encoder.self_attends[0].attention
    hook = attention.register_forward_hook(lambda module, arguments, attended: seen.append(attended.keys))
    model(**inputs)
    hook.remove()
    compared = seen[0].mean(dim=1).double()
    pairs = torch.cosine_similarity(compared[:, :, None], compared[:, None, :], dim=-1).mean(dim=0).numpy()
    assert np.abs(mean_similarity(model, [inputs], 0, SIMILARITIES["key"]).numpy() - pairs).max() < 1e-6


@pytest.mark.parametrize("count", range(1, NUM_LATENTS + 1))
@pytest.mark.parametrize("ties", ["all alike", "four kinds", "a ring"])
def test_ties_give_exactly_the_number_that_is_wanted(ties, count):
    latents = np.arange(NUM_LATENTS)
    ring = np.abs(latents[:, None] - latents)
    similarity = {
        "all alike": np.ones((NUM_LATENTS, NUM_LATENTS)),
        "four kinds": (latents[:, None] % 4 == latents % 4).astype(float),
        "a ring": 1 - np.minimum(ring, NUM_LATENTS - ring) / NUM_LATENTS,
    }[ties]
    groups = average_linkage(torch.from_numpy(similarity), count)
    assert set(groups) == set(range(count)) and groups == ordered(groups)
    tiny_config(merge_groups=[groups, *[None] * (NUM_LAYERS - 1)]).check_merging()
    if ties == "four kinds" and count == 4:
        assert groups == [0, 1, 2, 3] * 3


def test_the_model_is_afterwards_as_it_was():
    model, inputs = tiny_model(TEXT, r=2), tiny_inputs(TEXT)
    model.train()
    model.base_model.decoder.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    groups_left(model, [inputs], merging_once(0, 5))
    assert (model.r, model.config.merge_groups) == (2, None)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off_while_samples_are_looked_at():
    model, inputs = tiny_model(TEXT, attention_probs_dropout_prob=0.5), tiny_inputs(TEXT)
    evaluated, trained = (groups_left(model.train(mode), [inputs], merging_once(4, 5)) for mode in (False, True))
    assert trained == evaluated


def test_own_merging_of_the_checkpoint_does_not_count():
    inputs, groups = tiny_inputs(TEXT), [index % 6 for index in range(NUM_LATENTS)]
    fixed = {"merge_groups": [groups, *[None] * (NUM_LAYERS - 1)]}
    unmerged, by_r, by_groups = (
        groups_left(tiny_model(TEXT, **merging), [inputs], merging_once(2, 4)) for merging in ({}, {"r": 2}, fixed)
    )
    assert unmerged == by_r == by_groups


def test_the_model_is_as_it_was_also_when_something_fails():
    model, inputs = tiny_model(TEXT, r=[1, 0, 0, 0, 0, 0]), tiny_inputs(TEXT)
    model.train()
    batches = [inputs, {"input_ids": torch.zeros(1, 999, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="999"):
        groups_left(model, batches, merging_once(0, 5))
    assert (model.r, model.config.merge_groups, model.training) == ([1, 0, 0, 0, 0, 0], None, True)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "left_after", [[5] * (NUM_LAYERS - 1), [5, 6, 6, 6, 6, 6], [0] * NUM_LAYERS, [NUM_LATENTS + 1] * NUM_LAYERS]
)
def test_numbers_that_cannot_be_left_are_named(left_after):
    with pytest.raises(ValueError, match="left_after = .*6 numbers.*from 12 to 1"):
        groups_left(tiny_model(TEXT), [tiny_inputs(TEXT)], left_after)


def test_batches_that_can_be_gone_through_only_once_are_named():
    """The second merge would be decided on nothing."""
    left_after = [8, 8, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="batches: there are none"):
        groups_left(tiny_model(TEXT), iter([tiny_inputs(TEXT)]), left_after)


class NeverRead:
    """A label: whatever would be done with it fails."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"a label was read: {name}")

    __int__ = __float__ = __index__ = __iter__ = __len__ = lambda self: self.read


def test_labels_and_evaluation_splits_are_never_read():
    def unlabelled(train: list[dict], collate):
        nothing = NeverRead()
        task = PreparedTask.__new__(PreparedTask)
        vars(task).update(train=train, collate=collate, evaluation=nothing, prediction=nothing)
        return task.unlabelled(task.train, 2)

    def image(value: int) -> dict:
        return {"pixel_values": torch.full((3, 2, 2), float(value)), "labels": NeverRead()}

    batches = unlabelled([image(index) for index in range(5)], collate_images)
    for _ in range(2):  # they can be gone through again
        values = [batch["pixel_values"][:, 0, 0, 0].tolist() for batch in batches]
        assert values == [[0, 1], [2, 3], [4]]
        assert all(set(batch) == {"pixel_values"} for batch in batches)

    text = [{"input_ids": [4, index, 5], "attention_mask": [1, 1, 1], "labels": NeverRead()} for index in range(3)]
    batches = unlabelled(text, DataCollatorWithPadding(PerceiverTokenizer()))
    assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask"}] * 2
    assert isinstance(next(iter(batches))["input_ids"], Tensor)
    # That such a label is noticed when it is read.
    with pytest.raises((AssertionError, TypeError, RuntimeError, ValueError)):
        collate_images([image(0)])
