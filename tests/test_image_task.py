# SPDX-License-Identifier: Apache-2.0
"""Which images a task has, what the model sees of them, and how predictions are scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, PerceiverImageProcessorPil

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput
from experiments.image_task import ImageDataArguments, ImageTask, load_image_task
from experiments.task import PreparedTask
from tests.tiny_images import LABELS, MODEL, write_image_folders, write_images


def load(predict: bool = False, **given: object) -> ImageTask:
    return load_image_task(ImageDataArguments(**given), predict, seed=0)


def prepared(task: ImageTask, label2id: dict[str, int] | None = None) -> PreparedTask:
    config = ToMePerceiverConfig(**MODEL)
    config.label2id = label2id or {name: index for index, name in enumerate(task.labels)}
    config.id2label = {index: name for name, index in config.label2id.items()}
    processor = PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16})
    return task.prepared(config, processor, seed=0)


def test_greyscale_becomes_three_channels(tmp_path):
    sight = prepared(load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3}))))
    batch = sight.collate([sight.evaluation[""][0], sight.evaluation[""][1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1]
    assert set(sight.batch(2)) == {"pixel_values"}


def test_training_and_evaluation_see_an_image_alike_without_augmentation(tmp_path):
    """The same eight bright pixels in both splits: the image processor's work is done once in each."""
    task = load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3})))
    task.evaluation[""] = task.train
    sight = prepared(task)
    assert torch.equal(sight.train[2]["pixel_values"], sight.evaluation[""][2]["pixel_values"])


def test_the_checkpoints_order_of_the_labels_stays(tmp_path):
    task = load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3})))
    sight = prepared(task, {name: 2 - index for index, name in enumerate(LABELS)})
    assert [example["labels"] for example in sight.evaluation[""]] == [2, 1, 0]


@pytest.mark.parametrize(
    ("splits", "evaluated"), [({"train": 6, "test": 3}, 3), ({"train": 6, "validation": 4, "test": 3}, 4)]
)
def test_validation_before_test(tmp_path, splits, evaluated):
    task = load(dataset_name=str(write_images(tmp_path, splits)), predict=True)
    assert (len(task.train), len(task.evaluation[""]), len(task.prediction[""])) == (6, evaluated, 3)


def test_a_share_of_the_training_images_where_there_is_nothing_else(tmp_path):
    task = load(dataset_name=str(write_images(tmp_path, {"train": 20})), train_val_split=0.25)
    assert (len(task.train), len(task.evaluation[""])) == (15, 5)


def test_folders_of_images(tmp_path):
    folders = {f"{split}_dir": str(write_image_folders(tmp_path / split, 2)) for split in ("train", "validation")}
    task = load(**folders, max_train_samples=4)
    assert task.labels == sorted(LABELS)
    assert (len(task.train), len(task.evaluation[""])) == (4, 6)


def test_columns_of_other_names(tmp_path):
    images = write_images(tmp_path, {"train": 6, "test": 3}, columns=("picture", "kind"))
    assert set(load(dataset_name=str(images)).train.features) == {"image", "label"}


def test_no_training_split_is_named(tmp_path):
    images = write_images(tmp_path, {"test": 3})
    with pytest.raises(BadInput, match="'train'"):
        load(dataset_name=str(images))


def test_a_class_that_training_has_not_is_named(tmp_path):
    """Two training images are of the first two classes; the third comes in evaluation."""
    images = write_images(tmp_path, {"train": 2, "test": 3})
    with pytest.raises(BadInput, match=f"'test' has the labels '{LABELS[2]}'.*'{LABELS[0]}'"):
        load(dataset_name=str(images))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train_val_split": 1.0}, "--train_val_split 1.0"),
        ({"crop_scale": 0.0}, "--crop_scale 0.0"),
        ({"horizontal_flip": 2.0}, "--horizontal_flip 2.0"),
        ({"max_predict_samples": 0}, "--max_predict_samples 0"),
        ({"train_dir": "not_there"}, "--train_dir not_there"),
    ],
)
def test_arguments_that_cannot_be_meant(given, says):
    with pytest.raises(BadInput, match=says):
        ImageDataArguments(**given)


def test_accuracy_and_its_standard_error(tmp_path):
    sight = prepared(load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3}))))
    logits = np.eye(3)[[0, 1, 2, 0]]
    metrics = sight.metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 2, 1])))
    assert metrics == {"accuracy": 0.75, "accuracy_stderr": pytest.approx((0.75 * 0.25 / 4) ** 0.5)}
