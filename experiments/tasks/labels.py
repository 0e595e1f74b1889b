# SPDX-License-Identifier: Apache-2.0
"""Labels: read the classes or numbers in a column, and match class names of the data with those of a checkpoint.

Called by the loaders of text and images, and by `experiments.training.loading`.
"""

from __future__ import annotations

import logging
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from datasets import ClassLabel, Dataset, Value

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.reading import type_name, with_column

logger = logging.getLogger(__name__)

LABEL = "label"
"""Column with the class or number of each example."""
NO_LABEL = -1
"""Value of hidden labels, as in the test splits of GLUE."""
# Maximum number of names that a message lists.
MAX_NAMES_SHOWN = 20
# Labels that are parsed as numbers.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)
# Names of classes that are compared by their integer.
_INTEGER = re.compile(r"(?:LABEL_)?([-+]?\d{1,1000})(?:\.0*)?", re.ASCII)
# Words for a missing value, in lower case.
_MISSING_WORDS = {"n/a", "na", "#n/a", "nan", "none", "null", "nil", "-", "--", "?", "unknown", "missing", "."}
# Labels that people read as numbers, such as 2,5 or 1 000 or 50%, and that are refused as ambiguous.
_LIKE_A_NUMBER = re.compile(r"[-+\u2212]?[\d.][\d.,'\s\u2019]*%?")


def listed(names: Iterable[object], ordered: bool = False) -> str:
    """Return the first names, quoted and separated by commas, and the number of the others; sorted unless `ordered`."""
    quoted = [
        f"'{name}'" if name.isprintable() else repr(name)
        for name in (map(str, names) if ordered else sorted(map(str, names)))
    ]
    more = len(quoted) - MAX_NAMES_SHOWN
    return ", ".join(quoted[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def spelling(name: object) -> str:
    """Return a name normalized for comparison: lower case, Unicode NFC, with "-" and " " as "_"."""
    return re.sub(r"[-_\s]+", "_", _composed(name)).casefold()


def _composed(name: object) -> str:
    """Return a name in Unicode NFC without surrounding whitespace; macOS writes "é" as two characters."""
    return unicodedata.normalize("NFC", str(name)).strip(f"{string.whitespace}\xa0\u200b\u2060\ufeff")


def _class_key(name: object) -> str | int:
    """Return the key that identifies a class: the integer of 3, 3.0 or LABEL_3, otherwise the normalized name."""
    composed = _composed(name)
    if found := _INTEGER.fullmatch(composed):
        return int(found[1])
    return composed.casefold() if composed.casefold() in ("true", "false") else composed


# Two names mean one class if one of these keys is equal; the strictest key is tried first.
_COMPARISON_KEYS: tuple[Callable[[object], Hashable], ...] = (str, _class_key, spelling)


def checkpoint_labels(config: ToMePerceiverConfig) -> list[str]:
    """Return the names of a checkpoint's classes by index: from `id2label`, or from `label2id` if only that was set."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    index_of = {int(index): str(name) for name, index in (config.label2id or {}).items()}
    if are_only_indices(names) and sorted(index_of) == list(range(len(names))):
        return [index_of[index] for index in range(len(names))]
    return names


def match_labels(labels: Sequence[str], checkpoint: Sequence[str]) -> list[int] | None:
    """Return the checkpoint's index of each label of the data, or `None` if the names do not match.

    Integers are compared by value, and LABEL_3 equals 3. Case, "-", "_" and " " are ignored. If one side has only
    indices (LABEL_0, ... or 0, ...) and the other has names, they match in order.

    Args:
        labels: names of the classes in the data.
        checkpoint: names of the checkpoint's classes, by index.
    """
    if len(labels) != len(checkpoint):
        return None
    for key in _COMPARISON_KEYS:
        names, others = ([key(name) for name in side] for side in (labels, checkpoint))
        if set(names) == set(others) and len(set(names)) == len(names):
            return [others.index(name) for name in names]
    both_numbers = all(isinstance(_class_key(name), int) for name in (*labels, *checkpoint))
    if not both_numbers and (are_only_indices(labels) or are_only_indices(checkpoint)):
        return list(range(len(labels)))
    return None


def are_only_indices(labels: Sequence[str]) -> bool:
    """Whether all names are just their indices: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(labels))


def warn_of_order(labels: Sequence[str], checkpoint: Sequence[str], where: str) -> None:
    """Warn if labels are matched by their order alone, because one side has only indices as names."""
    if all(set(map(key, labels)) != set(map(key, checkpoint)) for key in (_class_key, spelling)):
        logger.warning(
            "%s: its labels %s are matched with the data's labels %s by their order, since the names differ",
            where, listed(checkpoint, ordered=True), listed(labels, ordered=True),
        )  # fmt: skip


def label_ids(config: ToMePerceiverConfig, labels: Sequence[str]) -> list[int]:
    """Return the model's class index of each label of the data.

    Raises:
        BadInput: if the model has other classes.
    """
    found = match_labels(labels, checkpoint_labels(config))
    if found is None:
        raise BadInput(f"id2label = {config.id2label}: must be the data's labels, {listed(labels)}")
    return found


def label_names(dataset: Dataset, column: str, where: str, regression: bool | None = None) -> list[str] | None:
    """Return the names of the classes in a column, at least two, or `None` if it holds numbers to predict.

    Integers are sorted by value, other names alphabetically.

    Args:
        dataset, column: the labels.
        where: name of the data for messages.
        regression: whether the labels are numbers to predict; `None`: true if they have decimal points and not all are
            whole.

    Raises:
        BadInput: for a column that holds neither classes nor numbers, or that may hold either.
    """
    _check_type(dataset, column, where)
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        if regression:
            raise BadInput(f"--do_regression true: {where}: column '{column}' holds classes, {listed(feature.names)}")
        names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in feature.names))
    else:
        found = [value for value in dataset.unique(column) if not _is_empty(value)]
        if regression or (regression is None and _are_numbers(list(map(str, found)), len(dataset), column, where)):
            return None
        # Tables on the Hub have -1 for a hidden label, so -1 is not a class.
        names = _merge_spellings([str(value) for value in found if not _is_missing(value)], column, where)
    if len(names) < 2:
        refuse_missing(dataset[column][:], column, where)
        raise BadInput(f"{where}: column '{column}' has only the class {listed(names)}; it must have two or more")
    return names


