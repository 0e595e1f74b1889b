# SPDX-License-Identifier: Apache-2.0
"""Tests of the frontier that a run saves: its samples, its weights, and the row that is chosen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from frontier_tome_perceiver import Frontier
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_texts import write_glue, write_model_config, write_table

TRAINING = (
    "--do_train", "--num_train_epochs", 2, "--per_device_train_batch_size", 8, "--learning_rate", 5e-3,
    "--save_strategy", "no",
)  # fmt: skip
# Nearly every answer may change, so that few samples suffice for the bound.
MOST_CHANGED = 0.9


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[object, ...]:
    """Write data with a test split whose labels are hidden."""
    folder = tmp_path_factory.mktemp("data")
    return "--dataset_name", write_glue(folder, "sst2", test=64), "--task_name", "sst2", "--do_eval", "--use_cpu"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[object, ...]:
    """Write data without a test split."""
    folder = tmp_path_factory.mktemp("files")
    sentences = [f"{letter}{number} text" for number in range(50) for letter in "ab"]
    table = {"sentence": sentences, "label": ["good", "bad"] * 50}
    return (
        "--train_file", write_table(folder / "train.csv", table), "--do_eval", "--use_cpu",
        "--validation_file", write_table(folder / "validation.csv", {name: each[:20] for name, each in table.items()}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finetuned(data, tmp_path_factory) -> Path:
    """Train without a budget, so without a frontier."""
    folder = tmp_path_factory.mktemp("finetuned")
    call_script(
        "run_glue.py", "--config_name", write_model_config(folder), *data, *TRAINING, "--num_train_epochs", 12,
        "--output_dir", folder / "out",
    )  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="module")
def promised(data, finetuned, tmp_path_factory) -> Path:
    """Merge without training, by --max_changed."""
    folder = tmp_path_factory.mktemp("promised") / "out"
    given = ("--model_name_or_path", finetuned, *data, "--max_changed", MOST_CHANGED)
    call_script("run_glue.py", *given, "--output_dir", folder)
    return folder


def loaded(folder: Path) -> ToMePerceiverForSequenceClassification:
    return ToMePerceiverForSequenceClassification.from_pretrained(folder)


def is_its_own(model: ToMePerceiverForSequenceClassification) -> bool:
    """Return whether a checkpoint's frontier was measured with its own weights."""
    frontier = Frontier.of(model.config)
    return frontier is not None and frontier.was_measured_on(model)


def test_what_was_chosen_is_promised_and_recorded(finetuned, promised):
    """The checkpoint keeps its frontier, which was measured on the test split."""
    model = loaded(promised)
    kept = model.config.merge_frontier
    assert (kept["searched"], kept["held_out"]) == (16, 48) and is_its_own(model)
    assert loaded(finetuned).config.merge_frontier is None
    figures = json.loads((promised / "merging_results.json").read_text())
    assert figures["merging_changed_bound"] <= MOST_CHANGED and figures["merging_who"]["samples"] == 48
    chosen = min(
        (row for row in kept["rows"] if row["changed_bound"] <= MOST_CHANGED), key=lambda row: row["flops_ratio"]
    )
    assert figures["merging_flops_ratio"] == chosen["flops_ratio"]
    card = (promised / "README.md").read_text()
    assert "calibrated on 64 inputs of the test split" in card and (promised / "frontier.png").exists()
    # The loaded checkpoint can merge to other rows of the card without a new measurement.
    budgets = re.findall(r"model\.merge_to\((flops_ratio|max_changed)=([\d.]+)\)", card)
    assert [name for name, _ in budgets] == ["flops_ratio", "flops_ratio", "max_changed"]
    for name, value in budgets:
        assert model.merge_to(**{name: float(value)}).chosen.flops_ratio < 1.0
    assert model.merge_to(flops_ratio=1.0).chosen.flops_ratio <= 1.0


