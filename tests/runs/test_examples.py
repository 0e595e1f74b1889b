# SPDX-License-Identifier: Apache-2.0
"""Tests of the examples: scripts, configs, argument files, and the paper's experiments on tiny data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import concatenate_datasets, load_dataset
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    PerceiverImageProcessorPil,
    PerceiverTokenizer,
    TrainingArguments,
)

from configuration_tome_perceiver import ToMePerceiverConfig
from examples.language.learn_from_teacher import TaughtArguments
from experiments.command_line import parse_arguments
from experiments.merging.arguments import MergeArguments
from experiments.publishing.hub import HubArguments
from experiments.runs.checkpoint_task import SweepDataArguments
from experiments.runs.sweep_arguments import SweepArguments
from experiments.tasks.glue import GlueDataArguments
from experiments.tasks.images import ImageDataArguments
from experiments.training.model_arguments import ModelArguments
from experiments.training.stage import RetrainArguments
from tests.support.script_run import ROOT, call_script, run_script
from tests.support.tiny_images import write_images
from tests.support.tiny_models import stock_model
from tests.support.tiny_teachers import write_teacher
from tests.support.tiny_texts import POSITIONS, write_glue, write_table

EXAMPLES = ROOT / "examples"
ARGUMENT_FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if not path.name.startswith("accelerate"))
PAPER_TASKS = ["mrpc", "stsb", "fashion_mnist"]  # rte differs from mrpc in its batch size alone
R = [0, 2, 4, 6, 8, 10, 12, 14, 16]


def is_sweep(path: Path) -> bool:
    return path.stem.endswith("_sweep")


def test_digits_are_all_there(tmp_path):
    result = run_script("examples/digits_dataset.py", "--output_dir", tmp_path / "digits")
    assert result.returncode == 0, result.stderr
    digits = load_dataset(str(tmp_path / "digits"))
    assert {name: len(split) for name, split in digits.items()} == {"train": 1297, "test": 500}
    assert digits["train"][0]["image"].size == (8, 8)
    assert sorted(set(digits["test"]["label"])) == list(range(10))


def test_a_tokenizer_is_trained(tmp_path):
    """Trained on several tasks, it separates sentences of a pair, knows their words, and loads with AutoTokenizer."""
    for task in ("rte", "mnli"):  # only the second has a third letter
        write_glue(tmp_path / "glue", task)
    result = run_script(
        "examples/train_tokenizer.py", "--dataset_name", tmp_path / "glue", "--task_name", "rte,mnli",
        "--vocab_size", 60, "--output_dir", tmp_path / "tokenizer",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("AAAx", "bbbc")["input_ids"])
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2 and tokens[-1] == "[SEP]"
    assert "[UNK]" not in tokens and len(tokenizer) <= 60
    assert tokenizer("!")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer("aaa[MASK]")["input_ids"][-2] == tokenizer.mask_token_id


def test_a_tokenizer_of_the_most_frequent_tokens_of_a_teachers(tmp_path):
    """Kept tokens get new ids, and words of dropped tokens are unknown."""
    write_glue(tmp_path / "glue", "rte")
    letters = [f"{letter * 3}{'x' * count}" for letter in "abc" for count in range(12)]
    vocab = ["[MASK]", "[PAD]", "[CLS]", "[UNK]", "[SEP]", "zzz", *letters]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "teacher")
    given = (
        "examples/train_tokenizer.py", "--dataset_name", tmp_path / "glue", "--task_name", "rte",
        "--teacher_name_or_path", tmp_path / "teacher", "--output_dir", tmp_path / "tokenizer",
    )  # fmt: skip
    result = run_script(*given, "--vocab_size", 15)
    assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    kept = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert len(kept) == 15 and set(kept) < set(vocab) and set(vocab[:5]) < set(kept) and "zzz" not in kept
    assert kept == sorted(kept, key=vocab.index)
    pair = tokenizer.convert_ids_to_tokens(tokenizer(kept[5].upper(), "zzz")["input_ids"])
    assert pair == ["[CLS]", kept[5], "[SEP]", "[UNK]", "[SEP]"] and tokenizer.mask_token == "[MASK]"
    result = run_script(*given, "--vocab_size", 5)
    assert result.returncode == 2 and "--vocab_size 5: must be 6 or more" in result.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--vocab_size", -5), "--vocab_size -5: must be 6 or more"),
        (("--vocab_size", 6), "--vocab_size 6: must be "),
        (("--output_dir", "DATA/train.csv"), "--output_dir DATA/train.csv: must be a folder"),
        (("--text_column", "other"), "--text_column other: "),
        (("--text_column", "empty"), "--dataset_name DATA: has no text"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(tmp_path, monkeypatch, given, says):
    """The script ends in one line with exit code 2, and writes nothing."""
    (tmp_path / "DATA").mkdir()
    (tmp_path / "DATA" / "train.csv").write_text("id,text,empty\na1,some text,\na2,more text,\n")
    given = ("--dataset_name", "DATA", "--output_dir", "out", *given)
    result = run_script(ROOT / "examples/train_tokenizer.py", *given, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: {says}")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_trained_on_a_table_of_ones_own(tmp_path):
    """Only its text column is read, not ids and labels."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("id,text,label\nqqq1,aaa bbb,zzz\nqqq2,bbb aaa,zzz\n")
    given = ("--dataset_name", tmp_path / "data", "--vocab_size", 40, "--output_dir", tmp_path / "tokenizer")
    result = run_script("examples/train_tokenizer.py", *given)
    assert result.returncode == 0, result.stderr
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    assert {"aaa", "bbb"} <= set(vocabulary) and not any(letter in "".join(vocabulary) for letter in "qz")


