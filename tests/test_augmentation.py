# SPDX-License-Identifier: Apache-2.0
"""Random crops and mirrored images."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets.features import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from experiments.augmentation import Augmentation, AugmentedImages, NextEpoch
from experiments.image_reading import AS_STORED

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8))


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


def augmented(count: int = 3, seed: int = 0) -> AugmentedImages:
    images = Dataset.from_dict({"image": [PICTURE] * count}, features=Features({"image": ImageFeature()}))
    images = images.cast_column("image", AS_STORED)
    return AugmentedImages(images, Augmentation(0.3, 0.5), lambda batch: {"seen": batch["image"]}, seed)


def test_nothing_asked_nothing_changed():
    assert pixels(Augmentation(1.0, 0.0)(PICTURE, np.random.default_rng(0))) == pixels(PICTURE)


def test_mirrored_for_certain():
    assert pixels(Augmentation(1.0, 1.0)(PICTURE, np.random.default_rng(0))) == pixels(ImageOps.mirror(PICTURE))


def test_mirrored_as_often_as_asked():
    random = np.random.default_rng(0)
    mirrored = [pixels(Augmentation(1.0, 0.3)(PICTURE, random)) != pixels(PICTURE) for _ in range(400)]
    assert np.mean(mirrored) == pytest.approx(0.3, abs=0.08)


@given(scale=st.floats(0.05, 0.95), seed=st.integers(0, 10**6), width=st.integers(1, 40), height=st.integers(1, 40))
def test_a_crop_stays_in_the_image_and_keeps_the_share(scale, seed, width, height):
    left, top, right, bottom = Augmentation(scale, 0.0)._crop((width, height), np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
    # An aspect ratio cut to the image loses at most a seventh of its length.
    assert (right - left) * (bottom - top) >= scale * width * height * 0.86


def test_a_crop_has_the_size_of_the_image():
    assert Augmentation(0.3, 0.0)(PICTURE, np.random.default_rng(0)).size == PICTURE.size


def test_an_image_depends_on_seed_epoch_and_place_alone():
    """Whatever was read before, and in whatever order: so a resumed run sees what the first one saw."""
    images, again = augmented(), augmented()
    for each in (images, again):
        each.epoch.fill_(2)
    first = [pixels(images[index]["seen"]) for index in (0, 1, 2)]
    assert [pixels(again[index]["seen"]) for index in (2, 1, 0)] == first[::-1]
    assert first[0] != first[1]
    images.epoch.fill_(3)
    assert pixels(images[0]["seen"]) != first[0]
    assert pixels(augmented(seed=1)[0]["seen"]) != pixels(augmented()[0]["seen"])


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0), (None, 0), (1.0, 1), (2.4, 2)])
def test_the_epoch_is_told(epoch, expected):
    """A run that is resumed in the middle of an epoch is in that epoch."""
    images = augmented()
    NextEpoch(images).on_epoch_begin(None, TrainerState(epoch=epoch), TrainerControl())
    assert int(images.epoch) == expected


def test_workers_that_live_on_hear_of_the_next_epoch():
    images = augmented(count=2)
    loader = DataLoader(images, num_workers=1, persistent_workers=True, collate_fn=lambda examples: examples)
    seen = []
    for epoch in (0, 1):
        images.epoch.fill_(epoch)
        seen.append([pixels(example["seen"]) for (example,) in loader])
        assert seen[-1] == [pixels(images[index]["seen"]) for index in (0, 1)]
    assert seen[0] != seen[1]
