# SPDX-License-Identifier: Apache-2.0
"""Image files: list them in a folder, name their classes, check them and read them as RGB.

Called by `experiments.tasks.images`.
"""

from __future__ import annotations

import io
import logging
import os
import unicodedata
import warnings
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
"""Columns with an image and its name in messages, such as "0 of split 'train'"; files are named by their paths."""
AS_STORED = ImageFeature(decode=False)
"""Feature of images that are not decoded: a mapping with `bytes` and `path`."""
# Names in lower case of files and folders that Windows, macOS and network drives create; they are ignored, like hidden
# ones.
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
# Number of images of each split to open at the start: enough to find a mistake that affects the whole split.
IMAGES_OPENED_AT_START = 1000
# Maximum number of file extensions that a message lists.
MAX_EXTENSIONS_SHOWN = 5


@contextmanager
def open_image(stored: dict[str, Any] | None, where: str) -> Iterator[Image.Image]:
    """Open an image and read its header; errors inside the block become a `BadInput` that names the image.

    Args:
        stored: a mapping with the `bytes` of an image, or with `None` for `bytes` and the `path` of its file.
        where: name of the image for messages, if it has no path.

    Raises:
        BadInput: for a missing file, a file that is not an image, more than 8 bits per channel, and too many pixels.
    """
    data: Any = None if stored is None else stored["bytes"]
    path: Any = None if stored is None else stored["path"]
    called = where if path is None else path if data is None else f"{where} ({path})"
    with naming(f"image {called}", Exception):
        if data is None and path is None:
            raise ValueError("is missing; every example must have an image")
        if data is None and "://" in path:
            # `datasets` 5.2 takes the name of the archive's folder as the class of such images.
            raise ValueError("is in an archive or elsewhere; unpack it into a folder")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(path if data is None else io.BytesIO(data))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ValueError(
                f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller, or remove it"
            ) from None
        except UnidentifiedImageError:
            raise ValueError("is not an image that Pillow can read; convert it to JPEG or PNG, or remove it") from None
        with image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"has more than 8 bits for each pixel (mode {image.mode}), which conversion to RGB would clip; "
                    "scale it to 8 bits, for example with ImageMagick's `mogrify -path NEW_FOLDER -depth 8 FILE`"
                )
            yield image


def read_image(stored: dict[str, Any] | None, where: str) -> Image.Image:
    """Return an image as RGB, with the same pixels as in the pipeline of a checkpoint.

    Raises:
        BadInput: as for `open_image`, and for a truncated file or a transparent image.
    """
    with open_image(stored, where) as image:
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise ValueError(
                "is transparent in places, where conversion to RGB would show hidden colours; put it on a "
                "background, for example with ImageMagick's `mogrify -path NEW_FOLDER -background white -alpha remove "
                "-alpha off FILE`"
            )
        return load_image(image)


def check_headers(datasets: Iterable[Dataset], argument: str) -> None:
    """Open the first images of each dataset, and warn if any has several frames: only one is used.

    The datasets have the columns `image`, not decoded, and `row`.

    Raises:
        BadInput: for the first image that `open_image` refuses.
    """
    frames = 0
    for dataset in datasets:
        for example in dataset.select_columns([IMAGE, ROW]).take(min(len(dataset), IMAGES_OPENED_AT_START)):
            with open_image(example[IMAGE], f"{example[ROW]} of {argument}") as image:
                # Phones keep a preview or a depth map as a second frame of a JPEG file.
                frames += image.format != "MPO" and getattr(image, "is_animated", False)
    if frames:
        logger.warning("%s: %d of the images opened first have several frames; only one is used", argument, frames)


def check_files(dataset: Dataset) -> None:
    """Check that all images that are separate files exist.

    The dataset must have all rows in the order in which they were read, since its Arrow table is read directly.

    Raises:
        BadInput: for the first file that is missing.
    """
    stored = dataset.data.column(IMAGE)
    is_file = pc.is_null(pc.struct_field(stored, "bytes"))
    for path in pc.filter(pc.struct_field(stored, "path"), is_file).to_pylist():
        if path is not None and not os.path.exists(path):
            with open_image({"bytes": None, "path": path}, path):
                pass


def stored_paths(dataset: Dataset) -> list[str | None]:
    """Return the path of each image in the column `image`, `None` for images stored as bytes without a path."""
    return dataset.select_columns(IMAGE).flatten()[f"{IMAGE}.path"][:]


def relative_names(dataset: Dataset, folder: str | None) -> list[str]:
    """Return the paths of the images in the column `image`, relative to `folder` if they are in it.

    Empty if any image has no path.
    """
    paths = [Path(path) for path in stored_paths(dataset) if path is not None]
    if len(paths) < len(dataset):
        return []
    roots = [Path(folder).absolute(), Path(folder).resolve()] if folder is not None else []
    return [str(next((path.relative_to(root) for root in roots if path.is_relative_to(root)), path)) for path in paths]


