# SPDX-License-Identifier: Apache-2.0
"""Fewer latents from the start: means of groups of the learned latents.

Letters: N latents (12).
"""

from __future__ import annotations

import pytest
import torch

from experiments.merging.latent_parameters import merge_latent_parameters
from tests.support.tiny_models import HEADS, NUM_LATENTS, NUM_LAYERS, repeat_latents, run, tiny_inputs, tiny_model

GROUPS = [0, 1, 2, 1, 3, 0, 1, 4, 4, 0, 1, 2]
TEXT = "ForSequenceClassification"


def test_the_latents_left_are_the_means_of_their_groups():
    model = tiny_model(TEXT)
    before = model.base_model.embeddings.latents.detach().clone()
    merge_latent_parameters(model, GROUPS)
    left, groups = model.base_model.embeddings.latents, torch.tensor(GROUPS)
    means = torch.stack([before[groups == group].mean(dim=0) for group in range(5)])
    assert (left - means).abs().max() < 1e-14
    assert isinstance(left, torch.nn.Parameter) and left.requires_grad and left.dtype == before.dtype
    assert (model.config.num_latents, model.config.merge_groups) == (5, None)


@pytest.mark.parametrize("head", HEADS)
def test_pairs_of_duplicates_merge_without_any_change(head):
    """All groups are of one size, so that no sizes are lost."""
    pairs = [0, 1, 2, 3, 4, 5] * 2
    model, inputs = repeat_latents(tiny_model(head), pairs), tiny_inputs(head)
    before = run(model, inputs).logits
    merge_latent_parameters(model, pairs)
    after = run(model, inputs).logits
    if head == "Model":  # whose latents are what comes out
        before = before[:, : after.shape[1]]
    assert (after - before).abs().max() < 1e-11


def test_groups_of_unequal_size_lose_their_sizes():
    """What the docstring warns of."""
    model, inputs = repeat_latents(tiny_model(TEXT), GROUPS), tiny_inputs(TEXT)
    before = run(model, inputs).logits
    merge_latent_parameters(model, GROUPS)
    assert (run(model, inputs).logits - before).abs().max() > 1e-3


def test_what_is_saved_is_an_unmerged_model_of_fewer_latents(tmp_path):
    model, inputs = tiny_model(TEXT, r=2, r_inflection=-1.0), tiny_inputs(TEXT)
    merge_latent_parameters(model, GROUPS)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.latents_per_layer == [5] * NUM_LAYERS
    assert (run(loaded.eval(), inputs).logits - run(model, inputs).logits).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("groups", "says"),
    [([0] * (NUM_LATENTS - 1), "12 integers"), (GROUPS[:-1] + [7], "0, 1, "), ([0] * 12, "min_latents")],
)
def test_groups_that_do_not_fit_are_named_and_the_model_stays(groups, says):
    model = tiny_model(TEXT, r=1, min_latents=2)
    latents = model.base_model.embeddings.latents
    with pytest.raises(ValueError, match=says):
        merge_latent_parameters(model, groups)
    assert model.base_model.embeddings.latents is latents and (model.r, model.config.num_latents) == (1, NUM_LATENTS)
