# SPDX-License-Identifier: Apache-2.0
"""Random crops and mirrored images for training, with Pillow alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

# Logarithm of how far a crop is stretched in width and shrunk in height: aspect ratios from 3/4 to 4/3.
MAX_LOG_STRETCH = math.log(4 / 3) / 2


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Attributes:
        crop_scale: smallest share of the area that a crop keeps; 1 crops nothing.
        horizontal_flip: probability of mirroring.
    """

    crop_scale: float
    horizontal_flip: float

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Return a random crop, resized to the image's size, mirrored or not (Szegedy et al., 2015)."""
        if self.crop_scale < 1:
            image = image.resize(image.size, Image.Resampling.BILINEAR, box=self._crop(image.size, random))
        if random.random() < self.horizontal_flip:
            image = ImageOps.mirror(image)
        return image

    def _crop(self, size: tuple[int, int], random: np.random.Generator) -> tuple[float, float, float, float]:
        width, height = size
        share = random.uniform(self.crop_scale, 1)
        stretch = math.exp(random.uniform(-MAX_LOG_STRETCH, MAX_LOG_STRETCH))
        # A crop longer than the image is cut to it.
        crop_width = min(width, width * math.sqrt(share) * stretch)
        crop_height = min(height, height * math.sqrt(share) / stretch)
        left, top = random.uniform(0, width - crop_width), random.uniform(0, height - crop_height)
        return left, top, left + crop_width, top + crop_height
