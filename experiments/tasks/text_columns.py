# SPDX-License-Identifier: Apache-2.0
"""Columns of text: find the columns with sentences in a table, read the sentences, and find duplicates.

Called by `experiments.tasks.glue`, `experiments.tasks.mlm` and the examples.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset, Features, List, Value, concatenate_datasets

from experiments.errors import BadInput
from experiments.tasks.labels import LABEL, listed, refuse_missing
from experiments.tasks.reading import column_key, is_string, means_text, type_name, with_column

TEXT = "text"
"""Column that masked language modelling reads instead of all others, like the official run_mlm.py."""
SENTENCE = "sentence"
"""Column of the sentences that `read_sentences` returns."""
LineKey = tuple[bytes, ...]
"""Key of a line for finding duplicates: a digest of each of its sentences, ignoring case and punctuation."""
# Number of lines to read at a time.
LINES_PER_BATCH = 1000
# Names of two columns that form a pair, as `column_key` returns them.
PAIR_COLUMNS = (
    ("sentence1", "sentence2"), ("sentencea", "sentenceb"), ("text1", "text2"), ("texta", "textb"),
    ("text", "textpair"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "answer"), ("query", "passage"), ("query", "document"),
)  # fmt: skip
# Names of columns with identifiers or labels, not text: id, user_id, userId, index, pandas' "Unnamed: 0", label_text.
_ID_OR_LABEL = re.compile(
    r"(?i:unnamed: .*|level_\d+|(.*[-_\s.])?(ids?|idx|index|uid|uuid|guid|key|no|nr)|labels?([-_\s].*)?)|.*[a-z]I[dD]"
)
# Number of rows to inspect to decide whether a column holds text.
ROWS_INSPECTED = 1000


def _holds_text(dataset: Dataset, column: str) -> bool:
    """Whether a column may hold sentences: strings with letters, but no labels or identifiers."""
    if not is_string(dataset.features[column]) or _ID_OR_LABEL.fullmatch(column):
        return False
    values = dataset.select(range(min(len(dataset), ROWS_INSPECTED)))[column]
    return any(re.search(r"[^\W\d_]", value) and value.casefold() not in ("true", "false") for value in values if value)


def _find_pairs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the pairs of columns among these whose names are in `PAIR_COLUMNS`."""
    by_key = {column_key(name): name for name in names}
    return [tuple(by_key[key] for key in pair) for pair in PAIR_COLUMNS if by_key.keys() >= set(pair)]


def input_columns(dataset: Dataset, argument: str, first: str | None, second: str | None) -> tuple[str, ...]:
    """Return the one or two columns with the sentences to classify.

    Args:
        dataset: the examples.
        argument: the argument that chose the examples, with its value.
        first, second: columns that the user named, if any.

    Raises:
        BadInput: for an unknown column, or if several or no columns may hold the sentences.
    """
    names = dataset.column_names
    for option, column in (("sentence1_column", first), ("sentence2_column", second)):
        if column is not None and (column not in names or column == LABEL):
            raise BadInput(
                f"--{option} {column}: is not a column of sentences in {argument}; choose from {listed(names)}"
            )
    if second is not None and first in (None, second):
        raise BadInput(f"--sentence2_column {second}: must be given with another column as --sentence1_column")
    if first is not None:
        return (first,) if second is None else (first, second)
    pairs = _find_pairs(names)
    single = [name for name in names if means_text(name) and not any(name in pair for pair in pairs)]
    if not pairs and not single:
        single = [name for name in names if _holds_text(dataset, name)]
    choices = [*pairs, *((name,) for name in single)]
    if len(choices) != 1:
        problem = f"columns {listed({name for choice in choices for name in choice})} may all hold the sentences"
        raise BadInput(
            f"{argument}: {problem if choices else f'has no column with sentences, only {listed(names)}'}; name the "
            "right one with --sentence1_column, and for pairs also --sentence2_column"
        )
    return choices[0]


