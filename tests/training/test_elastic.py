# SPDX-License-Identifier: Apache-2.0
"""Tests of --elastic: the merging drawn in each step, the loss, and the scripts that use it.

Letters: N latents, L self-attention layers.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PerceiverImageProcessorPil, PreTrainedModel, Trainer, TrainingArguments

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging, forward_cost
from experiments.training.elastic import SMALLEST_FLOPS_SHARE, ElasticTrainer, MergingDraw
from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from tests.support.tiny_images import LABELS, MODEL, write_images
from tests.support.tiny_models import NUM_LATENTS, NUM_LAYERS, tiny_config, tiny_inputs, tiny_model
from tests.training.test_resume import steps_of

BATCH = 6
STEP = 3
TEXT = "ForSequenceClassification"
# Fixed groups: the second layer joins the latents in pairs.
GROUPS = [None, [index // 2 for index in range(NUM_LATENTS)], *[None] * (NUM_LAYERS - 2)]
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def published() -> ToMePerceiverConfig:
    """Return the config of the published language model: 256 latents, 26 layers."""
    return ToMePerceiverConfig(qk_channels=256, v_channels=1280)


def shares(draw: MergingDraw, steps: int) -> list[float]:
    return [draw.at(step)[0] for step in range(steps)]


@settings(max_examples=20)
@given(SEEDS, st.integers(0, 10**6))
def test_a_draw_is_a_function_of_seed_and_step(seed, step):
    """It does not depend on earlier draws or on the config's own merging."""
    draw, other = MergingDraw(tiny_config(), seed), MergingDraw(tiny_config(r=2, r_inflection=1.0), seed)
    other.at(step + 1)
    assert other.at(step) == draw.at(step) == MergingDraw(tiny_config(merge_groups=GROUPS), seed).at(step)


@settings(max_examples=20)
@given(SEEDS)
def test_a_draw_is_what_the_config_does_and_costs(seed):
    """No cap changes a draw, and its share is that of the self-attention FLOPs."""
    draw = MergingDraw(tiny_config(), seed)
    unmerged = forward_cost(tiny_config(), (1, 9), "PerceiverForSequenceClassification")
    for step in range(10):
        share, r = draw.at(step)
        config = tiny_config(r=r)
        assert config.merge_schedule == r and config.latents_per_layer[-1] >= 1
        cost = forward_cost(config, (1, 9), "PerceiverForSequenceClassification")
        assert share == pytest.approx(sum(cost.self_attention) / sum(unmerged.self_attention))


def test_draws_go_evenly_from_an_eighth_to_all(published):
    """Shares are log-uniform: about a third in each of three halvings; some schedules do not reach the lowest."""
    drawn = shares(MergingDraw(published, seed=0), 3000)
    assert min(drawn) < 1.1 * SMALLEST_FLOPS_SHARE and max(drawn) > 0.95
    thirds, _ = np.histogram(np.log2(drawn), bins=[-3.1, -2, -1, 0])
    assert all(0.25 < count / len(drawn) < 0.41 for count in thirds), thirds


def test_other_seeds_and_steps_draw_otherwise():
    drawn = [shares(MergingDraw(tiny_config(), seed), 50) for seed in (0, 1)]
    assert drawn[0] != drawn[1] and len(set(drawn[0])) > 10


def test_every_constant_r_is_among_what_is_drawn(published):
    """These are the paper's rows, r = 0 to 16, down to one latent left."""
    members = {member for strengths in MergingDraw(published, seed=0).schedules for _, member in strengths}
    for r in range(17):
        assert tuple(ToMePerceiverConfig(r=r).merge_schedule) in members


def test_min_latents_stay_in_every_draw():
    draw = MergingDraw(tiny_config(min_latents=5), seed=0)
    assert min(NUM_LATENTS - sum(draw.at(step)[1]) for step in range(200)) == 5


