# SPDX-License-Identifier: Apache-2.0
"""Files of examples and images are read, or refused in one line, in seconds and without much memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from PIL import Image

from experiments.errors import BadInput
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.tasks.image_files import read_image
from experiments.tasks.images import ImageDataArguments, load_image_task
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task
from tests.fuzzing.files import images, mutated, png_of_size, tables
from tests.fuzzing.limits import check

TABLES, IMAGES = tables(), images()
TEXTS = TABLES | {"txt": b"aaa bbb\nccc\n"}


def read_sentences(path: Path) -> None:
    """Load a file as `run_glue.py` does, and every example of it."""
    arguments = GlueDataArguments(train_file=str(path), validation_file=str(path))
    task = load_glue_task(arguments, predict=False, seed=0, cache_dir=str(path.parent / "cache"))
    list(task.train)


def read_texts(path: Path) -> None:
    """Load a file as `run_mlm.py` does, beside a held-out one without duplicates of it, and every example of it."""
    held_out = path.with_name("held_out.txt")
    held_out.write_text("ddd eee\nfff\n")
    arguments = MlmDataArguments(train_file=str(path), validation_file=str(held_out))
    task = load_mlm_task(arguments, predict=False, seed=0, cache_dir=str(path.parent / "cache"))
    list(task.train)


def read_images(folder: Path) -> None:
    """Load a folder as `run_image.py` does, and decode every image of it."""
    task = load_image_task(ImageDataArguments(train_dir=str(folder)), predict=False, seed=0)
    for example in task.train:
        read_image(example["image"], "0")


@pytest.mark.parametrize(
    ("read", "extension"), [(read_sentences, name) for name in TABLES] + [(read_texts, name) for name in TEXTS]
)
def test_what_is_mutated_is_read(tmp_path, read, extension):
    path = tmp_path / f"data.{extension}"
    path.write_bytes(TEXTS[extension])
    read(path)


def check_file(read: Callable[[Path], object], extension: str, data: bytes) -> None:
    """Check that a file of these bytes is read, or refused in one line."""
    with TemporaryDirectory() as folder:
        path = Path(folder, f"data.{extension}")
        path.write_bytes(data)
        check(lambda: read(path), BadInput)


@given(mutated(TABLES))
def test_any_table_is_read_or_refused(file):
    check_file(read_sentences, *file)


@given(mutated(TEXTS))
def test_any_file_of_texts_is_read_or_refused(file):
    check_file(read_texts, *file)


@given(mutated(IMAGES))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_image_is_decoded_or_refused(file):
    check(lambda: read_image({"bytes": file[1], "path": None}, "0 of split 'train'"), BadInput)


@given(mutated(IMAGES))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_folder_of_images_is_read_or_refused(file):
    extension, data = file
    with TemporaryDirectory() as folder:
        for name in ("a", "b"):
            (Path(folder) / name).mkdir()
            for number in range(2):
                (Path(folder) / name / f"{number}.png").write_bytes(IMAGES["png"])
        (Path(folder) / "a" / f"2.{extension}").write_bytes(data)
        check(lambda: read_images(Path(folder)), BadInput)


@pytest.mark.parametrize("size", [(30_000, 3_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_decompression_bomb_is_one_line(size):
    """Of a file of a hundred bytes that would need up to gigabytes of memory."""
    with pytest.raises(BadInput, match=r"^image 0 of train: [^\n]*pixels[^\n]*$"):
        check(lambda: read_image({"bytes": png_of_size(*size), "path": None}, "0 of train"))


def test_the_largest_allowed_image_is_read_for_its_header_only():
    width = Image.MAX_IMAGE_PIXELS // 1000
    with pytest.raises(BadInput, match="truncated"):
        check(lambda: read_image({"bytes": png_of_size(width, 1000), "path": None}, "0 of train"))


# Tables that once gave a traceback, or that look as if they might.
FOUND = {
    "a deep list": ("json", b"[" * 100_000),
    "a deep value": ("jsonl", b'{"sentence": ' + b"[" * 100_000),
    "a label of ten thousand digits": ("json", b'[{"sentence": "a", "label": ' + b"9" * 10_000 + b"}]"),
    "a label that is nearly a long number": ("csv", b"sentence,label\naaa," + b"9" * 50_000 + b"x\nbbb,c\n"),
    "many quotation marks": ("csv", b"sentence,label\n" + b'"' * 100_001),
    "a control sequence": ("csv", b"\x1b[2J,label\na,b,c\n"),
    "a zero byte": ("tsv", b"sentence\x00label\n"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_table_that_was_found(tmp_path, name):
    extension, data = FOUND[name]
    path = tmp_path / f"data.{extension}"
    path.write_bytes(data)
    check(lambda: read_sentences(path), BadInput)


def test_nothing_is_written_beside_the_data(tmp_path):
    (tmp_path / "data.csv").write_bytes(TABLES["csv"])
    read_sentences(tmp_path / "data.csv")
    assert set(os.listdir(tmp_path)) <= {"data.csv", "cache"}
