# SPDX-License-Identifier: Apache-2.0
"""A student that starts with its teacher's layers: it reads what the BERT reads, and says nearly what the BERT says."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from experiments.tasks.teacher import Teacher
from experiments.training import loading
from experiments.training.from_bert import start_from_bert, why_not_from_bert
from experiments.training.taught import TeacherMap
from modeling_tome_perceiver import ToMePerceiverForMaskedLM

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
            # As trained ones are: all 1 and 0 would hide that they are left out.
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Teacher(bert, torch.arange(TOKENS) + 5)


def texts(seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    """Tokens, and the mask of texts of 5 to all positions."""
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


def examples_of(ids: Tensor, mask: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


def explained(found: Tensor, wanted: Tensor) -> float:
    """Share of the variance."""
    return 1 - ((found - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()).item()


def decoded(model: ToMePerceiverForMaskedLM, ids: Tensor, mask: Tensor) -> Tensor:
    """The decoder's states at the positions of the mask."""
    states = []
    handle = model.embedding_decoder.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    handle.remove()
    return states[0][mask.bool()]


def test_the_states_of_other_texts_are_nearly_the_teachers(started, teacher):
    ids, mask = texts(3)
    wanted = teacher.states(ids, mask)[mask.bool()]
    assert explained(decoded(started, ids, mask)[:, :WIDTH], wanted) > 0.75
    # It is not the embeddings, which the residual stream holds from the start.
    embedded = teacher.model.embeddings(teacher.ids[ids])[mask.bool()]
    assert explained(embedded, wanted) < 0.25


def test_a_latent_reads_its_token_and_without_one_the_first(started, teacher):
    ids, mask = texts(4)
    with torch.no_grad():
        read = started(ids, attention_mask=mask, output_hidden_states=True).hidden_states[0]
        embedded = teacher.model.embeddings(teacher.ids[ids])
    own = torch.arange(POSITIONS + 2).expand(len(ids), -1) < mask.sum(dim=1, keepdim=True)
    place = torch.where(own, torch.arange(POSITIONS + 2), 0).unsqueeze(-1).expand(-1, -1, WIDTH)
    # Codes of so few positions are not quite orthogonal, so a latent without a token may look elsewhere too.
    assert ((read[..., :WIDTH] - embedded.gather(1, place)).abs() > 0.05).float().mean() < 0.01


def test_the_bias_is_the_frequency_of_tokens(started):
    frequencies = started.embedding_decoder.bias.exp()
    assert frequencies.sum().item() == pytest.approx(1, rel=1e-4) and frequencies.argmax() == TOKENS - 1


def test_the_map_of_states_begins_with_what_reads_the_teachers_off_best(started, teacher):
    ids, mask = texts(5)
    wanted = teacher.states(ids, mask)[mask.bool()]
    wanted[:, 3] = 0.5  # a dimension that says nothing
    states = torch.cat([wanted, torch.randn(len(wanted), ROOM - WIDTH)], dim=1) @ torch.randn(ROOM, ROOM) + 1
    readers = [TeacherMap(ROOM, WIDTH) for _ in range(2)]
    for reader in readers:
        reader.standardise_by(wanted)
    readers[1].fit(states, wanted)
    assert [reader.distance(states, wanted).item() for reader in readers] == pytest.approx([1, 0], abs=0.04)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"num_blocks": 2}, "num_blocks is 2; allowed is 1"),
        ({"num_self_attends_per_block": 3}, "num_self_attends_per_block is 3; allowed is 2"),
        ({"num_self_attention_heads": 4}, "num_self_attention_heads is 4; allowed is 2"),
        ({"hidden_act": "relu"}, "hidden_act is relu; allowed is gelu"),
        ({"num_latents": 31}, "num_latents is 31; allowed is 32 and more"),
        ({"qk_channels": None}, "qk_channels is None; allowed is 32"),
        ({"d_latents": 48, "d_model": 48}, "d_latents is 48; allowed is 56 and more"),
        ({"d_model": 64}, "d_model is 64; allowed is 56"),
        ({"self_attention_widening_factor": 1}, "self_attention_widening_factor is 1; allowed is 2 and more"),
        ({"num_cross_attention_heads": 2}, "num_cross_attention_heads is 2; allowed is 1 to 1"),
        ({"use_query_residual": False}, "use_query_residual is False; allowed is true"),
    ],
)
def test_what_has_no_room_is_named(teacher, changes, says):
    assert why_not_from_bert(config(**changes), teacher.model) == says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "starting with the teacher's layers"),
        (
            {"num_latents": 8},
            "starting without the teacher's layers, for which num_latents is 8; allowed is 32 and more",
        ),
    ],
)
def test_a_model_from_scratch_starts_with_them_where_there_is_room(teacher, caplog, changes, says):
    model = ToMePerceiverForMaskedLM(config(**changes))
    examples = examples_of(*texts(6))
    with caplog.at_level("INFO", logger=loading.__name__):
        loading.start_taught(model, teacher, examples)
    assert caplog.messages == [says]
    copied = model.perceiver.encoder.self_attends[0].attention.self.query.weight[:, :WIDTH]
    assert copied.equal(teacher.model.encoder.layer[0].attention.self.query.weight) == (not changes)


def test_dropout_is_no_part_of_the_fit(teacher):
    states = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        model = ToMePerceiverForMaskedLM(config(attention_probs_dropout_prob=dropout))
        loading.start_taught(model, teacher, examples_of(*texts(7)))
        assert model.training
        states.append(model.state_dict())
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_only_a_bert_has_such_layers():
    other = RobertaModel(RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    assert why_not_from_bert(config(), other) == "the teacher is a roberta; allowed is a BERT"
