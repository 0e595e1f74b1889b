# SPDX-License-Identifier: Apache-2.0
"""Tests of image classification tasks: images, classes, model inputs, from tables, folders and metadata files."""

from __future__ import annotations

import io
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PerceiverImageProcessorPil

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, one_line
from experiments.tasks.base import PreparedTask
from experiments.tasks.image_files import read_image
from experiments.tasks.images import ImageDataArguments, ImageTask, load_image_task
from tests.support.tiny_images import MODEL, write_image_folders, write_images


def load(predict: bool = False, **given: object) -> ImageTask:
    return load_image_task(ImageDataArguments(**given), predict, seed=0)


def prepared(task: ImageTask, side: int | None = 16, **fields: object) -> PreparedTask:
    """Prepare the task for a model; without `side`, images are not resized."""
    config = ToMePerceiverConfig(**MODEL | fields)
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {name: index for index, name in enumerate(task.labels)}
    size = {"do_resize": False} if side is None else {"size": {"height": side, "width": side}}
    return task.prepare(config, PerceiverImageProcessorPil(do_center_crop=False, **size), seed=0)


def test_greyscale_becomes_three_channels(tmp_path):
    sight = prepared(load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3}))))
    batch = sight.collate([sight.evaluation[""][0], sight.evaluation[""][1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1]
    assert set(sight.batch(2)) == {"pixel_values"}


def test_training_and_evaluation_see_an_image_alike_without_augmentation(tmp_path):
    """The image processor runs once in both splits, so equal images give equal inputs."""
    task = load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3})))
    task.evaluation[""] = task.train
    sight = prepared(task)
    assert torch.equal(sight.train[2]["pixel_values"], sight.evaluation[""][2]["pixel_values"])


@pytest.mark.parametrize(
    ("splits", "evaluated"), [({"train": 6, "test": 3}, 3), ({"train": 6, "validation": 4, "test": 3}, 4)]
)
def test_validation_before_test(tmp_path, splits, evaluated):
    task = load(dataset_name=str(write_images(tmp_path, splits)), predict=True)
    assert (len(task.train), len(task.evaluation[""]), len(task.prediction[""])) == (6, evaluated, 3)


def test_a_share_of_the_training_images_where_there_is_nothing_else(tmp_path):
    task = load(dataset_name=str(write_images(tmp_path, {"train": 20})), train_val_split=0.25)
    assert (len(task.train), len(task.evaluation[""])) == (15, 5)
    assert task.summary[1] == "train: 15 examples, evaluated (held out of train): 5 examples"


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_image_ends_a_run_in_a_line_that_names_it(tmp_path, workers):
    """Images are decoded when they are used, in any split, and also in data loading workers."""
    train = write_image_folders(tmp_path / "train", 4)
    path = train / "dark" / "1.png"
    path.write_bytes(path.read_bytes()[:90])
    sight = prepared(load(train_dir=str(train), train_val_split=0.5))
    with pytest.raises(BadInput) as error:
        for split in (sight.train, sight.evaluation[""]):
            list(DataLoader(split, 2, num_workers=workers, collate_fn=sight.collate))
    assert re.fullmatch(f"image {path}: .*truncated.*", one_line(error.value))


def test_an_image_processor_that_does_not_fit_is_named(tmp_path):
    task = load(dataset_name=str(write_images(tmp_path, {"train": 6, "test": 3})))
    with pytest.raises(BadInput, match="--image_processor_name: makes images of 8 x 8; .*, 16"):
        prepared(task, 8, architectures=["PerceiverForImageClassificationLearned"])


def test_an_image_processor_that_does_not_resize_needs_images_of_one_size(tmp_path):
    task = load(train_dir=str(write_image_folders(tmp_path / "train", 6)))
    assert prepared(task, None).batch(2)["pixel_values"].shape == (2, 3, 8, 8)
    Image.new("RGB", (9, 8)).save(tmp_path / "train" / "dark" / "0.png")
    sight = prepared(load(train_dir=str(tmp_path / "train")), None)
    with pytest.raises(BadInput, match="--image_processor_name: does not make all images the same size: .* 9 x 8"):
        [example for split in (sight.train, sight.evaluation[""]) for example in split]


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
def test_wrong_arguments_are_refused(given, says):
    with pytest.raises(BadInput, match=says):
        ImageDataArguments(**given)


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


