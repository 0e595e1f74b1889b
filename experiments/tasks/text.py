# SPDX-License-Identifier: Apache-2.0
"""What all tasks on text share: where sentences are read from, and how they become tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, Value
from transformers import AutoTokenizer, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.tasks.base import LABELS, SampleArguments, Task
from experiments.tasks.labels import listed
from experiments.tasks.reading import TABLE_FORMATS, column_key, ending, is_string, means_text, with_column

LABEL = "label"
"""The column with a class or a number for each example."""
Columns = dict[str, list]
# Names of the two columns of a pair, as `column_key` gives them.
PAIRS = (
    ("sentence1", "sentence2"), ("sentencea", "sentenceb"), ("text1", "text2"), ("texta", "textb"),
    ("text", "textpair"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "answer"), ("query", "passage"), ("query", "document"),
)  # fmt: skip
# Columns that tell rows apart or name their labels: id, user_id, userId, index, pandas' "Unnamed: 0", label_text.
_NO_TEXT = re.compile(
    r"(?i:unnamed: .*|level_\d+|(.*[-_\s.])?(ids?|idx|index|uid|uuid|guid|key|no|nr)|labels?([-_\s].*)?)|.*[a-z]I[dD]"
)
# Whether a column holds text is seen by its first rows.
LOOKED_AT = 1000


@dataclass
class TextDataArguments(SampleArguments):
    """Which sentences, and how they become tokens."""

    _argument_group_name: ClassVar[str] = "sentences"
    file_formats: ClassVar[tuple[str, ...]] = TABLE_FORMATS
    """Endings of the files that are taken."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder, as `datasets.load_dataset` takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
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
            raise BadInput(f"--max_seq_length {self.max_seq_length}: allowed is an integer of 1 or more")
        for name in ("train_file", "validation_file", "test_file"):
            path = getattr(self, name)
            if path is None:
                continue
            if ending(path) not in self.file_formats:
                raise BadInput(f"--{name} {path}: allowed are files that end in .{', .'.join(self.file_formats)}")
            if not Path(path).is_file():
                raise BadInput(f"--{name} {path}: there is no such file")


@dataclass(frozen=True)
class Tokens:
    """A task's splits with `input_ids`, `attention_mask` and, where examples have them, `labels` as columns."""

    train: Dataset
    evaluation: dict[str, Dataset]
    prediction: dict[str, Dataset]
    calibration: Dataset | None


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
        """The tokenizer; with no name, the published language model's, whose tokens are bytes."""
        if name is None:
            return PerceiverTokenizer()
        with naming(f"--tokenizer_name {name}", Exception):
            return AutoTokenizer.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """An embedding for each token."""
        config.vocab_size = len(processing_class)

    def tokens(self, config: ToMePerceiverConfig, tokenizer: Any, label_ids: Sequence[int] = ()) -> Tokens:
        """The sentences as tokens, padded only if the arguments say so.

        The tokenizer learns how long inputs may be, so that what is saved cuts to the same length.

        Args:
            config: of the model.
            tokenizer: makes the tokens.
            label_ids: the model's index of each class; empty where labels, if there are any, are numbers.

        Raises:
            BadInput: if the tokenizer or `--max_seq_length` does not fit the model.
        """
        _check_tokenizer(tokenizer, config)
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

        return Tokens(
            train=tokenized(self.train, "train"),
            evaluation={suffix: tokenized(split, f"eval{suffix}") for suffix, split in self.evaluation.items()},
            prediction={suffix: tokenized(split, f"predict{suffix}") for suffix, split in self.prediction.items()},
            calibration=None if self.calibration is None else tokenized(self.calibration, "calibration"),
        )

    def tokenizing(self, tokenizer: Any, length: int, label_ids: Sequence[int]) -> Callable[[Columns], Columns]:
        """What makes inputs of at most `length` tokens, for `datasets` to map with: see `tokens`."""
        pad = self.arguments.pad_to_max_length
        return _tokenizing(tokenizer, self.sentence_columns, length, pad=pad, label_ids=label_ids)

    def _length(self, tokenizer: Any, config: ToMePerceiverConfig) -> int:
        """How many tokens an input may have."""
        positions = config.max_position_embeddings
        length = self.arguments.max_seq_length or positions
        if length > positions:
            raise BadInput(f"--max_seq_length {length}: allowed are 1 to {positions}, the positions of the model")
        special = tokenizer.num_special_tokens_to_add(pair=len(self.sentence_columns) > 1)
        if length <= special:
            raise BadInput(
                f"--max_seq_length {length}: allowed are {special + 1} to {positions}, since {special} tokens are "
                "around the text"
            )
        return length


