# SPDX-License-Identifier: Apache-2.0
"""Base of the text tasks: arguments for files of text, and tokenization.

Subclassed by `experiments.tasks.glue` and `experiments.tasks.mlm`.
"""

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
from experiments.tasks.reading import TABLE_FORMATS, file_extension

Columns = dict[str, list]
"""A batch of examples, as `Dataset.map` passes it: lists of values by column."""


@dataclass
class TextDataArguments(DataArguments):
    """Arguments that choose files of text and how they are tokenized."""

    _argument_group_name: ClassVar[str] = "sentences"
    file_formats: ClassVar[tuple[str, ...]] = TABLE_FORMATS
    """Extensions of the files that a task reads."""

    train_file: str | None = field(default=None, metadata={"help": "File to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "File to predict; it needs no labels."})
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Cut inputs to this number of tokens (default: number of positions of the model). A masked "
            "language model from scratch gets this number of positions."
        },
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every input to --max_seq_length, instead of to the longest input of the batch."},
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Read and tokenize the data again, instead of using the cache."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None and self.max_seq_length < 1:
            raise BadInput(f"--max_seq_length {self.max_seq_length}: must be an integer of 1 or more")
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is None:
                continue
            if file_extension(path) not in self.file_formats:
                raise BadInput(f"--{name} {path}: must end in .{', .'.join(self.file_formats)}")
            if not Path(path).is_file():
                raise BadInput(f"--{name} {path}: there is no such file")


@dataclass
class TextTask(Task):
    """Sentences, or pairs of sentences.

    Attributes:
        arguments: settings of the tokenization.
        sentence_columns: names of the one or two columns with text.
    """

    arguments: TextDataArguments
    sentence_columns: tuple[str, ...]

    input_name: ClassVar[str] = "input_ids"

    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """Return the tokenizer called `name` or, for `None`, the byte tokenizer of the published Perceiver."""
        if name is None:
            return PerceiverTokenizer()
        with naming(f"--tokenizer_name {name}", Exception):
            return AutoTokenizer.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Set the size of the vocabulary to the tokenizer's."""
        config.vocab_size = len(processing_class)

    def tokenize(self, config: ToMePerceiverConfig, tokenizer: Any, label_ids: Sequence[int] = ()) -> TextTask:
        """Return the task with the columns `input_ids`, `attention_mask` and, for labelled examples, `labels`.

        Inputs are padded only with `--pad_to_max_length`. Sets `model_max_length` of the tokenizer, so that the saved
        tokenizer cuts inputs to the same length.

        Args:
            config: config of the model.
            tokenizer: the tokenizer.
            label_ids: the model's index of each class; empty if labels are numbers or missing.

        Raises:
            BadInput: if the tokenizer or `--max_seq_length` does not fit the model.
        """
        if len(tokenizer) > config.vocab_size:
            raise BadInput(
                f"--tokenizer_name: has {len(tokenizer)} tokens, the model {config.vocab_size}; use the model's own "
                "tokenizer"
            )
        if tokenizer.pad_token is None:
            raise BadInput("--tokenizer_name: has no padding token; use a tokenizer with a pad_token")
        length = self._length(tokenizer, config)
        tokenizer.model_max_length = length
        tokenize = self.make_tokenize(tokenizer, length, label_ids)

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

    def make_tokenize(self, tokenizer: Any, length: int, label_ids: Sequence[int]) -> Callable[[Columns], Columns]:
        """Return the function for `Dataset.map` that turns a batch into inputs of at most `length` tokens, and labels.

        `datasets` caches results by a hash of this function's code and of the variables that it captures.
        """
        names = self.sentence_columns
        options: dict[str, Any] = {"truncation": True, "max_length": length}
        options["padding"] = "max_length" if self.arguments.pad_to_max_length else False
        # A fast tokenizer stores the options of its last call, and the hash includes them. This call sets them, so that
        # the hash does not depend on earlier calls.
        tokenizer(*(["a"] for _ in names), **options)

        def tokenize(batch: Columns) -> Columns:
            tokens = tokenizer(*(batch[name] for name in names), return_attention_mask=True, **options)
            columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            if LABEL in batch:
                columns[LABELS] = [label_ids[label] if label_ids else float(label) for label in batch[LABEL]]
            return columns

        return tokenize

    def _length(self, tokenizer: Any, config: ToMePerceiverConfig) -> int:
        """Return the maximum number of tokens of an input."""
        positions = config.max_position_embeddings
        length = self.arguments.max_seq_length or positions
        if length > positions:
            raise BadInput(f"--max_seq_length {length}: must be 1 to {positions}, the number of positions of the model")
        special = tokenizer.num_special_tokens_to_add(pair=len(self.sentence_columns) > 1)
        if length <= special:
            raise BadInput(
                f"--max_seq_length {length}: must be {special + 1} to {positions}, since {special} special tokens are "
                "added to the text"
            )
        return length