def test_pairs_are_labelled(tmp_path):
    """Labels are cosines of the teacher's mean states, and no sentence is paired with itself."""
    sentences = [f"{letter} {word} {letter * 9} {word * 3}" for letter in "abc" for word in ("az", "zz", "ba", "cz")]
    ids = [f"an identity of its own {index}" for index in range(len(sentences))]
    (tmp_path / "data").mkdir()
    # pandas writes strings of another type, and its index as a column.
    table = pd.DataFrame({"id": ids, "sentence1": sentences, "sentence2": ["a b"] * len(sentences)}, index=ids)
    table.to_parquet(tmp_path / "data" / "train.parquet")
    teacher = write_teacher(tmp_path / "teacher")
    given = (
        "examples/label_pairs.py", "--dataset_name", tmp_path / "data", "--teacher_name_or_path", teacher,
        "--pairs_per_sentence", 3,
    )  # fmt: skip
    result = run_script(*given, "--output_dir", tmp_path / "pairs")
    assert result.returncode == 0, result.stderr
    splits = load_dataset("csv", data_dir=str(tmp_path / "pairs"))
    assert set(splits["validation"]["sentence1"]) == set(sentences) - set(splits["train"]["sentence1"])
    pairs = concatenate_datasets([splits["train"], splits["validation"]])
    assert 2 * len(sentences) < len(pairs) <= 3 * len(sentences)  # chance may choose a sentence itself
    assert {*pairs["sentence1"], *pairs["sentence2"]} == set(sentences)
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModel.from_pretrained(teacher)
    for pair in pairs.select(range(5)):
        assert pair["sentence1"] != pair["sentence2"]
        means = []
        for sentence in (pair["sentence1"], pair["sentence2"]):
            states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state
            means.append(states[0].mean(dim=0))
        alike = torch.cosine_similarity(*means, dim=0).clamp(min=0)
        assert pair["label"] == pytest.approx(5 * float(alike), abs=2e-3)
    assert run_script(*given, "--output_dir", tmp_path / "again").returncode == 0
    assert (tmp_path / "again/train.csv").read_bytes() == (tmp_path / "pairs/train.csv").read_bytes()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--pairs_per_sentence", -1), "--pairs_per_sentence -1: must be 1 or more"),
        (("--max_sentences", 0), "--max_sentences 0: must be 1 or more"),
        (("--output_dir", "{folder}/test.csv"), "test.csv: must be a folder"),
        ((), "has no split 'train'"),
    ],
)
def test_wrong_arguments_for_pairs_are_refused(tmp_path, given, says):
    write_table(tmp_path / "test.csv", {"text": ["a sentence of twenty letters"] * 3})
    arguments = ("--dataset_name", tmp_path, "--teacher_name_or_path", tmp_path, "--output_dir", tmp_path / "pairs")
    given = tuple(str(word).format(folder=tmp_path) for word in given)
    result = run_script("examples/label_pairs.py", *arguments, *given)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("path", ARGUMENT_FILES, ids=lambda path: path.name)
