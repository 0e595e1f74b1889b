# SPDX-License-Identifier: Apache-2.0
"""Text for any task: which files it is read from, and how it becomes tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoTokenizer, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.tasks.base import LABELS, DataArguments, Task
from experiments.tasks.labels import LABEL
from experiments.tasks.reading import TABLE_FORMATS, ending

Columns = dict[str, list]


@dataclass
class TextDataArguments(DataArguments):
    """Which sentences, and how they become tokens."""

    _argument_group_name: ClassVar[str] = "sentences"
    file_formats: ClassVar[tuple[str, ...]] = TABLE_FORMATS
    """Endings of the files that are taken."""

    train_file: str | None = field(default=None, metadata={"help": "Own data, to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to predict; it needs no labels."})
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer inputs are cut, in tokens; a classifier keeps as many positions. By default: as many as "
            "the model can read."
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length, and not just to the longest of the batch."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and tokenize anew what is cached."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None and self.max_seq_length < 1:
            raise BadInput(f"--max_seq_length {self.max_seq_length}: must be an integer of 1 or more")
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is None:
                continue
            if ending(path) not in self.file_formats:
                raise BadInput(f"--{name} {path}: must end in .{', .'.join(self.file_formats)}")
            if not Path(path).is_file():
                raise BadInput(f"--{name} {path}: there is no such file")


@dataclass
class TextTask(Task):
    """Sentences, or pairs of them.

    Attributes:
        arguments: how they become tokens.
        sentence_columns: one or two.
    """

    arguments: TextDataArguments
    sentence_columns: tuple[str, ...]

    input_name: ClassVar[str] = "input_ids"

    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """Return the tokenizer; with no name, the published language model's, whose tokens are bytes."""
        if name is None:
            return PerceiverTokenizer()
        with naming(f"--tokenizer_name {name}", Exception):
            return AutoTokenizer.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Give the model an embedding for each token."""
        config.vocab_size = len(processing_class)

    def tokens(self, config: ToMePerceiverConfig, tokenizer: Any, label_ids: Sequence[int] = ()) -> TextTask:
        """Return the task with `input_ids`, `attention_mask` and, where examples have them, `labels` as columns.

        Inputs are padded only if the arguments say so.

        The tokenizer learns how long inputs may be, so that what is saved cuts to the same length.

        Args:
            config: of the model.
            tokenizer: makes the tokens.
            label_ids: the model's index of each class; empty where labels, if there are any, are numbers.

        Raises:
            BadInput: if the tokenizer or `--max_seq_length` does not fit the model.
        """
        if len(tokenizer) > config.vocab_size:
            raise BadInput(
                f"--tokenizer_name: has {len(tokenizer)} tokens, the model {config.vocab_size}; use the model's own "
                "tokenizer"
            )
        if tokenizer.pad_token is None:
            raise BadInput("--tokenizer_name: has no token to pad with; use a tokenizer with a pad_token")
        length = self._length(tokenizer, config)
        tokenizer.model_max_length = length
        tokenize = self.tokenizing(tokenizer, length, label_ids)

        def tokenized(split: Dataset, description: str) -> Dataset:
            return split.map(
                tokenize,
                batched=True,
                remove_columns=split.column_names,
                load_from_cache_file=not self.arguments.overwrite_cache,
                desc=f"Tokenizing {description}",
            )

        return replace(
            self,
            train=tokenized(self.train, "train"),
            evaluation={suffix: tokenized(split, f"eval{suffix}") for suffix, split in self.evaluation.items()},
            prediction={suffix: tokenized(split, f"predict{suffix}") for suffix, split in self.prediction.items()},
            calibration=None if self.calibration is None else tokenized(self.calibration, "calibration"),
        )

    def tokenizing(self, tokenizer: Any, length: int, label_ids: Sequence[int]) -> Callable[[Columns], Columns]:
        """Return what turns a batch of columns into inputs of at most `length` tokens and labels: see `tokens`.

        `datasets` knows it by its code and by what it closes over.
        """
        names = self.sentence_columns
        how: dict[str, Any] = {"truncation": True, "max_length": length}
        how["padding"] = "max_length" if self.arguments.pad_to_max_length else False
        # A fast tokenizer carries how it was called last, by which `datasets` would not know it again when something
        # has been tokenized in between.
        tokenizer(*(["a"] for _ in names), **how)

        def tokenize(batch: Columns) -> Columns:
            tokens = tokenizer(*(batch[name] for name in names), return_attention_mask=True, **how)
            columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            if LABEL in batch:
                columns[LABELS] = [label_ids[label] if label_ids else float(label) for label in batch[LABEL]]
            return columns

        return tokenize

    def _length(self, tokenizer: Any, config: ToMePerceiverConfig) -> int:
        """Return how many tokens an input may have."""
        positions = config.max_position_embeddings
        length = self.arguments.max_seq_length or positions
        if length > positions:
            raise BadInput(f"--max_seq_length {length}: must be 1 to {positions}, the positions of the model")
        special = tokenizer.num_special_tokens_to_add(pair=len(self.sentence_columns) > 1)
        if length <= special:
            raise BadInput(
                f"--max_seq_length {length}: must be {special + 1} to {positions}, since {special} tokens are around "
                "the text"
            )
        return length
