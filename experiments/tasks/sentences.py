# SPDX-License-Identifier: Apache-2.0
"""Sentences to mask: which columns hold them, and which of them say the same."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, Features, List, Value, concatenate_datasets

from experiments.errors import BadInput
from experiments.tasks.labels import listed
from experiments.tasks.reading import column_key, ending, means_text
from experiments.tasks.text import PAIRS, as_text

SENTENCE = "sentence"
"""The column that sentences are read to."""
TEXT = "text"
"""The column that is read alone, if there is one of this name, as by the official run_mlm.py."""
READ_AT_ONCE = 1000


class Split(NamedTuple):
    """Examples, and the argument that chose them, with its value."""

    argument: str
    examples: Dataset


def check_header(argument: str, path: str, named: Sequence[str]) -> None:
    """Check that the first line of a table names a column of text: one sentence in each line may be in such a file."""
    if ending(path) not in ("csv", "tsv"):
        return
    with suppress(UnicodeError, OSError), Path(path).open(encoding="utf-8-sig") as file:
        header = next(filter(str.strip, file), "")
        names = [name.strip().strip('"') for name in re.split(r"[,;\t]", header)]
        if header and not (set(named) & set(names) or _text_columns(names)):
            raise BadInput(_no_text(argument, names))


def _no_text(argument: str, names: Sequence[str]) -> str:
    shown = ", ".join(textwrap.shorten(f"'{name}'", 40, placeholder="...'") for name in names[:6])
    return (
        f"{argument}: no name of a column means text ({shown}); use --text_column NAME, a header row with a column "
        "'text', or a .txt file for one sentence in each line"
    )


def _text_columns(names: Sequence[str]) -> list[str]:
    """Return "text", or else the names that mean text, also those of pairs; never identities or labels."""
    by_key = {column_key(name): name for name in names}
    paired = {by_key[key] for pair in PAIRS if by_key.keys() >= set(pair) for key in pair}
    return [TEXT] if TEXT in names else [name for name in names if means_text(name) or name in paired]


def sentence_columns(examples: Dataset, argument: str, named: Sequence[str] = ()) -> list[str]:
    """Return the columns with the sentences to mask.

    Args:
        examples: of a split.
        argument: that chose them, with its value.
        named: columns that the user has named.

    Raises:
        BadInput: for a name that is not there, or where no name means text.
    """
    there = examples.column_names
    if missing := [name for name in named if name not in there]:
        raise BadInput(f"--text_column {missing[0]}: is no column of {argument}; choose from {listed(there)}")
    columns = list(named) or _text_columns(there)
    if not columns:
        raise BadInput(_no_text(argument, there))
    return columns


def read_sentences(splits: Sequence[Split], named: Sequence[str], joined: bool, anew: bool) -> Dataset:
    """Return all sentences, which `datasets` keeps on disk, in the column `sentence`.

    Args:
        splits: to read.
        named: columns that the user has named.
        joined: whether each row is the list of the sentences of a row of the splits; otherwise it is one sentence,
            those of one column after those of another.
        anew: whether to read again what is cached.

    Raises:
        BadInput: as for `sentence_columns`, or for a column of no text.
    """
    found = []
    for split in splits:
        argument, examples = split
        columns = sentence_columns(examples, argument, named)
        for column in columns:
            examples = as_text(examples, column, argument)
        for read in [columns] if joined else [[name] for name in columns]:
            found.append(
                examples.map(
                    _reading(read, joined),
                    batched=True,
                    remove_columns=examples.column_names,
                    features=Features({SENTENCE: List(Value("string")) if joined else Value("string")}),
                    load_from_cache_file=not anew,
                    desc="Reading sentences",
                )
            )
    return concatenate_datasets(found) if found else Dataset.from_dict({SENTENCE: []})


def _reading(columns: list[str], joined: bool) -> Callable[[dict[str, list]], dict[str, list]]:
    """From a batch of rows to one of those that have any text in these columns, see `read_sentences`."""

    def read(batch: dict[str, list]) -> dict[str, list]:
        rows = (
            [sentence.strip() for sentence in row if sentence is not None and sentence.strip()]
            for row in zip(*(batch[name] for name in columns), strict=True)
        )
        return {"sentence": [row if joined else row[0] for row in rows if row]}

    return read


def distinct(lines: Dataset) -> dict[tuple[bytes, ...], int]:
    """Where a line stands, by what tells its sentences apart: a digest of their letters and digits, in any case.

    Of several alike, the place of the last, in the order of the first.
    """
    batches = lines.iter(READ_AT_ONCE) if len(lines) else ()
    read = ([line] if isinstance(line, str) else line for batch in batches for line in batch[SENTENCE])
    return {tuple(map(_letters, sentences)): place for place, sentences in enumerate(read)}


def _letters(sentence: str) -> bytes:
    letters = re.sub(r"\W+", "", sentence).casefold() or sentence
    return hashlib.blake2b(letters.encode(errors="surrogatepass"), digest_size=8).digest()