COUNT = 12
CATS_AND_DOGS = ["cat", "dog"] * (COUNT // 2)


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, "PNG")
    return file.getvalue()


FILES = [png(20 * index) for index in range(COUNT)]
DECODED = [{"bytes": data, "path": f"{index}.png"} for index, data in enumerate(FILES)]


def load_table(folder: Path, **columns: object) -> ImageTask:
    """Load the task from a parquet file that pandas writes."""
    given = {name: columns.pop(name) for name in ("image_column_name", "label_column_name") if name in columns}
    pd.DataFrame(columns).to_parquet(folder / "train.parquet")
    return load(dataset_name=str(folder), **given)


def write_files(folder: Path, *names: str) -> Path:
    """Write images whose grey value is their index, and text for names without an image's ending."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(20 * index) if name.endswith(".png") else b"no image")
    return folder


def classes(task: ImageTask) -> dict[int, str]:
    """Return the class of each training and evaluation image, by its grey value."""
    rows = [row for split in (task.train, task.evaluation[""]) for row in split]
    return {np.asarray(read_image(row["image"], "0"))[0, 0, 0] // 20: task.labels[row["label"]] for row in rows}


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        (FILES, CATS_AND_DOGS, ["cat", "dog"]),
        (DECODED, pd.Categorical(CATS_AND_DOGS), ["cat", "dog"]),
        ([{"bytes": data} for data in FILES], [0, 1] * 6, ["0", "1"]),
        (FILES, np.array([7, 3] * 6, np.uint8), ["7", "3"]),
        (FILES, pd.array([10, 9] * 6, "Int64"), ["10", "9"]),
        (FILES, [False, True] * 6, ["False", "True"]),
    ],
)
def test_tables_from_pandas(tmp_path, images, labels, names):
    task = load_table(tmp_path, image=images, label=labels)
    assert sorted(task.labels) == sorted(names)
    assert classes(task) == {index: names[index % 2] for index in range(COUNT)}


@pytest.mark.parametrize(
    ("image", "label"), [("img", "labels"), ("Image", "Label"), ("pixel_values", "label"), ("photo", "label")]
)
def test_columns_are_found_by_their_names(tmp_path, image, label):
    """Otherwise the only column of a fitting type is used."""
    task = load_table(tmp_path, id=range(COUNT), **{label: CATS_AND_DOGS, image: FILES}, name=["a"] * COUNT)
    assert classes(task) == dict(enumerate(CATS_AND_DOGS))
    assert task.summary[0].endswith(f": images in column '{image}', labels in column '{label}'")


@pytest.mark.parametrize("given", [{}, {"image_column_name": "image", "label_column_name": "label"}])
def test_columns_beside_others_that_may_be_meant(tmp_path, given):
    """Such as a mask, or a second column of labels if the columns are given."""
    others = {"labels": range(COUNT)} if given else {}
    task = load_table(tmp_path, mask=FILES[::-1], image=FILES, label=CATS_AND_DOGS, **others, **given)
    assert classes(task) == dict(enumerate(CATS_AND_DOGS))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"left": FILES, "right": FILES, "label": CATS_AND_DOGS}, ("--image_column_name", "'left', 'right'")),
        ({"image": FILES, "species": CATS_AND_DOGS}, ("--label_column_name", "choose from 'species'")),
        ({"image": FILES, "label": CATS_AND_DOGS, "labels": CATS_AND_DOGS}, ("--label_column_name", "'labels'")),
        ({"image": FILES}, ("no labels", "metadata.csv")),
        ({"text": CATS_AND_DOGS, "label": CATS_AND_DOGS}, ("no column of images", "'label', 'text'")),
        ({"image": ["a.png"] * COUNT, "label": CATS_AND_DOGS}, ("'image' holds large_string", "metadata.csv")),
        ({"image": FILES, "label": ["cat", None] * 6}, ("split 'train': column 'label' has no value", "6 of 12")),
        ({"image": [*FILES[:7], None, *FILES[8:]], "label": CATS_AND_DOGS}, ("image 7 of", "split 'train'", "missing")),
        (
            {"image": FILES, "label": CATS_AND_DOGS, "image_column_name": "img"},
            ("--image_column_name img", "choose from 'image', 'label'"),
        ),
        ({"image": FILES, "label": CATS_AND_DOGS, "label_column_name": "image"}, ("choose from 'label'",)),
    ],
)
def test_wrong_tables_are_refused(tmp_path, columns, says):
    with pytest.raises(BadInput) as error:
        load_table(tmp_path, **columns)
    assert all(part in str(error.value) for part in says), str(error.value)


@pytest.mark.parametrize("argument", ["train_dir", "dataset_name"])
def test_a_metadata_file(tmp_path, argument):
    """Images that it does not list are left out, with a warning."""
    names = [f"{'ab'[index % 2]}/{index}.png" for index in range(COUNT)]
    write_files(tmp_path, *names, "b/13.png", "b/14.heic")
    pd.DataFrame({"file_name": names, "label": CATS_AND_DOGS}).to_csv(tmp_path / "metadata.csv", index=False)
    task = load(**{argument: str(tmp_path)})
    assert classes(task) == dict(enumerate(CATS_AND_DOGS))
    assert task.summary[-1] == f"left out: files of --{argument} {tmp_path} that are in no example (1 .heic, 1 .png)"


def test_an_archive_of_images_is_to_be_unpacked(tmp_path):
    """In a folder named "1", `datasets` would read all of them as the second class."""
    write_files(tmp_path / "all", *grid("cat", "dog"))
    shutil.make_archive(str(tmp_path / "1" / "images"), "zip", tmp_path / "all")
    with pytest.raises(BadInput, match="image zip://.*png::.*images.zip: is in an archive .* unpack it"):
        load(dataset_name=str(tmp_path / "1"))


def test_names_of_splits_in_names_of_files(tmp_path):
    names = [f"{'train' if index % 2 else 'test'}_{index}.png" for index in range(COUNT)]
    write_files(tmp_path, *names)
    pd.DataFrame({"file_name": names, "label": CATS_AND_DOGS}).to_csv(tmp_path / "metadata.csv", index=False)
    assert classes(load(train_dir=str(tmp_path))) == dict(enumerate(CATS_AND_DOGS))


def grid(*folders: str) -> list[str]:
    return [f"{folder}/{index}.png" for folder in folders for index in range(4)]


@pytest.mark.parametrize("argument", ["train_dir", "dataset_name"])
def test_a_class_does_not_vanish_from_a_folder(tmp_path, argument):
    write_files(tmp_path, *grid("cat", "dog"), "dog/4.heic")
    task = load(**{argument: str(tmp_path)})
    assert task.labels == ["cat", "dog"]
    assert ("a class for each folder" in task.summary[0]) == (argument == "train_dir")
    assert task.summary[-1] == f"left out: files of --{argument} {tmp_path} that are in no example (1 .heic)"
    write_files(tmp_path, "cow/1.heic")
    with pytest.raises(BadInput, match=rf"--{argument} .*: the folder cow has no image that can be read \(1 .heic\)"):
        load(**{argument: str(tmp_path)})


@pytest.mark.parametrize("argument", ["train_dir", "dataset_name"])
def test_classes_of_one_name(tmp_path, argument):
    """macOS writes accents as separate characters."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_files(tmp_path, *grid(composed, decomposed, "bar"))
    task = load(**{argument: str(tmp_path)})
    assert task.labels == ["bar", composed]
    assert sorted(classes(task).values()) == ["bar"] * 4 + [composed] * 8


