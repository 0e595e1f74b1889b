# SPDX-License-Identifier: Apache-2.0
"""Images as they are: from the bytes of a file to the RGB that a model sees, or a refusal."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, ImageOps
from tqdm import tqdm

from experiments.errors import BadInput, naming

IMAGE, LABEL = "image", "label"
AS_STORED = ImageFeature(decode=False)
"""The feature of images that are still bytes or a file: a mapping with `bytes` and `path`."""
# Brightness in 16 bits; that in other large numbers has no range that is known.
DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
UNKNOWN_RANGE = ("I", "F")
READ_AT_ONCE = 256


def rgb(image: Image.Image) -> Image.Image:
    """An image as RGB: 16-bit grey by its full range, transparency over white, and upright as its EXIF says.

    Raises:
        ValueError: for a mode whose range is unknown, or that has no RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in UNKNOWN_RANGE or (image.mode in DEEP_GREY and image.has_transparency_data):
        raise ValueError(f"mode {image.mode}; allowed are images of 8 bits, or 16-bit grey without transparency")
    if image.mode in DEEP_GREY:
        image = Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), transparent)
    return image.convert("RGB")


def read_image(stored: dict[str, Any], where: str, draft: bool = False) -> Image.Image:
    """An image of a dataset as RGB.

    Args:
        stored: `bytes`, or `None` and the `path` of a file.
        where: the image is, for the message; a path says more.
        draft: small, where its format can be read so, which shows as well whether it can be read.

    Raises:
        BadInput: for what is no image, a cut one, or one that cannot be RGB.
    """
    with naming(f"image {stored['path'] or where}" if stored else f"image {where}", Exception):
        if not stored:
            raise ValueError("is missing; allowed is an image in each example")
        data = stored["bytes"]
        with Image.open(stored["path"] if data is None else io.BytesIO(data)) as image:
            if draft:
                image.draft(None, (1, 1))
            image.load()
            return rgb(image)


def check_images(dataset: Dataset, where: str) -> None:
    """Read every image once, before any work.

    Args:
        dataset: with the images in the column `image`, as they are stored.
        where: what the split is, for the message.

    Raises:
        BadInput: naming the first that cannot be read.
    """
    images = dataset.select_columns(IMAGE)

    def check(numbered: tuple[int, dict[str, Any]]) -> None:
        index, stored = numbered
        read_image(stored, f"{index} of {where}, counted from 0", draft=True)

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(images), desc="checking images", unit="image", delay=2) as bar,
    ):
        for start in range(0, len(images), READ_AT_ONCE):
            stored = images[start : start + READ_AT_ONCE][IMAGE]
            for _ in pool.map(check, enumerate(stored, start)):
                bar.update()


def image_folder(argument: str, folder: str, unlabelled: bool = False) -> Dataset:
    """The images of a folder: in a folder for each class, or, if they may be unlabelled, without any.

    Hidden files and what is no image by its name are left out.

    Args:
        argument: that names the folder, with its value, for error messages.
        folder: its path.
        unlabelled: whether images may lie in it directly.

    Raises:
        BadInput: for no images, or images elsewhere.
    """
    root = Path(folder)
    with naming(argument, OSError):
        flat = list(_images(root))
        classes = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        by_class = {path.name: list(_images(path)) for path in classes}
        deeper = next((image for path in classes for inner in path.iterdir() if inner.is_dir()
                       for image in _images(inner)), None)  # fmt: skip
    by_class = {name: images for name, images in by_class.items() if images}
    if deeper is not None or (flat and (by_class or not unlabelled)):
        found = deeper or flat[0]
        raise BadInput(
            f"{argument}: {found.relative_to(root.absolute())} is not where images are to be; allowed is one folder of "
            "images for each class" + (", or images and no folders" if unlabelled else "")
        )
    if flat:
        return Dataset.from_dict({IMAGE: list(map(str, flat))}, features=Features({IMAGE: AS_STORED}))
    if not by_class:
        raise BadInput(f"{argument}: has no images; allowed is one folder of images for each class")
    names = list(by_class)
    paths = [str(path) for images in by_class.values() for path in images]
    labels = [index for index, images in enumerate(by_class.values()) for _ in images]
    features = Features({IMAGE: AS_STORED, LABEL: ClassLabel(names=names)})
    return Dataset.from_dict({IMAGE: paths, LABEL: labels}, features=features)


def _images(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ImageFolder.EXTENSIONS and not path.name.startswith(".") and path.is_file():
            yield path.absolute()
