# SPDX-License-Identifier: Apache-2.0
"""Image classification: the data and what the model sees of it.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import AutoImageProcessor, PerceiverImageProcessorPil

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.tasks.augmentation import Augmentation
from experiments.tasks.base import (
    Batch,
    PreparedTask,
    SampleArguments,
    Source,
    Task,
    evaluated_split,
    first_examples,
    read_lines,
    take_split,
    unseen_split,
)
from experiments.tasks.image_columns import ImageColumns
from experiments.tasks.image_folders import check_names, left_out_of_dataset, read_image_folder, relative_names
from experiments.tasks.image_reading import IMAGE, LABEL, check_images, read_image
from experiments.tasks.labels import check_trained, has_labels, label_ids
from experiments.tasks.reading import read_dataset
from experiments.tasks.redrawn_examples import NextEpoch, RedrawnExamples
from experiments.tasks.scores import classes

MODEL_CLASSES = tuple(
    f"ToMePerceiverForImageClassification{inputs}" for inputs in ("ConvProcessing", "Fourier", "Learned")
)


@dataclass
class ImageDataArguments(SampleArguments):
    """Which images."""

    _argument_group_name: ClassVar[str] = "images"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder, as `datasets.load_dataset` takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with a folder of images for each class, or with a metadata.csv."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, or a folder of images, to predict."})
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training images to evaluate on, if there is no validation or test split."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images; by default found by its type or name."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the labels; by default found by its type or name."}
    )
    crop_scale: float = field(
        default=1.0,
        metadata={
            "help": "Train on crops of a random size, from this share of an image's area to all of it. 1: no crops."
        },
    )
    horizontal_flip: float = field(
        default=0.0, metadata={"help": "Mirror a training image with this probability. 0: never."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, folder in self.folders.items():
            if not Path(folder).is_dir():
                raise BadInput(f"--{name}_dir {folder}: there is no such folder")
            if self.dataset_name is not None:
                raise BadInput(
                    f"--{name}_dir {folder}: does not go with --dataset_name {self.dataset_name}; use one of them"
                )
        if not 0 < self.train_val_split < 1:
            raise BadInput(f"--train_val_split {self.train_val_split}: must be a number between 0 and 1")
        if not 0 < self.crop_scale <= 1:
            raise BadInput(f"--crop_scale {self.crop_scale}: must be a number above 0, up to 1")
        if not 0 <= self.horizontal_flip <= 1:
            raise BadInput(f"--horizontal_flip {self.horizontal_flip}: must be a number from 0 to 1")

    @property
    def folders(self) -> dict[str, str]:
        """The folders that are given, by their split."""
        folders = {"train": self.train_dir, "validation": self.validation_dir, "test": self.test_dir}
        return {split: folder for split, folder in folders.items() if folder is not None}

    @property
    def chosen(self) -> tuple[str, str]:
        """The argument that chooses the images, and its value.

        Raises:
            BadInput: if none is given.
        """
        if self.dataset_name is not None:
            return "dataset_name", self.dataset_name
        if not self.folders:
            raise BadInput("--dataset_name: not given; use a Hub id or a folder (or --train_dir FOLDER)")
        split, folder = next(iter(self.folders.items()))
        return f"{split}_dir", folder

    @property
    def predicted(self) -> str | None:
        """The folder that the names of predicted files are relative to."""
        return self.folders.get("test", self.dataset_name)


@dataclass
class ImageTask(Task):
    """Images as they are stored, in the column `image`, and a class for each, in the column `label`.

    Attributes:
        augmentation: of training images.
        file_names: as in `PreparedTask`.
    """

    augmentation: Augmentation
    file_names: dict[str, list[str]]

    hub_task: ClassVar[str] = "image-classification"
    input_name: ClassVar[str] = "pixel_values"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """The class that the checkpoint was saved from, ours for a stock one; for none, convolution first."""
        name = str((config.architectures or [MODEL_CLASSES[0]])[0])
        name = name if name.startswith("ToMe") else f"ToMe{name}"
        if name not in MODEL_CLASSES:
            raise BadInput(
                f"architectures = {config.architectures}: choose for images from {', '.join(MODEL_CLASSES)} and the "
                "stock classes they come from"
            )
        return name

    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """The image processor; with no name, one that resizes to `config.image_size` and scales to [-1, 1]."""
        if name is None:
            side = config.image_size
            if side < 1:
                raise BadInput(f"--config_name, --config_overrides: image_size={side}; must be an integer of 1 or more")
            processor = PerceiverImageProcessorPil(
                do_center_crop=False,
                size={"height": side, "width": side},
                image_mean=[0.5, 0.5, 0.5],
                image_std=[0.5, 0.5, 0.5],
            )
            with TemporaryDirectory() as folder:
                processor.save_pretrained(folder)
                # The class that a pipeline takes, which resizes otherwise where torchvision is installed.
                return AutoImageProcessor.from_pretrained(folder)
        with naming(f"--image_processor_name {name}", Exception):
            return AutoImageProcessor.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Nothing: it is the image processor that follows the config."""

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """`pixel_values` (3, height, width) and `labels`, made on access."""
        ids = label_ids(config, self.labels)

        def process(batch: dict[str, list]) -> dict[str, Any]:
            columns = {"pixel_values": processing_class(batch[IMAGE], return_tensors="pt")["pixel_values"]}
            if LABEL in batch:
                columns["labels"] = [ids[label] for label in batch[LABEL]]
            return columns

        def read_and_process(batch: dict[str, list]) -> dict[str, Any]:
            return process(batch | {IMAGE: [read_image(stored, "of a batch") for stored in batch[IMAGE]]})

        def augmented(example: dict[str, Any], index: int, random: np.random.Generator) -> dict[str, Any]:
            image = self.augmentation(read_image(example[IMAGE], f"{index} of training"), random)
            columns = process({name: [value] for name, value in (example | {IMAGE: image}).items()})
            return {name: values[0] for name, values in columns.items()}

        _check_processed(self, config, processing_class)
        train = RedrawnExamples(self.train, augmented, seed)
        return PreparedTask(
            train=train,
            calibration=None if self.calibration is None else self.calibration.with_transform(read_and_process),
            evaluation={suffix: split.with_transform(read_and_process) for suffix, split in self.evaluation.items()},
            prediction={suffix: split.with_transform(read_and_process) for suffix, split in self.prediction.items()},
            processing_class=processing_class,
            collate=collate_images,
            predicted=classes,
            kind="classification",
            labels=self.labels,
            label_ids=ids,
            callbacks=[NextEpoch(train)],
            file_names=self.file_names,
        )


