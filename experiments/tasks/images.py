# SPDX-License-Identifier: Apache-2.0
"""Image classification: load images from the Hub or folders, and turn them into model inputs.

Called by run_image.py and eval_sweep.py.

Shapes: B batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.tasks.augmentation import Augmentation
from experiments.tasks.base import (
    LABELS,
    Batch,
    DataArguments,
    PreparedTask,
    Source,
    Splits,
    Task,
    first_examples,
    summarize_data,
    without_column,
)
from experiments.tasks.image_files import (
    AS_STORED,
    IMAGE,
    ROW,
    check_files,
    check_headers,
    describe_unused_files,
    list_files,
    read_image,
    read_image_folder,
    relative_names,
)
from experiments.tasks.labels import LABEL, has_labels, label_ids, label_names, listed, spelling, with_labels
from experiments.tasks.reading import read_dataset, type_name
from experiments.tasks.redrawn_examples import RedrawnExamples
from experiments.tasks.scores import choose_classes

try:
    from transformers import PerceiverImageProcessorPil
except ImportError:  # Its name before transformers 5.4 is that of the class that needs torchvision since then.
    from transformers import PerceiverImageProcessor as PerceiverImageProcessorPil

# Names of columns, in lower case, by which images and labels are found.
IMAGE_NAMES = {"image", "images", "img", "picture", "pixels", "pixel_values"}
LABEL_NAMES = {"label", "labels"}
MODEL_CLASSES = tuple(
    f"ToMePerceiverForImageClassification{inputs}" for inputs in ("ConvProcessing", "Fourier", "Learned")
)


@dataclass
class ImageDataArguments(DataArguments):
    """Arguments that choose the images and their augmentation."""

    _argument_group_name: ClassVar[str] = "images"

    train_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to train on, with a subfolder of images for each class, or with a metadata.csv."},
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Folder to evaluate on, like --train_dir."})
    test_dir: str | None = field(
        default=None, metadata={"help": "Folder to predict, like --train_dir, or with images alone."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={
            "help": "Share of the training images to hold out for evaluation if there is no other split to evaluate on."
        },
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images (default: found by type or name)."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the labels (default: found by type or name)."}
    )
    crop_scale: float = field(
        default=1.0,
        metadata={"help": "Train on random crops with at least this share of an image's area. 1: no crops."},
    )
    horizontal_flip: float = field(
        default=0.0, metadata={"help": "Mirror training images with this probability. 0: never."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, folder in self.folders.items():
            if not Path(folder).is_dir():
                raise BadInput(f"--{name}_dir {folder}: is not a folder; must be an existing one")
            if self.dataset_name is not None:
                raise BadInput(
                    f"--{name}_dir {folder}: cannot be combined with --dataset_name {self.dataset_name}; use "
                    "one of them"
                )
        if not 0 < self.train_val_split < 1:
            raise BadInput(f"--train_val_split {self.train_val_split}: must be a number between 0 and 1")
        if not 0 < self.crop_scale <= 1:
            raise BadInput(f"--crop_scale {self.crop_scale}: must be a number above 0, up to 1")
        if not 0 <= self.horizontal_flip <= 1:
            raise BadInput(f"--horizontal_flip {self.horizontal_flip}: must be a number from 0 to 1")

    @property
    def folders(self) -> dict[str, str]:
        """Folders that the user gave, by split."""
        folders = {"train": self.train_dir, "validation": self.validation_dir, "test": self.test_dir}
        return {split: folder for split, folder in folders.items() if folder is not None}

    @property
    def chosen(self) -> tuple[str, str]:
        """Name and value of the argument that chooses the images.

        Raises:
            BadInput: if none is given.
        """
        if self.dataset_name is not None:
            return "dataset_name", self.dataset_name
        if not self.folders:
            raise BadInput("--dataset_name: not given; use --dataset_name with a Hub id or folder, or --train_dir")
        split, folder = next(iter(self.folders.items()))
        return f"{split}_dir", folder

    @property
    def predicted_folder(self) -> str | None:
        """Folder of the images to predict; their names in results are relative to it."""
        return self.folders.get("test", self.dataset_name)


@dataclass
class ImageTask(Task):
    """Images that are not decoded, in the column `image`, and their classes, in the column `label`.

    Attributes:
        augmentation: random changes of training images.
        file_names: names of the files to predict, as in `PreparedTask`.
    """

    augmentation: Augmentation
    file_names: dict[str, list[str]]

    hub_task: ClassVar[str] = "image-classification"
    input_name: ClassVar[str] = "pixel_values"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """Return the merging class for the checkpoint's class; by default the one with convolutional preprocessing."""
        name = str((config.architectures or [MODEL_CLASSES[0]])[0])
        name = name if name.startswith("ToMe") else f"ToMe{name}"
        if name not in MODEL_CLASSES:
            raise BadInput(
                f"architectures = {config.architectures}: for images, choose from {', '.join(MODEL_CLASSES)} "
                "and the Perceiver classes that these extend"
            )
        return name

    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """Return the image processor called `name`; `None`: one for `config.image_size` and pixels in [-1, 1]."""
        if name is None:
            if config.image_size < 1:
                raise BadInput(
                    f"--config_name, --config_overrides: image_size={config.image_size}; "
                    "must be an integer of 1 or more"
                )
            size = {"height": config.image_size, "width": config.image_size}
            halves = [0.5, 0.5, 0.5]
            processor = PerceiverImageProcessorPil(do_center_crop=False, size=size, image_mean=halves, image_std=halves)
            with TemporaryDirectory() as folder:
                processor.save_pretrained(folder)
                # Load the class that a pipeline would use: with torchvision installed, it resizes differently.
                return AutoImageProcessor.from_pretrained(folder)
        with naming(f"--image_processor_name {name}", Exception):
            return AutoImageProcessor.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Change nothing: the default image processor is made to fit the config."""

    def prepare(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """Turn images into `pixel_values` (3, height, width) and `labels` when they are accessed."""
        ids = label_ids(config, self.labels)
        shape = self._processed_shape(config, processing_class)

        def process(example: dict[str, Any], image: Image.Image) -> dict[str, Any]:
            columns: dict[str, Any] = {"pixel_values": _process_image(processing_class, image, shape)}
            if LABEL in example:
                columns[LABELS] = ids[example[LABEL]]
            return columns

        def read_and_process(batch: dict[str, list]) -> dict[str, Any]:
            examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            processed = [process(example, self._read(example)) for example in examples]
            return {name: [columns[name] for columns in processed] for name in processed[0]}

        def augmented(example: dict[str, Any], index: int, random: np.random.Generator) -> dict[str, Any]:
            return process(example, self.augmentation(self._read(example), random))

        return PreparedTask(
            train=RedrawnExamples(self.train, augmented, seed),
            calibration=None if self.calibration is None else self.calibration.with_transform(read_and_process),
            evaluation={suffix: split.with_transform(read_and_process) for suffix, split in self.evaluation.items()},
            prediction={suffix: split.with_transform(read_and_process) for suffix, split in self.prediction.items()},
            processing_class=processing_class,
            collate=collate_images,
            decode_logits=choose_classes,
            kind="classification",
            labels=self.labels,
            label_ids=ids,
            file_names=self.file_names,
        )

    def _read(self, example: dict[str, Any]) -> Image.Image:
        return read_image(example[IMAGE], f"{example[ROW]} of {self.source.argument}")

    def _processed_shape(self, config: ToMePerceiverConfig, processing_class: Any) -> torch.Size:
        """Return the shape (3, height, width) of the first image after the image processor.

        Raises:
            BadInput: if the model does not accept this shape.
        """
        splits = [self.train, *self.evaluation.values(), *self.prediction.values()]
        shape = _process_image(processing_class, self._read(next(filter(len, splits))[0]), None).shape
        if len(shape) != 3 or shape[0] != 3:
            raise BadInput(
                f"--image_processor_name: makes pixel_values of shape {tuple(shape)}; must be (3, height, width)"
            )
        # Learned position embeddings exist for one image size only.
        if "Learned" in self.model_class_name(config) and shape[1:] != (config.image_size, config.image_size):
            raise BadInput(
                f"--image_processor_name: makes images of {shape[1]} x {shape[2]}; must be the image_size of the "
                f"model, {config.image_size}"
            )
        return shape


def _process_image(processing_class: Any, image: Image.Image, shape: torch.Size | None) -> Tensor:
    """Return the `pixel_values` (3, height, width) that the image processor makes of an image.

    Raises:
        BadInput: if they are not of the given shape.
    """
    with naming("--image_processor_name", Exception):
        values = processing_class([image], return_tensors="pt")["pixel_values"][0]
        if shape is not None and values.shape != shape:
            raise ValueError(
                f"does not make all images the same size: one of {image.width} x {image.height} becomes "
                f"{tuple(values.shape)}, the first {tuple(shape)}; use one that resizes, or images of one size"
            )
    return values


def collate_images(examples: list[dict[str, Any]]) -> Batch:
    """Return `pixel_values` (B, 3, height, width) and, for labelled examples, `labels` (B,)."""
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if LABELS in examples[0]:
        batch[LABELS] = torch.tensor([example[LABELS] for example in examples])
    return batch


def load_image_task(
    arguments: ImageDataArguments,
    predict: bool,
    seed: int,
    evaluate: bool = True,
    classes: Sequence[str] | None = None,
    calibration_samples: int = 0,
    **download: Any,
) -> ImageTask:
    """Load the images that the arguments choose; check the first images, and decode each when it is accessed.

    Arguments and errors are those of `load_glue_task`, with two differences: `seed` also decides which training images
    are held out for evaluation, and whenever there are training images, there is an evaluation split.
    """
    images = _read_images(arguments, classes, download)
    splits = images.splits
    train = images.take("train") if "train" in splits.by_name else None
    evaluation, prediction, split = {}, {}, "test"
    is_held_out = train is not None and "validation" not in splits.by_name and not splits.has_labels("test")
    if is_held_out:
        train, evaluation[""] = _hold_out_share(arguments, images, seed)
    elif train is not None or evaluate:
        split = splits.choose_evaluated()
        evaluation[""] = images.take(split, arguments.max_eval_samples, train)
    if predict:
        prediction[""] = images.take("test", arguments.max_predict_samples, train, may_lack_labels=True)
    calibration = splits.take_unlabelled("test", [] if is_held_out or not evaluation else [split], calibration_samples)
    if train is not None:
        train = first_examples(train.shuffle(seed=seed), arguments.max_train_samples)
    evaluated = "evaluated (held out of train)" if is_held_out else "evaluated"
    examples = {"train": train, evaluated: evaluation.get(""), "predicted": prediction.get("")}
    read = {purpose: dataset for purpose, dataset in examples.items() if dataset is not None}
    check_headers([*read.values(), *([] if calibration is None else [calibration])], splits.argument)
    left_out = [f"left out: {'; '.join(images.left_out)}"] if images.left_out else []
    return ImageTask(
        source=Source.of_dataset(arguments.chosen[1], arguments.dataset_config_name, split),
        labels=images.labels,
        train=next(iter(read.values())).select([]) if train is None else train,
        evaluation=evaluation,
        prediction=prediction,
        calibration=calibration,
        main_metric="accuracy",
        summary=summarize_data(f"{splits.argument}: {images.used}", read, images.labels) + left_out,
        augmentation=Augmentation(arguments.crop_scale, arguments.horizontal_flip),
        file_names={suffix: relative_names(split, arguments.predicted_folder) for suffix, split in prediction.items()},
    )


def _hold_out_share(arguments: ImageDataArguments, images: _Images, seed: int) -> tuple[Dataset, Dataset]:
    """Divide the training images into images to train on and held-out images to evaluate on."""
    share = f"--train_val_split {arguments.train_val_split}"
    with naming(share, ValueError):
        parts = images.take("train").train_test_split(arguments.train_val_split, seed=seed)
    evaluation = first_examples(parts["test"], arguments.max_eval_samples)
    where = f"{images.splits.argument}: the images of {share}"
    return parts["train"], with_labels(evaluation, LABEL, images.labels, where, parts["train"])


@dataclass(frozen=True)
class _Images:
    """Images that are not decoded, with their classes.

    Attributes:
        splits: splits with the columns `image`, `row` and, for labelled data, `label`.
        label: name of the column with the labels in the data.
        labels: names of the classes.
        used: description of the columns that are used, for the user.
        left_out: descriptions of files and labels that are not used, for the user.
    """

    splits: Splits
    label: str
    labels: list[str]
    used: str
    left_out: list[str]

    def take(
        self, name: str, count: int | None = None, train: Dataset | None = None, may_lack_labels: bool = False
    ) -> Dataset:
        """Return the first `count` images of a split, with their classes as indices into `labels`.

        Args:
            name: name of the split.
            count: maximum number of images; `None`: all.
            train: training images, which must have all classes of the split.
            may_lack_labels: whether the split may be unlabelled; the result then has no column `label`.
        """
        split, where = self.splits.take(name, count), self.splits.describe(name)
        if may_lack_labels and not has_labels(split, LABEL):
            return without_column(split, LABEL)
        if LABEL not in split.column_names:
            raise BadInput(
                f"{where} has no column '{self.label}'; name the column of the labels with --label_column_name"
            )
        return with_labels(split, LABEL, self.labels, where, train)


def _read_images(arguments: ImageDataArguments, classes: Sequence[str] | None, download: dict[str, Any]) -> _Images:
    name, chosen = arguments.chosen
    argument, folders = f"--{name} {chosen}", arguments.folders
    is_local = not folders and Path(chosen).is_dir()
    own = {split: f"--{split}_dir {folder}" for split, folder in folders.items()}
    if folders and "train" not in folders and classes is None:
        raise BadInput(
            f"--train_dir: not given beside {argument}; give it, or only evaluate or predict, without a budget"
        )
    left_out: list[str] = []
    by_name: dict[str, Dataset] = {}
    for split, folder in folders.items():
        by_name[split], lines = read_image_folder(own[split], folder, split == "test", **download)
        left_out += lines
    if is_local:
        list_files(argument, Path(chosen))  # refuse names that are not UTF-8
    if not folders:
        by_name = read_dataset(argument, chosen, arguments.dataset_config_name, overwrite_cache=False, **download)
    needs_train = "train" in by_name or classes is None
    first = Splits(argument, by_name).take("train" if needs_train else next(iter(by_name)))
    image = _find_image_column(first.features, argument, arguments.image_column_name)
    label = _find_label_column(first.features, image, argument, arguments.label_column_name, needs_train)
    labels = _read_class_names(first, label, argument) if needs_train else list(classes or ())
    by_name = {split: _select_columns(images, image, label, argument, split) for split, images in by_name.items()}
    if is_local:
        left_out = describe_unused_files(argument, chosen, by_name.values(), labels)
    if "test" in by_name and _has_other_labels(by_name["test"], labels):
        by_name["test"] = by_name["test"].remove_columns(LABEL)
        left_out.append("the labels of split 'test', none of which is a class of training")
    features = next(iter(by_name.values())).features
    used = f"images in column '{image}', " + (f"labels in column '{label}'" if LABEL in features else "no labels")
    if folders and isinstance(features.get(LABEL), ClassLabel):
        used = "a class for each folder of images"
    return _Images(Splits(argument, by_name, own), label, labels, used, left_out)


def _select_columns(dataset: Dataset, image: str, label: str, argument: str, name: str) -> Dataset:
    """Return images that are not decoded, with the columns `image`, `row` and, for labelled data, `label`.

    Raises:
        BadInput: for a missing column, missing files or a column of another type.
    """
    where = f"{argument}: split '{name}'"
    if image not in dataset.column_names:
        raise BadInput(f"{where} has no column '{image}', only {listed(dataset.column_names)}")
    wanted = {old: new for old, new in ((image, IMAGE), (label, LABEL)) if old in dataset.column_names}
    dataset = dataset.select_columns(list(wanted))
    dataset = dataset.rename_columns({old: new for old, new in wanted.items() if old != new})
    with naming(f"{where}, column '{image}'", Exception):
        dataset = dataset.cast_column(IMAGE, AS_STORED)
    check_files(dataset)
    return dataset.add_column(ROW, [f"{row} of split '{name}'" for row in range(len(dataset))])


def _has_other_labels(split: Dataset, labels: Sequence[str]) -> bool:
    """Whether a split has labels, but none is a class of training: placeholders for hidden labels."""
    feature = split.features.get(LABEL)
    if not isinstance(feature, (ClassLabel, Value)) or not has_labels(split, LABEL):
        return False  # labels of another type are refused when they are read
    own = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
    names = {spelling(own.get(value, value)) for value in split.unique(LABEL) if value is not None}
    return not names & set(map(spelling, labels))


def _find_image_column(features: Features, argument: str, given: str | None) -> str:
    """Find the column of images by its name or type."""
    files = [name for name in features if _holds_files(features[name])]
    named = [name for name in files or features if name.strip().lower() in IMAGE_NAMES]
    if given is None and not files and not named:
        raise BadInput(f"{argument}: has no column of images, only {listed(features)}")
    typed = [name for name in features if isinstance(features[name], ImageFeature)]
    given = _choose_column(f"{argument}: images: --image_column_name", given, [typed, named], files, features)
    if not _holds_files(features[given]):
        raise BadInput(
            f"{argument}: column '{given}' holds {type_name(features[given])}; must hold images, as datasets.Image or "
            "as the bytes of image files; put paths into the column file_name of a metadata.csv beside the files"
        )
    return given


def _find_label_column(features: Features, image: str, argument: str, given: str | None, is_needed: bool) -> str:
    """Find the column of labels by its name or type; if labels are not needed, it may be missing."""
    columns = [name for name in features if name != image]
    named = [name for name in columns if name.strip().lower() in LABEL_NAMES]
    if not is_needed:
        return given or (named[0] if len(named) == 1 else LABEL)
    if given is None and not columns:
        raise BadInput(
            f"{argument}: has images but no labels; put the images of every split into one folder for each class, all "
            "at the same depth, or name their classes in a metadata.csv beside them; use --test_dir for unlabelled "
            "images, with --train_dir"
        )
    typed = [name for name in columns if isinstance(features[name], ClassLabel)]
    return _choose_column(f"{argument}: labels: --label_column_name", given, [typed, named], [], columns)


def _choose_column(
    option: str, given: str | None, likely: list[list[str]], fitting: list[str], columns: Collection[str]
) -> str:
    """Return the column that the user gave, or else the only candidate.

    Args:
        option: start of an error message: the argument that chose the data, then the one that names the column.
        given: the column that the user gave, if any.
        likely: two lists: columns with a matching type, and columns with a matching name.
        fitting: candidates if no column is likely.
        columns: all columns to choose from.
    """
    if given is not None:
        if given not in columns:
            raise BadInput(f"--{option.partition('--')[2]} {given}: is not a column; choose from {listed(columns)}")
        return given
    typed, named = likely
    both = [name for name in named if name in typed]
    candidates = both if len(both) == 1 else list(dict.fromkeys(typed + named)) or fitting
    if len(candidates) != 1:
        raise BadInput(
            f"{option} is needed, since several columns or none may be meant; choose from "
            f"{listed(candidates or columns)}"
        )
    return candidates[0]


def _read_class_names(train: Dataset, label: str, argument: str) -> list[str]:
    """Return the names of the classes in a column; refuse numbers with a point."""
    labels = label_names(train, label, f"{argument}: split 'train'", regression=False)
    if labels is None or type_name(train.features[label]).startswith("float"):
        raise BadInput(f"{argument}: column '{label}' holds numbers with a point; must hold names or integers")
    return labels


def _holds_files(feature: Any) -> bool:
    """Whether a column holds images or the bytes of image files, also in the form in which pandas stores them."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, ImageFeature) or type_name(feature) in ("binary", "large_binary")