def is_text(dataset: Dataset, column: str) -> bool:
    """Whether a column may hold sentences: strings with letters in them, and no labels, identities or indices."""
    if not is_string(dataset.features[column]) or _NO_TEXT.fullmatch(column):
        return False
    values = dataset.select(range(min(len(dataset), LOOKED_AT)))[column]
    return any(re.search(r"[^\W\d_]", value) and value.casefold() not in ("true", "false") for value in values if value)


def text_columns(dataset: Dataset) -> list[str]:
    """Return the columns whose name means text, or where there are none, all that may hold sentences."""
    named = [name for name in dataset.column_names if means_text(name)]
    return named or [name for name in dataset.column_names if is_text(dataset, name)]


def sentence_columns(dataset: Dataset, argument: str, first: str | None, second: str | None) -> tuple[str, ...]:
    """Return the one or two columns with the sentences to classify.

    Args:
        dataset: the examples.
        argument: that chose them, with its value.
        first, second: names that the user has given.

    Raises:
        BadInput: for a name that is not there, or where it is not certain which columns are meant.
    """
    there = dataset.column_names
    for name, column in (("sentence1_column", first), ("sentence2_column", second)):
        if column is not None and (column not in there or column == LABEL):
            raise BadInput(f"--{name} {column}: is no column of sentences in {argument}; choose from {listed(there)}")
    if second is not None and first in (None, second):
        raise BadInput(f"--sentence2_column {second}: use --sentence1_column for another column beside it")
    if first is not None:
        return (first,) if second is None else (first, second)
    by_key = {column_key(name): name for name in there}
    pairs = [tuple(by_key[key] for key in pair) for pair in PAIRS if by_key.keys() >= set(pair)]
    others = {name for name in there if means_text(name)} - {name for pair in pairs for name in pair}
    choices = [*pairs, *((name,) for name in (sorted(others) if pairs else text_columns(dataset)))]
    if len(choices) != 1:
        what = f"columns {listed(name for choice in choices for name in choice)} may all hold the sentences"
        raise BadInput(
            f"{argument}: {what if choices else f'has no column with sentences, only {listed(there)}'}; name the right "
            "one with --sentence1_column, and for pairs also --sentence2_column"
        )
    return choices[0]


def as_text(split: Dataset, column: str, where: str) -> Dataset:
    """The same examples with the numbers, dates or truth values of a column as text.

    Raises:
        BadInput: for a column of another kind.
    """
    feature = split.features[column]
    if is_string(feature):
        return split
    if not isinstance(feature, Value) or feature.dtype in ("binary", "large_binary"):
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        raise BadInput(f"{where}: column '{column}' holds {kind}; it must hold text")
    values = [None if value is None else str(value) for value in split[column]]
    return with_column(split, column, values, Value("string"))


def _check_tokenizer(tokenizer: Any, config: ToMePerceiverConfig) -> None:
    if len(tokenizer) > config.vocab_size:
        raise BadInput(
            f"--tokenizer_name: has {len(tokenizer)} tokens, the model {config.vocab_size}; allowed is the model's "
            "own tokenizer"
        )
    if tokenizer.pad_token is None:
        raise BadInput("--tokenizer_name: has no token to pad with; allowed is a tokenizer with a pad_token")


def _tokenizing(
    tokenizer: Any, sentence_columns: Sequence[str], length: int, pad: bool, label_ids: Sequence[int]
) -> Callable[[Columns], Columns]:
    """From a batch of columns to one of tokens and labels; `datasets` knows it by its code and by what it closes over.

    Args:
        tokenizer, sentence_columns, label_ids: as in `TextTask.tokens`.
        length: at which inputs are cut.
        pad: whether all are padded to it.
    """
    how = {"truncation": True, "max_length": length, "padding": "max_length" if pad else False}
    # A fast tokenizer carries how it was called last, by which `datasets` would not know it again when something has
    # been tokenized in between.
    tokenizer(*(["a"] for _ in sentence_columns), **how)

    def tokenize(batch: Columns) -> Columns:
        tokens = tokenizer(*(batch[column] for column in sentence_columns), return_attention_mask=True, **how)
        columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        if LABEL in batch:
            columns[LABELS] = [label_ids[label] if label_ids else float(label) for label in batch[LABEL]]
        return columns

    return tokenize
