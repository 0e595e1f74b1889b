# SPDX-License-Identifier: Apache-2.0
"""Tests of the lines that a run prints: one for each stage, none without information."""

from __future__ import annotations

import logging

import pytest
from transformers import PerceiverConfig, PreTrainedConfig

from experiments.tasks.scores import Score, flatten_scores
from experiments.training.progress import quieten_transformers, results_line, step_line
from tests.support.script_run import run_script
from tests.support.tiny_images import write_images, write_model_config
from tests.support.tiny_models import tiny_config

TIMES = {"runtime": 2.25, "samples_per_second": 3.0, "model_preparation_time": 0.1}


@pytest.mark.parametrize(
    ("split", "metrics", "line"),
    [
        (
            "eval",
            {"eval_loss": 0.25, "eval_f1": 0.5, "eval_f1_stderr": 0.125, "eval_samples": 1024},
            "f1 0.5000 ± 0.1250, loss 0.25; 1,024 examples, 2.2 s",
        ),
        (
            "merged",
            {
                "merged_combined_score": 0.5, "merged_combined_score_stderr": 0.1,
                "merged_combined_score_change": -0.25, "merged_combined_score_change_stderr": 0.05, "merged_samples": 8,
            },
            "combined score 0.5000 ± 0.1000 (change -0.2500 ± 0.0500); 8 examples, 2.2 s",
        ),
        (
            "train",
            {"train_loss": 0.12345, "epoch": 3.0, "train_samples": 512, "train_resumed_from": "checkpoint-2"},
            "loss 0.1235; 512 examples, 3 epochs, 2.2 s",
        ),
        ("predict", {"predict_samples": 8}, "8 examples, 2.2 s"),
        (
            "eval",
            {
                "eval_pearson": None, "eval_pearson_stderr": None, "eval_pearson_change": None,
                "eval_mse": 0.5, "eval_mse_stderr": None,
            },
            "pearson undefined (change undefined), mse 0.5",
        ),
    ],
)  # fmt: skip
def test_a_stage_ends_in_its_figures_and_how_much_was_read(split, metrics, line):
    times = {f"{split}_{name}": value for name, value in TIMES.items()}
    assert results_line(split, metrics | times) == line


def test_the_second_split_of_mnli_stands_beside_the_first():
    scores = {
        name: Score(value, 0.1, 0.1, 0.2, compared=True)
        for name, value in {"accuracy": 0.5, "accuracy_mm": 0.25}.items()
    }
    metrics = flatten_scores(scores, "eval_")
    for suffix in ("", "_mm"):
        metrics |= {f"eval_loss{suffix}": 1.0, f"eval_samples{suffix}": 8, f"eval_runtime{suffix}": 3725.0}
        metrics[f"eval_samples_per_second{suffix}"] = 1.0
    assert results_line("eval", metrics) == (
        "accuracy 0.5000 ± 0.1000 (change +0.1000 ± 0.2000), accuracy mm 0.2500 ± 0.1000 (change +0.1000 ± 0.2000), "
        "loss 1, loss mm 1; 8 examples, 1:02:05; 8 examples mm, 1:02:05"
    )


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"loss": 2.5, "grad_norm": 3.0, "learning_rate": 0.1, "epoch": 1}, "epoch 1: loss 2.5, learning rate 0.1"),
        ({"eval_loss": 2.5, "eval_f1": 0.5, "eval_runtime": 1.0, "epoch": 1.0}, "epoch 1, evaluated: f1 0.5, loss 2.5"),
        ({"train_runtime": 1.0, "train_loss": 2.0, "epoch": 1.0}, None),
        ({"epoch": 1.0}, None),
    ],
)  # fmt: skip
def test_what_is_logged_on_the_way_is_a_line(logs, line):
    assert step_line(logs) == line


def test_a_tokenizer_of_a_checkpoint_of_ours_loads_without_a_warning(tmp_path):
    """`AutoTokenizer` warns when it reads the config; only that warning is hidden."""
    tiny_config().save_pretrained(tmp_path)
    quieten_transformers()
    upstream, records = logging.getLogger("transformers.configuration_utils"), []
    handler = logging.Handler()
    handler.emit = records.append
    level = upstream.level
    upstream.addHandler(handler)
    upstream.setLevel(logging.WARNING)
    try:
        for config_class in (PreTrainedConfig, PerceiverConfig):
            config_class.from_pretrained(tmp_path)
    finally:
        upstream.removeHandler(handler)
        upstream.setLevel(level)
    assert len(records) == 1 and "of type `perceiver`" in records[0].getMessage()


def test_every_line_of_a_run_says_something(tmp_path):
    """Each stage is named once; no dictionary, no profiler output, no figure that is always 0."""
    data = write_images(tmp_path / "data", {"train": 16, "validation": 8})
    run = run_script(
        "run_image.py", "--config_name", write_model_config(tmp_path), "--dataset_name", data, "--r", 1,
        "--do_train", "--do_eval", "--max_steps", 2, "--retrain_epochs", 1, "--logging_steps", 1,
        "--output_dir", tmp_path / "out", "--use_cpu",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    stages = [line for line in run.stdout.splitlines() if line.startswith("-- ")]
    assert stages == [
        "-- finetuning, unmerged", "-- evaluating the finetuned model, unmerged",
        "-- evaluating the finetuned model, merged without retraining", "-- retraining, merged",
        "-- evaluating the retrained model, merged",
    ]  # fmt: skip
    assert not any(
        noise in run.stdout + run.stderr for noise in ("USDT", "flos", "***", "{", "shards", "Loading weights")
    )
