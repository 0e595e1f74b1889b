# SPDX-License-Identifier: Apache-2.0
"""Classes by their names: what the data call them, what a checkpoint calls them, and which is which."""

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
from experiments.tasks.reading import kind_of, with_column

logger = logging.getLogger(__name__)

LABEL = "label"
"""The column with a class or a number for each example."""
NO_LABEL = -1
"""What test splits have in place of labels that are kept back."""
SHOWN_NAMES = 20
# What a label must look like to be a number, to be a class that is known by its value, and to be taken for a number by
# people: 2,5 or 1 000 or 50%.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)
_INTEGER = re.compile(r"(?:LABEL_)?([-+]?\d+)(?:\.0*)?", re.ASCII)
_MISSING_WORDS = {"n/a", "na", "#n/a", "nan", "none", "null", "nil", "-", "--", "?", "unknown", "missing", "."}
_LIKE_A_NUMBER = re.compile(r"[-+\u2212]?[\d.][\d.,'\s\u2019]*%?")


def listed(names: Iterable[object], ordered: bool = False) -> str:
    """Return names in quotes, on one line, sorted unless they are in an order; of many, the first few."""
    quoted = [
        f"'{name}'" if name.isprintable() else repr(name)
        for name in (map(str, names) if ordered else sorted(map(str, names)))
    ]
    more = len(quoted) - SHOWN_NAMES
    return ", ".join(quoted[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def spelling(name: object) -> str:
    """Return a name as it is compared: in lower case, composed (NFC), with "-" and " " as "_"."""
    return re.sub(r"[-_\s]+", "_", _composed(name)).casefold()


def _composed(name: object) -> str:
    """Return a name without spaces around it, in one form of Unicode: macOS writes "é" as two characters."""
    return unicodedata.normalize("NFC", str(name)).strip(f"{string.whitespace}\xa0\u200b\u2060\ufeff")


def _identity(name: object) -> str | int:
    """Return what tells two classes apart: the value of an integer or of LABEL_3, and otherwise the name itself."""
    composed = _composed(name)
    if found := _INTEGER.fullmatch(composed):
        return int(found[1])
    return composed.casefold() if composed.casefold() in ("true", "false") else composed


# What must be equal for two names to be of one class, the strictest first.
_SAMENESS: tuple[Callable[[object], Hashable], ...] = (str, _identity, spelling)


def checkpoint_labels(config: ToMePerceiverConfig) -> list[str]:
    """Return a checkpoint's names by its index: of `id2label`, or of `label2id` where that alone was set."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    index_of = {int(index): str(name) for name, index in (config.label2id or {}).items()}
    if says_nothing(names) and sorted(index_of) == list(range(len(names))):
        return [index_of[index] for index in range(len(names))]
    return names


def matched(labels: Sequence[str], checkpoint: Sequence[str]) -> list[int] | None:
    """Return the checkpoint's index of each of the data's labels, or `None` if they are not the same names.

    Numbers go by their value, and LABEL_3 is 3. Case and "-", "_" and " " make no other name. Names that only say an
    index (LABEL_0 or 0) match any names that are no numbers, in their order.

    Args:
        labels: the data's.
        checkpoint: the checkpoint's, by its index.
    """
    if len(labels) != len(checkpoint):
        return None
    for same in _SAMENESS:
        names, others = ([same(name) for name in side] for side in (labels, checkpoint))
        if set(names) == set(others) and len(set(names)) == len(names):
            return [others.index(name) for name in names]
    both_numbers = all(isinstance(_identity(name), int) for name in (*labels, *checkpoint))
    if not both_numbers and (says_nothing(labels) or says_nothing(checkpoint)):
        return list(range(len(labels)))
    return None


def says_nothing(labels: Sequence[str]) -> bool:
    """Whether names are only indices: LABEL_0, LABEL_1, ... or 0, 1, ..."""
    return all(name in (f"LABEL_{index}", str(index)) for index, name in enumerate(labels))


def warn_of_order(labels: Sequence[str], checkpoint: Sequence[str], where: str) -> None:
    """Warn if labels go by their order, since one side's names say nothing."""
    if all(set(map(same, labels)) != set(map(same, checkpoint)) for same in (_identity, spelling)):
        logger.warning(
            "%s: its labels %s are taken for the data's %s in this order, since their names say nothing of each other",
            where, listed(checkpoint, ordered=True), listed(labels, ordered=True),
        )  # fmt: skip


def label_ids(config: ToMePerceiverConfig, labels: Sequence[str]) -> list[int]:
    """Return the model's index of each of the data's labels.

    Raises:
        BadInput: if the model's are others.
    """
    found = matched(labels, checkpoint_labels(config))
    if found is None:
        raise BadInput(f"id2label = {config.id2label}: must be the data's labels, {listed(labels)}")
    return found


def label_names(dataset: Dataset, column: str, where: str, regression: bool | None = None) -> list[str] | None:
    """Return the names of the classes of a column, two or more, or `None` if it holds numbers to predict.

    Whole numbers are in the order of their values, and other names in that of their letters.

    Args:
        dataset, column: the labels.
        where: what messages call the data.
        regression: whether the labels are numbers to predict. `None`: numbers with a point are, if not all are whole.

    Raises:
        BadInput: for a column that holds neither, or of which this cannot be told.
    """
    _check_kind(dataset, column, where)
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        if regression:
            raise BadInput(f"--do_regression true: {where}: column '{column}' holds classes, {listed(feature.names)}")
        names = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in feature.names))
    else:
        found = [value for value in dataset.unique(column) if not _is_empty(value)]
        if regression or (regression is None and _are_numbers(list(map(str, found)), len(dataset), column, where)):
            return None
        # The Hub's tables say -1 of a label that is not there, and a class of that name would be none.
        names = _distinct([str(value) for value in found if not _is_missing(value)], column, where)
    if len(names) < 2:
        refuse_missing(dataset[column][:], column, where)
        raise BadInput(f"{where}: column '{column}' has the class {listed(names)} alone; it must have two or more")
    return names


