# SPDX-License-Identifier: Apache-2.0
"""Tests of run records: they change with everything that changes results, and not with paths."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage
from safetensors.torch import save_file
from transformers import TrainingArguments

from experiments.errors import BadInput
from experiments.tasks.mlm import MlmDataArguments
from experiments.training.fingerprints import config_fingerprint, data_fingerprint, weights_fingerprint
from experiments.training.run_record import (
    EVALUATION_FIELDS,
    SAVING_FIELDS,
    WITHOUT_EFFECT,
    RunRecord,
    data_fields,
    training_fields,
)
from tests.support.tiny_models import HEADS, tiny_config, tiny_model

TEXTS = st.lists(st.tuples(st.text(max_size=4), st.integers(0, 2)), min_size=1, max_size=5)


def sentences(rows: list[tuple[str, int]], names: tuple[str, ...] = ("a", "b", "c")) -> Dataset:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(names))})
    columns = {"sentence": [row[0] for row in rows], "label": [row[1] for row in rows]}
    return Dataset.from_dict(columns, features=features)


def of_data(dataset: object, labels: tuple[str, ...] = ("a", "b", "c")) -> str:
    return data_fingerprint({"": dataset}, "examples", labels)


@given(TEXTS, TEXTS)
def test_data_are_the_same_if_and_only_if_their_values_are(one, other):
    assert (of_data(sentences(one)) == of_data(sentences(other))) == (one == other)


def test_data_arguments_that_are_the_default_are_not_recorded():
    assert data_fields(MlmDataArguments(dataset_name="glue")) == {}
    given = MlmDataArguments(dataset_name="glue", text_column=["a"], mlm_probability=0.3)
    assert data_fields(given) == {"text_column": ["a"], "mlm_probability": 0.3}


def test_order_names_and_columns_count():
    rows = [("x", 0), ("y", 1)]
    data = sentences(rows)
    assert of_data(data) == of_data(sentences(rows * 2).select([2, 3])) == of_data(sentences(rows[::-1]).select([1, 0]))
    others = [
        of_data(sentences(rows[::-1])),
        of_data(data, ("a", "c", "b")),
        of_data(data.rename_column("sentence", "text")),
        of_data(data.add_column("more", [1, 2])),
        data_fingerprint({"_mm": data}, "examples", ("a", "b", "c")),
    ]
    assert len({of_data(data), *others}) == 1 + len(others)


def test_a_transform_does_not_count_and_tensors_do():
    data = sentences([("x", 0)])
    assert of_data(data.with_transform(lambda batch: {"nothing": [0]})) == of_data(data)
    masked = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2])}]
    other = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 3])}]
    assert of_data(masked) != of_data(other)
    assert of_data(masked) == of_data([{name: value.clone() for name, value in masked[0].items()}])


def test_images_count_by_their_bytes_and_not_by_their_path(tmp_path):
    def images(name: str, color: int) -> Dataset:
        path = tmp_path / name
        PilImage.new("L", (2, 2), color).save(path)
        return Dataset.from_dict({"image": [str(path)]}, features=Features({"image": Image()}))

    assert of_data(images("a.png", 1)) == of_data(images("b.png", 1)) != of_data(images("c.png", 2))


@pytest.mark.parametrize("head", HEADS)
def test_weights_are_the_same_in_a_model_and_in_what_it_saves(head, tmp_path):
    model = tiny_model(head, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(tmp_path / "model.safetensors") == weights_fingerprint(model)


@given(place=st.integers(0, 47), bit=st.integers(0, 7))
def test_any_bit_of_any_weight_counts(place, bit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file({"one": torch.arange(4.0), "two": torch.arange(8.0)}, folder / "a.safetensors")
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[len(data) - 48 + place] ^= 1 << bit
    (folder / "b.safetensors").write_bytes(bytes(data))
    assert weights_fingerprint(folder / "a.safetensors") != weights_fingerprint(folder / "b.safetensors")


def test_what_a_config_says_counts_and_not_where_it_was(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    assert config_fingerprint(type(config).from_pretrained(tmp_path)) == config_fingerprint(config)
    dropout = tiny_config(attention_probs_dropout_prob=0.5)
    assert config_fingerprint(dropout) != config_fingerprint(config)
    merging = tiny_config(r=2, min_latents=3, merge_metric="value")
    assert config_fingerprint(merging) != config_fingerprint(config)
    assert config_fingerprint(merging, merging=False) == config_fingerprint(config, merging=False)


def test_every_training_argument_counts_but_those_that_are_named():
    """A new argument of a later transformers release counts too, until it is listed as not changing results."""
    names = set(TrainingArguments.__dataclass_fields__)
    assert (WITHOUT_EFFECT | SAVING_FIELDS | set(EVALUATION_FIELDS)) - {"local_rank"} <= names
    fields = training_fields(TrainingArguments(output_dir="out", use_cpu=True))
    assert set(fields) == {name for name in names if not name.startswith("_")} - WITHOUT_EFFECT - SAVING_FIELDS | {
        "processes"
    }
    assert json.loads(json.dumps(fields)) == fields and fields["lr_scheduler_type"] == "linear"


def test_when_to_save_counts_where_an_evaluation_decides_and_the_number_of_processes_always(monkeypatch):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    arguments = TrainingArguments(output_dir="out", use_cpu=True, **best)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fields = training_fields(arguments)
    assert set(fields) >= SAVING_FIELDS and fields["processes"] == 2


def test_the_first_difference_between_two_records():
    """JSON has no tuples; data and models are compared by content; only values of the current run are compared."""
    record = RunRecord({"r": [1, 2], "seed": 1, "train_file": "a.csv"}, {"train": "x"})
    assert record.difference(RunRecord({"r": (1, 2), "train_file": "b.csv"}, {"train": "x"})) is None
    assert record.difference(RunRecord({"r": (2, 1)})) == "r [1, 2], now [2, 1]"
    assert record.difference(RunRecord({"seed": 2}), may_differ=("seed",)) is None
    assert record.difference(RunRecord({}, {"train": "y"})) == "other content of its train"
    assert record.difference(RunRecord({"more": 1})) == "more None, now 1"
    assert record.difference(RunRecord({"more": 1}, {"evaluation": "z"}), only_shared=True) is None


def test_a_record_is_read_as_it_was_written_and_a_file_that_is_none_is_refused(tmp_path):
    record = RunRecord({"seed": 1}, {"train": "x"}, {"continued_from": {"max_steps": 2}})
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record and RunRecord.read(tmp_path / "not_there") == RunRecord()
    for text in ("{", "[]", '{"seed": 1}'):
        (tmp_path / "arguments.json").write_text(text)
        with pytest.raises(BadInput, match="--output_dir .*arguments.json"):
            RunRecord.read(tmp_path)
