# SPDX-License-Identifier: Apache-2.0
"""Write scikit-learn's bundled digits (1,797 real 8x8 images of ten classes) as a folder that `load_dataset` reads.

The last 500 images are the test split, because other people wrote them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PilImage
from sklearn.datasets import load_digits

# Python adds this script's folder to sys.path, but not the repository root, which holds the modules.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.errors import exit_on_bad_input
from experiments.files import check_writable

TEST_IMAGES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for train.parquet and test.parquet")
    output_dir: Path = parser.parse_args().output_dir
    check_writable(f"--output_dir {output_dir}", output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    # Grey values are 0 to 16.
    images = [PilImage.fromarray(np.uint8(image * 255 / 16)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    splits = {"train": slice(None, -TEST_IMAGES), "test": slice(-TEST_IMAGES, None)}
    for name, rows in splits.items():
        columns = {"image": images[rows], "label": digits.target[rows].tolist()}
        Dataset.from_dict(columns, features=features).to_parquet(output_dir / f"{name}.parquet")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
