# SPDX-License-Identifier: Apache-2.0
"""Columns of image datasets: which has the images, which the labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from experiments.errors import BadInput, naming
from experiments.tasks.image_reading import AS_STORED, IMAGE, LABEL, ROW
from experiments.tasks.labels import (
    check_none_missing,
    check_trained,
    has_labels,
    label_names,
    listed,
    spelling,
    with_label_ids,
)

# Names that say what is in a column, in lower case.
IMAGE_NAMES = {"image", "images", "img", "picture", "pixels", "pixel_values"}
LABEL_NAMES = {"label", "labels"}


@dataclass(frozen=True)
class ImageColumns:
    """Columns that every split has.

    Attributes:
        image, label: columns with the images and classes.
        labels: names of the classes.
    """

    image: str
    label: str
    labels: list[str]

    @classmethod
    def found(
        cls, split: Dataset, argument: str, image: str | None, label: str | None, classes: Sequence[str] | None
    ) -> ImageColumns:
        """Find the columns of a split.

        Args:
            split: the training split, or any other if the classes are known.
            argument: that chose the data, with its value, for error messages.
            image, label: columns that the user named, if any.
            classes: names of the classes, if they are known; then there may be no labels.

        Raises:
            BadInput: for columns that are not there, of another kind, or not certain, or fewer than two classes.
        """
        features = split.features
        image = _image_column(features, argument, image)
        if classes is None:
            label = _label_column([name for name in features if name != image], features, argument, label)
            return cls(image, label, _class_names(split, label, argument))
        named = _named(features, LABEL_NAMES)
        return cls(image, label or (named[0] if len(named) == 1 else LABEL), list(classes))

    def described(self, split: Dataset, in_folders: bool) -> str:
        """Say which column is what, for a user.

        Args:
            split: as it is stored.
            in_folders: whether it is of folders, where a class is a folder unless a metadata file names it.
        """
        if in_folders and isinstance(split.features.get(LABEL), ClassLabel):
            return "a class for each folder of images"
        labels = f"labels in column '{self.label}'" if LABEL in split.features else "no labels"
        return f"images in column '{self.image}', {labels}"

    def stored(self, split: Dataset, where: str) -> Dataset:
        """Return the images as they are stored, in the column `image`, their labels, if any, in `label`, and `row`.

        Args:
            split: as it was read.
            where: what it is, for the message.

        Raises:
            BadInput: for images that are missing or of another kind.
        """
        if self.image not in split.column_names:
            raise BadInput(f"{where} has no column '{self.image}', only {listed(split.column_names)}")
        wanted = {old: new for old, new in ((self.image, IMAGE), (self.label, LABEL)) if old in split.column_names}
        split = split.select_columns(list(wanted))
        split = split.rename_columns({old: new for old, new in wanted.items() if old != new})
        with naming(f"{where}, column '{self.image}'", Exception):
            split = split.cast_column(IMAGE, AS_STORED)
        return split.add_column(ROW, range(len(split)))

    def has_other_labels(self, split: Dataset) -> bool:
        """Whether a split that is `stored` has labels, and none of them is a class, as where they are kept back."""
        if not has_labels(split, LABEL):
            return False
        feature = split.features[LABEL]
        if not isinstance(feature, (ClassLabel, Value)):
            return False  # of a kind that is refused where labels are read
        values = [value for value in split.unique(LABEL) if value is not None]
        own = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
        names = [own.get(value, value) for value in values]
        return not set(map(spelling, names)) & set(map(spelling, self.labels))

    def with_classes(self, split: Dataset, where: str, train: Dataset | None, may_lack: bool) -> Dataset:
        """Return a split that is `stored` with the places of its labels in `labels`.

        Args:
            split: as it is stored.
            where: what it is, for the message.
            train: what was trained on, which must have all the classes.
            may_lack: whether labels may be kept back; then there is no column of them.

        Raises:
            BadInput: for labels that are missing, or classes that training has not.
        """
        if may_lack and not has_labels(split, LABEL):
            return split.select_columns([IMAGE, ROW])
        if LABEL not in split.column_names:
            raise BadInput(f"{where} has no column '{self.label}'; name that of the labels with --label_column_name")
        split = with_label_ids(split, LABEL, self.labels, where)
        if train is not None:
            check_trained(split, train, LABEL, where)
        return split


def _image_column(features: Features, argument: str, given: str | None) -> str:
    if given is None:
        typed = [name for name in features if isinstance(features[name], ImageFeature)]
        files = [name for name in features if _holds_files(features, name)]
        named = _named(files or list(features), IMAGE_NAMES)
        if not files and not named:
            raise BadInput(f"{argument}: has no column of images, only {listed(features)}")
        given = _certain(typed, named, files, features, f"{argument}: images: --image_column_name")
    _check_there(given, features, "--image_column_name")
    if not _holds_files(features, given):
        raise BadInput(
            f"{argument}: column '{given}' holds {_kind(features, given)}; must be images, as datasets.Image or as the "
            "bytes of image files (paths of files go into the column file_name of a metadata.csv beside them)"
        )
    return given


def _label_column(columns: list[str], features: Features, argument: str, given: str | None) -> str:
    if given is None:
        if not columns:
            raise BadInput(
                f"{argument}: has images and no labels; put the images of every split into one folder for each class, "
                "all as deep, or name their classes in a metadata.csv beside them; those without labels go into "
                "--test_dir, beside --train_dir"
            )
        typed = [name for name in columns if isinstance(features[name], ClassLabel)]
        named = _named(columns, LABEL_NAMES)
        given = _certain(typed, named, [], columns, f"{argument}: labels: --label_column_name")
    _check_there(given, features, "--label_column_name")
    return given


def _class_names(train: Dataset, label: str, argument: str) -> list[str]:
    check_none_missing(train[label], label, f"{argument}: split 'train'")
    if _kind(train.features, label).startswith("float"):
        raise BadInput(f"{argument}: column '{label}' holds numbers with a point; must be names or integers")
    labels = label_names(train, label, argument, regression=False) or []
    labels = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in labels))
    if len(labels) < 2:
        raise BadInput(f"{argument}: column '{label}' has the class {listed(labels)} alone; must have two or more")
    return labels


def _named(columns: Collection[str], names: set[str]) -> list[str]:
    return [column for column in columns if column.strip().lower() in names]


def _certain(typed: list[str], named: list[str], fitting: list[str], columns: Collection[str], argument: str) -> str:
    """Choose a column by its type and name.

    Args:
        typed: columns whose type says what they are.
        named: columns whose name does.
        fitting: columns that may be it; a single one is, if nothing else is typed or named.
        columns: all to choose from, for the message.
        argument: that the user may give instead.

    Raises:
        BadInput: if several are as likely, or none is.
    """
    both = [name for name in named if name in typed]
    candidates = both if len(both) == 1 else list(dict.fromkeys(typed + named)) or fitting
    if len(candidates) != 1:
        raise BadInput(f"{argument} is needed, since no column is certain; choose from {listed(candidates or columns)}")
    return candidates[0]


def _check_there(column: str, columns: Collection[str], argument: str) -> None:
    if column not in columns:
        raise BadInput(f"{argument} {column}: there is no such column; choose from {listed(columns)}")


def _holds_files(features: Features, column: str) -> bool:
    """Whether a column holds images, or the bytes of image files, as pandas stores them too."""
    feature = features[column]
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, ImageFeature) or _kind(features, column) in ("binary", "large_binary")


def _kind(features: Features, column: str) -> str:
    feature = features[column]
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
