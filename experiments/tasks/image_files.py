# SPDX-License-Identifier: Apache-2.0
"""Image files: which of a folder are read, what their classes are called, and the RGB that a model sees of each."""

from __future__ import annotations

import io
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import load_image

from experiments.errors import BadInput, naming
from experiments.tasks.labels import LABEL
from experiments.tasks.reading import read_dataset

logger = logging.getLogger(__name__)

IMAGE, ROW = "image", "row"
"""The columns with the images, and with what messages call each, unless it is a file: "0 of split 'train'"."""
AS_STORED = ImageFeature(decode=False)
"""The feature of images that are still bytes or a file: a mapping with `bytes` and `path`."""
# Files and folders that Windows, macOS and network drives leave beside images, in lower case; hidden ones come on top.
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
# Number of images of each split that are opened at the start: enough to show what is wrong with all of them.
OPENED_FIRST = 1000
# A message names at most this many endings of files.
SHOWN_ENDINGS = 5


@contextmanager
def open_image(stored: dict[str, Any] | None, where: str) -> Iterator[Image.Image]:
    """Open an image, of which only the header is read; whatever fails inside is a `BadInput` that names it.

    Args:
        stored: `bytes`, or `None` and the `path` of a file.
        where: what messages call the image, unless it is a file.

    Raises:
        BadInput: for a file that is missing or no image, and for more than 8 bits of grey.
    """
    data: Any = None if stored is None else stored["bytes"]
    path: Any = None if stored is None else stored["path"]
    called = where if path is None else path if data is None else f"{where} ({path})"
    with naming(f"image {called}", Exception):
        if data is None and path is None:
            raise ValueError("is missing; every example needs an image")
        if data is None and "://" in path:
            # datasets 5.2 gives such images the class of the archive's folder.
            raise ValueError("is in an archive or elsewhere; unpack it into a folder")
        try:
            image = Image.open(path if data is None else io.BytesIO(data))
        except UnidentifiedImageError:
            raise ValueError("is no image that Pillow can read; convert it to JPEG or PNG, or remove it") from None
        with image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"has more than 8 bits for each pixel (mode {image.mode}), which conversion to RGB clips; scale it "
                    "to 8 bits, from 16 such as with ImageMagick's `mogrify -path NEW_FOLDER -depth 8 FILE`"
                )
            yield image


def read_image(stored: dict[str, Any] | None, where: str) -> Image.Image:
    """Return an image as RGB, the same pixels that a checkpoint's pipeline makes of its file.

    Raises:
        BadInput: as `open_image`, and for a file that is cut, or transparency.
    """
    with open_image(stored, where) as image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError(
                "is transparent in places, where conversion to RGB shows hidden colours; lay it on a background, such "
                "as with ImageMagick's `mogrify -path NEW_FOLDER -background white -alpha remove -alpha off FILE`"
            )
        return load_image(image)


def check_headers(datasets: Iterable[Dataset], argument: str) -> None:
    """Open the first images of each dataset, and warn of those that have more frames than the one that is used.

    The datasets have the columns `image`, as it is stored, and `row`.

    Raises:
        BadInput: naming the first that `open_image` refuses.
    """
    frames = 0
    for dataset in datasets:
        for example in dataset.select_columns([IMAGE, ROW]).take(min(len(dataset), OPENED_FIRST)):
            with open_image(example[IMAGE], f"{example[ROW]} of {argument}") as image:
                # Phones keep a preview or a depth map as a second frame of a JPEG file.
                frames += image.format != "MPO" and getattr(image, "is_animated", False)
    if frames:
        logger.warning("%s: %d of the images opened first have several frames; only one is used", argument, frames)


def check_files(dataset: Dataset) -> None:
    """Check that images which are files of their own are there.

    The dataset is as it was read, neither selected from nor shuffled.

    Raises:
        BadInput: naming the first that is not.
    """
    stored = dataset.data.column(IMAGE)
    is_file = pc.is_null(pc.struct_field(stored, "bytes"))
    for path in pc.filter(pc.struct_field(stored, "path"), is_file).to_pylist():
        if path is not None and not os.path.exists(path):
            with open_image({"bytes": None, "path": path}, path):
                pass


def stored_paths(dataset: Dataset) -> list[str | None]:
    """Return the paths of the images in the column `image`, as they are stored; bytes may have none."""
    return dataset.select_columns(IMAGE).flatten()[f"{IMAGE}.path"][:]


def relative_names(dataset: Dataset, folder: str | None) -> list[str]:
    """Return the paths of the images in the column `image`, relative to a folder that they are in.

    Empty if an image has none.
    """
    paths = [Path(path) for path in stored_paths(dataset) if path is not None]
    if len(paths) < len(dataset):
        return []
    roots = [Path(folder).absolute(), Path(folder).resolve()] if folder is not None else []
    return [str(next((path.relative_to(root) for root in roots if path.is_relative_to(root)), path)) for path in paths]


