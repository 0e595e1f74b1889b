# SPDX-License-Identifier: Apache-2.0
"""Folders checked before a script writes to them, and files written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.errors import BadInput, naming, one_line


def check_writable(name: str, folder: Path) -> None:
    """Check that a folder can be made and written to; nothing is left behind.

    Args:
        name: the argument or variable that chose the folder, such as "--output_dir out" or "HF_HOME=/cache".
        folder: the folder.

    Raises:
        BadInput: if it cannot.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # another process would find the folder of the first
    try:
        str(folder).encode()  # what caches write is named in UTF-8
        with made_for_a_while(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: must be a folder that can be written to ({one_line(error)})") from error


@contextmanager
def made_for_a_while(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; at the end, remove those of them that are new and empty."""
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: a stop in between leaves the old one.

    Args:
        path: path of the file.
        write: function that writes to the path given to it, one beside the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    except Exception:
        partial.unlink(missing_ok=True)  # so that a full disk has room again
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; characters that UTF-8 lacks, as in some file names, become \\udcff."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON file of an output folder.

    Raises:
        BadInput: if it cannot be read.
    """
    with naming(f"--output_dir {path.parent}: {path.name}", OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON that every parser takes, whole or not at all.

    Raises:
        ValueError: for a number that is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Save a checkpoint or other files into a folder, made if needed: no file is moved there before all are written.

    Files of other names in the folder stay.

    Args:
        folder: folder for the files.
        save: function that saves into an empty folder on the same disk, such as a model's `save_pretrained`.
    """
    partial = folder / ".partial"
    if partial.exists():
        shutil.rmtree(partial)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        save(partial)
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
