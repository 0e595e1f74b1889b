# SPDX-License-Identifier: Apache-2.0
"""The model sees of any image what the checkpoint's pipeline makes of its file; other images are refused."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageCms
from transformers import PerceiverConfig, PerceiverForImageClassificationConvProcessing, pipeline
from transformers.image_utils import load_image

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.image_reading import AS_STORED, check_images, read_image
from experiments.tasks.images import ImageDataArguments, load_image_task
from tests.support.tiny_images import MODEL

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # saving leaves settings of the format in the image
    return buffer.getvalue()


def png(bits: int, colour: int, pixels: list[int], *chunks: tuple[bytes, list[int]]) -> bytes:
    """A PNG file of one row of two pixels, of kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *((name, bytes(data)) for name, data in chunks)]
    parts += [(b"IDAT", zlib.compress(bytes([0, *pixels]))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def as_stored(rows: list[dict | None]) -> Dataset:
    features = Features({"image": AS_STORED, "row": Value("int64")})
    return Dataset.from_dict({"image": rows, "row": range(len(rows))}, features=features)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def frames() -> dict[str, object]:
    return {"save_all": True, "append_images": [Image.new("RGB", RGB.size, "red")]}


def with_profile(mode: str) -> dict[str, bytes]:
    return {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile(mode)).tobytes()}


def transparent(mode: str = "RGBA") -> Image.Image:
    image = RGB.convert("RGBA")
    image.putpixel((3, 4), (1, 2, 3, 254))
    return image.convert(mode)


PALETTE = (b"PLTE", [10, 20, 30, 40, 50, 60, 70, 80, 90])
ACCEPTED: dict[str, bytes] = {
    "1.png": encoded(RGB.convert("1"), "PNG"),
    "grey.png": encoded(RGB.convert("L"), "PNG"),
    "grey_4_bits.png": png(4, 0, [0x1B]),
    "grey_other_is_transparent.png": png(8, 0, [7, 9], (b"tRNS", [0, 8])),
    "palette.png": encoded(RGB.convert("P"), "PNG"),
    "palette_opaque.png": png(8, 3, [0, 1], PALETTE, (b"tRNS", [255, 255, 255])),
    "palette_other_is_transparent.png": png(8, 3, [0, 1], PALETTE, (b"tRNS", [255, 255, 0])),
    "rgb.png": encoded(RGB, "PNG"),
    "rgb_16_bits.png": png(16, 2, [10, 200, 20, 0, 30, 0, 1, 2, 3, 4, 5, 6]),
    "rgba_16_bits_opaque.png": png(16, 6, [10, 200, 20, 0, 30, 0, 255, 255] * 2),
    "rgba_opaque.png": encoded(RGB.convert("RGBA"), "PNG"),
    "grey_alpha_opaque.png": encoded(RGB.convert("LA"), "PNG"),
    "rotated.png": encoded(RGB, "PNG", exif=rotated()),
    "frames.png": encoded(RGB, "PNG", **frames()),
    "profile.png": encoded(RGB, "PNG", **with_profile("XYZ")),
    "rgb.jpg": encoded(RGB, "JPEG"),
    "grey.jpg": encoded(RGB.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "progressive.jpg": encoded(RGB, "JPEG", progressive=True),
    "rotated.jpg": encoded(RGB, "JPEG", exif=rotated()),
    "two_pictures.jpg": encoded(RGB, "MPO", **frames()),
    "png.jpg": encoded(RGB, "PNG"),
    "palette.gif": encoded(RGB, "GIF"),
    "frames.gif": encoded(RGB, "GIF", **frames()),
    "other_is_transparent.gif": encoded(RGB.quantize(16), "GIF", transparency=200),
    "rgb.webp": encoded(RGB, "WEBP"),
    "frames.webp": encoded(RGB, "WEBP", **frames()),
    "rotated.webp": encoded(RGB, "WEBP", exif=rotated()),
    "rgb.tiff": encoded(RGB, "TIFF"),
    "cmyk.tif": encoded(RGB.convert("CMYK"), "TIFF"),
    "ycbcr.tif": encoded(RGB.convert("YCbCr"), "TIFF"),
    "rotated.tif": encoded(RGB, "TIFF", exif=rotated()),
    "pages.tif": encoded(RGB, "TIFF", **frames()),
    "rgb.bmp": encoded(RGB, "BMP"),
    "palette.bmp": encoded(RGB.convert("P"), "BMP"),
    "rgb.ppm": encoded(RGB, "PPM"),
    "rgb.tga": encoded(RGB, "TGA"),
    "rgb.jp2": encoded(RGB, "JPEG2000"),
    "wide.png": encoded(RGB.resize((40, 3)), "PNG"),
    "pixel.png": encoded(RGB.resize((1, 1)), "PNG"),
}
MORE_BITS, TRANSPARENT, NO_IMAGE = "more than 8 bits", "is transparent in places", "is no image that Pillow can read"
REFUSED: dict[str, tuple[bytes, str]] = {
    "grey_16_bits.png": (encoded(RGB.convert("L").convert("I;16"), "PNG"), MORE_BITS),
    "grey_16_bits.tif": (encoded(RGB.convert("L").convert("I;16"), "TIFF"), MORE_BITS),
    "grey_16_bits.pgm": (encoded(RGB.convert("L").convert("I;16"), "PPM"), MORE_BITS),
    "grey_16_bits.jp2": (encoded(RGB.convert("L").convert("I;16"), "JPEG2000"), MORE_BITS),
    "grey_16_bits_transparent.png": (png(16, 0, [0, 1, 0, 2], (b"tRNS", [0, 1])), MORE_BITS),
    "integers.tif": (encoded(RGB.convert("I"), "TIFF"), MORE_BITS),
    "floats.tif": (encoded(RGB.convert("F"), "TIFF"), MORE_BITS),
    "rgba.png": (encoded(transparent(), "PNG"), TRANSPARENT),
    "grey_alpha.png": (encoded(transparent("LA"), "PNG"), TRANSPARENT),
    "grey_one_is_transparent.png": (png(8, 0, [7, 9], (b"tRNS", [0, 7])), TRANSPARENT),
    "palette_one_is_transparent.png": (png(8, 3, [0, 1], PALETTE, (b"tRNS", [255, 0])), TRANSPARENT),
    "rgba.webp": (encoded(transparent(), "WEBP", lossless=True), TRANSPARENT),
    "rgba.tif": (encoded(transparent(), "TIFF"), TRANSPARENT),
    "one_is_transparent.gif": (encoded(Image.new("P", (2, 1)), "GIF", transparency=0), TRANSPARENT),
    "cut.png": (encoded(RGB, "PNG")[:300], "truncated"),
    "cut.jpg": (encoded(RGB, "JPEG")[:-3], "truncated"),
    "cut.gif": (encoded(RGB, "GIF")[:-9], "truncated"),
    "empty.jpg": (b"", NO_IMAGE),
    "text.png": (b"version https://git-lfs.github.com/spec/v1", NO_IMAGE),
    "heic.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), NO_IMAGE),
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts_and_pipeline(tmp_path_factory) -> tuple[Callable[[Path], torch.Tensor], Callable[[Path], torch.Tensor]]:
    """What a script trains on and evaluates on, and what the pipeline of its checkpoint makes of the same file."""
    folder = tmp_path_factory.mktemp("checkpoint")
    PerceiverForImageClassificationConvProcessing(PerceiverConfig(**MODEL)).save_pretrained(folder)

    def script(path: Path) -> torch.Tensor:
        task = load_image_task(ImageDataArguments(train_dir=str(path.parents[1])), False, seed=0)
        config = ToMePerceiverConfig(**MODEL, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
        processor = task.processing_class(config, None)
        processor.save_pretrained(folder)
        prepared = task.prepared(config, processor, seed=0)
        trained, evaluated = prepared.train[0]["pixel_values"], prepared.evaluation[""][0]["pixel_values"]
        assert torch.equal(trained, evaluated)
        return trained

    def piped(path: Path) -> torch.Tensor:
        return pipeline("image-classification", str(folder)).preprocess(str(path))["pixel_values"][0]

    return script, piped


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_checkpoints_pipeline_sees_the_same_pixels(scripts_and_pipeline, tmp_path, name):
    """Bit for bit, also from the bytes of a dataset."""
    script, piped = scripts_and_pipeline
    # Everything is the same image, so whichever is drawn to evaluate on is the one.
    for path in (tmp_path / label / f"{index}_{name}" for label in "ab" for index in range(4)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(ACCEPTED[name])
    seen = script(path)
    assert seen.shape == (3, 16, 16)
    assert torch.equal(seen, piped(path))
    as_bytes = read_image({"bytes": ACCEPTED[name], "path": None}, "0")
    assert np.array_equal(as_bytes, load_image(str(path)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pipeline_would_change_or_cannot_read_is_refused(tmp_path, name):
    data, says = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    rows = [{"bytes": ACCEPTED["rgb.png"], "path": None}, {"bytes": None, "path": str(tmp_path / name)}]
    rows += [{"bytes": data, "path": None}]
    images = as_stored(rows)
    for row, called in ((1, f"image {tmp_path / name}: "), (2, "image 2 of here, counted from 0: ")):
        with pytest.raises(BadInput, match="^" + called) as error:
            check_images(images.select([0, row]), "here")
        assert says in str(error.value).lower() or says in str(error.value)
        assert "\n" not in str(error.value) and "object at 0x" not in str(error.value)
        with pytest.raises(BadInput, match="^image "):
            read_image(rows[row], "1 of here")


def test_a_missing_image_is_refused():
    rows = [{"bytes": ACCEPTED["rgb.png"], "path": None}, None]
    images = as_stored(rows)
    with pytest.raises(BadInput, match="image 1 of here, counted from 0: is missing"):
        check_images(images, "here")


def test_an_image_with_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match="image 3: .*600 pixels"):
        read_image({"bytes": ACCEPTED["rgb.png"], "path": None}, "3")


def test_frames_that_are_not_used_are_warned_of(caplog):
    """Not the second picture of a phone, which is a preview."""
    names = ["rgb.png", "two_pictures.jpg", "frames.gif", "frames.png", "frames.webp", "pages.tif"]
    rows = [{"bytes": ACCEPTED[name], "path": None} for name in names]
    images = as_stored(rows)
    with caplog.at_level(logging.WARNING):
        check_images(images.select([0, 1]), "here")
        assert not caplog.messages
        check_images(images, "here")
    assert caplog.messages == ["here: 4 images have several frames or pages; only the first is used"]


def test_a_dataset_of_decoded_images_is_the_same_function(tmp_path):
    """Images that `datasets` wrote to a parquet file."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [RGB, RGB.convert("L")] * 2, "label": [0, 1] * 2}
    for split in ("train", "test"):
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    task = load_image_task(ImageDataArguments(dataset_name=str(tmp_path)), False, seed=0)
    assert np.array_equal(read_image(task.evaluation[""][0]["image"], "0"), RGB)