def _check_type(dataset: Dataset, column: str, where: str) -> None:
    type_ = type_name(dataset.features[column])
    if not re.fullmatch(r"ClassLabel|bool|(large_)?string|(u?int|float)\d+", type_):
        raise BadInput(
            f"{where}: column '{column}' holds {type_}; it must hold a name, an integer or a number with a point for "
            "each example"
        )


def _are_numbers(values: list[str], count: int, column: str, where: str) -> bool:
    """Whether the distinct labels of `count` examples are numbers to predict, and not classes.

    Raises:
        BadInput: for labels that may be either.
    """
    remedy = "use --do_regression true if they are numbers to predict, --do_regression false if they are classes"
    values = [value.strip() for value in values]
    numbers = [value for value in values if _NUMBER.fullmatch(value)]
    whole = [value for value in numbers if _INTEGER.fullmatch(value)]
    others = sorted(set(values) - set(numbers))
    with_point = [value for value in numbers if not value.lstrip("+-").isdigit()]
    if others and (with_point or numbers and {other.casefold() for other in others} <= _MISSING_WORDS):
        raise BadInput(
            f"{where}: column '{column}' holds numbers such as '{(with_point or numbers)[0]}', and {listed(others)}, "
            "which are not numbers; correct or remove these rows, or use --do_regression false if all labels are "
            "names of classes"
        )
    if with_point:
        if len(whole) == len(numbers):
            raise BadInput(
                f"{where}: column '{column}' holds whole numbers with a point, {listed(numbers)}, as pandas writes "
                f"classes where some are missing; {remedy}"
            )
        return True
    if others and all(map(_LIKE_A_NUMBER.fullmatch, values)):
        other = next(value for value in values if not _NUMBER.fullmatch(value))
        raise BadInput(
            f"{where}: column '{column}' holds '{other}', which may be a number; write numbers to predict as 1234.5, "
            "or use --do_regression false if all labels are names of classes"
        )
    if len(values) == len(numbers) > max(MAX_NAMES_SHOWN, count / 2):
        raise BadInput(f"{where}: column '{column}' holds {len(values)} whole numbers in {count} examples; {remedy}")
    return False


def _merge_spellings(names: list[str], column: str, where: str) -> list[str]:
    """Return the sorted names of classes; names that differ only in surrounding spaces or Unicode form become one.

    Raises:
        BadInput: for an integer in two spellings.
    """
    first: dict[str | int, str] = {}
    for name in names:
        known = first.setdefault(_class_key(name), name.strip())
        if isinstance(_class_key(name), int) and known != name.strip():
            raise BadInput(
                f"{where}: column '{column}' has one number in two spellings, '{known}' and '{name.strip()}'; use "
                "one spelling for each class"
            )
    if all(isinstance(identity, int) for identity in first):
        return [first[identity] for identity in sorted(first)]
    by_spelling: dict[str, str] = {}
    for name in sorted(first.values()):
        if (other := by_spelling.setdefault(spelling(name), name)) != name:
            logger.warning("%s: column '%s' has '%s' and '%s' as two classes", where, column, other, name)
    return sorted(first.values())


