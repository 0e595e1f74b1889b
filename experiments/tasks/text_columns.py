# SPDX-License-Identifier: Apache-2.0
"""Columns of text: which of a table hold the sentences, the sentences to mask in them, and which of those are alike."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset, Features, List, Value, concatenate_datasets

from experiments.errors import BadInput
from experiments.tasks.labels import LABEL, listed, refuse_missing
from experiments.tasks.reading import column_key, is_string, kind_of, means_text, with_column

TEXT = "text"
"""The column that is read alone for masked language modelling, as by the official run_mlm.py."""
SENTENCE = "sentence"
"""The column that sentences are read to."""
Line = tuple[bytes, ...]
"""The sentences of a line, each by a digest of its letters and digits, in any case."""
# Number of lines that are read at a time.
BATCH = 1000
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
# Number of rows that show whether a column holds text.
LOOKED_AT = 1000


def _is_text(dataset: Dataset, column: str) -> bool:
    """Whether a column may hold sentences: strings with letters in them, and no labels, identities or indices."""
    if not is_string(dataset.features[column]) or _NO_TEXT.fullmatch(column):
        return False
    values = dataset.select(range(min(len(dataset), LOOKED_AT)))[column]
    return any(re.search(r"[^\W\d_]", value) and value.casefold() not in ("true", "false") for value in values if value)


def _pairs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the names of columns that are known to come in pairs."""
    by_key = {column_key(name): name for name in names}
    return [tuple(by_key[key] for key in pair) for pair in PAIRS if by_key.keys() >= set(pair)]


def input_columns(dataset: Dataset, argument: str, first: str | None, second: str | None) -> tuple[str, ...]:
    """Return the one or two columns with the sentences to classify.

    Args:
        dataset: the examples.
        argument: that chose them, with its value.
        first, second: names that the user has given.

    Raises:
        BadInput: for a name that is not there, or where it is not certain which columns are meant.
    """
    names = dataset.column_names
    for option, column in (("sentence1_column", first), ("sentence2_column", second)):
        if column is not None and (column not in names or column == LABEL):
            raise BadInput(f"--{option} {column}: is no column of sentences in {argument}; choose from {listed(names)}")
    if second is not None and first in (None, second):
        raise BadInput(f"--sentence2_column {second}: use --sentence1_column for another column beside it")
    if first is not None:
        return (first,) if second is None else (first, second)
    pairs = _pairs(names)
    single = [name for name in names if means_text(name) and not any(name in pair for pair in pairs)]
    if not pairs and not single:
        single = [name for name in names if _is_text(dataset, name)]
    choices = [*pairs, *((name,) for name in single)]
    if len(choices) != 1:
        what = f"columns {listed({name for choice in choices for name in choice})} may all hold the sentences"
        raise BadInput(
            f"{argument}: {what if choices else f'has no column with sentences, only {listed(names)}'}; name the right "
            "one with --sentence1_column, and for pairs also --sentence2_column"
        )
    return choices[0]


def masked_columns(names: Sequence[str], argument: str, given: Sequence[str] = ()) -> list[str]:
    """Return the columns with the sentences to mask: "text", or else all whose names mean text, also those of pairs.

    Args:
        names: of all columns.
        argument: that chose the data, with its value.
        given: columns that the user has named.

    Raises:
        BadInput: for a name that is not there, or where no name means text.
    """
    if missing := [name for name in given if name not in names]:
        raise BadInput(f"--text_column {missing[0]}: is no column of {argument}; choose from {listed(names)}")
    if given or TEXT in names:
        return list(given) or [TEXT]
    paired = {name for pair in _pairs(names) for name in pair}
    columns = [name for name in names if means_text(name) or name in paired]
    if not columns:
        shown = ", ".join(textwrap.shorten(f"'{name}'", 40, placeholder="...'") for name in names[:6])
        raise BadInput(
            f"{argument}: no name of a column means text ({shown}); use --text_column NAME, a header row with a column "
            "'text', or a .txt file for one sentence in each line"
        )
    return columns


def as_text(dataset: Dataset, column: str, where: str) -> Dataset:
    """Return the examples with the numbers, dates or truth values of a column as text.

    Raises:
        BadInput: for a column of another kind.
    """
    feature = dataset.features[column]
    if is_string(feature):
        return dataset
    if not isinstance(feature, Value) or feature.dtype in ("binary", "large_binary"):
        raise BadInput(f"{where}: column '{column}' holds {kind_of(feature)}; it must hold text")
    values = [None if value is None else str(value) for value in dataset[column][:]]
    return with_column(dataset, column, values, Value("string"))


def with_text(dataset: Dataset, columns: Sequence[str], where: str) -> Dataset:
    """Return the examples with text in these columns, which may be of no letters.

    Raises:
        BadInput: for a column that is not there or of another kind, or examples without text.
    """
    if missing := set(columns) - set(dataset.column_names):
        raise BadInput(f"{where} has no column {listed(missing)}, only {listed(dataset.column_names)}")
    for column in columns:
        dataset = as_text(dataset, column, where)
        refuse_missing(dataset[column][:], column, where, lambda value: value is None)
    return dataset


class Split(NamedTuple):
    """Examples, and the argument that chose them, with its value."""

    argument: str
    examples: Dataset


def read_sentences(splits: Sequence[Split], given: Sequence[str], joined: bool, anew: bool) -> Dataset:
    """Return all sentences, which `datasets` keeps on disk, in the column `sentence`.

    Args:
        splits: to read.
        given: columns that the user has named.
        joined: whether each row is the list of the sentences of a row of the splits; otherwise it is one sentence,
            those of one column after those of another.
        anew: whether to read again what is cached.

    Raises:
        BadInput: as for `masked_columns`, or for a column of no text.
    """
    found = []
    for argument, examples in splits:
        columns = masked_columns(examples.column_names, argument, given)
        for column in columns:
            examples = as_text(examples, column, argument)
        for read in [columns] if joined else [[name] for name in columns]:
            found.append(
                examples.map(
                    _sentences,
                    fn_kwargs={"columns": read, "joined": joined},
                    batched=True,
                    remove_columns=examples.column_names,
                    features=Features({SENTENCE: List(Value("string")) if joined else Value("string")}),
                    load_from_cache_file=not anew,
                    desc="Reading sentences",
                )
            )
    return concatenate_datasets(found) if found else Dataset.from_dict({SENTENCE: []})


def _sentences(batch: dict[str, list], columns: list[str], joined: bool) -> dict[str, list]:
    """Return the rows of a batch that have any text in these columns, see `read_sentences`."""
    rows = (
        [sentence.strip() for sentence in row if sentence is not None and sentence.strip()]
        for row in zip(*(batch[name] for name in columns), strict=True)
    )
    return {SENTENCE: [row if joined else row[0] for row in rows if row]}


def distinct(lines: Dataset) -> dict[Line, int]:
    """Return where each line stands: of several alike, the place of the last, in the order of the first."""
    batches = lines.iter(BATCH) if len(lines) else ()
    read = ([line] if isinstance(line, str) else line for batch in batches for line in batch[SENTENCE])
    return {tuple(map(_letters, sentences)): place for place, sentences in enumerate(read)}


def _letters(sentence: str) -> bytes:
    letters = re.sub(r"\W+", "", sentence).casefold() or sentence
    return hashlib.blake2b(letters.encode(errors="surrogatepass"), digest_size=8).digest()
