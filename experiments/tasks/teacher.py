# SPDX-License-Identifier: Apache-2.0
"""A pretrained encoder whose last hidden states a masked language model learns beside the masked tokens.

Letters: B batch, S input positions, T channels of the teacher's last hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from experiments.errors import BadInput, naming

SHOWN = 3


@dataclass(frozen=True)
class Teacher:
    """An encoder that reads the student's tokens.

    Attributes:
        model: the encoder, not trained.
        ids: (tokens of the student,) the teacher's id of each.
    """

    model: PreTrainedModel
    ids: Tensor

    @property
    def channels(self) -> int:
        """T."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states (B, S, T) of the student's `input_ids` (B, S), of which none is masked."""
        return self.model(input_ids=self.ids[input_ids], attention_mask=attention_mask).last_hidden_state

    def to(self, device: torch.device) -> Teacher:
        """The same on a device."""
        return Teacher(self.model.to(device), self.ids.to(device))


@dataclass(frozen=True)
class LoadedTeacher:
    """An encoder and its tokenizer, as they were loaded.

    Attributes:
        name: as it was given.
        model, tokenizer: of it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any

    def of(self, tokenizer: Any, length: int) -> Teacher:
        """The teacher of a student with this tokenizer, whose inputs have up to `length` tokens.

        Raises:
            BadInput: if the student has tokens that the teacher has not, or longer inputs than it reads.
        """
        own, known = tokenizer.get_vocab(), self.tokenizer.get_vocab()
        unknown = sorted((token for token in own if token not in known), key=own.__getitem__)
        if unknown:
            raise BadInput(
                f"--teacher_name_or_path {self.name}: has no token {', '.join(map(repr, unknown[:SHOWN]))}"
                + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
                + " of the student's tokenizer; allowed are --tokenizer_name with the teacher's own tokens, or fewer "
                "of them, see examples/train_tokenizer.py"
            )
        positions = getattr(self.model.config, "max_position_embeddings", length)
        if length > positions:
            raise BadInput(f"--max_seq_length {length}: allowed are 1 to {positions}, which the teacher reads")
        ids = torch.zeros(max(own.values()) + 1, dtype=torch.int64)
        for token, index in own.items():
            ids[index] = known[token]
        return Teacher(self.model, ids)


def load_teacher(name: str, **download: Any) -> LoadedTeacher:
    """Load an encoder and its tokenizer.

    Args:
        name: a folder or a Hub id.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: if it is not there, or is no encoder.
    """
    with naming(f"--teacher_name_or_path {name}", Exception):
        tokenizer = AutoTokenizer.from_pretrained(name, **download)
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **download)
    config = model.config
    if config.is_encoder_decoder or getattr(config, "is_decoder", False) or not hasattr(config, "hidden_size"):
        raise BadInput(f"--teacher_name_or_path {name}: is a {config.model_type}; allowed are encoders, such as BERT")
    return LoadedTeacher(name, model.eval().requires_grad_(False), tokenizer)