def labelled(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a model for a kind of task, and a labelled batch."""
    generator = torch.Generator().manual_seed(1)
    if kind == "masked":
        inputs = tiny_inputs("ForMaskedLM", batch=BATCH)
        model = tiny_model("ForMaskedLM")
        # Outputs, and so labels, are for all positions of the model.
        labels = torch.randint(0, 262, (BATCH, model.config.max_position_embeddings), generator=generator)
        asked = torch.rand(labels.shape, generator=generator) < 0.3
        return model, inputs | {"labels": labels.masked_fill(~asked, -100)}
    inputs = tiny_inputs(TEXT, batch=BATCH)
    if kind == "regression":
        labels = torch.randn(BATCH, generator=generator, dtype=torch.float64)
        return tiny_model(TEXT, num_labels=1, problem_type="regression"), inputs | {"labels": labels}
    model = tiny_model(TEXT, problem_type="single_label_classification")
    return model, inputs | {"labels": torch.arange(BATCH) % 3}


def elastic_trainer(model: PreTrainedModel, folder: Path, weight: float = 1.0, **arguments: Any) -> ElasticTrainer:
    arguments = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0} | arguments
    training = TrainingArguments(folder, use_cpu=True, save_strategy="no", disable_tqdm=True, **arguments)
    return ElasticTrainer(model=model, args=training, distillation_weight=weight)


def loss_of(trainer: Trainer, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    trainer.state.global_step = STEP
    return trainer.compute_loss(model.train(), batch)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def by_hand(model: PreTrainedModel, batch: dict[str, Tensor], kind: str, r: list[int], weight: float) -> Tensor:
    """Compute the loss by definition, from two forward passes."""
    model.config.merge_groups, model.r = None, 0
    unmerged = model(**batch)
    model.r = r
    merged = model(**batch).logits
    taught = unmerged.logits.detach()
    if kind == "regression":
        return unmerged.loss + weight * ((merged - taught) ** 2).mean()
    apart = (taught.softmax(-1) * (taught.softmax(-1).log() - merged.softmax(-1).log())).sum(-1)
    return unmerged.loss + weight * apart[batch["labels"] != -100].mean()


@pytest.mark.parametrize(
    ("kind", "own"), [("classes", {}), ("classes", {"merge_groups": GROUPS}), ("regression", {"r": 2}), ("masked", {})]
)
def test_loss_and_gradient_are_those_by_hand(kind, own, tmp_path):
    """For any merging of the config, which applies again after the step."""
    model, batch = labelled(kind)
    reference = copy.deepcopy(model)
    for name, value in own.items():
        setattr(model.config, name, value)
    before = Merging.of(model.config)
    trainer = elastic_trainer(model, tmp_path, weight=0.7)
    share, r = trainer.draw.at(STEP)
    assert share < 0.9  # it merges
    loss = loss_of(trainer, model, dict(batch))
    assert Merging.of(model.config) == before
    expected = by_hand(reference.train(), batch, kind, r, 0.7)
    # The distance is computed in float32.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    computed, wanted = gradients(model, loss), gradients(reference, expected)
    assert computed.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(computed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_what_was_drawn(reentrant, tmp_path):
    """The backward pass recomputes it although the config has changed by then."""
    model, batch = labelled("classes")
    plain = gradients(model, loss_of(elastic_trainer(model, tmp_path), model, dict(batch)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recomputed = gradients(model, loss_of(elastic_trainer(model, tmp_path), model, dict(batch)))
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_weight_and_in_evaluation_the_loss_is_the_tasks(smoothing, tmp_path):
    model, batch = labelled("classes")
    elastic = elastic_trainer(model, tmp_path, weight=0.0, label_smoothing_factor=smoothing)
    plain = Trainer(model=model, args=elastic.args)
    assert loss_of(elastic, model, dict(batch)).item() == loss_of(plain, model, dict(batch)).item()
    elastic.distillation_weight, model.r = 1.0, 2
    evaluated, expected = (trainer.compute_loss(model.eval(), dict(batch)) for trainer in (elastic, plain))
    assert evaluated.item() == expected.item()


def test_parts_of_a_step_merge_alike(tmp_path):
    """So that accumulated gradients equal those of a larger batch."""
    model, batch = labelled("classes")
    examples = [{name: values[row] for name, values in batch.items()} for row in range(BATCH)]
    trained = []
    for accumulated in (1, 3):
        copied = copy.deepcopy(model)
        trainer = elastic_trainer(
            copied, tmp_path, per_device_train_batch_size=BATCH // accumulated,
            gradient_accumulation_steps=accumulated, max_steps=2,
        )  # fmt: skip
        trainer.train_dataset = examples
        trainer.train()
        trained.append(copied.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not trained[0]["perceiver.embeddings.latents"].equal(model.base_model.embeddings.latents)


def test_a_sweep_trains_once_for_all_rows(tmp_path):
    """Each row is the same checkpoint with the row's merging; a missing cell is measured again without training."""
    config = ToMePerceiverConfig(**MODEL | {"model_type": "tome_perceiver", "num_labels": len(LABELS)})
    ToMePerceiverForImageClassificationConvProcessing(config).save_pretrained(tmp_path / "model")
    processor = PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "model")
    output_dir = tmp_path / "sweep"
    sweep = (
        "--model_name_or_path", tmp_path / "model", "--dataset_name",
        write_images(tmp_path / "images", {"train": 24, "test": 20}), "--use_cpu", "--r", "0", "2", "4,0,0,1",
        "--elastic", "--retrain_epochs", 1, "--per_device_train_batch_size", 6, "--save_strategy", "no",
        "--timing_rounds", 0, "--output_dir", output_dir,
    )  # fmt: skip
    assert steps_of("eval_sweep.py", *sweep) == 4
    assert [folder.name for folder in (output_dir / "retrained").iterdir()] == ["elastic"]
    checkpoint = output_dir / "retrained" / "elastic"
    assert ToMePerceiverForImageClassificationConvProcessing.from_pretrained(checkpoint).r == 0

    results = json.loads((output_dir / "sweep_results.json").read_text())
    lost = results["rows"][1].pop("retrained")
    (output_dir / "sweep_results.json").write_text(json.dumps(results))
    assert steps_of("eval_sweep.py", *sweep) == 0
    assert json.loads((output_dir / "sweep_results.json").read_text())["rows"][1]["retrained"] == lost
    card = (checkpoint / "README.md").read_text()
    assert all(f"| retrained for every r | {r} |" in card for r in ("0", "2", "4,0,0,1"))
