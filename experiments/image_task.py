# SPDX-License-Identifier: Apache-2.0
"""Image classification: the data, what the model sees of it, and how predictions are scored.

Letters: B batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.features import Image
from sklearn.metrics import accuracy_score
from transformers import BaseImageProcessor, EvalPrediction

from experiments.bad_input import BadInput, naming

# Where evaluation happens if the dataset has no split of the first name.
EVALUATION_SPLITS = ("validation", "test")


@dataclass
class ImageDataArguments:
    """Which images."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder, as `datasets.load_dataset` takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
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
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many (shuffled)."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many."})


@dataclass
class ImageTask:
    """Images to train and to evaluate on, unprocessed.

    Attributes:
        train, evaluation: datasets with the columns `image` and `label`.
        labels: names of the K classes.
        name: of the dataset, for reports.
    """

    train: Dataset
    evaluation: Dataset
    labels: list[str]
    name: str

    def processed(self, dataset: Dataset, image_processor: BaseImageProcessor) -> Dataset:
        """The dataset with `pixel_values` (3, height, width) made on access, greyscale as RGB."""

        def process(batch: dict[str, list]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in batch["image"]]
            return {**image_processor(images, return_tensors="pt"), "labels": batch["label"]}

        return dataset.with_transform(process)


def load_image_task(arguments: ImageDataArguments, seed: int, cache_dir: str | None = None) -> ImageTask:
    """Load the images that the arguments mean.

    Args:
        arguments: which images.
        seed: for a validation split made here and for `max_train_samples`.
        cache_dir: where `datasets` keeps what it prepares.

    Raises:
        BadInput: for a dataset, split or column that is not there, or an empty split.
    """
    splits = _load_splits(arguments, cache_dir)
    if "train" not in splits:
        raise BadInput(f"--dataset_name {arguments.dataset_name}: has no split 'train', only {sorted(splits)}")
    evaluation_split = next((name for name in EVALUATION_SPLITS if name in splits), None)
    if evaluation_split is None:
        if not 0 < arguments.train_val_split < 1:
            raise BadInput(f"--train_val_split {arguments.train_val_split}: allowed is a number between 0 and 1")
        splits = splits["train"].train_test_split(arguments.train_val_split, seed=seed)
        evaluation_split = "test"
    image_column = _column(splits["train"], Image, "image_column_name", arguments.image_column_name)
    label_column = _column(splits["train"], ClassLabel, "label_column_name", arguments.label_column_name)
    train, evaluation = (
        splits[name]
        .select_columns([image_column, label_column])
        .rename_columns({old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new})
        for name in ("train", evaluation_split)
    )
    return ImageTask(
        train=_first(train.shuffle(seed=seed), "max_train_samples", arguments.max_train_samples),
        evaluation=_first(evaluation, "max_eval_samples", arguments.max_eval_samples),
        labels=list(train.features["label"].names),
        name=arguments.dataset_name or arguments.train_dir or "images",
    )


def collate_images(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """`pixel_values` (B, 3, height, width) and `labels` (B,)."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def image_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and its standard error, both in [0, 1], from logits (B, K) and labels (B,)."""
    predicted = np.argmax(prediction.predictions, axis=-1)
    accuracy = float(accuracy_score(prediction.label_ids, predicted))
    return {"accuracy": accuracy, "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / len(predicted)))}


def _load_splits(arguments: ImageDataArguments, cache_dir: str | None) -> DatasetDict:
    not_there: tuple[type[Exception], ...] = (OSError, ValueError, DatasetNotFoundError)
    if arguments.dataset_name is not None:
        with naming(f"--dataset_name {arguments.dataset_name}", *not_there):
            return load_dataset(arguments.dataset_name, arguments.dataset_config_name, cache_dir=cache_dir)
    if arguments.train_dir is None:
        raise BadInput("--dataset_name: not given; allowed is a Hub id or a folder (or --train_dir FOLDER)")
    folders = {"train": f"{arguments.train_dir}/**"}
    if arguments.validation_dir is not None:
        folders["validation"] = f"{arguments.validation_dir}/**"
    with naming(f"--train_dir {arguments.train_dir}", *not_there):
        return load_dataset("imagefolder", data_files=folders, cache_dir=cache_dir)


def _column(dataset: Dataset, kind: type, argument: str, name: str | None) -> str:
    fitting = [column for column, feature in dataset.features.items() if isinstance(feature, kind)]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name is None or name not in fitting:
        raise BadInput(f"--{argument} {name}: allowed are the columns of type {kind.__name__}, here {fitting}")
    return name


def _first(dataset: Dataset, argument: str, count: int | None) -> Dataset:
    if count is not None and count < 1:
        raise BadInput(f"--{argument} {count}: allowed is an integer of 1 or more")
    if len(dataset) == 0:
        raise BadInput(f"--dataset_name: a split is empty, so --{argument} leaves nothing")
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))
