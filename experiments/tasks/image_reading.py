# SPDX-License-Identifier: Apache-2.0
"""From the bytes of an image file to the RGB that a model sees, or a refusal."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from transformers.image_utils import load_image

from experiments.errors import naming

logger = logging.getLogger(__name__)

IMAGE, LABEL, ROW = "image", "label", "row"
AS_STORED = ImageFeature(decode=False)
"""The feature of images that are still bytes or a file: a mapping with `bytes` and `path`."""
# How many images are read from a dataset at a time while they are checked.
CHECKED_AT_ONCE = 256


def read_image(stored: dict[str, Any] | None, where: str) -> Image.Image:
    """Return an image of a dataset as RGB, the same pixels that a checkpoint's pipeline makes of its file.

    Args:
        stored: `bytes`, or `None` and the `path` of a file.
        where: the image is, for the message, unless it is a file.

    Raises:
        BadInput: for a file that is missing, cut or no image, and for one that RGB does not hold as it is.
    """
    with _opened(stored, where) as image:
        return _rgb(image)


@contextmanager
def _opened(stored: dict[str, Any] | None, where: str) -> Iterator[Image.Image]:
    """Open an image; whatever fails inside is a `BadInput` that names it."""
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
            yield image


def _rgb(image: Image.Image) -> Image.Image:
    """Convert as transformers' pipelines do, and refuse an image that this would change.

    Raises:
        ValueError: for more than 8 bits of grey, and for transparency.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"has more than 8 bits for each pixel (mode {image.mode}), which conversion to RGB clips; scale it to 8 "
            "bits, from 16 such as with ImageMagick's `mogrify -path NEW_FOLDER -depth 8 FILE`"
        )
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError(
            "is transparent in places, where conversion to RGB shows hidden colours; lay it on a background, such as "
            "with ImageMagick's `mogrify -path NEW_FOLDER -background white -alpha remove -alpha off FILE`"
        )
    return load_image(image)


def stored_paths(dataset: Dataset) -> list[str | None]:
    """Return the paths of the images in the column `image`, as they are stored; bytes may have none."""
    return list(dataset.select_columns(IMAGE).flatten()[f"{IMAGE}.path"])


def check_images(dataset: Dataset, where: str) -> Dataset:
    """Read every image once, before any work, and warn of those that have more frames than the one that is used.

    Args:
        dataset: with the images in the column `image`, as they are stored, and where each was in its split, in `row`.
        where: what the split is, for the message.

    Returns:
        The dataset without the column `row`.

    Raises:
        BadInput: naming the first that cannot be read.
    """

    def has_more_frames(row: int, stored: dict[str, Any] | None) -> bool:
        with _opened(stored, f"{row} of {where}, counted from 0") as image:
            # A small version, where the format can be read so, shows as well whether the file is whole.
            image.draft(None, (1, 1))
            _rgb(image)
            # Phones keep a preview or a depth map as a second frame of a JPEG file.
            return image.format != "MPO" and getattr(image, "is_animated", False)

    frames = 0
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(dataset), desc="checking images", unit="image", delay=2) as bar,
    ):
        for start in range(0, len(dataset), CHECKED_AT_ONCE):
            rows = dataset[start : start + CHECKED_AT_ONCE]
            for more in pool.map(has_more_frames, rows[ROW], rows[IMAGE]):
                frames += more
                bar.update()
    if frames:
        logger.warning("%s: %d images have several frames or pages; only the first is used", where, frames)
    return dataset.remove_columns(ROW)