def collate_images(examples: list[dict[str, Any]]) -> Batch:
    """`pixel_values` (B, 3, height, width) and, if there are any, `labels` (B,)."""
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


def _check_processed(task: ImageTask, config: ToMePerceiverConfig, processing_class: Any) -> None:
    """Check that the image processor makes what the model takes, all of one size."""

    def processed(image: Image.Image) -> tuple[int, ...]:
        return tuple(processing_class([image], return_tensors="pt")["pixel_values"].shape)

    splits = [task.train, *task.evaluation.values(), *task.prediction.values()]
    image = read_image(next(split for split in splits if len(split))[0][IMAGE], "0 of the first split")
    with naming("--image_processor_name", Exception):
        shape = processed(image)
        side = config.image_size
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"makes pixel_values of shape {shape}; must be (images, 3, height, width)")
        # Positions that are learned are those of one size.
        if "Learned" in task.model_class_name(config) and shape[2:] != (side, side):
            raise ValueError(f"makes images of {shape[2]} x {shape[3]}; must be the image_size of the model, {side}")
        if processed(Image.new("RGB", (image.width + 8, image.height + 24))) == shape:
            return
    for split in splits:
        for stored in split.select_columns(IMAGE):
            other = read_image(stored[IMAGE], "of a split")
            if other.size != image.size and processed(other) != shape:
                raise BadInput(
                    f"--image_processor_name: does not make images of {image.width} x {image.height} and "
                    f"{other.width} x {other.height} the same size; use one that resizes, or images of one size"
                )


