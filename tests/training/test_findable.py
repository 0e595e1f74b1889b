# SPDX-License-Identifier: Apache-2.0
"""The start for a teacher: each position is found from the first step on, and no constant is left to be learnt."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel

from experiments.tasks.teacher import Teacher
from experiments.training.findable import BRANCH_SCALE, start_findable, token_counts
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.tiny_texts import MODEL

TOKENS, WIDTH = 40, 128


def student(latents: int, positions: int, width: int = WIDTH) -> ToMePerceiverForMaskedLM:
    torch.manual_seed(0)
    sizes = {
        "architectures": ["PerceiverForMaskedLM"], "num_latents": latents, "max_position_embeddings": positions,
        "d_model": width, "d_latents": WIDTH, "qk_channels": WIDTH, "v_channels": WIDTH, "vocab_size": TOKENS,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02,
    }  # fmt: skip
    return ToMePerceiverForMaskedLM(ToMePerceiverForMaskedLM.config_class(**MODEL | sizes)).eval()


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=TOKENS + 5, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return Teacher(BertModel(config), torch.arange(TOKENS) + 5)


@pytest.mark.parametrize(("latents", "positions"), [(16, 16), (24, 16), (8, 16), (6, 16)])
def test_a_latent_reads_its_tokens_and_a_position_its_latent(teacher, latents, positions):
    model = student(latents, positions)
    start_findable(model, teacher, torch.ones(TOKENS))
    model.set_attn_implementation("eager")
    ids = torch.randint(TOKENS, (3, positions), generator=torch.Generator().manual_seed(2))
    reads, read = (weights.mean(dim=(0, 1)) for weights in model(ids, output_attentions=True).cross_attentions)
    owner = torch.arange(positions) * min(latents, positions) // positions
    assert owner[reads.argmax(dim=1)[: min(latents, positions)]].tolist() == list(range(min(latents, positions)))
    assert read.argmax(dim=1).equal(owner)
    plain = student(latents, positions)
    plain.set_attn_implementation("eager")
    assert plain(ids, output_attentions=True).cross_attentions[0].max() < 0.5


def test_what_is_constant_is_there_and_branches_are_small(teacher):
    model, plain = student(8, 16), student(8, 16)
    counts = torch.arange(TOKENS)
    start_findable(model, teacher, counts)
    frequencies = model.embedding_decoder.bias.exp()
    assert frequencies.sum().item() == pytest.approx(1, rel=1e-4)
    assert frequencies[10].item() == pytest.approx(11 / (counts.sum() + TOKENS).item())
    assert model.get_input_embeddings().weight.equal(teacher.model.get_input_embeddings().weight[5:])
    for ours, drawn in zip(model.perceiver.encoder.self_attends, plain.perceiver.encoder.self_attends, strict=True):
        torch.testing.assert_close(
            ours.attention.output.dense.weight, BRANCH_SCALE * drawn.attention.output.dense.weight
        )
        torch.testing.assert_close(ours.mlp.dense2.weight, BRANCH_SCALE * drawn.mlp.dense2.weight)
        assert ours.mlp.dense1.weight.equal(drawn.mlp.dense1.weight)


def test_a_teacher_of_another_width_leaves_the_embeddings(teacher):
    model, plain = student(8, 16, width=64), student(8, 16, width=64)
    start_findable(model, teacher, torch.ones(TOKENS))
    assert model.get_input_embeddings().weight.equal(plain.get_input_embeddings().weight)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_tokens_are_counted():
    examples = Dataset.from_dict({"input_ids": [[0, 3, 3], [], [1]]})
    assert token_counts(examples.select([0, 2, 0]), 5).tolist() == [2, 1, 0, 4, 0]
