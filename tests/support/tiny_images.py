# SPDX-License-Identifier: Apache-2.0
"""Write tiny image datasets and a tiny image config as files for the scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PilImage

LABELS = ["dark", "middle", "bright"]
NUM_LATENTS, NUM_LAYERS = 8, 4
MODEL = {
    "architectures": ["PerceiverForImageClassificationConvProcessing"],
    "model_type": "perceiver",
    "image_size": 16,
    "num_latents": NUM_LATENTS,
    "d_latents": 8,
    "num_blocks": 2,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "qk_channels": 8,
    "v_channels": 8,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def write_model_config(folder: Path, **changes: object) -> Path:
    """Write a JSON file for `--config_name`."""
    path = folder / "config.json"
    path.write_text(json.dumps(MODEL | changes))
    return path


def write_images(
    folder: Path,
    splits: dict[str, int],
    columns: tuple[str, str] = ("image", "label"),
    first_label: int = 0,
    missing: dict[str, int | None] | None = None,
) -> Path:
    """Write one parquet file for each split, of greyscale 8x8 images whose brightness is their class.

    `missing` maps a split to the label that replaces its labels: all in "test", all but the first two elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in splits.items():
        labels = [index % len(LABELS) for index in range(count)]
        images = [
            PilImage.fromarray(random.integers(80 * label, 80 * label + 80, (8, 8), np.uint8)) for label in labels
        ]
        labels[0] = first_label
        if split in (missing or {}):
            kept = 0 if split == "test" else 2
            labels = labels[:kept] + [missing[split]] * (count - kept)
        features = Features({columns[0]: Image(), columns[1]: ClassLabel(names=LABELS)})
        Dataset.from_dict(dict(zip(columns, (images, labels), strict=True)), features=features).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


def write_image_folders(folder: Path, per_class: int) -> Path:
    """Write one folder of PNG files for each class, as `--train_dir` reads them."""
    random = np.random.default_rng(0)
    for label, name in enumerate(LABELS):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = random.integers(80 * label, 80 * label + 80, (8, 8, 3), np.uint8)
            PilImage.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder
