# SPDX-License-Identifier: Apache-2.0
"""calibrate.py, really run: the checkpoint that it leaves, what it looks at, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, PerceiverImageProcessorPil, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import forward_cost
from experiments.merging.similarity import SIMILARITIES
from groups_tome_perceiver import fixed_groups
from modeling_tome_perceiver import (
    ToMePerceiverForImageClassificationConvProcessing,
    ToMePerceiverForSequenceClassification,
)
from tests.support.loopback_hub import LoopbackHub
from tests.support.loopback_repository import USER, WRITE_TOKEN
from tests.support.script_run import bad_input_line, call_script, run_script
from tests.support.tiny_images import LABELS, MODEL, write_images
from tests.support.tiny_models import repeat_latents, spread_weights, stock_model
from tests.support.tiny_texts import POSITIONS, write_glue

SECRET = "hf_secretfordownloads"
TRAIN, EVALUATED = 24, 20
DUPLICATES = [0, 1, 2, 3, 3, 1, 1, 4, 4, 0, 1, 2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    """A checkpoint, which itself merges, and images."""
    folder = tmp_path_factory.mktemp("inputs")
    config = ToMePerceiverConfig(**MODEL | {"model_type": "tome_perceiver", "num_labels": len(LABELS), "r": 3})
    spread_weights(ToMePerceiverForImageClassificationConvProcessing(config)).save_pretrained(folder / "model")
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    images = write_images(folder / "images", {"train": TRAIN})
    write_noise(images / "test.parquet", EVALUATED)
    return ("--model_name_or_path", folder / "model", "--use_cpu", "--dataset_name", images)


@pytest.fixture(scope="module")
def script(inputs, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Two merges, in a process of its own: where, and what was printed."""
    output_dir = tmp_path_factory.mktemp("outputs") / "calibrated"
    result = run_script(
        "calibrate.py", *inputs, "--num_groups", "6,3", "--merge_layer", "0,3", "--similarity", "hidden", "--do_eval",
        "--calibration_samples", 1000, "--token", SECRET, "--output_dir", output_dir,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return output_dir, result


@pytest.fixture(scope="module")
def calibrated(script) -> Path:
    return script[0]


def write_noise(path: Path, count: int) -> None:
    """Images unlike those of `write_images`: their classes all look the same."""
    random = np.random.default_rng(1)
    images = [Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)) for _ in range(count)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=LABELS)})
    labels = [index % len(LABELS) for index in range(count)]
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)


def read(output_dir: Path) -> dict:
    return json.loads((output_dir / "calibration_results.json").read_text())


def merge_groups(output_dir: Path) -> list:
    return json.loads((output_dir / "config.json").read_text())["merge_groups"]


def pixel_values(images: Path, split: str) -> torch.Tensor:
    """(B, 3, 16, 16), in the order of the file."""
    processor = PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16})
    rgb = [image.convert("RGB") for image in Dataset.from_parquet(str(images / f"{split}.parquet"))["image"]]
    return processor(rgb, return_tensors="pt")["pixel_values"]


def logits(model, values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=values).logits


def test_the_checkpoint_has_groups_that_come_from_the_training_images(inputs, calibrated):
    """All of them were asked for, so that nothing depends on which."""
    model = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(inputs[1])
    direct, elsewhere = (
        fixed_groups(model, [{"pixel_values": pixel_values(inputs[-1], split)}], [6, 6, 6, 3], SIMILARITIES["hidden"])
        for split in ("train", "test")
    )
    assert merge_groups(calibrated) == direct != elsewhere
    config = ToMePerceiverConfig.from_pretrained(calibrated)
    assert (config.r, config.latents_per_layer) == (0, [6, 6, 6, 3])


def test_what_is_saved_is_the_calibrated_model(inputs, calibrated):
    values = pixel_values(inputs[-1], "test")
    saved = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(calibrated)
    start = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(inputs[1])
    start.r = 0
    unmerged = logits(start, values)
    start.config.merge_groups = merge_groups(calibrated)
    assert logits(saved, values).equal(logits(start, values))
    assert (logits(saved, values) - unmerged).abs().max() > 1e-3
    saved.config.merge_groups = None
    assert logits(saved, values).equal(unmerged)
    AutoImageProcessor.from_pretrained(calibrated)


def test_figures_are_of_all_evaluated_images_unmerged_and_with_groups(inputs, script):
    calibrated, result = script
    values = pixel_values(inputs[-1], "test")
    labels = torch.tensor(Dataset.from_parquet(str(inputs[-1] / "test.parquet"))["label"])
    saved = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(calibrated)
    results = read(calibrated)
    assert (results["evaluated_on"], results["calibrated_on"]) == (EVALUATED, TRAIN)
    for stage in ("calibrated", "unmerged"):
        accuracy = float((logits(saved, values).argmax(dim=-1) == labels).float().mean())
        assert results[stage]["accuracy"] == pytest.approx(accuracy)
        assert results[stage]["accuracy_stderr"] == pytest.approx((accuracy * (1 - accuracy) / EVALUATED) ** 0.5)
        saved.config.merge_groups = None
    shown = [f"{results[stage]['accuracy']:.4f} ± " for stage in ("unmerged", "calibrated")]
    line = next(line for line in result.stdout.splitlines() if "Accuracy" in line)
    assert line.startswith(f"| Accuracy | {shown[0]}") and f" | {shown[1]}" in line
    # Two standard errors say little of a difference between paired figures.
    assert f"On {EVALUATED} examples" in result.stdout and "paired by example" in result.stdout
    change = results["calibrated"]["accuracy_change"]
    assert change == pytest.approx(results["calibrated"]["accuracy"] - results["unmerged"]["accuracy"])


def test_the_file_says_what_made_it_and_what_it_costs(inputs, calibrated):
    results = read(calibrated)
    assert results["arguments"]["num_groups"] == "6,3" and "token" not in results["arguments"]
    assert results["environment"]["torch"] and results["source"]["split"] == "test"
    assert results["latents_left"] == [6, 6, 6, 3]
    assert set(results["seconds"]) == {"calibrating", "evaluating unmerged", "evaluating calibrated"}
    config = ToMePerceiverConfig.from_pretrained(calibrated)
    cost = forward_cost(config, (1, 3, 16, 16)).total
    config.merge_groups = None
    assert results["gflops"] == pytest.approx(cost / 1e9)
    assert results["flops_ratio"] == pytest.approx(cost / forward_cost(config, (1, 3, 16, 16)).total)
    assert not any(SECRET in path.read_text(errors="replace") for path in calibrated.iterdir())


def test_the_card_says_what_was_done_and_shows_code_that_runs(calibrated):
    card = ModelCard.load(calibrated / "README.md")
    assert f"{TRAIN} training samples of images" in card.text and "6,6,6,3" in card.text
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [
        (f"Accuracy (r=0, {name})", read(calibrated)[stage]["accuracy"])
        for name, stage in (("unmerged", "unmerged"), ("fixed groups", "calibrated"))
    ]
    with Image.open(calibrated / "schedule.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10
    # The one line that is not loading: a model with groups takes no r before they are gone.
    model = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(calibrated)
    with pytest.raises(ValueError, match="merge_groups"):
        model.r = 8
    line = next(line for line in card.text.splitlines() if line.startswith("model.config."))
    exec(line, {"model": model})
    model.r = 8
    assert model.config.latents_per_layer[-1] == 1


def test_labels_and_evaluated_images_make_no_difference(inputs, tmp_path):
    """The same training images with other labels, and other evaluated ones; and other training images."""
    train = Dataset.from_parquet(str(inputs[-1] / "train.parquet"))
    other_labels, other_images = tmp_path / "labels", tmp_path / "images"
    write_images(other_labels, {"test": 7})
    labels = [(label + 1) % len(LABELS) for label in train["label"]]
    train.remove_columns("label").add_column("label", labels, feature=train.features["label"]).to_parquet(
        other_labels / "train.parquet"
    )
    write_images(other_images, {"test": EVALUATED})
    write_noise(other_images / "train.parquet", TRAIN)
    found = {}
    for images in (inputs[-1], other_labels, other_images):
        output_dir = tmp_path / f"out_{images.name}_{len(found)}"
        call_script(
            "calibrate.py", *inputs[:-1], images, "--num_groups", 4, "--merge_layer", 1, "--calibration_samples", 10,
            "--similarity", "key", "--output_dir", output_dir,
        )  # fmt: skip
        assert read(output_dir)["calibrated_on"] == 10
        found[images] = merge_groups(output_dir)
    assert found[inputs[-1]] == found[other_labels] != found[other_images]


def test_a_stock_text_checkpoint_comes_down_to_a_budget_and_exact_duplicates_cost_nothing(tmp_path, capsys):
    """Five kinds of latents and room for five groups; both halves of MNLI are evaluated."""
    stock = repeat_latents(
        stock_model("ForSequenceClassification", max_position_embeddings=POSITIONS, dtype=torch.float32), DUPLICATES
    )
    stock.save_pretrained(tmp_path / "stock")
    PerceiverTokenizer().save_pretrained(tmp_path / "stock")
    given = (
        "calibrate.py", "--model_name_or_path", tmp_path / "stock", "--task_name", "mnli", "--dataset_name",
        write_glue(tmp_path / "glue", "mnli"), "--pad_to_max_length", "--use_cpu", "--do_eval",
    )  # fmt: skip
    config = ToMePerceiverConfig.from_pretrained(tmp_path / "stock")
    unmerged, wanted, more = (
        forward_cost(config_with(config, count), (1, POSITIONS), "PerceiverForSequenceClassification").total
        for count in (12, 5, 6)
    )
    ratio = (wanted + more) / 2 / unmerged
    call_script(*given, "--flops_ratio", ratio, "--output_dir", tmp_path / "out")
    results = read(tmp_path / "out")
    assert results["latents_left"] == [5] * 6 and merge_groups(tmp_path / "out")[0] == DUPLICATES
    assert results["flops_ratio"] == pytest.approx(wanted / unmerged) and results["flops_ratio"] <= ratio
    assert set(results["unmerged"]) == {"accuracy", "accuracy_stderr", "accuracy_mm", "accuracy_mm_stderr"}
    changed = {name: results["calibrated"].pop(name) for name in list(results["calibrated"]) if "_change" in name}
    assert results["calibrated"] == results["unmerged"]
    assert len(changed) == 4 and set(changed.values()) == {0.0}
    assert "| Accuracy mm | " in capsys.readouterr().out

    saved = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = PerceiverTokenizer.from_pretrained(tmp_path / "out")("aaaxx", return_tensors="pt")
    with torch.no_grad():
        assert (saved(**tokens).logits - stock.eval()(**tokens).logits).abs().max() < 1e-4


def config_with(config: ToMePerceiverConfig, count: int) -> ToMePerceiverConfig:
    """One merge in layer 0 that leaves so many latents."""
    groups = [min(latent, count - 1) for latent in range(config.num_latents)]
    layers = config.num_self_attention_layers
    return ToMePerceiverConfig.from_dict(config.to_dict() | {"merge_groups": [groups, *[None] * (layers - 1)]})


@pytest.fixture(scope="module")
def started(inputs, tmp_path_factory) -> Path:
    """Fewer latents from the start."""
    output_dir = tmp_path_factory.mktemp("outputs") / "started"
    call_script(
        "calibrate.py", *inputs, "--num_groups", 3, "--merge_layer", "start", "--do_eval", "--output_dir", output_dir
    )
    return output_dir


def test_merging_at_the_start_leaves_a_smaller_model_that_merges_nothing(inputs, started):
    start = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(inputs[1])
    batches = [{"pixel_values": pixel_values(inputs[-1], "train")}]
    groups = torch.tensor(fixed_groups(start, batches, [3] * 4, SIMILARITIES["hidden"])[0])
    saved = ToMePerceiverForImageClassificationConvProcessing.from_pretrained(started)
    assert (saved.config.num_latents, saved.r, saved.config.merge_groups) == (3, 0, None)
    before, after = (model.base_model.embeddings.latents for model in (start, saved))
    for group in range(3):
        assert (after[group] - before[groups == group].mean(dim=0)).abs().max() < 1e-6

    results, values = read(started), pixel_values(inputs[-1], "test")
    labels = torch.tensor(Dataset.from_parquet(str(inputs[-1] / "test.parquet"))["label"])
    for stage, model in (("unmerged", start), ("calibrated", saved)):
        model.r = 0
        accuracy = float((logits(model, values).argmax(dim=-1) == labels).float().mean())
        assert results[stage]["accuracy"] == pytest.approx(accuracy)
    assert results["latents_left"] == [3] * 4
    costs = [forward_cost(model.config, (1, 3, 16, 16)).total for model in (saved, start)]
    assert results["flops_ratio"] == pytest.approx(costs[0] / costs[1])
    card = (started / "README.md").read_text()
    assert "is lost" in card and "merge_groups" not in card and "fewer latents" in card


def train_on(checkpoint: Path, images: Path, output_dir: Path, *arguments: object) -> ToMePerceiverConfig:
    call_script(
        "run_image.py", "--model_name_or_path", checkpoint, "--dataset_name", images, "--do_train", "--do_eval",
        "--use_cpu", "--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 0.01,
        "--output_dir", output_dir, *arguments,
    )  # fmt: skip
    return ToMePerceiverConfig.from_pretrained(output_dir)


def test_training_on_keeps_the_fixed_groups_and_trains(inputs, calibrated, tmp_path):
    config = train_on(calibrated, inputs[-1], tmp_path / "out")
    assert config.merge_groups == merge_groups(calibrated)
    before, after = (
        ToMePerceiverForImageClassificationConvProcessing.from_pretrained(folder)
        for folder in (calibrated, tmp_path / "out")
    )
    changed = [name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])]
    assert any("latents" in name for name in changed) and any("self_attends.0" in name for name in changed)
    # What is evaluated is the merged model.
    values = pixel_values(inputs[-1], "test")
    labels = torch.tensor(Dataset.from_parquet(str(inputs[-1] / "test.parquet"))["label"])
    accuracy = float((logits(after, values).argmax(dim=-1) == labels).float().mean())
    evaluated = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert evaluated["eval_accuracy"] == pytest.approx(accuracy)


