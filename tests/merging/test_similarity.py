# SPDX-License-Identifier: Apache-2.0
"""How alike latents are: what each similarity of the registry says of duplicates, layers and rows of a batch.

Letters: B batch, N latents (12).
"""

from __future__ import annotations

import pytest
import torch

from experiments.merging.similarity import SIMILARITIES, output_similarity, received_attention
from layers_tome_perceiver import AttentionOutput
from tests.support.tiny_models import (
    IMAGE_HEADS,
    NUM_LATENTS,
    NUM_LAYERS,
    repeat_latents,
    take_row,
    tiny_inputs,
    tiny_model,
)

TEXT = "ForSequenceClassification"
DUPLICATES = [0, 1, 2, 1, 3, 0, 1, 4, 4, 0, 1, 2]
EVERY = sorted(SIMILARITIES)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("head", [TEXT, IMAGE_HEADS[0]])
@pytest.mark.parametrize("similarity", EVERY)
def test_nothing_is_more_alike_than_exact_duplicates(similarity, head):
    model, inputs = repeat_latents(tiny_model(head), DUPLICATES), tiny_inputs(head, batch=3)
    groups = torch.tensor(DUPLICATES)
    alike = groups[:, None] == groups
    for each in SIMILARITIES[similarity](model, inputs, range(NUM_LAYERS)):
        assert each.shape == (3, NUM_LATENTS, NUM_LATENTS)
        assert (each - each.transpose(1, 2)).abs().max() < 1e-12
        assert each[:, alike].min() > each[:, alike].max() - 1e-12
        assert each[:, ~alike].max() < each[:, alike].min() - 1e-9


@pytest.mark.parametrize("similarity", EVERY)
def test_layers_are_told_apart_and_the_same_whichever_are_asked_for(similarity):
    """Layers 0 and 3, 1 and 4, 2 and 5 are calls of the same module."""
    model, inputs = tiny_model(TEXT), tiny_inputs(TEXT)
    every = SIMILARITIES[similarity](model, inputs, range(NUM_LAYERS))
    some = SIMILARITIES[similarity](model, inputs, [1, 4])
    assert len(every) == NUM_LAYERS and len(some) == 2
    assert some[0].equal(every[1]) and some[1].equal(every[4])
    assert all((every[layer] - every[layer + 3]).abs().max() > 1e-4 for layer in range(3))


@pytest.mark.parametrize("similarity", EVERY)
def test_a_row_is_the_same_alone_and_in_a_batch(similarity):
    """Texts are padded in the batch and not alone."""
    model, inputs = tiny_model(TEXT), tiny_inputs(TEXT, batch=3)
    (together,) = SIMILARITIES[similarity](model, inputs, [2])
    for row in range(3):
        (alone,) = SIMILARITIES[similarity](model, take_row(inputs, row), [2])
        assert (alone[0] - together[row]).abs().max() < 1e-12


@pytest.mark.parametrize("head", [TEXT, "ForMaskedLM"])
def test_output_similarity_is_minus_the_divergence_when_the_pair_alone_merges(head):
    model, inputs = tiny_model(head, r=0), tiny_inputs(head, batch=3)
    (similarity,) = output_similarity(model, inputs, [4])
    unmerged = model(**inputs).logits.softmax(dim=-1)
    for one, other in ((0, 1), (3, 11), (10, 11)):
        groups = [latent if latent != other else one for latent in range(NUM_LATENTS)]
        numbered = [sorted(set(groups)).index(group) for group in groups]
        model.config.merge_groups = [*[None] * 4, numbered, None]
        merged = model(**inputs).logits.softmax(dim=-1)
        divergence = (unmerged * (unmerged / merged).log()).sum(dim=-1).reshape(3, -1).mean(dim=1)
        assert divergence.min() > 1e-9
        assert (similarity[:, one, other] + divergence).abs().max() < 1e-12
        model.config.merge_groups = None


def test_output_similarity_of_regression_is_minus_the_squared_error():
    model, inputs = tiny_model(TEXT, num_labels=1, problem_type="regression"), tiny_inputs(TEXT, batch=3)
    (similarity,) = output_similarity(model, inputs, [5])
    unmerged = model(**inputs).logits[:, 0]
    model.config.merge_groups = [*[None] * 5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 10]]
    error = (model(**inputs).logits[:, 0] - unmerged) ** 2
    assert (similarity[:, 2, 10] + error).abs().max() < 1e-12 and error.min() > 1e-12


def test_output_similarity_after_an_earlier_merge_keeps_that_merge():
    """Two groups that are left may merge as their latents would have in the first place, where nothing lies between."""
    first = [*range(NUM_LATENTS - 1), 0]
    model, inputs = tiny_model(TEXT, merge_groups=[first, *[None] * (NUM_LAYERS - 1)]), tiny_inputs(TEXT)
    merged = model(**inputs).logits
    (similarity,) = output_similarity(model, inputs, [3])
    assert similarity.shape == (2, NUM_LATENTS - 1, NUM_LATENTS - 1)
    assert model.config.merge_groups == [first, *[None] * (NUM_LAYERS - 1)]
    second = [*range(NUM_LATENTS - 2), 1]
    model.config.merge_groups = [first, None, None, second, None, None]
    both = model(**inputs).logits
    divergence = (merged.softmax(-1) * (merged.log_softmax(-1) - both.log_softmax(-1))).sum(-1)
    assert (similarity[:, 1, NUM_LATENTS - 2] + divergence).abs().max() < 1e-12


def test_a_model_without_logits_is_named_and_its_merging_stays():
    model = tiny_model("Model", r=2)
    with pytest.raises(ValueError, match="similarity = 'output': ToMePerceiverModel"):
        output_similarity(model, tiny_inputs("Model"), [0])
    assert (model.r, model.config.merge_groups) == (2, None)


def test_received_attention_is_of_every_head_and_query_and_indifferent_to_sizes():
    weights = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    received = received_attention(AttentionOutput(hidden_states=None, keys=None, values=None, weights=weights))
    assert received.shape == (2, 5, 15)
    assert received[1, 4, 5 * 2 + 3] == weights[1, 2, 3, 4]
    sizes = torch.tensor([1.0, 2.0, 3.0, 1.0, 9.0], dtype=torch.float64)
    sized = received_attention(AttentionOutput(None, None, None, weights * sizes))
    cosine = torch.nn.functional.cosine_similarity
    pairs = (cosine(each[:, :, None], each[:, None], dim=-1) for each in (received, sized))
    assert (next(pairs) - next(pairs)).abs().max() < 1e-12


@pytest.mark.parametrize("similarity", EVERY)
def test_the_model_keeps_no_hook(similarity):
    model = tiny_model(TEXT)
    SIMILARITIES[similarity](model, tiny_inputs(TEXT), [0])
    with pytest.raises(ValueError, match="999"):
        SIMILARITIES[similarity](model, {"input_ids": torch.zeros(1, 999, dtype=torch.int64)}, [0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