@pytest.mark.parametrize("argument", ["train_dir", "dataset_name"])
def test_a_name_that_is_not_utf8(tmp_path, argument):
    write_files(tmp_path, *grid("cat", "dog"))
    (tmp_path / os.fsdecode(b"cat/caf\xe9.png")).write_bytes(FILES[0])
    with pytest.raises(BadInput, match=rf"^--{argument} .*: the name cat/caf\\xe9.png is not UTF-8; rename it"):
        load(**{argument: str(tmp_path)})


def test_predicted_files_are_named_in_their_order(tmp_path):
    train = write_files(tmp_path / "train", *grid("cat", "dog"))
    test = write_files(tmp_path / "test", "1.png", "10.png", "2.png", "a b.png")
    assert load(True, train_dir=str(train), test_dir=str(test)).file_names == {
        "": ["1.png", "10.png", "2.png", "a b.png"]
    }
    assert load(True, train_dir=str(train), test_dir=str(train)).file_names == {"": grid("cat", "dog")}


@pytest.mark.parametrize("folders", [("unknown",), ("a", "b")])
def test_placeholder_labels_are_ignored(tmp_path, folders):
    """Images to predict may be in a folder of any name; among several, a class that training lacks is refused."""
    train, test = write_files(tmp_path / "train", *grid("cat", "dog")), write_files(tmp_path / "test", *grid(*folders))
    task = load(True, train_dir=str(train), test_dir=str(test))
    assert task.prediction[""].column_names == ["image", "row"] and len(task.evaluation[""]) == 2
    assert task.summary[-1] == "left out: the labels of split 'test', none of which is a class of training"
    write_files(test, "cat/1.png")
    with pytest.raises(BadInput, match=f"split 'test' has the labels '{folders[0]}'"):
        load(True, train_dir=str(train), test_dir=str(test))


