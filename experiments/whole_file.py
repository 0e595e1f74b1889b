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


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text))
