# SPDX-License-Identifier: Apache-2.0
"""What a model sees of an image of any kind, and what is said of files that are none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from PIL import Image

from experiments.errors import BadInput
from experiments.tasks.image_reading import AS_STORED, check_images, image_folder, read_image, rgb

RAMP = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_by_their_full_range(mode, kind):
    data = RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    seen = np.asarray(read_image(stored(Image.frombytes(mode, (8, 8), data), kind), "0"))
    expected = np.round(RAMP / 257)
    assert np.abs(seen - expected[..., None]).max() <= 0.5 and seen.max() == 255 and len(np.unique(seen)) == 64


@pytest.mark.parametrize("mode", ["I", "F"])
def test_an_unknown_range_is_refused(mode):
    image = Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32))
    with pytest.raises(BadInput, match=f"image 7 of this: mode {mode}; allowed"):
        read_image(stored(image, "TIFF"), "7 of this")


def test_what_is_transparent_is_white():
    """Whatever colour lies under it; what is opaque stays."""
    for mode in ("RGBA", "LA", "PA"):
        image = Image.new("RGBA", (2, 1), (10, 10, 10, 255))
        image.putpixel((0, 0), (0, 0, 0, 0))
        image = image.convert(mode)
        assert pixels(rgb(image))[0] == [[255] * 3, [10] * 3], mode
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    assert pixels(read_image(stored(palette, transparency=0), "0"))[0] == [[255] * 3, [0, 0, 200]]
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 9)
    assert pixels(read_image(stored(grey, transparency=7), "0"))[0] == [[255] * 3, [9] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_others_are_converted(mode):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode)
    assert pixels(rgb(image)) == pixels(image.convert("RGB"))


def test_an_image_is_upright():
    image = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(stored(image, exif=exif), "0").size == (2, 4)


def test_a_file_that_is_no_image_is_named_before_any_work(tmp_path):
    good = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    for content in (
        b"",
        b"no image",
        good["bytes"][: len(good["bytes"]) // 2],
        stored(Image.new("L", (9, 9)))["bytes"][:45],
    ):
        path = tmp_path / "bad.jpg"
        path.write_bytes(content)
        rows = [good, {"bytes": None, "path": str(path)}]
        images = Dataset.from_dict({"image": rows}, features=Features({"image": AS_STORED}))
        with pytest.raises(BadInput, match="image .*bad.jpg: ") as error:
            check_images(images, "here")
        assert "\n" not in str(error.value)
        unnamed = Dataset.from_dict({"image": [good, {"bytes": content, "path": None}]}, features=images.features)
        with pytest.raises(BadInput, match="image 1 of here, counted from 0: "):
            check_images(unnamed, "here")
    missing = Dataset.from_dict({"image": [good, None]}, features=images.features)
    with pytest.raises(BadInput, match="image 1 of here, counted from 0: is missing"):
        check_images(missing, "here")
    check_images(Dataset.from_dict({"image": [good] * 2}, features=images.features), "here")


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path, "PNG")


def test_a_folder_for_each_class(tmp_path):
    """Brackets are no pattern; hidden files and what is no image are left out, and so are folders without any."""
    root = tmp_path / "a[1] *"
    for name in ("cat/1.png", "cat/2.PNG", "dog [b]/1.png", ".cache/1.png", "cat/.hidden.png"):
        save(root / name)
    for name in ("README.txt", "cat/Thumbs.db", "cat/.DS_Store", "empty/notes.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    images = image_folder("--train_dir", str(root))
    assert images.features["label"].names == ["cat", "dog [b]"]
    assert images["label"] == [0, 0, 1]
    check_images(images, "here")


def test_images_without_classes_are_to_predict_alone(tmp_path):
    for index in range(3):
        save(tmp_path / "test" / f"{index}.png")
    assert image_folder("--test_dir", str(tmp_path / "test"), unlabelled=True).column_names == ["image"]
    with pytest.raises(BadInput, match="--train_dir x: 0.png is not where"):
        image_folder("--train_dir x", str(tmp_path / "test"))


@pytest.mark.parametrize(
    "names", [("train/cat/1.png", "test/cat/1.png"), ("cat/1.png", "2.png"), ("cat/notes.txt",), ()]
)
def test_images_elsewhere_are_named(tmp_path, names):
    """A folder with train and test in it would be two classes, or one with everything."""
    for name in names:
        save(tmp_path / name)
    for unlabelled in (False, True):
        with pytest.raises(BadInput, match="--train_dir .*one folder of images for each class"):
            image_folder(f"--train_dir {tmp_path}", str(tmp_path), unlabelled)
