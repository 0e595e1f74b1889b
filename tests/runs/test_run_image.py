# SPDX-License-Identifier: Apache-2.0
"""Tests of run_image.py, run on tiny images: what it writes, that its checkpoint loads, messages for bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters
from transformers import pipeline

from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from tests.support.script_run import call_script, run_script
from tests.support.tiny_images import LABELS, write_image_folders, write_images, write_model_config

TRAINING = (
    "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 1, "--per_device_train_batch_size", 12,
    "--learning_rate", 3e-3, "--save_strategy", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    images = write_images(folder / "images", {"train": 48, "test": 30})
    return "--config_name", write_model_config(folder), "--dataset_name", images


@pytest.fixture(scope="module")
def finetuned(inputs, tmp_path_factory) -> Path:
    """Finetune, merge and retrain in one run of the script, in its own process."""
    output_dir = tmp_path_factory.mktemp("outputs") / "r2"
    result = run_script(
        "run_image.py", *inputs, *TRAINING, "--num_train_epochs", 8, "--r", 2, "--retrain_epochs", 1,
        "--output_dir", output_dir,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return output_dir


def results(output_dir: Path) -> dict[str, float]:
    return json.loads((output_dir / "all_results.json").read_text())


def test_finetunes_merges_and_retrains(finetuned):
    """One command gives the unmerged checkpoint, the merged accuracy and the retrained checkpoint."""
    unmerged = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(finetuned / "finetuned")
    retrained = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(finetuned)
    assert (unmerged.r, retrained.r) == (0, 2)
    assert list(retrained.config.id2label.values()) == LABELS
    assert not unmerged.base_model.embeddings.latents.equal(retrained.base_model.embeddings.latents)
    assert {"merged_accuracy", "eval_accuracy", "eval_accuracy_stderr", "train_loss"} <= set(results(finetuned))
    # Brightness is an easy class, so accuracy is far above chance, a third.
    assert results(finetuned / "finetuned")["eval_accuracy"] > 0.7


@pytest.fixture(scope="module")
def grouped(inputs, finetuned, tmp_path_factory) -> Path:
    """Merge the unmerged checkpoint to a budget with fixed groups."""
    output_dir = tmp_path_factory.mktemp("outputs") / "grouped"
    call_script(
        "run_image.py", "--model_name_or_path", finetuned / "finetuned", *inputs[2:], "--do_eval", "--use_cpu",
        "--flops_ratio", 0.98, "--merge_method", "groups", "--calibration_samples", 8, "--output_dir", output_dir,
    )  # fmt: skip
    return output_dir


def test_fixed_groups_within_a_budget(finetuned, grouped):
    """Weights stay the same; figures are of both models; the card's code removes the groups before it sets r."""
    model, start = (
        ToMePerceiverForImageClassificationConvProcessing.from_pretrained(folder)
        for folder in (grouped, finetuned / "finetuned")
    )
    config = model.config
    # Groups of the learned latents, or in a layer.
    assert config.merge_groups or config.latent_groups
    assert config.latents_per_layer[-1] < 8 and not any(config.merge_schedule if config.merge_groups is None else [])
    assert all(value.equal(start.state_dict()[name]) for name, value in model.state_dict().items())
    assert results(grouped)["unmerged_accuracy"] == results(finetuned / "finetuned")["eval_accuracy"]
    card = (grouped / "README.md").read_text()
    assert "fixed groups, `" in card and "model.r = 0  #" not in card
    line = next(line for line in card.splitlines() if line.startswith("model.unmerged."))
    exec(line, {"model": model})
    model.r = 8
    assert model.config.latents_per_layer[-1] == 1


def test_training_on_keeps_fixed_groups_and_trains(inputs, grouped, tmp_path):
    arguments = ("--model_name_or_path", grouped, *inputs[2:], *TRAINING, "--max_steps", 2)
    call_script("run_image.py", *arguments, "--output_dir", tmp_path / "out")
    before, after = (
        ToMePerceiverForImageClassificationConvProcessing.from_pretrained(folder)
        for folder in (grouped, tmp_path / "out")
    )
    for name in ("merge_groups", "latent_groups"):
        assert getattr(after.config, name) == getattr(before.config, name)
    changed = [name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])]
    assert any("latents" in name for name in changed) and any("self_attends.0" in name for name in changed)


