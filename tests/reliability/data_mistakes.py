# SPDX-License-Identifier: Apache-2.0
"""Mistakes in data: files of sentences, labels, images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.reliability.bad_input import BadInputCase, Make
from tests.reliability.inputs import Command, Inputs, edit_value
from tests.support.tiny_texts import write_table

FILES, LABELS, IMAGES = "files of sentences", "labels", "images"
GOOD = {"text": ["aaa", "bbb", "aaab", "bbba"], "label": ["good", "bad", "good", "bad"]}
# Content of a training file, and what the message must contain.
TRAIN_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty.csv": (b"", ("--train_file", "empty.csv")),
    "header.csv": (b"text,label\n", ("header.csv",)),
    "no_label.csv": (b"text,mark\naaa,1\nbbb,0\n", ("no_label.csv", "label")),
    "no_text.csv": (b"label\n1\n0\n", ("no_text.csv",)),
    "ragged.csv": (b"text,label\naaa,1\nbbb,0,7,8\n", ("ragged.csv",)),
    "latin1.csv": (b"text,label\n\xe9t\xe9,1\nbbb,0\n", ("latin1.csv",)),
    "zeros.csv": (b"\0\0\0\0", ("zeros.csv",)),
    "empty.json": (b"", ("empty.json",)),
    "broken.json": (b'{"text": "aaa", "label": 1}\n{"text": "bb', ("broken.json",)),
    "word.json": (b'"hello"', ("word.json",)),
    "mixed.json": (b'{"text": "a", "label": 1}\n{"text": "b", "label": {"x": 2}}\n', ("mixed.json",)),
    "lists.json": (b'{"text": ["a"], "label": 1}\n{"text": ["b"], "label": 0}\n', ("lists.json",)),
    "label_lists.json": (b'{"text": "a", "label": [1]}\n{"text": "b", "label": [0]}\n', ("label",)),
    "numbers.csv": (b"number,label\n1.5,1\n2.5,0\n", ("numbers.csv", "--sentence1_column")),
    "two_texts.csv": (b"words,by,label\naaa,Ann,1\nbbb,Bob,0\n", ("two_texts.csv", "--sentence1_column")),
    "short.csv": (b"text,label\naaa,1\nbbb\n", ("short.csv", "line 3")),
    "quotes.tsv": (b'text\tlabel\n"a" b\t1\nbbb\t0\n', ("quotes.tsv", "line 2")),
    "points.json": (b'{"text": "a", "label": "1.0"}\n{"text": "b", "label": "2.0"}\n', ("--do_regression",)),
    "comma.csv": (b'text,label\na,"2,5"\nb,"3,5"\n', ("--do_regression", "'2,5'")),
    "not_all_numbers.csv": (b"text,label\na,0.5\nb,n/a\nc,1.5\n", ("--do_regression", "'n/a'")),
    "minus_one.csv": (b"text,label\na,1\nb,-1\n", ("-1 says that there is none",)),
    "two_spellings.csv": (b"text,label\na,01\nb,1\nc,2\n", ("'01' and '1'",)),
    "empty.parquet": (b"", ("empty.parquet",)),
    "garbage.parquet": (b"PAR1 and nothing else", ("garbage.parquet",)),
    "zip.parquet": (b"PK\x03\x04" + b"\0" * 40, ("zip.parquet",)),
    "spaces.csv": (b"   \n \n", ("spaces.csv",)),
    "table.xlsx": (b"PK", ("table.xlsx", "csv")),
    "no_ending": (b"text,label\naaa,1\n", ("no_ending", "csv")),
}
# Labels of training, labels of evaluation, and what the message must contain.
LABEL_PAIRS: dict[str, tuple[list, list, tuple[str, ...]]] = {
    "one unseen": (["good", "bad"], ["good", "ugly"], ("ugly",)),
    "all unseen": ([0, 1], [2, 3], ("2",)),
    "missing in training": (["good", None], ["good", "bad"], ("label",)),
    "missing in evaluation": (["good", "bad"], ["good", None], ("label",)),
    "text for numbers": ([0.5, 1.5], ["good", "bad"], ("validation",)),
    "not a number in training": ([0.5, float("nan")], [0.5, 1.5], ("label",)),
    "not a number in evaluation": ([0.5, 1.5], [0.5, float("nan")], ("label",)),
    "infinite": ([0.5, float("inf")], [0.5, 1.5], ("label",)),
    "of one class": (["good", "good"], ["good", "good"], ("label",)),
}


# Files without a column whose name means text; the first ones have a sentence in each line.
NOT_OF_TEXT = {
    "lines.csv": b"The cat sat, and left.\nA dog came, and stayed.\n",
    "short_lines.csv": b"The cat sat.\nA dog came.\n",
    "lines.tsv": b"The cat sat.\nA dog came.\n",
    "identities.csv": b"id,label,annotator\na1,good,some one\na2,bad,some one\n",
    "identities.json": b'[{"id": "a1", "label": "good"}, {"id": "a2", "label": "bad"}]',
}


def data_mistakes() -> Iterator[BadInputCase]:
    for name, (data, says) in TRAIN_FILES.items():
        yield BadInputCase(FILES, name, "run_glue.py", _train_file(name, data), says)
    for name in ("empty.csv", "header.csv", "latin1.csv", "broken.json", "garbage.parquet"):
        data = TRAIN_FILES[name][0]
        yield BadInputCase(FILES, name, "run_mlm.py", _train_file(name, data, "mlm_scratch"), (name,))
    for name, data in NOT_OF_TEXT.items():
        make = _train_file(name, data, "mlm_scratch")
        yield BadInputCase(FILES, name, "run_mlm.py", make, (name, "--text_column", ".txt"))
    yield BadInputCase(
        FILES, "blank.txt", "run_mlm.py", _train_file("blank.txt", b"\n \n", "mlm_scratch"), ("blank.txt",)
    )
    for name, (make, says) in _SENTENCES.items():
        yield BadInputCase(FILES, name, "run_glue.py", make, says)
    for name, (train, validation, says) in LABEL_PAIRS.items():
        yield BadInputCase(LABELS, name, "run_glue.py", _labels(train, validation), says)
    for name, (script, make, says) in _LABELLED.items():
        yield BadInputCase(LABELS, name, script, make, says)
    for name, (make, says) in _OF_IMAGES.items():
        # A cut image is found only when it is decoded, which happens when it is used.
        yield BadInputCase(IMAGES, name, "run_image.py", make, says, works=name == "one image is cut")


def _train_file(name: str, data: bytes, base: str = "text_scratch") -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        (folder / name).write_bytes(data)
        ending = Path(name).suffix.replace(".tsv", ".csv")
        validation: Command = ()
        if ending in (".csv", ".json", ".parquet"):
            validation = ("--validation_file", write_table(folder / f"validation{ending}", GOOD))
        return (*getattr(inputs, base), "--train_file", folder / name, *validation)

    return make


def _own(name: str, columns: dict[str, list], argument: str, *words: object) -> Make:
    """Make good files of sentences, and replace one by a table."""
    return lambda inputs, folder: (
        *inputs.text_scratch, *inputs.own_files, *words, argument, write_table(folder / name, columns),
    )  # fmt: skip


def _new_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _truncated_dataset(inputs: Inputs, folder: Path) -> Command:
    shutil.copytree(inputs.glue, folder / "glue")
    path = next((folder / "glue" / "sst2").glob("train*"))
    path.write_bytes(path.read_bytes()[:-200])
    return (*inputs.text_scratch, "--dataset_name", folder / "glue", "--task_name", "sst2")


_SENTENCES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "no validation file": (
        lambda inputs, folder: (*inputs.text_scratch, "--train_file", inputs.folder / "train.csv"),
        ("--validation_file",),
    ),
    "no test file": (
        lambda inputs, folder: (*inputs.text_scratch, *inputs.own_files, "--do_predict"), ("--test_file",),
    ),
    "a folder for a file": (
        lambda inputs, folder: (
            *inputs.text_scratch, *inputs.own_files, "--train_file", _new_folder(folder / "train.csv")
        ),
        ("--train_file", "train.csv"),
    ),
    "other columns to evaluate on": (
        _own("other.csv", {"words": GOOD["text"], "label": GOOD["label"]}, "--validation_file"), ("text",),
    ),
    "a test file without sentences": (
        _own("test.csv", {"number": [1, 2]}, "--test_file", "--do_predict"), ("text",),
    ),
    "a sentence that is missing": (
        _own("holes.csv", {"text": ["aaa", None, "bbb"], "label": ["good", "bad", "bad"]}, "--train_file"),
        ("holes.csv", "text"),
    ),
    "an empty dataset folder": (
        lambda inputs, folder: (*inputs.text_scratch, "--dataset_name", _new_folder(folder / "data")),
        ("--dataset_name", "data"),
    ),
    "a task that the dataset has not": (
        lambda inputs, folder: (*inputs.text_scratch, "--dataset_name", inputs.glue, "--task_name", "rte"),
        ("--dataset_name", "rte"),
    ),
    "a dataset file that is cut": (_truncated_dataset, ("--dataset_name", "glue")),
    "images for sentences": (
        lambda inputs, folder: (*inputs.text_scratch, "--dataset_name", inputs.images), ("--dataset_name", "images"),
    ),
}  # fmt: skip


def _labelled_files(folder: Path, **labels: list) -> Command:
    """Write files of sentences with these labels, one for each split."""
    words: list[object] = []
    for split, each in labels.items():
        columns = {"text": ["aaa", "bbb"] * (len(each) // 2), "label": each}
        words += [f"--{split}_file", write_table(folder / f"{split}.csv", columns)]
    return tuple(words)


def _labels(train: list, validation: list) -> Make:
    return lambda inputs, folder: (
        *inputs.text_scratch, *_labelled_files(folder, train=train * 4, validation=validation * 4),
    )  # fmt: skip


def _label(script: str, split: str, label: int | None) -> Make:
    """Replace one label of a split by another one, such as the -1 of GLUE's test splits, or remove it if `None`."""

    def make(inputs: Inputs, folder: Path) -> Command:
        source, files = (inputs.glue, "sst2/") if script == "run_glue.py" else (inputs.images, "")
        shutil.copytree(source, folder / "data")
        edit_value(next((folder / "data").glob(f"{files}{split}*")), "label", lambda _: label, row=0)
        return (*inputs.usual(script), "--dataset_name", folder / "data")

    return make