def _check_kind(dataset: Dataset, column: str, where: str) -> None:
    kind = kind_of(dataset.features[column])
    if not re.fullmatch(r"ClassLabel|bool|(large_)?string|(u?int|float)\d+", kind):
        raise BadInput(
            f"{where}: column '{column}' holds {kind}; it must hold a name, an integer or a number with a point for "
            "each example"
        )


def _are_numbers(values: list[str], count: int, column: str, where: str) -> bool:
    """Whether the distinct labels of `count` examples are numbers to predict.

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
            "which are none; remove or mend these rows, or use --do_regression false if all are names of classes"
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
            "or use --do_regression false if all are names of classes"
        )
    if len(values) == len(numbers) > max(SHOWN_NAMES, count / 2):
        raise BadInput(f"{where}: column '{column}' holds {len(values)} whole numbers in {count} examples; {remedy}")
    return False


def _distinct(names: list[str], column: str, where: str) -> list[str]:
    """Return the names of classes without those that only differ in spaces around them or in how Unicode writes them.

    Raises:
        BadInput: for one number in two spellings.
    """
    first: dict[str | int, str] = {}
    for name in names:
        known = first.setdefault(_identity(name), name.strip())
        if isinstance(_identity(name), int) and known != name.strip():
            raise BadInput(
                f"{where}: column '{column}' has one number in two spellings, '{known}' and '{name.strip()}'; write "
                "each class in one way"
            )
    if all(isinstance(identity, int) for identity in first):
        return [first[identity] for identity in sorted(first)]
    by_spelling: dict[str, str] = {}
    for name in sorted(first.values()):
        if (other := by_spelling.setdefault(spelling(name), name)) != name:
            logger.warning("%s: column '%s' has '%s' and '%s' as two classes", where, column, other, name)
    return sorted(first.values())


def has_labels(dataset: Dataset, column: str) -> bool:
    """Whether a split has any labels: test splits may lack the column, or have -1 or nothing everywhere."""
    if column not in dataset.features:
        return False
    if not isinstance(dataset.features[column], (Value, ClassLabel)):
        return True  # of a kind that is refused where they are read
    return not all(_is_missing(value) or value in (NO_LABEL, f"{NO_LABEL}.0") for value in dataset.unique(column))


def with_labels(
    dataset: Dataset, column: str, labels: Sequence[str], where: str, train: Dataset | None = None
) -> Dataset:
    """Return the examples with their classes as places in `labels`, or, if that is empty, with a number for each.

    Args:
        dataset: with classes in `column` as names, integers, or places in the names of its own; or with numbers.
        where: what messages call the split.
        train: training examples with their labels as places, which must have all the classes of the split.

    Raises:
        BadInput: for labels that are missing or of another kind, or classes that are not among those of training.
    """
    if column not in dataset.column_names:
        raise BadInput(f"{where} has no column '{column}', only {listed(dataset.column_names)}")
    if not labels:
        return _with_numbers(dataset, column, where)
    dataset = _with_places(dataset, column, labels, where)
    if train is not None:
        # Dataset.unique would first copy all columns of a dataset that was shuffled, its images too.
        seen, asked = set(train[column][:]), set(dataset[column][:])
        if unseen := asked - seen:
            raise BadInput(
                f"{where} has the labels {listed(labels[index] for index in unseen)}; they must be among those of "
                f"training, {listed(labels[index] for index in seen)}"
            )
    return dataset


def _with_places(dataset: Dataset, column: str, labels: Sequence[str], where: str) -> Dataset:
    feature = dataset.features[column]
    own_names = list(feature.names) if isinstance(feature, ClassLabel) else None
    _check_kind(dataset, column, where)
    values = dataset[column][:]
    if own_names is not None:
        names = dict(enumerate(own_names)) | {NO_LABEL: NO_LABEL}
        values = [names.get(value) for value in values]
    refuse_missing(values, column, where)
    if own_names == list(labels):
        return dataset
    places: dict[object, int] = {}
    for same in _SAMENESS:
        counts = Counter(map(same, labels))
        place_of = {same(label): place for place, label in enumerate(labels) if counts[same(label)] == 1}
        places = {value: place_of[same(value)] for value in set(values) if same(value) in place_of} | places
    if unknown := set(values) - set(places):
        raise BadInput(f"{where} has the labels {listed(unknown)}; they must be among {listed(labels, ordered=True)}")
    return with_column(dataset, column, [places[value] for value in values], ClassLabel(names=list(labels)))


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
    """Whether a label is a number that a float32 holds, or a text that says one."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return False
    return isinstance(value, (str, int, float)) and bool(abs(float(value)) <= np.finfo(np.float32).max)


def refuse_missing(
    values: Sequence[object], column: str, where: str, is_missing: Callable[[object], bool] | None = None
) -> None:
    """Refuse the values of a column if any is missing: by default, if it is empty or a label that says so.

    Raises:
        BadInput: with how many are missing and which is the first.
    """
    missing = [index for index, value in enumerate(values) if (is_missing or _is_missing)(value)]
    if not missing:
        return
    hint = ""
    if not all(_is_empty(values[index]) for index in missing):
        hint = f" (the label {NO_LABEL} says that there is none, as in GLUE; a class needs another name)"
    raise BadInput(
        f"{where}: column '{column}' has no value in {len(missing)} of {len(values)} examples, the first of them "
        f"example {missing[0]}, counted from 0{hint}; fill or remove these rows"
    )


def _is_empty(value: object) -> bool:
    return bool(np.isnan(value)) if isinstance(value, float) else value is None or str(value).strip() == ""


def _is_missing(value: object) -> bool:
    """Whether a label is empty or says that there is none."""
    return _is_empty(value) or (not isinstance(value, (bool, float)) and str(value).strip() == str(NO_LABEL))
