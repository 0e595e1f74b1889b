# SPDX-License-Identifier: Apache-2.0
"""Writing a file whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: a stop in between leaves what was there.

    Args:
        path: of the file.
        write: called with a path beside it to write to.
    """
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
