# SPDX-License-Identifier: Apache-2.0
"""Classes by their names: what the data call them, what a checkpoint calls them, and which is which."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming

logger = logging.getLogger(__name__)

NO_LABEL = -1
"""What test splits have in place of labels that are kept back."""
SHOWN_NAMES = 20


def listed(names: Iterable[object], ordered: bool = False) -> str:
    """Names in quotes, sorted unless their order says something; of many, the first few."""
    quoted = [f"'{name}'" for name in (map(str, names) if ordered else sorted(map(str, names)))]
    more = len(quoted) - SHOWN_NAMES
    return ", ".join(quoted[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def spelling(name: object) -> str:
    """A name as it is compared: in lower case, "-" and " " as "_"."""
    return re.sub(r"[-_\s]+", "_", str(name).strip()).casefold()


def checkpoint_labels(config: ToMePerceiverConfig) -> list[str]:
    """A checkpoint's names, by its index: those of `id2label`, or of `label2id` where that alone was set."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    index_of = {int(index): str(name) for name, index in (config.label2id or {}).items()}
    if says_nothing(names) and sorted(index_of) == list(range(len(names))):
        return [index_of[index] for index in range(len(names))]
    return names


def matched(labels: Sequence[str], checkpoint: Sequence[str]) -> list[int] | None:
    """The checkpoint's index of each of the data's labels; `None` if they are not the same names.

    Case and "-", "_" and " " make no other name. Names that only say an index (LABEL_0 or 0) stand for any.

    Args:
        labels: the data's.
        checkpoint: the checkpoint's, by its index.
    """
    if len(labels) != len(checkpoint):
        return None
    if list(labels) == list(checkpoint):
        return list(range(len(labels)))
    for names, others in ((list(labels), list(checkpoint)), (_spelled(labels), _spelled(checkpoint))):
        if set(names) == set(others) and len(set(names)) == len(set(others)) == len(names):
            return [others.index(name) for name in names]
    if says_nothing(labels) or says_nothing(checkpoint):
        return list(range(len(labels)))
    return None


def says_nothing(labels: Sequence[str]) -> bool:
    """Whether names are only indices: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(labels))


def warn_of_order(labels: Sequence[str], checkpoint: Sequence[str], where: str) -> None:
    """Say so if labels go by their order, since one side's names say nothing."""
    if set(_spelled(labels)) != set(_spelled(checkpoint)) and (says_nothing(labels) or says_nothing(checkpoint)):
        logger.warning(
            "%s: its labels %s are taken for the data's %s in this order, since their names say nothing of each other",
            where, listed(checkpoint, ordered=True), listed(labels, ordered=True),
        )  # fmt: skip


def label_ids(config: ToMePerceiverConfig, labels: Sequence[str]) -> list[int]:
    """The model's index of each of the data's labels.

    Raises:
        BadInput: if the model's are others.
    """
    found = matched(labels, checkpoint_labels(config))
    if found is None:
        raise BadInput(f"id2label = {config.id2label}: allowed are the data's labels, {listed(labels)}")
    return found


def label_names(dataset: Dataset, column: str, where: str) -> list[str] | None:
    """Names of the classes that a column may have, in their order; `None` if it holds numbers with a point.

    Raises:
        BadInput: for a column that holds neither.
    """
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    kind = feature.dtype if isinstance(feature, Value) else ""
    if kind.startswith("float"):
        return None
    if kind not in ("string", "large_string", "bool") and not kind.startswith(("int", "uint")):
        raise BadInput(
            f"{where}: column '{column}' holds {kind or type(feature).__name__}; allowed are a name, an integer or a "
            "number with a point for each example"
        )
    # The Hub's tables say -1 of a label that is not there, and a class of that name would be none.
    return [str(value) for value in sorted({value for value in dataset.unique(column) if not _is_missing(value)})]