def has_labels(dataset: Dataset, column: str) -> bool:
    """Whether a split has any labels: a test split may lack the column, or be empty or -1 in every row."""
    if column not in dataset.features:
        return False
    if not isinstance(dataset.features[column], (Value, ClassLabel)):
        return True  # labels of another type are refused when they are read
    return not all(_is_missing(value) or value in (NO_LABEL, f"{NO_LABEL}.0") for value in dataset.unique(column))


def with_labels(
    dataset: Dataset, column: str, labels: Sequence[str], where: str, train: Dataset | None = None
) -> Dataset:
    """Return the examples with their classes as indices into `labels` or, if `labels` is empty, as float numbers.

    Args:
        dataset: examples with names, integers or a `ClassLabel` in `column`, or with numbers.
        where: name of the split for messages.
        train: training examples with classes as indices; every class of the split must be among theirs.

    Raises:
        BadInput: for labels that are missing or of another type, or classes that are not in the training examples.
    """
    if column not in dataset.column_names:
        raise BadInput(f"{where} has no column '{column}', only {listed(dataset.column_names)}")
    if not labels:
        return _with_numbers(dataset, column, where)
    dataset = _with_indices(dataset, column, labels, where)
    if train is not None:
        # `Dataset.unique` would first copy all columns of a shuffled dataset, images included.
        trained = set(train[column][:])
        if untrained := set(dataset[column][:]) - trained:
            raise BadInput(
                f"{where} has the labels {listed(labels[index] for index in untrained)}; they must be among those of "
                f"training, {listed(labels[index] for index in trained)}"
            )
    return dataset


def _with_indices(dataset: Dataset, column: str, labels: Sequence[str], where: str) -> Dataset:
    feature = dataset.features[column]
    own_names = list(feature.names) if isinstance(feature, ClassLabel) else None
    _check_type(dataset, column, where)
    values = dataset[column][:]
    if own_names is not None:
        names = dict(enumerate(own_names)) | {NO_LABEL: NO_LABEL}
        values = [names.get(value) for value in values]
    refuse_missing(values, column, where)
    if own_names == list(labels):
        return dataset
    indices: dict[object, int] = {}
    for key in _COMPARISON_KEYS:
        counts = Counter(map(key, labels))
        index_of = {key(label): index for index, label in enumerate(labels) if counts[key(label)] == 1}
        # Stricter keys came first, so their matches win.
        indices = {value: index_of[key(value)] for value in set(values) if key(value) in index_of} | indices
    if unknown := set(values) - set(indices):
        raise BadInput(f"{where} has the labels {listed(unknown)}; they must be among {listed(labels, ordered=True)}")
    return with_column(dataset, column, [indices[value] for value in values], ClassLabel(names=list(labels)))


def _with_numbers(dataset: Dataset, column: str, where: str) -> Dataset:
    if isinstance(dataset.features[column], ClassLabel):
        raise BadInput(f"{where}: column '{column}' holds classes; it must hold numbers")
    values = dataset[column][:]
    refuse_missing(values, column, where, _is_empty)
    if wrong := [index for index, value in enumerate(values) if not _is_finite(value)]:
        raise BadInput(
            f"{where}: column '{column}' has no finite number in {len(wrong)} of {len(values)} examples, the first "
            f"'{values[wrong[0]]}' in example {wrong[0]}, counted from 0; write numbers as 1234.5"
        )
    return with_column(dataset, column, [float(value) for value in values], Value("float32"))


def _is_finite(value: object) -> bool:
    """Whether a label is a number, or text with a number, that fits into a float32."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return False
    return isinstance(value, (str, int, float)) and bool(abs(float(value)) <= np.finfo(np.float32).max)


def refuse_missing(
    values: Sequence[object], column: str, where: str, is_missing: Callable[[object], bool] | None = None
) -> None:
    """Refuse a column with missing values; by default these are empty values and the label -1.

    Raises:
        BadInput: with the number of missing values and the index of the first.
    """
    missing = [index for index, value in enumerate(values) if (is_missing or _is_missing)(value)]
    if not missing:
        return
    hint = ""
    if not all(_is_empty(values[index]) for index in missing):
        hint = f" (the label {NO_LABEL} says that there is none, as in GLUE; rename a class of this name)"
    raise BadInput(
        f"{where}: column '{column}' has no value in {len(missing)} of {len(values)} examples, the first of them "
        f"example {missing[0]}, counted from 0{hint}; fill in or remove these rows"
    )


def _is_empty(value: object) -> bool:
    return bool(np.isnan(value)) if isinstance(value, float) else value is None or str(value).strip() == ""


def _is_missing(value: object) -> bool:
    """Whether a label is empty or -1."""
    return _is_empty(value) or (not isinstance(value, (bool, float)) and str(value).strip() == str(NO_LABEL))