def _other_names(*stage: object) -> Make:
    """Use as many labels as the checkpoint has, with other names."""

    def make(inputs: Inputs, folder: Path) -> Command:
        files = _labelled_files(folder, train=["cat", "dog"] * 3, validation=["cat", "dog"] * 3)
        return ("--model_name_or_path", inputs.text_model, *files, "--use_cpu", *stage)

    return make


def _other_image_names(inputs: Inputs, folder: Path) -> Command:
    names = ["cat", "cow", "dog"]
    for split in ("train", "test"):
        data = Dataset.from_parquet(str(inputs.images / f"{split}.parquet"))
        (folder / "images").mkdir(exist_ok=True)
        named = data.cast(Features(data.features | {"label": ClassLabel(names=names)}))
        named.to_parquet(folder / "images" / f"{split}.parquet")
    return ("--model_name_or_path", inputs.image_model, "--dataset_name", folder / "images", "--do_eval", "--use_cpu")


_LABELLED: dict[str, tuple[str, Make, tuple[str, ...]]] = {
    "-1 in training sentences": ("run_glue.py", _label("run_glue.py", "train", -1), ("train", "-1")),
    "-1 in evaluated sentences": ("run_glue.py", _label("run_glue.py", "validation", -1), ("validation", "-1")),
    "-1 in training images": ("run_image.py", _label("run_image.py", "train", -1), ("train", "-1")),
    "-1 in evaluated images": ("run_image.py", _label("run_image.py", "test", -1), ("test", "-1")),
    "missing in training images": ("run_image.py", _label("run_image.py", "train", None), ("train",)),
    "other names than the checkpoint's": ("run_glue.py", _other_names("--do_eval"), ("cat",)),
    "other names than the swept checkpoint's": (
        "eval_sweep.py", _other_names("--r", 1, "--timing_rounds", 0), ("cat",)
    ),
    "other names than the image checkpoint's": ("run_image.py", _other_image_names, ("cat",)),
    "more than the checkpoint's": (
        "run_glue.py", lambda inputs, folder: (*inputs.text_evaluation, "--task_name", "mnli"),
        ("3", "--ignore_mismatched_sizes"),
    ),
    "numbers for a classifier": (
        "run_glue.py", lambda inputs, folder: (*inputs.text_evaluation, "--task_name", "stsb"),
        ("--model_name_or_path",),
    ),
}  # fmt: skip