def test_a_checkpoint_needs_no_images_to_train_on(tmp_path):
    """Classes are the checkpoint's, in any order; images to predict may have no labels."""
    test, flat = write_files(tmp_path / "test", *grid("cat", "dog")), write_files(tmp_path / "flat", "1.png", "2.png")

    def loaded(predict: bool, evaluate: bool, **given: Path) -> ImageTask:
        arguments = ImageDataArguments(**{name: str(path) for name, path in given.items()})
        return load_image_task(arguments, predict, 0, evaluate, classes=["dog", "cow", "cat"])

    task = loaded(True, False, test_dir=flat)
    assert task.evaluation == {} and len(task.train) == 0 and task.file_names == {"": ["1.png", "2.png"]}
    assert task.summary == [f"--test_dir {flat}: images in column 'image', no labels", "predicted: 2 examples"]
    task = loaded(True, True, validation_dir=test, test_dir=flat)
    assert task.evaluation[""]["label"] == [2] * 4 + [0] * 4 and task.labels == ["dog", "cow", "cat"]
    assert loaded(False, True, test_dir=test).evaluation[""]["label"] == [2] * 4 + [0] * 4
    with pytest.raises(BadInput, match="nothing to evaluate on"):
        loaded(False, True, test_dir=flat)
    pd.DataFrame({"img": FILES, "id": range(COUNT)}).to_parquet(flat / "test.parquet")
    for path in flat.glob("*.png"):
        path.unlink()
    assert len(loaded(True, False, dataset_name=flat).prediction[""]) == COUNT
    with pytest.raises(BadInput, match="--train_dir: not given beside --test_dir"):
        load(True, test_dir=str(test))


def test_predicted_rows_of_a_table_are_named_if_they_have_paths(tmp_path):
    for folder, images in (("named", DECODED), ("bytes", FILES)):
        (tmp_path / folder).mkdir()
        table = pd.DataFrame({"image": images, "label": CATS_AND_DOGS})
        for split in ("train", "test"):
            table.to_parquet(tmp_path / folder / f"{split}.parquet")
    assert load(True, dataset_name=str(tmp_path / "named")).file_names == {"": [f"{i}.png" for i in range(COUNT)]}
    assert load(True, dataset_name=str(tmp_path / "bytes")).file_names == {"": []}
