# SPDX-License-Identifier: Apache-2.0
"""Image classification: the data and what the model sees of it.

Letters: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.features import Image
from transformers import AutoImageProcessor, PerceiverImageProcessorPil

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.augmentation import Augmentation, AugmentedImages, NextEpoch
from experiments.bad_input import BadInput, naming
from experiments.scores import classes
from experiments.task import NOT_THERE, Batch, PreparedTask, SampleArguments, Source, Task, check_labels, take_split

# Where evaluation happens if the dataset has no split of the first name.
EVALUATION_SPLITS = ("validation", "test")
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
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, to predict."})
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training images to evaluate on, if there is no validation or test split."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images; by default the only one of that type."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column with the labels; by default the only one of that type."}
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
        for name in ("train_dir", "validation_dir", "test_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise BadInput(f"--{name} {folder}: there is no such folder")
        if not 0 < self.train_val_split < 1:
            raise BadInput(f"--train_val_split {self.train_val_split}: allowed is a number between 0 and 1")
        if not 0 < self.crop_scale <= 1:
            raise BadInput(f"--crop_scale {self.crop_scale}: allowed is a number above 0, up to 1")
        if not 0 <= self.horizontal_flip <= 1:
            raise BadInput(f"--horizontal_flip {self.horizontal_flip}: allowed is a number from 0 to 1")


@dataclass
class ImageTask(Task):
    """Images, in the column `image`, and a class for each, in the column `label`."""

    augmentation: Augmentation

    hub_task: ClassVar[str] = "image-classification"
    input_name: ClassVar[str] = "pixel_values"

    def model_class_name(self, config: ToMePerceiverConfig) -> str:
        """The class that the checkpoint was saved from, ours for a stock one; for none, convolution first."""
        name = (config.architectures or [MODEL_CLASSES[0]])[0]
        name = name if name.startswith("ToMe") else f"ToMe{name}"
        if name not in MODEL_CLASSES:
            raise BadInput(
                f"architectures = {config.architectures}: allowed for images are {', '.join(MODEL_CLASSES)} and the "
                "stock classes they come from"
            )
        return name

    def processing_class(self, config: ToMePerceiverConfig, name: str | None, **download: Any) -> Any:
        """The image processor; with no name, one that resizes to `config.image_size` and scales to [-1, 1]."""
        if name is None:
            side = config.image_size
            return PerceiverImageProcessorPil(
                do_center_crop=False,
                size={"height": side, "width": side},
                image_mean=[0.5, 0.5, 0.5],
                image_std=[0.5, 0.5, 0.5],
            )
        with naming(f"--image_processor_name {name}", OSError, ValueError):
            return AutoImageProcessor.from_pretrained(name, **download)

    def fit_config(self, config: ToMePerceiverConfig, processing_class: Any) -> None:
        """Nothing: it is the image processor that follows the config."""

    def prepared(self, config: ToMePerceiverConfig, processing_class: Any, seed: int) -> PreparedTask:
        """`pixel_values` (3, height, width) and `labels`, made on access; greyscale as RGB."""
        # The checkpoint's order of the same labels, which may be another one.
        label_ids = [config.label2id[label] for label in self.labels]

        def process(batch: dict[str, list]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch["image"]]
            columns = {"pixel_values": processing_class(images, return_tensors="pt")["pixel_values"]}
            if "label" in batch:
                columns["labels"] = [label_ids[label] for label in batch["label"]]
            return columns

        train = AugmentedImages(self.train, self.augmentation, process, seed)
        return PreparedTask(
            train=train,
            evaluation={suffix: split.with_transform(process) for suffix, split in self.evaluation.items()},
            prediction={suffix: split.with_transform(process) for suffix, split in self.prediction.items()},
            processing_class=processing_class,
            collate=collate_images,
            predicted=classes,
            kind="classification",
            callbacks=[NextEpoch(train)],
        )


def collate_images(examples: list[dict[str, Any]]) -> Batch:
    """`pixel_values` (B, 3, height, width) and, if there are any, `labels` (B,)."""
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


def load_image_task(arguments: ImageDataArguments, predict: bool, seed: int, **download: Any) -> ImageTask:
    """Load the images that the arguments mean.

    Args:
        arguments: which images.
        predict: whether the test split is needed too.
        seed: for a validation split made here and for `max_train_samples`.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for a dataset, split or column that is not there, an empty split, or labels that training has not.
    """
    splits, argument = _load_splits(arguments, download)
    train = take_split(splits, "train", argument, None)
    evaluation_split = next((name for name in EVALUATION_SPLITS if name in splits), None)
    if evaluation_split is None:
        splits = splits["train"].train_test_split(arguments.train_val_split, seed=seed)
        train, evaluation_split = splits["train"], "test"
    image_column = _column(train, Image, "image_column_name", arguments.image_column_name)
    label_column = _column(train, ClassLabel, "label_column_name", arguments.label_column_name)
    labels = list(train.features[label_column].names)

    def columns(name: str, count: int | None) -> Dataset:
        split = take_split(splits, name, argument, count)
        wanted = {image_column: "image", label_column: "label"}
        if missing := set(wanted) - set(split.column_names):
            raise BadInput(f"{argument}: split '{name}' has no column '{missing.pop()}'")
        return split.select_columns(list(wanted)).rename_columns(
            {old: new for old, new in wanted.items() if old != new}
        )

    train = columns("train", None)
    evaluation = columns(evaluation_split, arguments.max_eval_samples)
    prediction = {"": columns("test", arguments.max_predict_samples)} if predict else {}
    for name, split in {evaluation_split: evaluation, "test": prediction.get("", evaluation)}.items():
        check_labels(split, train, "label", labels, f"{argument}: split '{name}'")
    train = train.shuffle(seed=seed)
    if arguments.max_train_samples is not None:
        train = train.select(range(min(arguments.max_train_samples, len(train))))
    dataset = arguments.dataset_name or str(arguments.train_dir)
    return ImageTask(
        source=Source.of_dataset(dataset, arguments.dataset_config_name, evaluation_split),
        labels=labels,
        train=train,
        evaluation={"": evaluation},
        prediction=prediction,
        main_metric="accuracy",
        augmentation=Augmentation(arguments.crop_scale, arguments.horizontal_flip),
    )


def _load_splits(arguments: ImageDataArguments, download: dict[str, Any]) -> tuple[DatasetDict, str]:
    if arguments.dataset_name is not None:
        argument = f"--dataset_name {arguments.dataset_name}"
        with naming(argument, *NOT_THERE):
            return load_dataset(arguments.dataset_name, arguments.dataset_config_name, **download), argument
    if arguments.train_dir is None:
        raise BadInput("--dataset_name: not given; allowed is a Hub id or a folder (or --train_dir FOLDER)")
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir, "test": arguments.test_dir}
    files = {split: f"{folder}/**" for split, folder in folders.items() if folder is not None}
    argument = f"--train_dir {arguments.train_dir}"
    with naming(argument, *NOT_THERE):
        return load_dataset("imagefolder", data_files=files, **download), argument


def _column(dataset: Dataset, kind: type, argument: str, name: str | None) -> str:
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name is None or name not in fitting:
        raise BadInput(f"--{argument} {name}: allowed are the columns of type {kind.__name__}, here {fitting}")
    return name