def test_training_drops_a_frontier_of_other_weights(data, promised, tmp_path):
    call_script("run_glue.py", "--model_name_or_path", promised, *data, *TRAINING, "--output_dir", tmp_path / "out")
    assert loaded(tmp_path / "out").config.merge_frontier is None


def test_trained_to_a_budget_the_frontier_is_of_the_weights_that_came_out(data, finetuned, tmp_path):
    """The merging was chosen before training, and stays."""
    given = ("--model_name_or_path", finetuned, *data, *TRAINING, "--flops_ratio", 0.98)
    call_script("run_glue.py", *given, "--output_dir", tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert is_its_own(model) and "before training, changed answers" in (tmp_path / "out" / "README.md").read_text()
    chosen = json.loads((tmp_path / "out" / "arguments.json").read_text())["resolved_merging"]["chosen"]
    assert chosen["merging"]["r"] == model.r


@pytest.mark.parametrize("retraining", [(), ("--retrain_epochs", 1)])
def test_a_share_of_changed_answers_is_promised_of_the_trained_weights(data, tmp_path, capsys, retraining):
    given = (
        "--config_name", write_model_config(tmp_path), *data, *TRAINING, "--max_changed", MOST_CHANGED, *retraining,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    call_script("run_glue.py", *given)
    model, out = loaded(tmp_path / "out"), capsys.readouterr().out
    assert is_its_own(model)
    figures = json.loads((tmp_path / "out" / "merging_results.json").read_text())
    assert figures["merging_changed_bound"] <= MOST_CHANGED
    assert "before " not in out.rpartition("saved: ")[0].rpartition("merges: ")[2]
    # Run again, it trains nothing and finds the same.
    before = [(tmp_path / "out" / name).read_bytes() for name in ("config.json", "model.safetensors")]
    call_script("run_glue.py", *given, "--resume_from_checkpoint", "last")
    assert [(tmp_path / "out" / name).read_bytes() for name in ("config.json", "model.safetensors")] == before


def test_without_a_test_split_samples_are_held_out_from_training(files, tmp_path):
    call_script(
        "run_glue.py", "--config_name", write_model_config(tmp_path), *files, *TRAINING, "--calibration_samples", 50,
        "--max_changed", MOST_CHANGED, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["train_samples"] == 50
    kept = loaded(tmp_path / "out").config.merge_frontier
    assert kept["searched"] + kept["held_out"] == 50
    assert "50 held-out training samples" in (tmp_path / "out" / "README.md").read_text()


def test_of_training_samples_nothing_is_promised(files, tmp_path, capsys, caplog):
    """Answers of training samples change less than those of other inputs."""
    given = ("--config_name", write_model_config(tmp_path), *files, *TRAINING, "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "run_glue.py", *given, "--max_changed", MOST_CHANGED)
    assert f"--max_changed {MOST_CHANGED}" in line and "--test_file" in line and "--calibration_samples" in line
    line = bad_input_line(capsys, "run_glue.py", *given, "--max_changed", 0.5, "--calibration_samples", 51)
    assert "--calibration_samples 51" in line and "at most 50" in line
    assert not (tmp_path / "out").exists()
    call_script("run_glue.py", *given, "--flops_ratio", 0.98)
    rows = loaded(tmp_path / "out").config.merge_frontier["rows"]
    assert all(row["changed"] is row["changed_bound"] is None and row["divergence"] is not None for row in rows)
    assert any("training samples" in record.getMessage() for record in caplog.records)
    assert "changed answers:" not in capsys.readouterr().out


def test_too_few_samples_are_refused_before_any_work(data, finetuned, tmp_path, capsys):
    given = ("--model_name_or_path", finetuned, *data, "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "run_glue.py", *given, "--max_changed", 0.01)
    assert "--max_changed 0.01: 64 inputs of the test split" in line and "435 or more" in line
    assert not (tmp_path / "out").exists()
