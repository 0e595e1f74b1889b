# SPDX-License-Identifier: Apache-2.0
"""Groups of latents from calibration: exact for duplicates, as many as wanted, and what a direct computation gives.

Letters: B batch, N latents (12), C channels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from transformers import DataCollatorWithPadding, PerceiverTokenizer

from cost_tome_perceiver import forward_cost
from experiments.errors import BadInput
from experiments.merging.similarity import SIMILARITIES
from experiments.runs.calibration_arguments import CalibrationArguments, groups_for_flops
from experiments.tasks.base import PreparedTask
from experiments.tasks.images import collate_images
from groups_tome_perceiver import average_linkage, fixed_groups, mean_similarity
from tests.support.tiny_models import NUM_LATENTS, NUM_LAYERS, repeat_latents, run, tiny_config, tiny_inputs, tiny_model

TEXT, IMAGE = "ForSequenceClassification", "ForImageClassificationConvProcessing"
MODULES = 3  # of the six layers; the two blocks share them
DUPLICATES = [0, 1, 2, 1, 3, 0, 1, 4, 4, 0, 1, 2]


def calibrate_groups(model, batches, left_after, similarity="key"):
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


@pytest.mark.parametrize("similarity", ["key", "hidden", "attention", "output"])
@pytest.mark.parametrize(("head", "layer"), [(TEXT, 0), (TEXT, 4), (IMAGE, 1), ("ForMaskedLM", 5)])
def test_exact_duplicates_are_grouped_and_the_logits_stay(head, layer, similarity):
    model = repeat_latents(tiny_model(head), DUPLICATES)
    inputs = tiny_inputs(head, batch=3)
    unmerged = run(model, inputs)
    merge_groups = calibrate_groups(model, [inputs], merging_once(layer, 5), similarity)
    assert merge_groups[layer] == DUPLICATES
    model.config.merge_groups = merge_groups
    merged = run(model, inputs)
    assert merged.base.last_hidden_state.shape[1] == 5
    assert (merged.logits - unmerged.logits).abs().max() < 1e-12


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
        merge_groups = calibrate_groups(model, [inputs], merging_once(layer, left), similarity)
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
    merge_groups = calibrate_groups(model, [inputs], left_after, similarity)
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
    calibrate_groups(model, [inputs], merging_once(0, 5))
    assert (model.r, model.config.merge_groups) == (2, None)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_is_off_while_samples_are_looked_at():
    model, inputs = tiny_model(TEXT, attention_probs_dropout_prob=0.5), tiny_inputs(TEXT)
    evaluated, trained = (calibrate_groups(model.train(mode), [inputs], merging_once(4, 5)) for mode in (False, True))
    assert trained == evaluated


def test_own_merging_of_the_checkpoint_does_not_count():
    inputs, groups = tiny_inputs(TEXT), [index % 6 for index in range(NUM_LATENTS)]
    fixed = {"merge_groups": [groups, *[None] * (NUM_LAYERS - 1)]}
    unmerged, by_r, by_groups = (
        calibrate_groups(tiny_model(TEXT, **merging), [inputs], merging_once(2, 4)) for merging in ({}, {"r": 2}, fixed)
    )
    assert unmerged == by_r == by_groups


def test_the_model_is_as_it_was_also_when_something_fails():
    model, inputs = tiny_model(TEXT, r=[1, 0, 0, 0, 0, 0]), tiny_inputs(TEXT)
    model.train()
    batches = [inputs, {"input_ids": torch.zeros(1, 999, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="999"):
        calibrate_groups(model, batches, merging_once(0, 5))
    assert (model.r, model.config.merge_groups, model.training) == ([1, 0, 0, 0, 0, 0], None, True)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "left_after", [[5] * (NUM_LAYERS - 1), [5, 6, 6, 6, 6, 6], [0] * NUM_LAYERS, [NUM_LATENTS + 1] * NUM_LAYERS]
)
def test_numbers_that_cannot_be_left_are_named(left_after):
    with pytest.raises(ValueError, match="left_after = .*6 numbers.*from 12 to 1"):
        calibrate_groups(tiny_model(TEXT), [tiny_inputs(TEXT)], left_after)


def test_batches_that_can_be_gone_through_only_once_are_named():
    """The second merge would be decided on nothing."""
    left_after = [8, 8, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="batches: there are none"):
        calibrate_groups(tiny_model(TEXT), iter([tiny_inputs(TEXT)]), left_after)


def cost(layer: int, count: int) -> int:
    groups = [min(latent, count - 1) for latent in range(NUM_LATENTS)]
    merge_groups = [groups if index == layer else None for index in range(NUM_LAYERS)]
    config = tiny_config(merge_groups=merge_groups)
    return forward_cost(config, (1, 9), f"ToMePerceiver{TEXT}").total_with_matching


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_the_groups_for_a_budget_are_the_most_that_fit(layer, share):
    """`share` of the way from a single group to no merging."""
    unmerged = cost(layer, NUM_LATENTS)
    ratio = (cost(layer, 1) * (1 - share) + unmerged * share) / unmerged
    # What the checkpoint itself merges makes no difference.
    for merging in ({}, {"r": 2}, {"r": 1, "r_inflection": -1.0}):
        count = groups_for_flops(tiny_config(**merging), ratio, layer, (1, 9), f"ToMePerceiver{TEXT}")
        assert cost(layer, count) <= ratio * unmerged < cost(layer, count + 1)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_budget_for_fewer_latents_from_the_start(share):
    def fewer(count: int) -> int:
        return forward_cost(tiny_config(num_latents=count), (1, 9), f"ToMePerceiver{TEXT}").total_with_matching

    ratio = (fewer(1) * (1 - share) + fewer(NUM_LATENTS) * share) / fewer(NUM_LATENTS)
    count = groups_for_flops(tiny_config(), ratio, None, (1, 9), f"ToMePerceiver{TEXT}")
    assert fewer(count) <= ratio * fewer(NUM_LATENTS) < fewer(count + 1)
    with pytest.raises(BadInput, match="at the start"):
        groups_for_flops(tiny_config(), 0.001, None, (1, 9), f"ToMePerceiver{TEXT}")


def test_a_budget_that_is_met_exactly_fits():
    ratio = cost(1, 7) / cost(1, NUM_LATENTS)
    assert groups_for_flops(tiny_config(), ratio, 1, (1, 9), f"ToMePerceiver{TEXT}") == 7


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 0.1, 1.0, 1.5])
def test_a_budget_out_of_range_is_named(ratio):
    least = cost(4, 1) / cost(4, NUM_LATENTS)
    with pytest.raises(BadInput, match=f"--flops_ratio {ratio}: .* layer 4 are {least:.3f}, .* to below 1"):
        groups_for_flops(tiny_config(), ratio, 4, (1, 9), f"ToMePerceiver{TEXT}")


def test_a_budget_never_leaves_fewer_than_min_latents():
    ratio = cost(0, 4) / cost(0, NUM_LATENTS)
    with pytest.raises(BadInput, match="where 5 of 12 latents are left"):
        groups_for_flops(tiny_config(min_latents=5), ratio, 0, (1, 9), f"ToMePerceiver{TEXT}")
    assert groups_for_flops(tiny_config(min_latents=4), ratio, 0, (1, 9), f"ToMePerceiver{TEXT}") == 4


@pytest.mark.parametrize(
    ("num_groups", "merge_layer", "left"),
    [
        ("5", "0", [5] * 6),
        ("5", "3", [12, 12, 12, 5, 5, 5]),
        ("5", "start", [5] * 6),
        ("8,3", "0,4", [8, 8, 8, 8, 3, 3]),
        # As they come from a YAML file.
        (5, 5, [12, 12, 12, 12, 12, 5]),
        ([8, 3, 1], [0, 1, 2], [8, 3, 1, 1, 1, 1]),
    ],
)
def test_the_arguments_say_how_many_are_left_after_each_layer(num_groups, merge_layer, left):
    arguments = CalibrationArguments(num_groups=num_groups, merge_layer=merge_layer)
    assert arguments.left_after(tiny_config(), (1, 9), f"ToMePerceiver{TEXT}") == left


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
