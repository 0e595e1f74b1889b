# SPDX-License-Identifier: Apache-2.0
"""Sentences to mask, read from the columns of any splits, and which of them say the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset, Features, List, Value, concatenate_datasets

from experiments.tasks.text_columns import as_text, masked_columns

SENTENCE = "sentence"
"""The column that sentences are read to."""
Line = tuple[bytes, ...]
"""The sentences of a line, each by a digest of its letters and digits, in any case."""
BATCH = 1000


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
