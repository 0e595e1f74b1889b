# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder of images are read, and what is said of the others."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from experiments.errors import BadInput
from experiments.tasks.image_folders import read_image_folder
from experiments.tasks.image_reading import check_images, read_image


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path, "PNG")


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no image")


def test_a_folder_for_each_class(tmp_path):
    """Brackets are no pattern; hidden files and those of a system are no images and no classes, wherever they are."""
    root = tmp_path / "a[1] *"
    for name in ("cat/1.png", "cat/2.PNG", "dog [b]/1.png", "dog [b]/2.avif"):
        save(root / name)
    for name in (".cache/1.png", "cat/.hidden.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "__MACOSX/cat/1.png",
                 "cat/@eaDir/1.png/SYNOPHOTO_THUMB.jpg"):  # fmt: skip
        save(root / name)
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "desktop.ini", "cat/._1.png"):
        write(root / name)
    images, left_out = read_image_folder("--train_dir", str(root))
    assert images.features["label"].names == ["cat", "dog [b]"]
    assert images["label"] == [0, 0, 1, 1]
    check_images(images.add_column("row", range(4)), "here")
    assert left_out == []


def test_files_that_are_left_out_are_counted(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        save(tmp_path / name)
    for name in ("README.md", "cat/2.heic", "cat/3.HEIC", "dog/2.jxl", "dog/notes", "dog/masks/1.xml"):
        write(tmp_path / name)
    images, left_out = read_image_folder("--train_dir x", str(tmp_path))
    assert len(images) == 2
    assert left_out == [
        "files of --train_dir x that are in no example (2 .heic, 1 .jxl, 1 .md, 1 .xml, 1 without an ending)"
    ]


@pytest.mark.parametrize("names", [("dog/1.heic", "dog/2.HEIC"), ("dog/sub/1.heic", "dog/1.heic"), ()])
def test_a_class_does_not_vanish(tmp_path, names):
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    for name in names:
        write(tmp_path / name)
    found = "2 .heic" if names else "it is empty"
    with pytest.raises(BadInput, match=rf"^--train_dir x: the folder dog has no image that can be read \({found}\)"):
        read_image_folder("--train_dir x", str(tmp_path))


def test_a_class_is_the_same_name_from_any_system(tmp_path):
    """macOS writes an accent as a character of its own."""
    for index, form in enumerate(("NFC", "NFD")):
        save(tmp_path / unicodedata.normalize(form, "café") / f"{index}.png")
    save(tmp_path / "bar" / "1.png")
    images, _ = read_image_folder("--train_dir", str(tmp_path))
    assert images.features["label"].names == ["bar", unicodedata.normalize("NFC", "café")]
    assert images["label"].count(1) == 2


@pytest.mark.parametrize("name", [b"cat/\xe9.png", b"caf\xe9/1.png", b"sub/../caf\xe9/b/1.png"])
def test_names_that_are_not_utf8_are_refused(tmp_path, name):
    path = Path(os.path.normpath(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    save(path)
    save(tmp_path / "dog" / "1.png")
    root = path.parents[1]
    with pytest.raises(BadInput, match=r"^--train_dir x: the name .*\\xe9.* is not UTF-8; rename it") as error:
        read_image_folder("--train_dir x", str(root))
    str(error.value).encode()


def test_images_without_classes_are_to_predict_alone(tmp_path):
    for index in range(3):
        save(tmp_path / "test" / f"{index}.png")
    write(tmp_path / "test" / "notes" / "1.txt")
    assert read_image_folder("--test_dir", str(tmp_path / "test"), unlabelled=True)[0].column_names == ["image"]
    with pytest.raises(BadInput, match="--train_dir x: 0.png is in the wrong place"):
        read_image_folder("--train_dir x", str(tmp_path / "test"))


@pytest.mark.parametrize(
    "names",
    [("train/cat/1.png", "test/cat/1.png"), ("cat/1.png", "2.png"), ("cat/a/b/1.png", "cat/1.png"), ("notes.txt",), ()],
)
def test_images_elsewhere_are_named(tmp_path, names):
    """A folder with train and test in it would be two classes, or one with everything."""
    for name in names:
        save(tmp_path / name)
    for unlabelled in (False, True):
        with pytest.raises(BadInput, match="--train_dir .* put (images|JPEG or PNG files) into "):
            read_image_folder(f"--train_dir {tmp_path}", str(tmp_path), unlabelled)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path):
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(BadInput, match="image .*dog/1.png: .*No such file"):
        read_image(read_image_folder("--train_dir", str(tmp_path))[0][1]["image"], "1")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("file_name;label\n1.png;cat\n", "metadata.csv: has ';' between its columns; it must be ','"),
        ("filename,label\n1.png,cat\n", "metadata.csv: has no column 'file_name', only 'filename', 'label'"),
        ("file_name,label\n1.png,k\xe4se\n", "metadata.csv: .*save it as UTF-8"),
    ],
)
def test_a_metadata_file_that_is_none(tmp_path, content, says):
    save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=f"^--test_dir x: {says}"):
        read_image_folder("--test_dir x", str(tmp_path))


def test_a_flat_folder_without_readable_images_needs_other_files_and_no_folders(tmp_path):
    write(tmp_path / "1.heic")
    with pytest.raises(BadInput, match=r"no image that can be read \(1 .heic\); put JPEG or PNG files into it$"):
        read_image_folder("--test_dir x", str(tmp_path), unlabelled=True)
