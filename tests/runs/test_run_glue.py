# SPDX-License-Identifier: Apache-2.0
"""Tests of run_glue.py, run on tiny data: what it writes, that its checkpoint loads, messages for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PerceiverTokenizer, TrainingArguments, pipeline

from experiments.runs import finetune as experiment
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.training.loading import load_model_and_task
from experiments.training.model_arguments import ModelArguments
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.script_run import bad_input_line, call_script, run_script
from tests.support.tiny_models import stock_model
from tests.support.tiny_texts import LABELS, NUM_LAYERS, POSITIONS, write_glue, write_model_config, write_table

TRAINING = (
    "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 1, "--per_device_train_batch_size", 8,
    "--learning_rate", 5e-3, "--save_strategy", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    for task in ("sst2", "stsb", "mnli", "mrpc"):
        write_glue(folder / "glue", task)
    return "--config_name", write_model_config(folder), "--dataset_name", folder / "glue"


@pytest.fixture(scope="module")
def finetuned(inputs, tmp_path_factory) -> Path:
    """Finetune, merge and retrain in one run of the script, in its own process."""
    output_dir = tmp_path_factory.mktemp("outputs") / "r1"
    result = run_script(
        "run_glue.py", *inputs, *TRAINING, "--task_name", "sst2", "--num_train_epochs", 15, "--do_predict",
        "--r", 1, "--retrain_epochs", 1, "--output_dir", output_dir,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return output_dir


def results(output_dir: Path, split: str = "all") -> dict[str, float]:
    return json.loads((output_dir / f"{split}_results.json").read_text())


def test_finetunes_merges_retrains_and_predicts(finetuned):
    unmerged = ToMePerceiverForSequenceClassification.from_pretrained(finetuned / "finetuned")
    retrained = ToMePerceiverForSequenceClassification.from_pretrained(finetuned)
    assert (unmerged.r, retrained.r) == (0, 1)
    assert not unmerged.base_model.embeddings.latents.equal(retrained.base_model.embeddings.latents)
    for split in ("train", "merged", "eval", "predict"):
        assert results(finetuned, split).items() <= results(finetuned).items()
    assert (finetuned / "trainer_state.json").exists()
    # The first letter tells the class, so the task is easy.
    assert results(finetuned / "finetuned")["eval_accuracy"] > 0.9


def test_predictions_are_what_the_checkpoint_says(finetuned, inputs):
    lines = (finetuned / "predict_results_sst2.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    model = ToMePerceiverForSequenceClassification.from_pretrained(finetuned).eval()
    tokenizer = AutoTokenizer.from_pretrained(finetuned, config=model.config)
    sentences = load_dataset(str(inputs[-1]), "sst2", split="test")["sentence"]
    logits = model(**tokenizer(list(sentences), padding=True, return_tensors="pt")).logits
    expected = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    assert [line.split("\t") for line in lines[1:]] == [[str(i), name] for i, name in enumerate(expected)]


def test_the_card_says_what_was_measured(finetuned):
    """Every figure has its standard error, in the table and in the metadata, which also has r."""
    card = ModelCard.load(finetuned / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    listed = {(result.metric_name, result.metric_value) for result in card.data.eval_results}
    assert listed == {
        ("Accuracy (r=0, finetuned)", results(finetuned / "finetuned")["eval_accuracy"]),
        ("Accuracy (r=1, merged without retraining)", results(finetuned)["merged_accuracy"]),
        ("Accuracy (r=1, retrained)", results(finetuned)["eval_accuracy"]),
    }
    retrained = next(result for result in card.data.eval_results if "retrained)" in result.metric_name[-11:])
    assert retrained.metric_args["r"] == 1
    assert retrained.metric_args["standard_error"] == results(finetuned)["eval_accuracy_stderr"]
    assert "| retrained | 1 |" in card.text and (finetuned / "schedule.png").exists()


def test_both_halves_of_mnli(inputs, tmp_path):
    call_script(
        "run_glue.py", *inputs, *TRAINING, "--task_name", "mnli", "--do_predict", "--max_train_samples", 8,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    measured = results(tmp_path / "out", "eval")
    assert (measured["eval_samples"], measured["eval_samples_mm"]) == (26, 29)
    for name, count in (("eval_accuracy", 26), ("eval_accuracy_mm", 29)):
        assert measured[name] * count == pytest.approx(round(measured[name] * count))
        assert f"{name}_stderr" in measured
    for name, count in (("mnli", 14), ("mnli-mm", 17)):
        lines = (tmp_path / "out" / f"predict_results_{name}.txt").read_text().splitlines()
        assert len(lines) == count + 1
        assert {line.split("\t")[1] for line in lines[1:]} <= set(LABELS["mnli"])


def test_regression(inputs, tmp_path):
    call_script(
        "run_glue.py", *inputs, *TRAINING, "--task_name", "stsb", "--do_predict", "--output_dir", tmp_path / "out"
    )
    measured = results(tmp_path / "out", "eval")
    assert measured["eval_combined_score"] == pytest.approx((measured["eval_pearson"] + measured["eval_spearmanr"]) / 2)
    model = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    lines = (tmp_path / "out" / "predict_results_stsb.txt").read_text().splitlines()[1:]
    assert [f"{float(line.split(chr(9))[1]):.3f}" for line in lines] == [line.split("\t")[1] for line in lines]


def test_a_stock_masked_language_model_becomes_a_classifier(inputs, tmp_path):
    """As with deepmind/language-perceiver: the encoder is kept, the decoder is new; r can be set without reloading."""
    stock = stock_model("ForMaskedLM", max_position_embeddings=POSITIONS, dtype=torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    PerceiverTokenizer().save_pretrained(tmp_path / "stock")
    call_script(
        "run_glue.py", "--model_name_or_path", tmp_path / "stock", *inputs[2:], *TRAINING, "--task_name", "mrpc",
        "--learning_rate", 0, "--r", 2, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    model = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.r == 2
    assert list(model.config.id2label.values()) == LABELS["mrpc"]
    assert model.perceiver.embeddings.latents.equal(stock.perceiver.embeddings.latents)


def test_fixed_groups_are_found_once_there_is_a_finetuned_model(inputs, tmp_path):
    """When training from scratch, groups are found after finetuning, and retraining keeps them."""
    call_script(
        "run_glue.py", *inputs, *TRAINING, "--task_name", "sst2", "--flops_ratio", 0.985, "--merge_method", "groups",
        "--calibration_samples", 4, "--retrain_epochs", 1, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    retrained, finetuned = (
        ToMePerceiverForSequenceClassification.from_pretrained(folder)
        for folder in (tmp_path / "out", tmp_path / "out" / "finetuned")
    )
    assert retrained.config.merge_groups or retrained.config.latent_groups
    assert not (finetuned.config.merge_groups or finetuned.config.latent_groups)
    assert {"merged_accuracy", "eval_accuracy"} <= set(results(tmp_path / "out"))


@pytest.mark.parametrize("schedule", ["linear", "search"])
def test_a_budget_of_flops_becomes_a_list(inputs, tmp_path, schedule):
    """The checkpoint's config has the list of r; the card has its share of the FLOPs."""
    samples = ("--calibration_samples", 4) if schedule == "search" else ()
    call_script(
        "run_glue.py", *inputs, *TRAINING, "--task_name", "sst2", "--flops_ratio", 0.985, "--schedule", schedule,
        *samples, "--retrain_epochs", 1, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    model = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out")
    unmerged = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out" / "finetuned")
    fewer = model.config.num_blocks < unmerged.config.num_blocks or model.config.latent_groups is not None
    assert any(model.config.merge_schedule) or schedule == "search" and fewer
    assert schedule == "search" or len(model.r) == model.config.num_self_attention_layers
    share = re.search(r"([0-9.]+) % of the unmerged", (tmp_path / "out" / "README.md").read_text().replace("\n", " "))
    assert 0 < float(share[1]) <= 98.5
    assert unmerged.config.merge_schedule == [0] * NUM_LAYERS


def test_a_budget_without_training_saves_the_merged_checkpoint(inputs, finetuned, tmp_path, capsys):
    """The run evaluates both unmerged and merged, writes the card, and ends with a summary in a few lines."""
    given = (
        "--model_name_or_path", finetuned / "finetuned", *inputs[2:], "--task_name", "sst2", "--do_eval", "--use_cpu",
        "--flops_ratio", 0.985, "--calibration_samples", 8, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    call_script("run_glue.py", *given)
    printed = capsys.readouterr().out
    found = results(tmp_path / "out")
    model = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out")
    start = ToMePerceiverForSequenceClassification.from_pretrained(finetuned / "finetuned")
    assert any(model.config.merge_schedule) or model.config.num_blocks < start.config.num_blocks
    assert all(value.equal(start.state_dict()[name]) for name, value in model.state_dict().items())
    assert found["unmerged_accuracy"] == results(finetuned / "finetuned")["eval_accuracy"]
    assert found["eval_accuracy_change"] == pytest.approx(found["eval_accuracy"] - found["unmerged_accuracy"])
    ending = printed[printed.rindex("\nunmerged: ") :].strip().splitlines()
    names = [re.split(r":| [0-9]", line)[0] for line in ending]
    assert names[:5] == ["unmerged", "merged without training", "cost", "merges", "changed answers"]
    assert names[-2:] == ["worst tenth of the samples", "saved"]
    assert {"merging_changed", "merging_changed_bound", "merging_who"} <= set(results(tmp_path / "out", "merging"))
    assert f"Accuracy {100 * found['unmerged_accuracy']:.2f} ±" in ending[0] and "paired by example" in ending[1]
    assert " of the FLOPs, " in ending[2] and str(tmp_path / "out") in ending[-1]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {result.metric_value for result in card.data.eval_results} == {
        found["unmerged_accuracy"], found["eval_accuracy"]
    }  # fmt: skip
    # The same command leaves the same results; another budget is another run.
    call_script("run_glue.py", *given)
    line = bad_input_line(capsys, "run_glue.py", *given, "--flops_ratio", 0.99)
    assert "holds another run" in line and "flops_ratio" in line


def test_the_card_compares_with_all_blocks_where_fewer_run(inputs, finetuned, tmp_path, capsys):
    """The share of FLOPs is relative to all blocks, as in the run's summary."""
    call_script(
        "run_glue.py", "--model_name_or_path", finetuned / "finetuned", *inputs[2:], "--task_name", "sst2", "--do_eval",
        "--use_cpu", "--flops_ratio", 0.9, "--schedule", "skip_blocks", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_blocks"] == 1 and not any(config["r"])
    share = re.search(r"cost: ([0-9.]+) of the FLOPs", capsys.readouterr().out)
    card = (tmp_path / "out" / "README.md").read_text().replace("\n", " ")
    assert float(share[1]) < 0.9 and f"{float(share[1]) * 100:.1f} % of the unmerged model's" in card


def test_a_merged_checkpoint_is_not_saved_over_the_unmerged_one(inputs, finetuned, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finetuned / "finetuned", copy)
    line = bad_input_line(
        capsys, "run_glue.py", "--model_name_or_path", copy, *inputs[2:], "--task_name", "sst2", "--do_eval",
        "--use_cpu", "--flops_ratio", 0.985, "--output_dir", copy,
    )  # fmt: skip
    assert "holds another run" in line
    assert json.loads((copy / "config.json").read_text())["r"] == 0


def test_a_push_without_a_token_is_refused_before_training(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "load", None)
    monkeypatch.setitem(os.environ, "HF_HOME", str(tmp_path))
    monkeypatch.setattr("experiments.publishing.hub.get_token", lambda: None)
    given = (*inputs, "--task_name", "sst2", *TRAINING, "--push_to_hub", "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "run_glue.py", *given)
    assert "--push_to_hub" in line and "hf auth login" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["HF_DATASETS_CACHE", "HF_XET_CACHE", "TENSORBOARD_LOGGING_DIR"])
def test_a_cache_that_cannot_be_written_to_is_refused_before_training(inputs, tmp_path, capsys, monkeypatch, place):
    """The message names the cache folder, of data or of uploads, and the variable that sets it."""
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "cache"
    monkeypatch.setenv(place, str(below))
    monkeypatch.setattr("experiments.training.model_arguments.HF_DATASETS_CACHE", os.environ["HF_DATASETS_CACHE"])
    if place == "HF_XET_CACHE":
        monkeypatch.setattr("experiments.publishing.hub.HF_XET_CACHE", str(below))
    if place == "TENSORBOARD_LOGGING_DIR":
        available = "experiments.training.trainer_arguments.get_available_reporting_integrations"
        monkeypatch.setattr(available, lambda: ["tensorboard"])
    pushed = ("--push_to_hub", "--report_to", "tensorboard" if "LOGGING" in place else "none")
    given = (*inputs, "--task_name", "sst2", *TRAINING, *pushed, "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "run_glue.py", *given)
    assert line.startswith(f"error: {place}={below}: must be a folder that can be written to")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_loads_here_only_is_not_pushed(inputs, tmp_path, capsys):
    given = (*inputs, "--task_name", "sst2", *TRAINING, "--r", 1, "--merge_method", "random", "--push_to_hub")
    line = bad_input_line(capsys, "run_glue.py", *given, "--output_dir", tmp_path / "out")
    assert line.startswith("error: --merge_method random: ") and "--push_to_hub" in line


def test_a_finished_checkpoint_predicts_a_file_alone(finetuned, tmp_path):
    """Labels in the file are ignored; classes are the checkpoint's."""
    test_file = write_table(tmp_path / "test.csv", {"text": ["aaax", "bbbx", "aaa"], "label": ["?", "?", "?"]})
    result = run_script(
        "run_glue.py", "--model_name_or_path", finetuned, "--test_file", test_file, "--do_predict", "--use_cpu",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "sentence in column 'text'" in result.stdout and "first input, 6 tokens: '[CLS]aaax[SEP]'" in result.stdout
    lines = (tmp_path / "out" / "predict_results_test.txt").read_text().splitlines()
    assert lines == ["index\tprediction", "0\tnegative", "1\tpositive", "2\tnegative"]
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_a_correlation_that_is_not_defined_is_said_to_be(inputs, tmp_path):
    """If all labels are equal: null in JSON, "undefined" in text, and no result for the Hub."""
    train = write_table(tmp_path / "train.csv", {"text": ["aa", "bb", "cc"], "label": [0.5, 1.5, 2.5]})
    same = write_table(tmp_path / "validation.csv", {"text": ["aa", "bb"], "label": [1.5, 1.5]})
    call_script(
        "run_glue.py", *inputs[:2], *TRAINING, "--train_file", train, "--validation_file", same, "--r", 1,
        "--retrain_epochs", 1, "--metric_for_best_model", "pearson", "--load_best_model_at_end", "--save_strategy",
        "epoch", "--eval_strategy", "epoch", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    for split in ("eval", "merged"):
        measured = results(tmp_path / "out", split)
        assert measured[f"{split}_pearson"] is measured[f"{split}_spearmanr_stderr"] is None
        assert measured[f"{split}_mse"] > 0
    assert results(tmp_path / "out", "merged")["merged_pearson_change"] is None
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"mse"}
    assert "| undefined |" in card.text and "A score is undefined where" in card.text


WORDS = ["a", "bb bb", "ccc " * 30, "\u00e9" * 50, " spaces ", "1.50"]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("length", [None, 20])
def test_the_pipeline_of_the_checkpoint_reads_the_tokens_that_it_was_trained_on(tmp_path, length, pairs):
    """Texts are cut to the same length; without truncation, a longer input is refused."""
    columns = {"sentence1": WORDS} | ({"sentence2": WORDS[::-1]} if pairs else {})
    path = write_table(tmp_path / "own.csv", columns | {"label": ["x", "y"] * 3})
    cut = () if length is None else ("--max_seq_length", length)
    call_script(
        "run_glue.py", "--config_name", write_model_config(tmp_path), "--train_file", path, "--validation_file", path,
        *TRAINING, "--output_dir", tmp_path / "start",
    )  # fmt: skip
    call_script(
        "run_glue.py", "--model_name_or_path", tmp_path / "start", "--train_file", path, "--validation_file", path,
        *TRAINING, *cut, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    arguments = GlueDataArguments(train_file=str(path), validation_file=str(path), max_seq_length=length)
    task = load_glue_task(arguments, predict=False, seed=0)
    _, prepared = load_model_and_task(
        ModelArguments(model_name_or_path=str(tmp_path / "start")), {}, task, TrainingArguments(tmp_path / "no")
    )
    model = ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", config=model.config)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert pipe.model.config.max_position_embeddings == pipe.tokenizer.model_max_length == (length or POSITIONS)
    for index, example in enumerate(prepared.evaluation[""]):
        texts = [columns[name][index] for name in columns]
        given = dict(zip(("text", "text_pair"), texts, strict=False))
        assert pipe.preprocess(given, truncation=True)["input_ids"].tolist() == [example["input_ids"]]
        uncut = pipe.preprocess(given)
        if uncut["input_ids"].tolist() != [example["input_ids"]]:
            with pytest.raises(ValueError, match="max_position_embeddings"):
                pipe.forward(uncut)
