# SPDX-License-Identifier: Apache-2.0
"""What a teacher reads, and which ones are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5Model

from experiments.errors import BadInput
from experiments.tasks.teacher import load_teacher
from tests.support.tiny_teachers import TEACHER_CHANNELS, TEACHER_POSITIONS, letter_tokenizer, write_teacher


def test_a_teacher_reads_tokens_by_what_they_are_called(tmp_path):
    loaded = load_teacher(str(write_teacher(tmp_path)))
    student = letter_tokenizer("abc")
    teacher = loaded.of(student, 20)
    texts = ["abca", "c"]
    own = student(texts, padding=True, return_tensors="pt")
    theirs = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    assert not own["input_ids"].equal(theirs["input_ids"])
    states = teacher.states(own["input_ids"], own["attention_mask"])
    assert states.shape == (*own["input_ids"].shape, TEACHER_CHANNELS) == (2, 6, teacher.channels)
    assert not states.requires_grad
    torch.testing.assert_close(states, loaded.model(**theirs).last_hidden_state)


def test_a_student_with_tokens_of_its_own_or_longer_inputs(tmp_path):
    loaded = load_teacher(str(write_teacher(tmp_path)))
    with pytest.raises(BadInput, match=r"--teacher_name_or_path .*'x', 'y', '##x' and 1 more.*--tokenizer_name"):
        loaded.of(letter_tokenizer("abxy"), 20)
    with pytest.raises(BadInput, match=f"--max_seq_length 101: allowed are 1 to {TEACHER_POSITIONS}"):
        loaded.of(letter_tokenizer("abc"), 101)


def test_what_is_no_encoder(tmp_path):
    with pytest.raises(BadInput, match="--teacher_name_or_path .*nowhere"):
        load_teacher(str(tmp_path / "nowhere"))
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    letter_tokenizer("abc").save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="is a t5; allowed are encoders"):
        load_teacher(str(tmp_path))