def _images(files: str, change: Callable[[Path], object]) -> Make:
    """Make folders of images, and change each file or folder that matches a pattern."""

    def make(inputs: Inputs, folder: Path) -> Command:
        shutil.copytree(inputs.image_folders, folder / "train")
        for path in sorted((folder / "train").glob(files)):
            change(path)
        return (*inputs.image_scratch, "--train_dir", folder / "train")

    return make


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def _saved_as(ending: str, convert: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    """Save images in a mode that RGB cannot represent."""

    def change(path: Path) -> None:
        image = convert(Image.open(path).convert("L"))
        path.unlink()
        image.save(path.with_suffix(ending))

    return change


def _transparent(image: Image.Image) -> Image.Image:
    return Image.merge("RGBA", [image] * 4)


def _pandas_images(**columns: object) -> Make:
    """Make a table that has the bytes of four images in each column given as `None`."""

    def make(inputs: Inputs, folder: Path) -> Command:
        (folder / "data").mkdir()
        data = [path.read_bytes() for path in sorted(inputs.image_folders.rglob("*.png"))[:4]]
        table = {name: data if values is None else values for name, values in columns.items()}
        pd.DataFrame(table).to_parquet(folder / "data" / "train.parquet")
        return (*inputs.image_scratch, "--dataset_name", folder / "data")

    return make


def _unseen_class(inputs: Inputs, folder: Path) -> Command:
    shutil.copytree(inputs.image_folders, folder / "validation")
    (folder / "validation" / "dark").rename(folder / "validation" / "blue")
    return (*inputs.image_scratch, "--train_dir", inputs.image_folders, "--validation_dir", folder / "validation")


def _no_image_column(inputs: Inputs, folder: Path) -> Command:
    for split in ("train", "test"):
        (folder / "data").mkdir(exist_ok=True)
        features = Features({"pixels": Value("int32"), "label": ClassLabel(names=["a", "b"])})
        columns = {"pixels": [1, 2], "label": [0, 1]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    return (*inputs.image_scratch, "--dataset_name", folder / "data")


def _not_an_image(split: str) -> Make:
    """Replace an image of a good dataset by other bytes."""

    def make(inputs: Inputs, folder: Path) -> Command:
        shutil.copytree(inputs.images, folder / "images")
        path = folder / "images" / f"{split}.parquet"
        data = Dataset.from_parquet(str(path)).cast_column("image", ImageFeature(decode=False))
        rows = [{"bytes": b"no image", "path": None}, *data["image"][1:]]
        changed = data.remove_columns("image").add_column("image", rows)
        changed.cast_column("image", ImageFeature()).to_parquet(path)
        return (*inputs.image_scratch, "--dataset_name", folder / "images")

    return make


_OF_IMAGES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "no image is whole": (_images("*/*.png", _cut), ("png",)),
    "one image is cut": (_images("dark/0.png", _cut), ("0.png",)),
    "one image is empty": (_images("dark/0.png", lambda path: path.write_bytes(b"")), ("0.png",)),
    "one image is text": (_images("dark/0.png", lambda path: path.write_text("hello")), ("0.png",)),
    "no images": (_images("*/*.png", Path.unlink), ("--train_dir",)),
    "no folder for each class": (
        _images("*/*.png", lambda path: path.rename(path.parents[1] / f"{path.parent.name}_{path.name}")),
        ("--train_dir",),
    ),
    "pixels that are no numbers": (
        _images("*/*.png", _saved_as(".tiff", lambda _: Image.fromarray(np.full((8, 8), np.nan, np.float32)))),
        ("tiff",),
    ),
    "16 bits in PNG": (
        _images("*/*.png", _saved_as(".png", lambda image: image.convert("I;16"))), (".png", "8 bits"),
    ),
    "16 bits in TIFF": (
        _images("*/*.png", _saved_as(".tif", lambda image: image.convert("I;16"))), (".tif", "8 bits"),
    ),
    "transparency": (_images("*/*.png", _saved_as(".png", _transparent)), (".png", "transparent")),
    "transparency in WebP": (_images("*/*.png", _saved_as(".webp", _transparent)), (".webp", "transparent")),
    "a class in HEIC": (
        _images("dark/*", lambda path: path.rename(path.with_suffix(".heic"))), ("--train_dir", "dark", "6 .heic"),
    ),
    "a class in files without an ending": (
        _images("dark/*", lambda path: path.rename(path.with_suffix(""))), ("--train_dir", "dark"),
    ),
    "a class without files": (
        _images("dark", lambda path: path.with_name("blue").mkdir()), ("--train_dir", "blue", "empty"),
    ),
    "an image deeper than the classes": (
        _images("dark", lambda path: shutil.copytree(path, path / "a" / "b")), ("--train_dir", "dark/a/b"),
    ),
    "a name that is not UTF-8": (
        _images("dark/0.png", lambda path: path.rename(path.with_name(os.fsdecode(b"caf\xe9.png")))),
        ("--train_dir", "caf\\xe9.png"),
    ),
    "two columns that may be the images": (
        _pandas_images(left=None, right=None, label=list("abab")), ("--image_column_name", "left", "right"),
    ),
    "a folder beside a dataset": (
        lambda inputs, folder: (*inputs.image_training, "--test_dir", inputs.image_folders),
        ("--test_dir", "--dataset_name"),
    ),
    "a column that may be the labels": (
        _pandas_images(image=None, name=list("abab")), ("--label_column_name", "name"),
    ),
    "paths of images in a table": (
        _pandas_images(image=["a.png"] * 4, label=list("abab")), ("--dataset_name", "image", "metadata.csv"),
    ),
    "a label that is missing in a table": (
        _pandas_images(image=None, label=["a", "b", None, "a"]), ("label", "1 of 4", "example 2"),
    ),
    "a class that is not trained on": (_unseen_class, ("blue",)),
    "no column of images": (_no_image_column, ("image",)),
    "no image among training images": (_not_an_image("train"), ("train",)),
    "no image among evaluated images": (_not_an_image("test"), ("test",)),
    "a file for a folder": (
        lambda inputs, folder: (*inputs.image_scratch, "--train_dir", inputs.image_config),
        ("--train_dir", "image_config.json"),
    ),
    "a validation folder that is not there": (
        lambda inputs, folder: (
            *inputs.image_scratch, "--train_dir", inputs.image_folders, "--validation_dir", "not_there"
        ),
        ("--validation_dir", "not_there"),
    ),
    "a test folder that is needed": (
        lambda inputs, folder: (*inputs.image_scratch, "--train_dir", inputs.image_folders, "--do_predict"),
        ("test",),
    ),
}  # fmt: skip