def load_image_task(
    arguments: ImageDataArguments,
    predict: bool,
    seed: int,
    evaluate: bool = True,
    classes: Sequence[str] | None = None,
    calibration_samples: int = 0,
    **download: Any,
) -> ImageTask:
    """Load the images that the arguments mean.

    Args:
        arguments: which images.
        predict: whether the test split is needed too.
        seed: for a validation split made here and for `max_train_samples`.
        evaluate: whether anything is evaluated; beside images to train on, something always is.
        classes: those of the checkpoint, for a run that does not train, which then needs no training split.
        calibration_samples: number of unlabelled images of the test split to take at most.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for a dataset, split or column that is not there, an empty split, labels that are missing or that
            training has not, or an image that cannot be read.
    """
    splits, columns, argument, dropped = _read(arguments, classes, download)

    def taken(name: str, count: int | None, train: Dataset | None = None, may_lack: bool = False) -> Dataset:
        split = take_split(splits, name, argument, count)
        where = f"--{name}_dir {arguments.folders[name]}" if name in arguments.folders else argument
        return columns.with_classes(split, f"{where}: split '{name}'", train, may_lack)

    def labelled(split: Dataset) -> bool:
        return has_labels(split, LABEL)

    def checked(split: Dataset, name: str) -> Dataset:
        return check_images(split, f"{argument}: split '{name}'")

    train = taken("train", None) if "train" in splits else None
    evaluation, prediction, name, from_split = {}, {}, "test", "train"
    if train is None or "validation" in splits or ("test" in splits and labelled(splits["test"])):
        if train is not None or evaluate:
            name = from_split = evaluated_split(splits, argument, labelled)
            evaluation[""] = taken(name, arguments.max_eval_samples, train)
    else:
        train, evaluation[""] = _divided(arguments, train, argument, seed)
    if predict:
        prediction[""] = checked(taken("test", arguments.max_predict_samples, train, may_lack=True), "test")
    calibration = unseen_split(splits, "test", [from_split], calibration_samples)
    if calibration is not None:
        unlabelled = calibration.select_columns([name for name in calibration.column_names if name != LABEL])
        calibration = checked(unlabelled, "test")
    if train is not None:
        train = checked(first_examples(train.shuffle(seed=seed), arguments.max_train_samples), "train")
    evaluation = {suffix: checked(split, from_split) for suffix, split in evaluation.items()}
    used = columns.described(next(iter(splits.values())), arguments.dataset_name is None)
    evaluated = "evaluated (held out of train)" if from_split == "train" else "evaluated"
    parts = {"train": train, evaluated: evaluation.get(""), "predicted": prediction.get("")}
    read = {part: split for part, split in parts.items() if split is not None}
    return ImageTask(
        source=Source.of_dataset(arguments.chosen[1], arguments.dataset_config_name, name),
        labels=columns.labels,
        train=next(iter(read.values())).select([]) if train is None else train,
        evaluation=evaluation,
        prediction=prediction,
        calibration=calibration,
        main_metric="accuracy",
        read=read_lines(argument, used, read, LABEL, columns.labels, dropped),
        augmentation=Augmentation(arguments.crop_scale, arguments.horizontal_flip),
        file_names={suffix: relative_names(split, arguments.predicted) for suffix, split in prediction.items()},
    )


def _divided(arguments: ImageDataArguments, train: Dataset, argument: str, seed: int) -> tuple[Dataset, Dataset]:
    """The images to train on, and those of them that are evaluated on instead, since there are no others."""
    with naming(f"--train_val_split {arguments.train_val_split}", ValueError):
        parts = train.train_test_split(arguments.train_val_split, seed=seed)
    evaluation = take_split(parts, "test", argument, arguments.max_eval_samples)
    where = f"{argument}: the images of --train_val_split {arguments.train_val_split}"
    check_trained(evaluation, parts["train"], LABEL, where)
    return parts["train"], evaluation


def _read(
    arguments: ImageDataArguments, classes: Sequence[str] | None, download: dict[str, Any]
) -> tuple[DatasetDict, ImageColumns, str, list[str]]:
    """Return the splits as they are stored, their columns, the argument that chose them, and what was left out."""
    name, chosen = arguments.chosen
    argument = f"--{name} {chosen}"
    if name == "dataset_name":
        if Path(chosen).is_dir():
            check_names(argument, Path(chosen))
        splits, dropped = read_dataset(argument, chosen, arguments.dataset_config_name, anew=False, **download), []
    else:
        if name != "train_dir" and classes is None:
            raise BadInput(
                f"--train_dir: not given beside {argument}; give it, or only evaluate or predict, without a budget"
            )
        read = {
            split: read_image_folder(f"--{split}_dir {folder}", folder, split == "test", **download)
            for split, folder in arguments.folders.items()
        }
        splits = DatasetDict({split: images for split, (images, _) in read.items()})
        dropped = [line for _, lines in read.values() for line in lines]
    needs_train = "train" in splits or classes is None
    first = take_split(splits, "train" if needs_train else next(iter(splits)), argument, None)
    named = (arguments.image_column_name, arguments.label_column_name)
    columns = ImageColumns.found(first, argument, *named, None if needs_train else classes)
    splits = DatasetDict(
        {split: columns.stored(images, f"{argument}: split '{split}'") for split, images in splits.items()}
    )
    if name == "dataset_name" and Path(chosen).is_dir():
        dropped = left_out_of_dataset(argument, chosen, splits.values(), columns.labels)
    if "test" in splits and columns.has_other_labels(splits["test"]):
        splits["test"] = splits["test"].remove_columns(LABEL)
        dropped.append("the labels of split 'test', none of which is a class of training")
    return splits, columns, argument, dropped
