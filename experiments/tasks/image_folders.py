# SPDX-License-Identifier: Apache-2.0
"""Folders of images: which files are read, which are left out, and what the classes are called."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from datasets import ClassLabel, Dataset, Features
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

from experiments.errors import BadInput, naming
from experiments.tasks.image_reading import AS_STORED, IMAGE, LABEL, stored_paths
from experiments.tasks.reading import read_dataset

# Files and folders that Windows, macOS and network drives leave beside images, in lower case; hidden ones come on top.
SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
# A message names at most this many endings of files.
SHOWN_ENDINGS = 5


def read_image_folder(
    argument: str, folder: str, unlabelled: bool = False, **download: Any
) -> tuple[Dataset, list[str]]:
    """Return the images of a folder, which has a folder for each class, or, if they may be unlabelled, none.

    Images are in the order of their paths, character by character. With them comes a line on the files that are left
    out, if any are. Hidden files and those of a system do not count. A folder with a metadata file is read as
    `datasets` reads it, with the columns of that file.

    Args:
        argument: that names the folder, with its value, for error messages.
        folder: its path.
        unlabelled: whether images may lie in it directly.
        download: `cache_dir` and `token` for `datasets.load_dataset`.

    Raises:
        BadInput: for no images, images elsewhere, a class without images, or a name that is not UTF-8.
    """
    root = Path(folder).absolute()
    if any((root / name).exists() for name in ImageFolder.METADATA_FILENAMES):
        split = read_dataset(argument, folder, None, False, data_files={"train": "**"}, **download)["train"]
        stored = split.cast_column(IMAGE, AS_STORED) if IMAGE in split.column_names else split
        return split, left_out_of_dataset(argument, folder, [stored], [])
    files, classes = _list_files(argument, root)
    images = [path for path in files if path.suffix.lower() in _readable_endings()]
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
    for name in [] if flat else classes:
        if not any(path.parts[0] == name for path in labelled):
            _refuse_empty_class(argument, Path(name), [path for path in files if path.parts[0] == name])
    check_names(argument, root, images)
    columns: dict[str, list] = {IMAGE: [str(root / path) for path in images]}
    features = Features({IMAGE: AS_STORED})
    if labelled:
        of_images = [_class_name(path.parent) for path in labelled]
        features[LABEL] = ClassLabel(names=sorted(set(of_images)))
        columns[LABEL] = [features[LABEL].str2int(name) for name in of_images]
    return Dataset.from_dict(columns, features=features), _left_out(argument, files, set(images))


def left_out_of_dataset(argument: str, folder: str, splits: Iterable[Dataset], labels: list[str]) -> list[str]:
    """Return a line on the files of a local dataset that it leaves out, if it has image files and leaves out any.

    Args:
        argument: that names the folder, with its value, for error messages.
        folder: its path.
        splits: all there are, with the images in the column `image`, as they are stored.
        labels: names of the classes.

    Raises:
        BadInput: for a folder of a class of which nothing is read.
    """
    root = Path(folder).resolve()
    paths = (Path(path) for split in splits for path in stored_paths(split) if path is not None)
    images = {path.relative_to(root) for path in paths if path.is_relative_to(root)}
    if not images:
        return []
    files, _ = _list_files(argument, root)
    tables = [path for path in files if path.name in ImageFolder.METADATA_FILENAMES]
    folders = {path.parent for path in images}
    if {_class_name(folder) for folder in folders} <= set(map(_class_name, map(Path, labels))):
        beside = {folder.parent for folder in folders}
        for empty in sorted({path.parent for path in files} - folders - {Path()}):
            if empty.parent in beside:
                _refuse_empty_class(argument, empty, [path for path in files if path.parent == empty])
    return _left_out(argument, files, images | set(tables))


def _class_name(folder: Path) -> str:
    """The name of a folder's class, without spaces around it; macOS decomposes accents, and means the same."""
    return unicodedata.normalize("NFC", folder.name).strip()


def _list_files(argument: str, root: Path) -> tuple[list[Path], list[str]]:
    """Return the paths of all files below a folder, relative to it, and the names of the folders in it, in order.

    Hidden ones and those of a system are left out.

    Raises:
        BadInput: for a folder that cannot be read.
    """
    files: list[Path] = []
    folders: list[str] = []
    with naming(argument, OSError):
        for parent, names, found in os.walk(root, followlinks=True, onerror=_raise):
            # os.walk goes on into the folders that are left in its list.
            names[:] = [name for name in names if not _is_ignored(name)]
            relative = Path(parent).relative_to(root)
            files += [relative / name for name in found if not _is_ignored(name)]
            folders = names if relative == Path() else folders
    return sorted(files), sorted(folders)


def relative_names(split: Dataset, folder: str | None) -> list[str]:
    """Return the paths of the images in the column `image`, relative to a folder that they are in.

    Empty if an image has none.
    """
    paths = [Path(path) for path in stored_paths(split) if path is not None]
    if len(paths) < len(split):
        return []
    roots = [Path(folder).absolute(), Path(folder).resolve()] if folder is not None else []
    return [str(next((path.relative_to(root) for root in roots if path.is_relative_to(root)), path)) for path in paths]


def _left_out(argument: str, files: list[Path], read: set[Path]) -> list[str]:
    left = [path for path in files if path not in read]
    return [f"files of {argument} that are in no example ({_counted(left)})"] if left else []


def _refuse_empty_class(argument: str, folder: Path, files: list[Path]) -> NoReturn:
    raise BadInput(
        f"{argument}: the folder {_shown(folder)} has no image that can be read ({_counted(files)}); convert "
        "what is in it to JPEG or PNG, or remove it"
    )


def check_names(argument: str, root: Path, images: Iterable[Path] | None = None) -> None:
    """Check that the names of images are UTF-8, as all is that they are written into.

    Args:
        argument: that names the folder, with its value, for error messages.
        root: the folder.
        images: their paths, relative to it; by default all that are in it.

    Raises:
        BadInput: naming the first that is not.
    """
    if images is None:
        images = [path for path in _list_files(argument, root)[0] if path.suffix.lower() in _readable_endings()]
    for path in (root, *images):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise BadInput(f"{argument}: the name {_shown(path)} is not UTF-8; rename it") from None


def _readable_endings() -> set[str]:
    Image.init()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


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
    """A name as it can be printed: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _raise(error: OSError) -> NoReturn:
    raise error