def masked_columns(names: Sequence[str], argument: str, given: Sequence[str] = ()) -> list[str]:
    """Return the columns with the sentences to mask: "text", or else all columns named like text, also those of pairs.

    Args:
        names: names of all columns.
        argument: the argument that chose the data, with its value.
        given: columns that the user named, which replace this search.

    Raises:
        BadInput: for an unknown column, or if no column is named like text.
    """
    if missing := [name for name in given if name not in names]:
        raise BadInput(f"--text_column {missing[0]}: is not a column of {argument}; choose from {listed(names)}")
    if given or TEXT in names:
        return list(given) or [TEXT]
    paired = {name for pair in _find_pairs(names) for name in pair}
    columns = [name for name in names if means_text(name) or name in paired]
    if not columns:
        shown = ", ".join(textwrap.shorten(f"'{name}'", 40, placeholder="...'") for name in names[:6])
        raise BadInput(
            f"{argument}: has no column with a name for text ({shown}); use --text_column NAME, a header row with a "
            "column 'text', or a .txt file with one sentence in each line"
        )
    return columns


def as_text(dataset: Dataset, column: str, where: str) -> Dataset:
    """Return the examples with a column of numbers, dates or booleans converted to text.

    Raises:
        BadInput: for a column of another type.
    """
    feature = dataset.features[column]
    if is_string(feature):
        return dataset
    if not isinstance(feature, Value) or feature.dtype in ("binary", "large_binary"):
        raise BadInput(f"{where}: column '{column}' holds {type_name(feature)}; it must hold text")
    values = [None if value is None else str(value) for value in dataset[column][:]]
    return with_column(dataset, column, values, Value("string"))


def with_text(dataset: Dataset, columns: Sequence[str], where: str) -> Dataset:
    """Return the examples with these columns converted to text, which may be empty.

    Raises:
        BadInput: for a column that is missing or of another type, or for missing values.
    """
    if missing := set(columns) - set(dataset.column_names):
        raise BadInput(f"{where} has no column {listed(missing)}, only {listed(dataset.column_names)}")
    for column in columns:
        dataset = as_text(dataset, column, where)
        refuse_missing(dataset[column][:], column, where, lambda value: value is None)
    return dataset


class Split(NamedTuple):
    """Examples, with the argument that chose them and its value."""

    argument: str
    examples: Dataset


def read_sentences(splits: Sequence[Split], given: Sequence[str], joined: bool, overwrite_cache: bool) -> Dataset:
    """Return all non-empty sentences in the column `sentence`; `datasets` keeps them on disk.

    Args:
        splits: the splits to read.
        given: columns that the user named.
        joined: whether each row of the result is a list of the sentences in one row of the data; otherwise each row is
            one sentence, and the columns of a split follow one another.
        overwrite_cache: whether to read again, instead of using the cache.

    Raises:
        BadInput: as for `masked_columns`, or for a column that holds no text.
    """
    found = []
    for argument, examples in splits:
        columns = masked_columns(examples.column_names, argument, given)
        for column in columns:
            examples = as_text(examples, column, argument)
        for read in [columns] if joined else [[name] for name in columns]:
            found.append(
                examples.map(
                    _extract_sentences,
                    fn_kwargs={"columns": read, "joined": joined},
                    batched=True,
                    remove_columns=examples.column_names,
                    features=Features({SENTENCE: List(Value("string")) if joined else Value("string")}),
                    load_from_cache_file=not overwrite_cache,
                    desc="Reading sentences",
                )
            )
    return concatenate_datasets(found) if found else Dataset.from_dict({SENTENCE: []})


def _extract_sentences(batch: dict[str, list], columns: list[str], joined: bool) -> dict[str, list]:
    """Return the rows of a batch that have text in any of these columns, as `read_sentences` describes."""
    rows = (
        [sentence.strip() for sentence in row if sentence is not None and sentence.strip()]
        for row in zip(*(batch[name] for name in columns), strict=True)
    )
    return {SENTENCE: [row if joined else row[0] for row in rows if row]}


def find_distinct(lines: Dataset) -> dict[LineKey, int]:
    """Return the index of each distinct line; duplicates get the index of the last, at the place of the first."""
    batches = lines.iter(LINES_PER_BATCH) if len(lines) else ()
    read = ([line] if isinstance(line, str) else line for batch in batches for line in batch[SENTENCE])
    return {tuple(map(_digest_letters, sentences)): index for index, sentences in enumerate(read)}


def _digest_letters(sentence: str) -> bytes:
    """Return a digest of the letters and digits of a sentence in lower case, or of all characters if it has none."""
    letters = re.sub(r"\W+", "", sentence).casefold() or sentence
    return hashlib.blake2b(letters.encode(errors="surrogatepass"), digest_size=8).digest()