def test_the_pipeline_of_a_checkpoint_predicts_what_the_script_does(tmp_path):
    """Each file is named in the table of predictions, whatever characters its name has."""
    train = write_image_folders(tmp_path / "images", 8)
    (tmp_path / "test").mkdir()
    kinds = {"1.png": "L", "10.webp": "RGB", "2.tif": "CMYK", 'a\t"b".bmp': "P", "c\nd.png": "RGBA"}
    for index, (name, mode) in enumerate(kinds.items()):
        with Image.open(train / LABELS[index % 3] / "0.png") as image:
            image.resize((20, 24)).convert(mode).save(tmp_path / "test" / name)
    data = ("--config_name", write_model_config(tmp_path), "--train_dir", train, "--test_dir", tmp_path / "test")
    call_script("run_image.py", *data, *TRAINING, "--do_predict", "--output_dir", tmp_path / "out")
    path = tmp_path / "out" / "predict_results_images.txt"
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, dialect="excel-tab"))
    assert [row["file"] for row in table] == sorted(kinds) and [row["index"] for row in table] == list("01234")
    alone = ("--model_name_or_path", tmp_path / "out", "--test_dir", tmp_path / "test", "--do_predict", "--use_cpu")
    call_script("run_image.py", *alone, "--output_dir", tmp_path / "alone")
    assert (tmp_path / "alone" / "predict_results_test.txt").read_text() == path.read_text()
    pipe = pipeline("image-classification", str(tmp_path / "out"), trust_remote_code=True)
    for row in table:
        assert pipe(str(tmp_path / "test" / row["file"]))[0]["label"] == row["prediction"]


def test_one_checkpoint_for_every_r(inputs, finetuned, tmp_path):
    """Training starts from a checkpoint; evaluation and the saved config use the given r."""
    arguments = ("--model_name_or_path", finetuned / "finetuned", *inputs[2:], *TRAINING, "--elastic")
    for r in (0, 2):
        call_script("run_image.py", *arguments, "--r", r, "--output_dir", tmp_path / f"r{r}")
    unmerged, merged = (
        ToMePerceiverForImageClassificationConvProcessing.from_pretrained(tmp_path / f"r{r}") for r in (0, 2)
    )
    assert (unmerged.r, merged.r) == (0, 2)
    for name, weights in unmerged.state_dict().items():
        assert weights.equal(merged.state_dict()[name]), name  # what is drawn does not depend on it
    assert results(tmp_path / "r0")["eval_loss"] != results(tmp_path / "r2")["eval_loss"]
    card = (tmp_path / "r2" / "README.md").read_text()
    assert "| trained for every r | 2 |" in card and "- `elastic`: True" in card


def test_retrains_for_every_r(inputs, tmp_path):
    """With --elastic after plain finetuning, and without --r."""
    arguments = (*inputs, *TRAINING, "--retrain_epochs", 1, "--elastic", "--output_dir", tmp_path)
    call_script("run_image.py", *arguments)
    finetuned, retrained = (
        ToMePerceiverForImageClassificationConvProcessing.from_pretrained(folder)
        for folder in (tmp_path / "finetuned", tmp_path)
    )
    assert (finetuned.r, retrained.r) == (0, 0)
    assert not finetuned.base_model.embeddings.latents.equal(retrained.base_model.embeddings.latents)
    assert not (tmp_path / "merged_results.json").exists()  # nothing would have merged
    card = (tmp_path / "README.md").read_text()
    assert "| finetuned | 0 |" in card and "| retrained for every r | 0 |" in card


def test_compiled_layers_give_the_same(inputs, finetuned, tmp_path):
    arguments = ("--model_name_or_path", finetuned, *inputs[2:], "--do_eval", "--use_cpu", "--output_dir", tmp_path)
    torch.compiler.reset()
    counters.clear()
    call_script("run_image.py", *arguments, "--torch_compile", "--torch_compile_backend", "eager")
    assert counters["stats"]["unique_graphs"] > 0
    assert results(tmp_path)["eval_loss"] == pytest.approx(results(finetuned)["eval_loss"], rel=1e-5)
    assert results(tmp_path)["eval_accuracy"] == results(finetuned)["eval_accuracy"]


def test_trains_on_augmented_images(inputs, tmp_path):
    augmented = ("--crop_scale", 0.5, "--horizontal_flip", 0.5, "--num_train_epochs", 2)
    call_script("run_image.py", *inputs, *TRAINING, *augmented, "--output_dir", tmp_path / "out")
    call_script("run_image.py", *inputs, *TRAINING, "--num_train_epochs", 2, "--output_dir", tmp_path / "plain")
    assert results(tmp_path / "out")["train_loss"] != results(tmp_path / "plain")["train_loss"]