def read_image_folder(
    argument: str, folder: str, unlabelled: bool = False, **download: Any
) -> tuple[Dataset, list[str]]:
    """Return the images of a folder with a subfolder for each class, and lines on the files that are left out.

    If `unlabelled`, the images may also be directly in the folder. All are sorted by path, character by character. A
    folder with a metadata file is read by `datasets`, with the columns of that file.

    Raises:
        BadInput: for no images, images in the wrong place, a class without images, or a file name that is not UTF-8.
    """
    root = Path(folder).absolute()
    if any((root / name).exists() for name in ImageFolder.METADATA_FILENAMES):
        dataset = read_dataset(argument, folder, None, False, data_files={"train": "**"}, **download)["train"]
        stored = dataset.cast_column(IMAGE, AS_STORED) if IMAGE in dataset.column_names else dataset
        return dataset, describe_unused_files(argument, folder, [stored], [])
    files, _ = list_files(argument, root)
    images = list(filter(_is_readable, files))
    flat = [path for path in images if len(path.parts) == 1]
    labelled = [path for path in images if len(path.parts) == 2]
    misplaced = [path for path in images if len(path.parts) > 2] or (flat if labelled or not unlabelled else [])
    if misplaced:
        raise BadInput(
            f"{argument}: {misplaced[0]} is in the wrong place; put images into one folder for each class"
            + (", or all of them directly into the folder itself" if unlabelled else "")
        )
    if not images:
        raise BadInput(
            f"{argument}: has no image that can be read ({_count_by_extension(files)}); put JPEG or PNG files into "
            + ("it" if unlabelled else "one folder for each class")
        )
    columns: dict[str, list] = {IMAGE: [str(root / path) for path in images]}
    features = Features({IMAGE: AS_STORED})
    if labelled:
        classes = [_class_name(path.parent) for path in labelled]
        features[LABEL] = ClassLabel(names=sorted(set(classes)))
        columns[LABEL] = [features[LABEL].str2int(name) for name in classes]
    return Dataset.from_dict(columns, features=features), _describe_unused(argument, root, set(images), bool(labelled))


def describe_unused_files(argument: str, folder: str, splits: Iterable[Dataset], labels: list[str]) -> list[str]:
    """Return a list with one line about the files of a local folder that are in no example.

    The list is empty if all files are used, or if no image is a separate file. Images of the splits are not decoded.

    Raises:
        BadInput: for the folder of a class from which no image was read.
    """
    root = Path(folder).resolve()
    paths = (Path(path) for split in splits for path in stored_paths(split) if path is not None)
    images = {path.relative_to(root) for path in paths if path.is_relative_to(root)}
    by_class = {_class_name(path.parent) for path in images} <= {_class_name(Path(label)) for label in labels}
    return _describe_unused(argument, root, images, by_class) if images else []


def _describe_unused(argument: str, root: Path, images: Collection[Path], by_class: bool) -> list[str]:
    """Return the line of `describe_unused_files`; `by_class`: whether images are in folders of their classes."""
    files, folders = list_files(argument, root)
    class_folders = {path.parent for path in images}
    parents = {folder.parent for folder in class_folders}
    for folder in folders if by_class else []:
        if folder not in class_folders and folder.parent in parents:
            within = [path for path in files if folder in path.parents]
            raise BadInput(
                f"{argument}: the folder {_printable(folder)} has no image that can be read "
                f"({_count_by_extension(within)}); convert its files to JPEG or PNG, or remove it"
            )
    unused = [path for path in files if path not in images and path.name not in ImageFolder.METADATA_FILENAMES]
    return [f"files of {argument} that are in no example ({_count_by_extension(unused)})"] if unused else []


def list_files(argument: str, root: Path) -> tuple[list[Path], list[Path]]:
    """Return the sorted paths of all files and folders below a folder, relative to it.

    Hidden files and those of the operating system are left out.

    Raises:
        BadInput: for a folder that cannot be read, or an image whose name is not UTF-8 and so cannot be written into
            results.
    """
    files: list[Path] = []
    folders: list[Path] = []
    with naming(argument, OSError):
        for parent, names, found in os.walk(root, followlinks=True, onerror=_raise):
            # Removing folders from this list keeps os.walk from entering them.
            names[:] = [name for name in names if not _is_ignored(name)]
            relative = Path(parent).relative_to(root)
            files += [relative / name for name in found if not _is_ignored(name)]
            folders += [relative / name for name in names]
    for path in (root, *filter(_is_readable, sorted(files))):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise BadInput(f"{argument}: the name {_printable(path)} is not UTF-8; rename it") from None
    return sorted(files), sorted(folders)


def _class_name(folder: Path) -> str:
    """Return the class of a folder: its name without surrounding spaces, in NFC, since macOS decomposes accents."""
    return unicodedata.normalize("NFC", folder.name).strip()


def _is_readable(path: Path) -> bool:
    """Whether a file has the extension of an image format that Pillow can open."""
    Image.init()
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _count_by_extension(files: Iterable[Path]) -> str:
    """Describe the number of files by extension: "8 .heic, 4 .txt"."""
    counts = Counter(path.suffix.lower() or "without an extension" for path in files)
    extensions = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {_printable(extension)}" for extension, count in extensions[:MAX_EXTENSIONS_SHOWN]]
    more = sum(count for _, count in extensions[MAX_EXTENSIONS_SHOWN:])
    return ", ".join(shown) + (f" and {more} others" if more else "") or "it is empty"


def _printable(path: str | Path) -> str:
    """Return a name that can be printed, with \\xNN for bytes that are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _raise(error: OSError) -> NoReturn:
    raise error
