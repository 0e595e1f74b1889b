# SPDX-License-Identifier: Apache-2.0
"""Tests of augmentation: random crops and horizontal flips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.tasks.augmentation import Augmentation

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8))


def pixels(image: Image.Image) -> list:
    return np.asarray(image).tolist()


def test_without_augmentation_images_stay_the_same():
    assert pixels(Augmentation(1.0, 0.0)(PICTURE, np.random.default_rng(0))) == pixels(PICTURE)


def test_flips_have_the_given_probability():
    random = np.random.default_rng(0)
    mirrored = [pixels(Augmentation(1.0, 0.3)(PICTURE, random)) != pixels(PICTURE) for _ in range(400)]
    assert np.mean(mirrored) == pytest.approx(0.3, abs=0.08)


@given(scale=st.floats(0.05, 0.95), seed=st.integers(0, 10**6), width=st.integers(1, 40), height=st.integers(1, 40))
def test_a_crop_stays_in_the_image_and_keeps_the_share(scale, seed, width, height):
    left, top, right, bottom = Augmentation(scale, 0.0)._crop((width, height), np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
    # Clipping a crop's aspect ratio to the image shortens it by at most a seventh.
    assert (right - left) * (bottom - top) >= scale * width * height * 0.86


def test_a_crop_has_the_size_of_the_image():
    assert Augmentation(0.3, 0.0)(PICTURE, np.random.default_rng(0)).size == PICTURE.size
