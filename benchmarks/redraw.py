# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of results anew from the figures beside them; nothing is measured.

Every sweep.png, scaling.png and throughput.png below the folders that are given.

    python benchmarks/redraw.py docs/results/budgets docs/results/scaling
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scaling, throughput
from experiments.errors import BadInput, exit_on_bad_input
from experiments.runs import sweep_report

DRAW = {
    sweep_report.PICTURE: sweep_report.redraw,
    scaling.PICTURE: scaling.redraw,
    throughput.PICTURE: throughput.redraw,
}
"""What draws a picture, by its name."""


def main(arguments: Sequence[str] | None = None) -> None:
    description, _, example = (__doc__ or "").partition("\n\n    python")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="example:\n    python" + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="whose results, and those below them, are drawn")
    for folder in parser.parse_args(arguments).folders:
        pictures = [path for path in sorted(folder.rglob("*.png")) if path.name in DRAW]
        if not pictures:
            raise BadInput(f"folders {folder}: must have a {' or a '.join(DRAW)} in them or below")
        for picture in pictures:
            print(DRAW[picture.name](picture.parent))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
