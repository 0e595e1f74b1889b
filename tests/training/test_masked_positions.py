# SPDX-License-Identifier: Apache-2.0
"""Decoding only masked positions changes neither loss nor gradients, and nothing outside training."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.tasks.scores import IGNORE_INDEX
from experiments.training.elastic import ElasticTrainer
from experiments.training.trainer import TaskTrainer, decoding_only_masked
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.tiny_models import stock_model
from tests.support.tiny_texts import MODEL, POSITIONS

ROWS, LENGTH = 3, 20


@pytest.fixture
def model() -> ToMePerceiverForMaskedLM:
    torch.manual_seed(0)
    without_dropout = {"architectures": ["PerceiverForMaskedLM"], "attention_probs_dropout_prob": 0.0}
    return ToMePerceiverForMaskedLM(ToMePerceiverConfig(**MODEL | without_dropout)).double().train()


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(6, MODEL["vocab_size"], (ROWS, LENGTH), generator=random)
    labels = torch.full((ROWS, POSITIONS), IGNORE_INDEX)
    labels[:, :LENGTH] = torch.where(torch.rand(ROWS, LENGTH, generator=random) < 0.3, ids, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def trainer(model, kind: type = TaskTrainer, **arguments: object) -> TaskTrainer:
    made = kind(
        model=model,
        args=TrainingArguments(
            output_dir="unused", use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[], **arguments
        ),
        train_dataset=[{}],
    )
    made.current_gradient_accumulation_steps = 1  # as within `train`
    return made


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_all_positions(model, smoothing):
    """Also with label smoothing, for which Trainer computes the loss from the logits."""
    whole = trainer(model, label_smoothing_factor=smoothing).compute_loss(model, batch())
    whole.backward()
    expected = gradients(model)
    loss = trainer(model, label_smoothing_factor=smoothing).training_step(model, batch())
    # transformers' label smoothing sums in single precision.
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-7 if smoothing else 1e-12, atol=0)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-6 if smoothing else 1e-9, atol=1e-12)


def test_only_masked_positions_are_decoded_and_only_meanwhile(model):
    inputs = batch()
    masked = inputs["labels"] != IGNORE_INDEX
    before = model(**inputs)
    with decoding_only_masked(model, inputs) as some:
        meanwhile = model(**some)
    assert meanwhile.logits.shape == (1, int(masked.sum()), MODEL["vocab_size"])
    torch.testing.assert_close(meanwhile.logits[0], before.logits[masked])
    assert model(**inputs).logits.equal(before.logits)


def test_elastic_training_compares_outputs_at_masked_positions(model):
    """With --elastic, merged and unmerged outputs are compared at the masked positions, the only ones decoded."""
    whole = trainer(model, ElasticTrainer).compute_loss(model, batch())
    loss = trainer(model, ElasticTrainer).training_step(model, batch())
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-9, atol=0)


def test_other_models_go_on_as_they_are():
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.tensor([0, 1])}
    with decoding_only_masked(stock_model("ForSequenceClassification"), inputs) as same:
        assert same is inputs
    unlabelled = {"input_ids": inputs["input_ids"]}
    with decoding_only_masked(stock_model("ForMaskedLM"), unlabelled) as same:
        assert same is unlabelled
