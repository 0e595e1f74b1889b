# SPDX-License-Identifier: Apache-2.0
"""Which images a task has, what the model sees of them, and how predictions are scored."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction, PerceiverImageProcessorPil

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import PreparedTask
from experiments.tasks.images import ImageDataArguments, ImageTask, load_image_task
from tests.support.tiny_images import LABELS, MODEL, write_image_folders, write_images


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
    assert task.read[1] == "train: 15 examples, evaluated (held out of train): 5 examples"


def test_folders_of_images(tmp_path):
    folders = {f"{split}_dir": str(write_image_folders(tmp_path / split, 2)) for split in ("train", "validation")}
    task = load(**folders, max_train_samples=4)
    assert task.labels == sorted(LABELS)
    assert (len(task.train), len(task.evaluation[""])) == (4, 6)


def test_unlabelled_images_are_predicted(tmp_path):
    train = write_image_folders(tmp_path / "train", 6)
    flat = tmp_path / "test"
    flat.mkdir()
    for index, path in enumerate(sorted(train.glob("*/*.png"))[:4]):
        (flat / f"{index}.png").write_bytes(path.read_bytes())
    sight = prepared(load(predict=True, train_dir=str(train), test_dir=str(flat), train_val_split=0.5))
    assert set(sight.prediction[""][0]) == {"pixel_values"} and len(sight.prediction[""]) == 4


def test_a_validation_folder_of_fewer_classes_goes_by_name(tmp_path):
    train, validation = write_image_folders(tmp_path / "train", 2), write_image_folders(tmp_path / "validation", 2)
    shutil.rmtree(validation / "bright")
    task = load(train_dir=str(train), validation_dir=str(validation))
    assert {task.labels[label] for label in task.evaluation[""]["label"]} == {"dark", "middle"}
    (validation / "dark").rename(validation / "black")
    with pytest.raises(BadInput, match="has the labels 'black'; they must be among 'bright', 'dark'"):
        load(train_dir=str(train), validation_dir=str(validation))


@pytest.mark.parametrize("value", [-1, None])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_missing_labels_are_refused_unless_they_are_to_predict(tmp_path, split, value):
    folder = write_images(tmp_path, {"train": 6, "validation": 3, "test": 3}, missing={split: value, "test": value})
    with pytest.raises(BadInput, match=f"split '{split}': column 'label' has no value"):
        load(dataset_name=str(folder))
    folder = write_images(tmp_path / "good", {"train": 6, "validation": 3, "test": 3}, missing={"test": value})
    assert set(prepared(load(True, dataset_name=str(folder))).prediction[""][0]) == {"pixel_values"}


def test_a_cut_image_is_refused_before_any_work(tmp_path):
    train = write_image_folders(tmp_path / "train", 6)
    path = train / "dark" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadInput, match="dark/1.png"):
        load(train_dir=str(train), train_val_split=0.5)


def test_a_cut_image_is_refused_wherever_it_is(tmp_path):
    """Also among those that were taken from training to evaluate on, where others are predicted."""
    train, flat = write_image_folders(tmp_path / "train", 4), tmp_path / "test"
    flat.mkdir()
    shutil.copy(train / "dark" / "0.png", flat)
    for path in sorted(train.glob("*/*.png")):
        whole = path.read_bytes()
        path.write_bytes(whole[:60])
        with pytest.raises(BadInput, match=f"{path.parent.name}/{path.name}"):
            load(predict=True, train_dir=str(train), test_dir=str(flat), train_val_split=0.5)
        path.write_bytes(whole)


def test_an_image_processor_that_does_not_fit_is_named(tmp_path):
    task = load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3})))
    config = ToMePerceiverConfig(**MODEL | {"architectures": ["PerceiverForImageClassificationLearned"]})
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {name: index for index, name in enumerate(task.labels)}
    with pytest.raises(
        BadInput, match="--image_processor_name: makes images of 8 x 8; must be the image_size of the model, 16"
    ):
        task.prepared(config, PerceiverImageProcessorPil(do_center_crop=False, size={"height": 8, "width": 8}), 0)


def test_an_image_processor_that_does_not_resize_needs_images_of_one_size(tmp_path):
    task = load(train_dir=str(write_image_folders(tmp_path / "train", 6)))
    config = ToMePerceiverConfig(**MODEL)
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {name: index for index, name in enumerate(task.labels)}
    processor = PerceiverImageProcessorPil(do_center_crop=False, do_resize=False)
    assert task.prepared(config, processor, 0).batch(2)["pixel_values"].shape == (2, 3, 8, 8)
    Image.new("RGB", (9, 8)).save(tmp_path / "train" / "dark" / "0.png")
    task = load(train_dir=str(tmp_path / "train"))
    with pytest.raises(BadInput, match="--image_processor_name: does not make images of .* the same size"):
        task.prepared(config, processor, 0)


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


def test_folders_of_splits_in_capitals_are_not_trained_on_together(tmp_path):
    for split in ("Training", "Testing"):
        write_image_folders(tmp_path / split, 2)
    with pytest.raises(
        BadInput, match=r"^--dataset_name .*: Testing/bright/0.png would be read as a part of .*'train'"
    ):
        load(dataset_name=str(tmp_path))


def test_a_class_may_be_called_test(tmp_path):
    for name in ("Test", "Control"):
        shutil.copytree(write_image_folders(tmp_path / f"of {name}", 4) / "dark", tmp_path / "images" / name)
    assert load(dataset_name=str(tmp_path / "images"), train_val_split=0.5).labels == ["Control", "Test"]