def has_labels(dataset: Dataset, column: str) -> bool:
    """Whether a split has any labels: test splits may lack the column, or have -1 or nothing everywhere."""
    if column not in dataset.features:
        return False
    if not isinstance(dataset.features[column], (Value, ClassLabel)):
        return True  # of a kind that is refused where they are read
    return not all(_is_missing(value) or value == NO_LABEL for value in dataset.unique(column))


def with_label_ids(dataset: Dataset, column: str, labels: Sequence[str], where: str) -> Dataset:
    """The same examples with their classes as places in `labels`, whatever their order was.

    Args:
        dataset: with the classes in `column`: as names, integers, or places in the names of its own.
        column: their name.
        labels: names of the classes.
        where: what the split is, for the message.

    Raises:
        BadInput: for labels that are missing or not among them, with how many and where the first is.
    """
    feature = dataset.features[column]
    own_names = list(feature.names) if isinstance(feature, ClassLabel) else None
    label_names(dataset, column, where)
    values = list(dataset[column])
    if own_names is not None:
        values = [own_names[v] if v is not None and 0 <= v < len(own_names) else None for v in values]
    check_none_missing(values, column, where)
    names = [str(value) for value in values]
    place = {name: index for index, name in enumerate(labels)}
    if unknown := set(names) - set(place):
        raise BadInput(f"{where} has the labels {listed(unknown)}; allowed are those of training, {listed(labels)}")
    if own_names == list(labels):
        return dataset
    ids = [place[name] for name in names]
    added = dataset.add_column(f"{column}_ids", ids, feature=ClassLabel(names=list(labels)))
    return added.remove_columns(column).rename_column(f"{column}_ids", column)


def with_numbers(dataset: Dataset, column: str, where: str) -> Dataset:
    """The same examples with a finite float for each.

    Raises:
        BadInput: for what is no number, with how many and where the first is.
    """
    if isinstance(dataset.features[column], ClassLabel):
        raise BadInput(f"{where}: column '{column}' holds classes; allowed are numbers")
    values = list(dataset[column])
    check_none_missing(values, column, where)
    with naming(f"{where}, column '{column}'", Exception):
        finite = np.isfinite(np.array(values, dtype=object).astype(np.float32))
        dataset = dataset.cast_column(column, Value("float32"))
    if not finite.all():
        raise BadInput(
            f"{where}: column '{column}' has {int((~finite).sum())} numbers that are not finite, the first in example "
            f"{int(np.argmin(finite))}; allowed are finite ones"
        )
    return dataset


def check_none_missing(values: Iterable[object], column: str, where: str) -> None:
    """Check that there is a label for each example.

    Raises:
        BadInput: with how many are missing and which is the first.
    """
    values = list(values)
    refuse_missing([index for index, value in enumerate(values) if _is_missing(value)], len(values), column, where)


def refuse_missing(missing: Sequence[int], count: int, column: str, where: str) -> None:
    """Refuse a column of `count` examples that has no value in some.

    Raises:
        BadInput: with how many they are and which is the first, if there are any.
    """
    if missing:
        raise BadInput(
            f"{where}: column '{column}' has no value (nothing, or the label {NO_LABEL}) in {len(missing)} of {count} "
            f"examples, the first of them example {missing[0]}, counted from 0; allowed is one in each"
        )


def check_trained(split: Dataset, train: Dataset, column: str, where: str) -> None:
    """Check that training has all the classes of a split, both with the same `ClassLabel`.

    Raises:
        BadInput: naming the labels that training has not.
    """
    names = train.features[column].names
    seen, asked = set(train.unique(column)), set(split.unique(column))
    if unseen := asked - seen:
        raise BadInput(
            f"{where} has the labels {listed(names[index] for index in unseen)}; allowed are those of training, "
            f"{listed(names[index] for index in seen)}"
        )


def _is_missing(value: object) -> bool:
    if isinstance(value, float):
        return bool(np.isnan(value))
    return value is None or value == "" or (not isinstance(value, bool) and value == NO_LABEL)


def _spelled(names: Iterable[object]) -> list[str]:
    return [spelling(name) for name in names]
