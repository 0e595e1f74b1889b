# SPDX-License-Identifier: Apache-2.0
"""Record the files of a trained checkpoint, and find those that were damaged or changed later."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME

from experiments.errors import naming
from experiments.training.fingerprints import file_fingerprint, weights_fingerprint
from experiments.training.resume import STATE_FILE
from experiments.training.run_record import SAVED_FILES, WEIGHTS, RunRecord, update_record

# Files that training saves and from which no model is loaded.
NOT_LOADED = (STATE_FILE, "training_args.bin")


def record_saved_files(folder: Path, names: Collection[str]) -> None:
    """Add the fingerprints of files that training saved to the record of its output folder."""
    files = {name: file_fingerprint(folder / name) for name in sorted({*names} - {SAFE_WEIGHTS_NAME})}
    update_record(folder, {WEIGHTS: weights_fingerprint(folder / SAFE_WEIGHTS_NAME)}, {SAVED_FILES: files})


@contextmanager
def rewriting_saved_file(folder: Path, name: str) -> Iterator[None]:
    """Record a file that the block rewrites anew; if the block is killed, the file is unrecorded."""
    files = dict(RunRecord.read(folder).notes.get(SAVED_FILES, {}))
    files.pop(name, None)
    update_record(folder, notes={SAVED_FILES: files})
    yield
    update_record(folder, notes={SAVED_FILES: files | {name: file_fingerprint(folder / name)}})


def check_saved_files(folder: Path) -> None:
    """Check that the files of a training that has ended are as it saved them.

    Raises:
        BadInput: if one has changed or cannot be read.
    """
    with naming(f"--output_dir {folder}", Exception):
        if (changed := find_changed_file(folder)) is not None:
            raise ValueError(f"{changed} has changed since training; use --resume_from_checkpoint false to begin anew")


def find_changed_file(folder: Path, to_load: bool = False) -> str | None:
    """Return the name of a file that differs from the folder's record; `None` if all are the same or unrecorded.

    Args:
        to_load: skip missing files and those that no model is loaded from; a push leaves out or shortens these.

    Raises:
        Exception: for weights that cannot be read.
    """
    record = RunRecord.read(folder)
    for name, fingerprint in record.notes.get(SAVED_FILES, {}).items():
        if to_load and (name in NOT_LOADED or not (folder / name).is_file()):
            continue
        if not (folder / name).is_file() or file_fingerprint(folder / name) != fingerprint:
            return name
    weights = record.content.get(WEIGHTS)
    if weights is not None and weights != weights_fingerprint(folder / SAFE_WEIGHTS_NAME):
        return SAFE_WEIGHTS_NAME
    return None
