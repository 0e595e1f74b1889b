# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to resume from: whole ones, of the run that resumes.

Beside what Trainer writes, a checkpoint has `run_record.json`: the record of its run and the fingerprint of each of its
files. It is written last, so a checkpoint that was cut short has none, and one that has changed since shows.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from experiments.errors import BadInput
from experiments.files import read_json, write_json
from experiments.training.fingerprints import file_fingerprint
from experiments.training.run_record import RunRecord

logger = logging.getLogger(__name__)

RECORD_FILE = "run_record.json"
# Arguments that may grow when training resumes.
LENGTHS = ("num_train_epochs", "max_steps")
# Files of a checkpoint without which the optimizer and the learning rate would start anew.
STATES = ("rng_state*.pth", "optimizer*", "scheduler.pt")


def record_checkpoint(checkpoint: Path, record: RunRecord, loss_sum: float | None) -> None:
    """Write the record of a checkpoint, when all else of it is written.

    Args:
        checkpoint: its folder.
        record: of its run.
        loss_sum: the sum of the losses of all steps so far, if it is known.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RECORD_FILE)
    files = {str(path.relative_to(checkpoint)): file_fingerprint(path) for path in paths}
    write_json(checkpoint / RECORD_FILE, {"record": record.flatten(), "loss_sum": loss_sum, "files": files})


def read_loss_sum(checkpoint: Path) -> float | None:
    """Return the sum of the losses up to a checkpoint, if it is known."""
    return read_json(checkpoint / RECORD_FILE)["loss_sum"]


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_checkpoint(folder: Path, record: RunRecord | None = None) -> Path | None:
    """Return the newest whole checkpoint of a run, and warn of those that are passed over.

    Args:
        folder: with the checkpoints.
        record: of the run that resumes; `None` for any.
    """
    for path in checkpoints(folder):
        found = fault(path, record)
        if found is None:
            return path
        logger.warning("%s is passed over: %s", path, found)
    return None


def fault(checkpoint: Path, record: RunRecord | None = None) -> str | None:
    """Say why a run cannot resume from a folder; `None` if it can.

    Args:
        checkpoint: the folder.
        record: of the run that resumes; `None` for any.
    """
    try:
        written = read_json(checkpoint / RECORD_FILE)
        files, of = written["files"], RunRecord.parse(written["record"])
    except (BadInput, ValueError, KeyError, TypeError):
        return f"it has no whole {RECORD_FILE}, so it is not whole or another program wrote it"
    for pattern in STATES:
        if not any(checkpoint.glob(pattern)) and not any(checkpoint.glob("global_step*")):  # DeepSpeed's own folder
            return f"it has no {pattern}, so holds only weights"
    for name in files:
        path = checkpoint / name
        if not path.is_file() or file_fingerprint(path) != files[name]:
            return f"{name} is not what was written"
    different = None if record is None else of.difference(record, LENGTHS)
    return None if different is None else f"it is of another run ({different})"


def check_checkpoint(name: str, record: RunRecord | None) -> None:
    """Check a checkpoint that the user names with `--resume_from_checkpoint`.

    Args:
        name: its folder.
        record: of the run that resumes; `None` as long as it is not known.

    Raises:
        BadInput: if the run cannot resume from it.
    """
    if (found := fault(Path(name), record)) is not None:
        raise BadInput(
            f"--resume_from_checkpoint {name}: {found}; use 'last' for the newest one in --output_dir, or the folder "
            "of a whole checkpoint of the same run"
        )


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in a folder, before a training begins there at the start."""
    for path in checkpoints(folder):
        # First, so that a removal that is cut short leaves nothing that looks whole.
        (path / RECORD_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)