def test_argument_files_are_understood(monkeypatch, tmp_path, path):
    """Every key is an argument of the file's script; an unknown one would be an error."""
    script = path.read_text().removeprefix("# ").partition(":")[0]
    assert (script == "eval_sweep.py") == is_sweep(path)
    data, own = {
        "eval_sweep.py": (SweepDataArguments, SweepArguments),
        "run_image.py": (ImageDataArguments, MergeArguments),
        "run_glue.py": (GlueDataArguments, MergeArguments),
        "examples/language/learn_from_teacher.py": (TaughtArguments, MergeArguments),
    }[script]
    given = yaml.safe_load(path.read_text())
    # Without a GPU, bf16 requires --use_cpu.
    (tmp_path / path.name).write_text(yaml.safe_dump(given | {"use_cpu": True}))
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / path.name)])
    parsed = parse_arguments("", ModelArguments, data, own, RetrainArguments, HubArguments, TrainingArguments)
    assert parsed[-1].output_dir.startswith("outputs/")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_perceiver.json")), ids=lambda path: path.name)
def test_configs_are_perceivers(path: Path):
    config = ToMePerceiverConfig.from_json_file(path)
    assert len(config.latents_per_layer) == config.num_self_attention_layers


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """Write tiny stand-ins for the published checkpoints: the same stock classes, with other labels."""
    folder = tmp_path_factory.mktemp("published")
    language = stock_model("ForMaskedLM", dtype=torch.float32, max_position_embeddings=POSITIONS, num_latents=200)
    vision = stock_model("ForImageClassificationConvProcessing", dtype=torch.float32, num_labels=7, num_latents=200)
    for name, model, processing in (
        ("language", language, PerceiverTokenizer()),
        ("vision", vision, PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16})),
    ):
        model.save_pretrained(folder / name)
        processing.save_pretrained(folder / name)
    return {name: folder / name for name in ("language", "vision")}


@pytest.mark.parametrize("task", PAPER_TASKS)
def test_the_papers_experiment_runs(published, tmp_path, monkeypatch, task):
    """Run the two argument files of a task, with only the sizes of model, data and training changed."""
    monkeypatch.setattr("experiments.tasks.scores.RESAMPLES", 10)  # 18 cells of standard errors that nobody reads
    image = task == "fashion_mnist"
    data = write_images(tmp_path / "data", {"train": 6, "test": 3}) if image else write_glue(tmp_path / "data", task)
    small = dict(
        dataset_name=str(data), num_train_epochs=1, retrain_epochs=1, max_steps=1, use_cpu=True, timing_rounds=1,
        max_eval_samples=3, **({} if image else {"max_seq_length": POSITIONS}),
    )  # fmt: skip
    stages = {
        task: ("run_image.py" if image else "run_glue.py", published["vision" if image else "language"]),
        f"{task}_sweep": ("eval_sweep.py", tmp_path / task),
    }
    for name, (script, model) in stages.items():
        given = yaml.safe_load((EXAMPLES / "paper" / f"{name}.yaml").read_text())
        changed = {key: value for key, value in small.items() if key in given or key in CHANGES[script]}
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(given | changed | dict(model_name_or_path=str(model), output_dir=str(tmp_path / name)))
        )
        call_script(script, path)
    results = json.loads((tmp_path / f"{task}_sweep" / "sweep_results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [f"r={r}" for r in R]
    score = "pearson" if task == "stsb" else "accuracy"
    assert all(score in row["merged"] and score in row["retrained"] for row in results["rows"])


CHANGES = {
    "run_glue.py": ("dataset_name", "max_steps", "use_cpu", "max_eval_samples"),
    "run_image.py": ("max_steps", "use_cpu", "max_eval_samples"),
    "eval_sweep.py": ("dataset_name", "max_steps", "use_cpu", "max_eval_samples", "timing_rounds"),
}
"""Further changes to the arguments, by task."""
