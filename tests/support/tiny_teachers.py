# SPDX-License-Identifier: Apache-2.0
"""A tiny encoder with its tokenizer, and a student's tokenizer with the same tokens in another order."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
TEACHER_CHANNELS, TEACHER_POSITIONS = 12, 100


def letter_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token for each letter, at the beginning of a word and inside it."""
    tokens = [*SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def write_teacher(folder: Path, letters: str = "zcba") -> Path:
    """Write a random BERT with a token for each letter."""
    tokenizer = letter_tokenizer(letters)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=TEACHER_CHANNELS, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=TEACHER_POSITIONS, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_student_tokenizer(folder: Path, letters: str = "abc") -> Path:
    """Write the tokenizer of a student."""
    letter_tokenizer(letters).save_pretrained(folder)
    return folder
