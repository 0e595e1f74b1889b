# SPDX-License-Identifier: Apache-2.0
"""How alike latents are: what each similarity of the registry says of duplicates, layers and rows of a batch.

Letters: B batch, N latents (12).
"""

from __future__ import annotations

import pytest
import torch

from experiments.latent_similarity import SIMILARITIES
from tests.tiny_models import IMAGE_HEADS, NUM_LATENTS, NUM_LAYERS, repeat_latents, take_row, tiny_inputs, tiny_model

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


@pytest.mark.parametrize("similarity", EVERY)
def test_the_model_keeps_no_hook(similarity):
    model = tiny_model(TEXT)
    SIMILARITIES[similarity](model, tiny_inputs(TEXT), [0])
    with pytest.raises(ValueError, match="999"):
        SIMILARITIES[similarity](model, {"input_ids": torch.zeros(1, 999, dtype=torch.int64)}, [0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
