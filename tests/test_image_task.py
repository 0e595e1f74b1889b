# SPDX-License-Identifier: Apache-2.0
"""Which images a task has, what the model sees of them, and how predictions are scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, PerceiverImageProcessorPil

from experiments.bad_input import BadInput
from experiments.image_task import ImageDataArguments, collate_images, image_metrics, load_image_task
from tests.tiny_images import LABELS, write_images


def test_greyscale_becomes_three_channels(tmp_path):
    images = write_images(tmp_path, {"train": 6, "test": 3})
    task = load_image_task(ImageDataArguments(dataset_name=str(images)), seed=0)
    processor = PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16})
    dataset = task.processed(task.evaluation, processor)
    batch = collate_images([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1]
    assert task.labels == LABELS


@pytest.mark.parametrize(
    ("splits", "evaluated"), [({"train": 6, "test": 3}, 3), ({"train": 6, "validation": 2, "test": 3}, 2)]
)
def test_validation_before_test(tmp_path, splits, evaluated):
    task = load_image_task(ImageDataArguments(dataset_name=str(write_images(tmp_path, splits))), seed=0)
    assert (len(task.train), len(task.evaluation)) == (6, evaluated)


def test_columns_of_other_names(tmp_path):
    images = write_images(tmp_path, {"train": 6, "test": 3}, columns=("picture", "kind"))
    assert set(load_image_task(ImageDataArguments(dataset_name=str(images)), seed=0).train.features) == {
        "image",
        "label",
    }


def test_no_training_split_is_named(tmp_path):
    images = write_images(tmp_path, {"test": 3})
    with pytest.raises(BadInput, match="'train'"):
        load_image_task(ImageDataArguments(dataset_name=str(images)), seed=0)


def test_accuracy_and_its_standard_error():
    logits = np.eye(3)[[0, 1, 2, 0]]
    metrics = image_metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 1, 2, 1])))
    assert metrics == {"accuracy": 0.75, "accuracy_stderr": pytest.approx((0.75 * 0.25 / 4) ** 0.5)}
    assert torch.tensor(metrics["accuracy"]).isfinite()
