# SPDX-License-Identifier: Apache-2.0
"""Random crops and mirrored images for training, with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from transformers import TrainerCallback, TrainerControl, TrainerState

from experiments.image_reading import read_image

# Of width, and the inverse of height: aspect ratios from 3/4 to 4/3.
MAX_LOG_STRETCH = math.log(4 / 3) / 2


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image.

    Attributes:
        crop_scale: smallest share of the area that a crop keeps; 1 crops nothing.
        horizontal_flip: probability of mirroring.
    """

    crop_scale: float
    horizontal_flip: float

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """A random crop, resized to what the image was, and mirrored or not (Szegedy et al., 2015)."""
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


class AugmentedImages(torch.utils.data.Dataset):
    """Training images, each augmented anew in every epoch: fill `epoch` before it begins.

    What happens to an image is drawn from the seed, the epoch and its place, and from nothing else: a run that is
    killed and resumed, or that has more workers or processes, sees the same images.

    Args:
        images: with the column `image`, as `experiments.image_reading.AS_STORED`.
        augmentation: what may happen to them.
        process: from a batch of columns to the model's.
        seed: of what is drawn.
    """

    def __init__(
        self, images: Dataset, augmentation: Augmentation, process: Callable[[dict[str, list]], dict], seed: int
    ) -> None:
        self.images, self.augmentation, self.process, self.seed = images, augmentation, process, seed
        # Shared, so that data loader workers that live on hear of it.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.images[index]
        random = np.random.default_rng((self.seed, int(self.epoch), index))
        example["image"] = self.augmentation(read_image(example["image"], f"{index} of training"), random)
        batch = self.process({name: [value] for name, value in example.items()})
        return {name: values[0] for name, values in batch.items()}


class NextEpoch(TrainerCallback):
    """Tells the training images which epoch it is; accelerate would only tell a sampler.

    Args:
        images: to train on.
    """

    def __init__(self, images: AugmentedImages) -> None:
        self.images = images

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.images.epoch.fill_(int(state.epoch or 0))
