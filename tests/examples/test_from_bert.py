# SPDX-License-Identifier: Apache-2.0
"""Tests of examples/language/from_bert.py: the Perceiver computes nearly the BERT's states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel

from examples.language.from_bert import Teacher, describe_misfit, load_teacher, start_from_bert
from experiments.errors import BadInput
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.tiny_teachers import TEACHER_CHANNELS, TEACHER_POSITIONS, letter_tokenizer, write_teacher

TOKENS, WIDTH, ROOM, HEADS, LAYERS, POSITIONS = 40, 32, 56, 2, 2, 32
FITTING = {
    "architectures": ["PerceiverForMaskedLM"], "num_latents": POSITIONS + 2, "max_position_embeddings": POSITIONS,
    "d_model": ROOM, "d_latents": ROOM, "qk_channels": WIDTH, "v_channels": ROOM,
    "num_blocks": 1, "num_self_attends_per_block": LAYERS, "num_self_attention_heads": HEADS,
    "num_cross_attention_heads": 1, "self_attention_widening_factor": 2, "vocab_size": TOKENS,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02,
}  # fmt: skip


def config(**changes: object):
    return ToMePerceiverForMaskedLM.config_class(**FITTING | changes)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(1)
    bert = BertModel(
        BertConfig(
            vocab_size=TOKENS + 5, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=64, initializer_range=0.15,
        )
    ).eval()  # fmt: skip
    for name, parameter in bert.named_parameters():
        if "LayerNorm" in name:
            # Random scales and shifts, as after training: with 1 and 0 a test would not notice if they were not copied.
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Teacher(bert, torch.arange(TOKENS) + 5)


def texts(seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    """Draw tokens (count, P) and the mask of texts of 5 to P tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TOKENS, (count, POSITIONS), generator=generator)
    lengths = torch.randint(5, POSITIONS + 1, (count, 1), generator=generator)
    return ids, (torch.arange(POSITIONS) < lengths).long()


@pytest.fixture(scope="module")
def started(teacher) -> ToMePerceiverForMaskedLM:
    torch.manual_seed(0)
    model = ToMePerceiverForMaskedLM(config()).eval()
    ids, mask = texts(2)
    rows = {
        name: [row[: int(own.sum())].tolist() for row, own in zip(values, mask, strict=True)]
        for name, values in (("input_ids", ids), ("attention_mask", mask))
    }
    start_from_bert(model, teacher, rows, torch.arange(TOKENS))
    return model


def explained(found: Tensor, wanted: Tensor) -> float:
    """Return the share of the variance of `wanted` that `found` explains."""
    return 1 - ((found - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()).item()


def test_the_states_of_other_texts_are_nearly_the_teachers(started, teacher):
    ids, mask = texts(3)
    wanted = teacher.states(ids, mask)[mask.bool()]
    states = []
    handle = started.embedding_decoder.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        started(ids, attention_mask=mask)
    handle.remove()
    assert explained(states[0][mask.bool()][:, :WIDTH], wanted) > 0.75
    # The embeddings alone, which the residual stream holds from the start, would explain less.
    embedded = teacher.model.embeddings(teacher.ids[ids])[mask.bool()]
    assert explained(embedded, wanted) < 0.25


def test_a_latent_reads_its_token_and_without_one_the_first(started, teacher):
    ids, mask = texts(4)
    with torch.no_grad():
        read = started(ids, attention_mask=mask, output_hidden_states=True).hidden_states[0]
        embedded = teacher.model.embeddings(teacher.ids[ids])
    own = torch.arange(POSITIONS + 2).expand(len(ids), -1) < mask.sum(dim=1, keepdim=True)
    place = torch.where(own, torch.arange(POSITIONS + 2), 0).unsqueeze(-1).expand(-1, -1, WIDTH)
    # The codes of few positions are not quite orthogonal, so a latent without a token attends to other tokens too.
    assert ((read[..., :WIDTH] - embedded.gather(1, place)).abs() > 0.05).float().mean() < 0.01


def test_the_bias_is_the_frequency_of_tokens(started):
    frequencies = started.embedding_decoder.bias.exp()
    assert frequencies.sum().item() == pytest.approx(1, rel=1e-4) and frequencies.argmax() == TOKENS - 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"num_blocks": 2}, "num_blocks 2: must be 1"),
        ({"num_self_attends_per_block": 3}, "num_self_attends_per_block 3: must be 2"),
        ({"num_self_attention_heads": 4}, "num_self_attention_heads 4: must be 2"),
        ({"hidden_act": "relu"}, "hidden_act relu: must be gelu"),
        ({"num_latents": 31}, "num_latents 31: must be 32 or more"),
        ({"qk_channels": None}, "qk_channels None: must be 32"),
        ({"d_latents": 48, "d_model": 48}, "d_latents 48: must be 56 or more"),
        ({"d_model": 64}, "d_model 64: must be 56"),
        ({"self_attention_widening_factor": 1}, "self_attention_widening_factor 1: must be 2 or more"),
        ({"num_cross_attention_heads": 2}, "num_cross_attention_heads 2: must be 1 to 1"),
        ({"use_query_residual": False}, "use_query_residual False: must be True"),
    ],
)
def test_a_config_without_room_is_named(teacher, changes, says):
    assert describe_misfit(config(**changes), teacher.model) == says


def test_only_a_bert_has_such_layers():
    other = RobertaModel(RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    assert describe_misfit(config(), other) == "the teacher is a roberta; use a BERT"


def test_a_teacher_reads_tokens_by_their_names(tmp_path):
    folder = write_teacher(tmp_path)
    student, known = letter_tokenizer("abc"), AutoTokenizer.from_pretrained(folder)
    teacher = load_teacher(str(folder), student, 20)
    texts = ["cab", "b c", "abca b"]
    own, theirs = (tokenizer(texts, return_tensors="pt", padding=True) for tokenizer in (student, known))
    assert not own["input_ids"].equal(theirs["input_ids"])
    states = teacher.states(own["input_ids"], own["attention_mask"])
    assert states.shape == (*own["input_ids"].shape, TEACHER_CHANNELS)
    assert states.equal(teacher.model(**theirs).last_hidden_state)


def test_a_teacher_that_cannot_read_the_student_is_refused(tmp_path):
    folder = str(write_teacher(tmp_path))
    with pytest.raises(BadInput, match=r"--teacher_name_or_path .*'x', 'y', '##x' and 1 more.*--tokenizer_name"):
        load_teacher(folder, letter_tokenizer("axy"), 20)
    with pytest.raises(BadInput, match=f"--max_seq_length {TEACHER_POSITIONS + 1}: must be 1 to {TEACHER_POSITIONS}"):
        load_teacher(folder, letter_tokenizer("abc"), TEACHER_POSITIONS + 1)
    with pytest.raises(BadInput, match="--teacher_name_or_path .*nowhere"):
        load_teacher(str(tmp_path / "nowhere"), letter_tokenizer("abc"), 20)
