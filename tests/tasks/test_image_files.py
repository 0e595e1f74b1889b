# SPDX-License-Identifier: Apache-2.0
"""Tests of image files: which files of a folder are read, and that inputs equal those of the checkpoint's pipeline."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image, ImageCms
from transformers import PerceiverConfig, PerceiverForImageClassificationConvProcessing, pipeline
from transformers.image_utils import load_image

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.image_files import AS_STORED, check_headers, read_image, read_image_folder
from experiments.tasks.images import ImageDataArguments, load_image_task
from tests.support.tiny_images import MODEL, write_image_folders

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # saving leaves settings of the format in the image
    return buffer.getvalue()


def png(bits: int, colour: int, pixels: list[int], *chunks: tuple[bytes, list[int]]) -> bytes:
    """Return a PNG file of one row of two pixels, in formats that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *((name, bytes(data)) for name, data in chunks)]
    parts += [(b"IDAT", zlib.compress(bytes([0, *pixels]))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


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
    "grey_4_bits.png": png(4, 0, [0x1B]),
    "grey_other_is_transparent.png": png(8, 0, [7, 9], (b"tRNS", [0, 8])),
    "palette.png": encoded(RGB.convert("P"), "PNG"),
    "palette_opaque.png": png(8, 3, [0, 1], PALETTE, (b"tRNS", [255, 255, 255])),
    "rgb.png": encoded(RGB, "PNG"),
    "rgb_16_bits.png": png(16, 2, [10, 200, 20, 0, 30, 0, 1, 2, 3, 4, 5, 6]),
    "rgba_opaque.png": encoded(RGB.convert("RGBA"), "PNG"),
    "rotated.png": encoded(RGB, "PNG", exif=rotated()),
    "frames.png": encoded(RGB, "PNG", **frames()),
    "profile.png": encoded(RGB, "PNG", **with_profile("XYZ")),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "rotated.jpg": encoded(RGB, "JPEG", exif=rotated()),
    "two_pictures.jpg": encoded(RGB, "MPO", **frames()),
    "png.jpg": encoded(RGB, "PNG"),
    "frames.gif": encoded(RGB, "GIF", **frames()),
    "other_is_transparent.gif": encoded(RGB.quantize(16), "GIF", transparency=200),
    "frames.webp": encoded(RGB, "WEBP", **frames()),
    "rotated.webp": encoded(RGB, "WEBP", exif=rotated()),
    "cmyk.tif": encoded(RGB.convert("CMYK"), "TIFF"),
    "rotated.tif": encoded(RGB, "TIFF", exif=rotated()),
    "pages.tif": encoded(RGB, "TIFF", **frames()),
    "rgb.ppm": encoded(RGB, "PPM"),
    "rgb.jp2": encoded(RGB, "JPEG2000"),
    "pixel.png": encoded(RGB.resize((1, 1)), "PNG"),
}
MORE_BITS, TRANSPARENT, NO_IMAGE = "more than 8 bits", "is transparent in places", "image that Pillow can read"
REFUSED: dict[str, tuple[bytes, str]] = {
    "grey_16_bits.png": (encoded(RGB.convert("L").convert("I;16"), "PNG"), MORE_BITS),
    "grey_16_bits.tif": (encoded(RGB.convert("L").convert("I;16"), "TIFF"), MORE_BITS),
    "grey_16_bits_transparent.png": (png(16, 0, [0, 1, 0, 2], (b"tRNS", [0, 1])), MORE_BITS),
    "floats.tif": (encoded(RGB.convert("F"), "TIFF"), MORE_BITS),
    "rgba.png": (encoded(transparent(), "PNG"), TRANSPARENT),
    "grey_alpha.png": (encoded(transparent("LA"), "PNG"), TRANSPARENT),
    "grey_one_is_transparent.png": (png(8, 0, [7, 9], (b"tRNS", [0, 7])), TRANSPARENT),
    "palette_one_is_transparent.png": (png(8, 3, [0, 1], PALETTE, (b"tRNS", [255, 0])), TRANSPARENT),
    "one_is_transparent.gif": (encoded(Image.new("P", (2, 1)), "GIF", transparency=0), TRANSPARENT),
    "cut.png": (encoded(RGB, "PNG")[:300], "truncated"),
    "cut.jpg": (encoded(RGB, "JPEG")[:-3], "truncated"),
    "empty.jpg": (b"", NO_IMAGE),
    "text.png": (b"version https://git-lfs.github.com/spec/v1", NO_IMAGE),
    "heic.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), NO_IMAGE),
}  # fmt: skip


@pytest.fixture(scope="module")
def processor_and_pipeline(tmp_path_factory):
    """Return the image processor of a script, and the pipeline of its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    PerceiverForImageClassificationConvProcessing(PerceiverConfig(**MODEL)).save_pretrained(folder)
    images = write_image_folders(tmp_path_factory.mktemp("images") / "train", 4)
    task = load_image_task(ImageDataArguments(train_dir=str(images), train_val_split=0.5), False, seed=0)
    processor = task.processing_class(ToMePerceiverConfig(**MODEL), None)
    processor.save_pretrained(folder)
    return processor, pipeline("image-classification", str(folder))


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_checkpoints_pipeline_sees_the_same_pixels(processor_and_pipeline, tmp_path, name):
    """Pixels are equal bit for bit, also for images from a dataset."""
    processor, piped = processor_and_pipeline
    path = tmp_path / name
    path.write_bytes(ACCEPTED[name])
    images = [
        read_image(stored, "0")
        for stored in ({"bytes": None, "path": str(path)}, {"bytes": ACCEPTED[name], "path": None})
    ]
    assert np.array_equal(images[1], images[0]) and np.array_equal(images[0], load_image(str(path)))
    seen = processor(images[:1], return_tensors="pt")["pixel_values"][0]
    assert seen.shape == (3, 16, 16) and torch.equal(seen, piped.preprocess(str(path))["pixel_values"][0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pipeline_would_change_or_cannot_read_is_refused(tmp_path, name):
    """Refused before any work if the header of the file tells, otherwise when it is decoded."""
    data, says = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    for stored, called in (({"bytes": None, "path": str(path)}, path), ({"bytes": data, "path": None}, "2 of here")):
        with pytest.raises(BadInput, match=f"^image {called}: ") as error:
            read_image(stored, "2 of here")
        assert says in str(error.value).lower() or says in str(error.value)
        assert "\n" not in str(error.value) and "object at 0x" not in str(error.value)
        if says in (MORE_BITS, NO_IMAGE):
            with pytest.raises(BadInput, match=f"^image {path if called == path else '1 of split'}"):
                check_headers([as_stored([{"bytes": ACCEPTED["rgb.png"], "path": None}, stored])], "here")


def as_stored(images: list[dict | None]) -> Dataset:
    columns = {"image": images, "row": [f"{row} of split 'train'" for row in range(len(images))]}
    return Dataset.from_dict(columns, features=Features({"image": AS_STORED, "row": Value("string")}))


def test_a_missing_image_is_refused():
    with pytest.raises(BadInput, match="image 1 of split 'train' of here: is missing"):
        check_headers([as_stored([{"bytes": ACCEPTED["rgb.png"], "path": None}, None])], "here")


def test_an_image_with_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInput, match="image 3: has more than 100 pixels"):
        read_image({"bytes": ACCEPTED["rgb.png"], "path": None}, "3")


def test_frames_that_are_not_used_are_warned_of(caplog):
    """There is no warning about the second picture of a phone, which is a preview."""
    names = ["rgb.png", "two_pictures.jpg", "frames.gif", "frames.png", "frames.webp", "pages.tif"]
    images = as_stored([{"bytes": ACCEPTED[name], "path": None} for name in names])
    with caplog.at_level(logging.WARNING):
        check_headers([images.select([0, 1])], "here")
        assert not caplog.messages
        check_headers([images], "here")
    assert caplog.messages == ["here: 4 of the images opened first have several frames; only one is used"]


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path, "PNG")


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no image")


def test_a_folder_for_each_class(tmp_path):
    """Brackets in names are no pattern; hidden files and system files are neither images nor classes."""
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
    assert [read_image(stored, "").size for stored in images["image"]] == [(4, 4)] * 4
    assert left_out == []


def test_files_that_are_left_out_are_counted(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        save(tmp_path / name)
    for name in ("README.md", "cat/2.heic", "cat/3.HEIC", "dog/2.jxl", "dog/notes", "dog/masks/1.xml"):
        write(tmp_path / name)
    images, left_out = read_image_folder("--train_dir x", str(tmp_path))
    assert len(images) == 2
    assert left_out == [
        "files of --train_dir x that are in no example (2 .heic, 1 .jxl, 1 .md, 1 .xml, 1 without an extension)"
    ]


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
    """A folder that holds train and test would otherwise be read as two classes, or as one."""
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
        load_image_task(ImageDataArguments(train_dir=str(tmp_path)), False, seed=0)
