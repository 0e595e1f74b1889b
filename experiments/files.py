# SPDX-License-Identifier: Apache-2.0
"""Writing files whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: a stop in between leaves what was there.

    Args:
        path: of the file.
        write: called with a path beside it to write to.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    except Exception:
        partial.unlink(missing_ok=True)  # a disk that is full has room again
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Save a checkpoint or other files into a folder, which is made if need be: nothing of it before all is written.

    Each file comes there whole; one that another `save` has left stays if this one writes none of its name.

    Args:
        folder: where the files are to be.
        save: called with an empty folder on the same disk, such as a model's `save_pretrained`.
    """
    partial = folder / ".partial"
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed here
    partial.mkdir(parents=True)
    try:
        save(partial)
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
