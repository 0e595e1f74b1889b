# SPDX-License-Identifier: Apache-2.0
"""Random crops and mirroring of training images, with Pillow alone; called by `experiments.tasks.images`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

# Logarithm of the largest stretch. It multiplies the width and divides the height: the aspect ratio changes by 4/3.
MAX_LOG_STRETCH = math.log(4 / 3) / 2


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        crop_scale: smallest share of an image's area that a crop keeps; 1 turns cropping off.
        horizontal_flip: probability of mirroring an image.
    """

    crop_scale: float
    horizontal_flip: float

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Return a random crop, resized to the size of the image and randomly mirrored (Szegedy et al., 2015)."""
        if self.crop_scale < 1:
            image = image.resize(image.size, Image.Resampling.BILINEAR, box=self._crop(image.size, random))
        if random.random() < self.horizontal_flip:
            image = ImageOps.mirror(image)
        return image

    def _crop(self, size: tuple[int, int], random: np.random.Generator) -> tuple[float, float, float, float]:
        """Return a random box (left, top, right, bottom) in an image of this size (width, height)."""
        width, height = size
        share = random.uniform(self.crop_scale, 1)
        stretch = math.exp(random.uniform(-MAX_LOG_STRETCH, MAX_LOG_STRETCH))
        # Stretching may make a crop wider or higher than the image.
        crop_width = min(width, width * math.sqrt(share) * stretch)
        crop_height = min(height, height * math.sqrt(share) / stretch)
        left, top = random.uniform(0, width - crop_width), random.uniform(0, height - crop_height)
        return left, top, left + crop_width, top + crop_height
