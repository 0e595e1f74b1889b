# SPDX-License-Identifier: Apache-2.0
"""Tests of checkpoints with a new, untrained head: it is not evaluated, and no merging is chosen by it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.merging.arguments import SEARCH
from modeling_tome_perceiver import ToMePerceiverForMaskedLM, ToMePerceiverForSequenceClassification
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_models import spread_weights
from tests.support.tiny_texts import LABELS, MODEL, write_glue

TRAINING = ("--do_train", "--do_eval", "--num_train_epochs", 1, "--per_device_train_batch_size", 8)
BUDGET = ("--flops_ratio", 0.985, "--calibration_samples", 16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, tuple[object, ...]]:
    """Write a masked language model, and a classifier with other labels; return the arguments for each."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = ToMePerceiverConfig(**MODEL | {"architectures": ["PerceiverForMaskedLM"]})
    ToMePerceiverForMaskedLM(config).save_pretrained(folder / "mlm")
    labels = {"id2label": dict(enumerate(LABELS["mnli"])), "problem_type": "single_label_classification"}
    classifier = ToMePerceiverConfig(**MODEL | labels)
    spread_weights(ToMePerceiverForSequenceClassification(classifier)).save_pretrained(folder / "mnli")
    PerceiverTokenizer().save_pretrained(folder / "tokenizer")
    data = (
        "--task_name", "sst2", "--dataset_name", write_glue(folder / "glue", "sst2"), "--use_cpu",
        "--tokenizer_name", folder / "tokenizer",
    )  # fmt: skip
    return {
        "masked language model": ("--model_name_or_path", folder / "mlm", *data),
        "other labels": ("--model_name_or_path", folder / "mnli", *data, "--ignore_mismatched_sizes"),
    }


@pytest.mark.parametrize("model", ["masked language model", "other labels"])
@pytest.mark.parametrize("asked", [("--do_eval",), ("--do_eval", *BUDGET), ("--do_predict",)])
def test_a_new_head_is_not_evaluated_without_training(inputs, tmp_path, capsys, model, asked):
    line = bad_input_line(capsys, "run_glue.py", *inputs[model], *asked, "--output_dir", tmp_path / "out")
    assert "--model_name_or_path" in line and "head" in line and "--do_train" in line
    assert not (tmp_path / "out").exists()


def test_a_sweep_needs_a_finetuned_checkpoint(inputs, tmp_path, capsys):
    given = (*inputs["other labels"], "--r", 1, "--retrain_epochs", 1, "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "eval_sweep.py", *given)
    assert "--model_name_or_path" in line and "head" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["masked language model", "other labels"])
def test_a_budget_without_retraining_takes_a_schedule(inputs, tmp_path, capsys, caplog, model):
    """There is no search before training, and a message says so."""
    call_script("run_glue.py", *inputs[model], *TRAINING, *BUDGET, "--output_dir", tmp_path / "out")
    (said,) = [record.getMessage() for record in caplog.records if "is untrained" in record.getMessage()]
    assert "--schedule" in said and "--retrain_epochs" in said and "\n" not in said
    before, _, after = capsys.readouterr().out.partition("-- training")
    assert SEARCH not in next(line for line in before.splitlines() if line.startswith("chosen"))
    assert "calibrating on" not in before and "calibrating on" in after


def test_with_retraining_the_search_comes_after_finetuning(inputs, tmp_path, capsys, caplog):
    given = (*inputs["masked language model"], *TRAINING, *BUDGET, "--retrain_epochs", 1)
    call_script("run_glue.py", *given, "--output_dir", tmp_path / "out")
    stages = [line.removeprefix("-- ") for line in capsys.readouterr().out.splitlines() if line.startswith("-- ")]
    order = [next(i for i, stage in enumerate(stages) if stage.startswith(name)) for name in ("fine", "choos", "retra")]
    assert order == sorted(order) and "is untrained" not in caplog.text
    assert "resolved_merging" in json.loads((tmp_path / "out" / "arguments.json").read_text())


def test_fixed_groups_are_not_found_with_a_new_head(inputs, tmp_path, capsys):
    given = (*inputs["masked language model"], *TRAINING, *BUDGET, "--merge_method", "groups")
    line = bad_input_line(capsys, "run_glue.py", *given, "--output_dir", tmp_path / "out")
    assert "--merge_method groups" in line and "--retrain_epochs" in line
    assert not (tmp_path / "out").exists()
