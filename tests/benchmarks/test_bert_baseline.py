# SPDX-License-Identifier: Apache-2.0
"""benchmarks/bert_baseline.py, really run on a tiny BERT."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertForSequenceClassification

from experiments.tasks.scores import SCORES
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_teachers import write_teacher
from tests.support.tiny_texts import write_glue

SCRIPT = "benchmarks.bert_baseline.py"


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_it_is_finetuned_and_scored_as_a_perceiver_is(tmp_path, capsys, task):
    write_glue(tmp_path / "glue", task)
    given = (
        "--model_name_or_path", write_teacher(tmp_path / "bert"), "--task_name", task, "--dataset_name",
        tmp_path / "glue", "--use_cpu", "--save_strategy", "no",
    )  # fmt: skip
    figures = {}
    for name, training in (("without", ()), ("with", ("--do_train", "--num_train_epochs", 1, "--learning_rate", 0.1))):
        call_script(SCRIPT, *given, *training, "--output_dir", tmp_path / name)
        figures[name] = json.loads((tmp_path / name / "baseline.json").read_text())["metrics"]
        metric = next(iter(SCORES[task]))
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"{metric} {100 * figures[name][f'eval_{metric}']:.2f} ± " in last and "18 examples" in last
    assert figures["without"]["eval_loss"] != figures["with"]["eval_loss"]


def test_without_training_the_scores_are_those_of_the_checkpoint(tmp_path, capsys):
    write_glue(tmp_path / "glue", "sst2")
    write_teacher(tmp_path / "bert")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    model.save_pretrained(tmp_path / "bert")
    call_script(
        SCRIPT, "--model_name_or_path", tmp_path / "bert", "--task_name", "sst2", "--dataset_name", tmp_path / "glue",
        "--use_cpu", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    # It says 'positive' of every sentence, and a half of them are.
    assert "accuracy 50.00 ± " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "named"),
    [((), "--model_name_or_path: not given"), (("--model_name_or_path", "nowhere/at-all"), "nowhere/at-all")],
)
def test_no_model_is_one_line(tmp_path, capsys, given, named):
    write_glue(tmp_path / "glue", "sst2")
    given = (*given, "--task_name", "sst2", "--dataset_name", tmp_path / "glue", "--output_dir", tmp_path / "out")
    assert named in bad_input_line(capsys, SCRIPT, *given)
