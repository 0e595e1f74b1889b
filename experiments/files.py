# SPDX-License-Identifier: Apache-2.0
"""Check that folders can be written to, and write files atomically: an interruption never leaves half a file."""

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
from experiments.interruption import deferring

# Folder of files that are being saved, inside the folder that gets them; see `save_whole`.
PARTIAL_FOLDER = ".partial"


def check_writable(name: str, folder: Path) -> None:
    """Check that a folder can be created and written to, without leaving anything behind.

    Args:
        name: the argument or variable that chose the folder, such as "--output_dir out" or "HF_HOME=/cache".
        folder: the folder.

    Raises:
        BadInput: if the folder cannot be written to.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # only the first process checks: others could see its temporary folder
    try:
        str(folder).encode()  # caches write file names in UTF-8
        with folder_kept_if_used(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: must be a folder that can be written to ({one_line(error)})") from error


@contextmanager
def folder_kept_if_used(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents; at the end, remove the created ones that are empty."""
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: an interruption leaves the old file.

    Args:
        path: path of the file.
        write: function that writes to the path it is given, in the folder of the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    except BaseException:  # also a signal
        partial.unlink(missing_ok=True)  # frees the space on a full disk
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; characters that UTF-8 cannot encode, as in some file names, are escaped."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_json(path: Path) -> Any:
    """Read a JSON file of an output folder.

    Raises:
        BadInput: if the file cannot be read or is not JSON.
    """
    with naming(f"--output_dir {path.parent}: {path.name}", OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write standard JSON, without NaN and infinity, atomically.

    Raises:
        ValueError: for a number that is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Save a checkpoint or other files into a folder, replacing files only after all new ones are written.

    The folder is created if needed. Its files with other names stay.

    Args:
        folder: folder for the files.
        save: function that saves into the empty folder it is given, such as a model's `save_pretrained`; that folder is
            on the same disk.
    """
    partial = folder / PARTIAL_FOLDER
    if partial.exists():
        shutil.rmtree(partial)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        save(partial)
        with deferring():  # a signal must not leave files of two checkpoints
            for path in sorted(path for path in partial.rglob("*") if path.is_file()):
                target = folder / path.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove the half-written files that a killed run left in a folder."""
    for path in folder.glob(".*.partial"):
        path.unlink()
    shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)
