# SPDX-License-Identifier: Apache-2.0
"""Places that a script writes to, checked before its work, and files written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.errors import PLACES, BadInput, one_line


def check_writable(name: str, folder: Path) -> None:
    """Check that a folder can be made and written to, and note it as one of `PLACES`; nothing is left behind, nor made.

    Args:
        name: what chose the folder, such as "--output_dir out" or "HF_HOME=/cache".
        folder: the folder.

    Raises:
        BadInput: if it cannot.
    """
    PLACES.setdefault(name, folder.absolute())
    if os.environ.get("RANK", "0") != "0":
        return  # one process, and not another one that finds the folder of the first
    try:
        str(folder).encode()  # what caches write is named in UTF-8
        with made_for_a_while(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: must be a folder that can be written to ({one_line(error)})") from error


def cache_name(own: str, folder: Path) -> str:
    """Return the variable that put a cache of the Hub's libraries where it is, with its value.

    Args:
        own: the variable for this cache alone.
        folder: the cache.
    """
    for name in (own, "HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(name):
            return f"{name}={os.environ[name]}"
    return f"HF_HOME, not set, so {folder.parent}"


@contextmanager
def made_for_a_while(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; those that were not there and are empty at the end go."""
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


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
    """Write a text file, whole or not at all; of a name that is not UTF-8, a byte is written as \\udcff."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="backslashreplace"))


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