def read_image_folder(
    argument: str, folder: str, unlabelled: bool = False, **download: Any
) -> tuple[Dataset, list[str]]:
    """Return the images of a folder, which has a folder for each class, or, if they may be unlabelled, none.

    Images are in the order of their paths, character by character. With them comes a line on the files that are left
    out, if any are. A folder with a metadata file is read as `datasets` reads it, with the columns of that file.

    Raises:
        BadInput: for no images, images elsewhere, a class without images, or a name that is not UTF-8.
    """
    root = Path(folder).absolute()
    if any((root / name).exists() for name in ImageFolder.METADATA_FILENAMES):
        dataset = read_dataset(argument, folder, None, False, data_files={"train": "**"}, **download)["train"]
        stored = dataset.cast_column(IMAGE, AS_STORED) if IMAGE in dataset.column_names else dataset
        return dataset, left_out_of_dataset(argument, folder, [stored], [])
    files, _ = list_files(argument, root)
    images = list(filter(_is_readable, files))
    flat = [path for path in images if len(path.parts) == 1]
    labelled = [path for path in images if len(path.parts) == 2]
    misplaced = [path for path in images if len(path.parts) > 2] or (flat if labelled or not unlabelled else [])
    if misplaced:
        raise BadInput(
            f"{argument}: {misplaced[0]} is in the wrong place; put images into one folder for each class"
            + (", or all of them directly into this one" if unlabelled else "")
        )
    if not images:
        raise BadInput(
            f"{argument}: has no image that can be read ({_counted(files)}); put JPEG or PNG files into "
            + ("it" if unlabelled else "one folder for each class")
        )
    columns: dict[str, list] = {IMAGE: [str(root / path) for path in images]}
    features = Features({IMAGE: AS_STORED})
    if labelled:
        of_images = [_class_name(path.parent) for path in labelled]
        features[LABEL] = ClassLabel(names=sorted(set(of_images)))
        columns[LABEL] = [features[LABEL].str2int(name) for name in of_images]
    return Dataset.from_dict(columns, features=features), _left_out(argument, root, set(images), bool(labelled))


def left_out_of_dataset(argument: str, folder: str, splits: Iterable[Dataset], labels: list[str]) -> list[str]:
    """Return a line on the files of a local dataset that it leaves out, if it has image files and leaves out any.

    The images of the splits are as they are stored.

    Raises:
        BadInput: for a folder of a class of which nothing is read.
    """
    root = Path(folder).resolve()
    paths = (Path(path) for split in splits for path in stored_paths(split) if path is not None)
    images = {path.relative_to(root) for path in paths if path.is_relative_to(root)}
    in_folders = {_class_name(path.parent) for path in images} <= {_class_name(Path(label)) for label in labels}
    return _left_out(argument, root, images, in_folders) if images else []


def _left_out(argument: str, root: Path, images: Collection[Path], in_folders: bool) -> list[str]:
    """Return the line of `left_out_of_dataset`; `in_folders` says that images are in folders of their classes."""
    files, folders = list_files(argument, root)
    of_images = {path.parent for path in images}
    beside = {folder.parent for folder in of_images}
    for folder in folders if in_folders else []:
        if folder not in of_images and folder.parent in beside:
            within = [path for path in files if folder in path.parents]
            raise BadInput(
                f"{argument}: the folder {_shown(folder)} has no image that can be read ({_counted(within)}); convert "
                "what is in it to JPEG or PNG, or remove it"
            )
    left = [path for path in files if path not in images and path.name not in ImageFolder.METADATA_FILENAMES]
    return [f"files of {argument} that are in no example ({_counted(left)})"] if left else []


def list_files(argument: str, root: Path) -> tuple[list[Path], list[Path]]:
    """Return the paths of all files and folders below a folder, relative to it, in order.

    Hidden ones and those of a system are left out.

    Raises:
        BadInput: for a folder that cannot be read, or an image whose name is not UTF-8, as all is that it is written
            into.
    """
    files: list[Path] = []
    folders: list[Path] = []
    with naming(argument, OSError):
        for parent, names, found in os.walk(root, followlinks=True, onerror=_raise):
            # os.walk goes on into the folders that are left in its list.
            names[:] = [name for name in names if not _is_ignored(name)]
            relative = Path(parent).relative_to(root)
            files += [relative / name for name in found if not _is_ignored(name)]
            folders += [relative / name for name in names]
    for path in (root, *filter(_is_readable, sorted(files))):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise BadInput(f"{argument}: the name {_shown(path)} is not UTF-8; rename it") from None
    return sorted(files), sorted(folders)


def _class_name(folder: Path) -> str:
    """Return the name of a folder's class, without spaces around it; macOS decomposes accents, and means the same."""
    return unicodedata.normalize("NFC", folder.name).strip()


def _is_readable(path: Path) -> bool:
    """Whether a file's ending is that of an image that Pillow can open."""
    Image.init()
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _counted(files: Iterable[Path]) -> str:
    """Describe how many files have which ending: "8 .heic, 4 .txt"."""
    counts = Counter(path.suffix.lower() or "without an ending" for path in files)
    endings = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {_shown(ending)}" for ending, count in endings[:SHOWN_ENDINGS]]
    more = sum(count for _, count in endings[SHOWN_ENDINGS:])
    return ", ".join(shown) + (f" and {more} others" if more else "") or "it is empty"


def _shown(path: str | Path) -> str:
    """Return a name as it can be printed: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _raise(error: OSError) -> NoReturn:
    raise error