def test_training_on_from_fewer_latents(inputs, started, tmp_path):
    config = train_on(started, inputs[-1], tmp_path / "out", "--r", 1)
    assert (config.num_latents, config.latents_per_layer) == (3, [2, 1, 1, 1])


def test_fixed_groups_and_r_do_not_go_together(inputs, calibrated, tmp_path, capsys):
    line = bad_input_line(
        capsys, "run_image.py", "--model_name_or_path", calibrated, "--dataset_name", inputs[-1], "--do_train",
        "--use_cpu", "--r", 2, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "merge_groups" in line and not (tmp_path / "out").exists()


def test_push_only_pushes_what_is_there(calibrated, tmp_path):
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        call_script("calibrate.py", "--push_only", "--hub_token", WRITE_TOKEN, "--output_dir", calibrated)
        files = hub.files(f"{USER}/{calibrated.name}")
    for name in ("model.safetensors", "config.json", "layers_tome_perceiver.py", "calibration_results.json"):
        assert files[name] == (calibrated / name).read_bytes()
    assert f'from_pretrained("{USER}/{calibrated.name}"' in files["README.md"].decode()


def test_the_same_command_may_run_again_and_another_one_may_not(inputs, tmp_path, capsys):
    given = ("calibrate.py", *inputs, "--calibration_samples", 4, "--output_dir", tmp_path / "out")
    call_script(*given, "--num_groups", 4)
    (tmp_path / "out" / "calibration_results.json").unlink()
    call_script(*given, "--num_groups", 4)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert read(tmp_path / "out")["latents_left"] == [4] * 4
    line = bad_input_line(capsys, *given, "--num_groups", 5)
    assert "another experiment" in line and "num_groups is 4 and not 5" in line
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_another_experiment_in_the_folder_is_named_and_stays(inputs, capsys):
    """The checkpoint's own folder, too, is one."""
    folder = inputs[1]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    line = bad_input_line(capsys, "calibrate.py", *inputs, "--num_groups", 4, "--output_dir", folder)
    assert "another experiment" in line and str(folder) in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("--num_groups, --flops_ratio", "neither")),
        (("--num_groups", "4", "--flops_ratio", "0.5"), ("--num_groups, --flops_ratio", "both")),
        (("--num_groups", "0"), ("--num_groups 0", "1 to 7")),
        (("--num_groups", "8"), ("--num_groups 8", "1 to 7")),
        (("--num_groups", "x"), ("--num_groups x", "integer")),
        (("--num_groups", "4,4", "--merge_layer", "0,2"), ("--num_groups 4,4", "layer 2", "1 to 3")),
        (("--num_groups", "4", "--merge_layer", "4"), ("--merge_layer 4", "0 to 3")),
        (("--num_groups", "4", "--merge_layer", "-1"), ("--merge_layer -1", "0 to 3")),
        (("--num_groups", "4", "--merge_layer", "x"), ("--merge_layer x", "integer", "'start' alone")),
        (("--num_groups", "4,2", "--merge_layer", "start,2"), ("--merge_layer start,2", "'start' alone")),
        (("--num_groups", "4,2", "--merge_layer", "start"), ("--merge_layer start", "4,2")),
        (("--num_groups", "8", "--merge_layer", "start"), ("--num_groups 8", "1 to 7")),
        (("--num_groups", "4,2", "--merge_layer", "1,1"), ("--merge_layer 1,1", "rising")),
        (("--num_groups", "4,2"), ("--merge_layer 0", "--num_groups 4,2", "2")),
        (("--flops_ratio", "0.5", "--merge_layer", "0,1"), ("--merge_layer 0,1", "--flops_ratio 0.5", "1")),
        (("--flops_ratio", "0.01"), ("--flops_ratio 0.01", "below 1")),
        (("--flops_ratio", "1"), ("--flops_ratio 1", "below 1")),
        (("--num_groups", "4", "--similarity", "value"), ("--similarity value", "hidden, key")),
        (("--num_groups", "4", "--calibration_samples", "0"), ("--calibration_samples 0", "1 or more")),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(inputs, tmp_path, capsys, arguments, says):
    line = bad_input_line(capsys, "calibrate.py", *inputs, *arguments, "--output_dir", tmp_path / "out")
    assert all(part in line for part in says), line
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_needed(tmp_path, capsys):
    line = bad_input_line(capsys, "calibrate.py", "--num_groups", "4", "--output_dir", tmp_path / "out")
    assert "--model_name_or_path" in line


def test_a_checkpoint_without_a_trained_head_is_named(tmp_path, capsys):
    stock_model("ForMaskedLM").save_pretrained(tmp_path / "stock")
    given = ("--model_name_or_path", tmp_path / "stock", "--task_name", "mrpc", "--num_groups", "4")
    line = bad_input_line(capsys, "calibrate.py", *given, "--output_dir", tmp_path / "out")
    assert "PerceiverForMaskedLM" in line and "classifier" in line
    assert not (tmp_path / "out").exists()
