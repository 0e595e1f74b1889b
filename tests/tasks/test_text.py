# SPDX-License-Identifier: Apache-2.0
"""Tests of tokenizing sentences for text tasks, and messages for wrong tokenizers and lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import PreparedTask
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.tasks.text import TextDataArguments
from tests.support.tiny_texts import MODEL, POSITIONS, write_glue, write_table


def prepared(
    folder: Path, tokenizer: PerceiverTokenizer | None = None, vocab_size: int = MODEL["vocab_size"], **given: object
) -> PreparedTask:
    """Prepare a task of single sentences for a model without labels."""
    arguments = GlueDataArguments(**given)
    if arguments.train_file is None:
        arguments.task_name, arguments.dataset_name = "sst2", str(write_glue(folder, "sst2"))
    task = load_glue_task(arguments, predict=False, seed=0)
    config = ToMePerceiverConfig(**MODEL | {"vocab_size": vocab_size, "num_labels": len(task.labels)})
    return task.prepare(config, tokenizer or PerceiverTokenizer(), seed=0)


@pytest.mark.parametrize(("pad", "length"), [(False, None), (True, 20), (True, None)])
def test_batches_are_padded_to_their_longest_unless_asked(tmp_path, pad, length):
    sight = prepared(tmp_path, pad_to_max_length=pad, max_seq_length=length)
    lengths = [len(sight.train[index]["input_ids"]) for index in range(4)]
    batch = sight.collate([sight.train[index] for index in range(4)])
    assert batch["input_ids"].shape[1] == (length or POSITIONS if pad else max(lengths))
    assert sight.processing_class.model_max_length == (length or POSITIONS)
    assert max(lengths) > min(lengths) or pad


def test_long_sentences_are_cut(tmp_path):
    assert {len(example["input_ids"]) for example in prepared(tmp_path, max_seq_length=4).train} == {4}


def test_an_empty_sentence_is_one(tmp_path):
    path = str(write_table(tmp_path / "data.parquet", {"text": ["", "b", "c"], "label": ["x", "y", "x"]}))
    assert prepared(tmp_path, train_file=path, validation_file=path).train[0]["attention_mask"] == [1, 1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"vocab_size": 100}, ["262", "100", "--tokenizer_name"]),
        ({"max_seq_length": POSITIONS + 1}, [f"--max_seq_length {POSITIONS + 1}", str(POSITIONS)]),
        ({"max_seq_length": 2}, ["--max_seq_length 2: must be 3 to"]),
    ],
)
def test_a_tokenizer_or_a_length_that_does_not_fit_is_named(tmp_path, given, says):
    with pytest.raises(BadInput) as error:
        prepared(tmp_path, **given)
    assert all(part in str(error.value) for part in says), error.value


def test_a_tokenizer_without_padding_is_named(tmp_path):
    tokenizer = PerceiverTokenizer()
    tokenizer.pad_token = None
    with pytest.raises(BadInput, match="pad"):
        prepared(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_seq_length": 0}, ["--max_seq_length 0", "1 or more"]),
        ({"train_file": "not_there.csv"}, ["--train_file not_there.csv", "no such file"]),
        ({"train_file": "data.xlsx"}, ["--train_file data.xlsx", ".csv", ".parquet"]),
    ],
)
def test_wrong_arguments_are_refused(given, says):
    with pytest.raises(BadInput) as error:
        TextDataArguments(**given)
    assert all(part in str(error.value) for part in says), error.value
