# SPDX-License-Identifier: Apache-2.0
"""Resume trainings from checkpoints, and detect checkpoints that are damaged or of another run.

Besides the files that Trainer writes, a checkpoint holds `run_record.json`: the run record and each file's fingerprint.
It is written last, so an incomplete checkpoint lacks it, and a file changed later no longer matches its fingerprint.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from experiments.errors import BadInput, naming
from experiments.files import read_json, write_json
from experiments.training.fingerprints import digest_of, file_fingerprint
from experiments.training.run_record import RunRecord

logger = logging.getLogger(__name__)

# File of a checkpoint with its run record; that of an output folder is `run_record.ARGUMENTS_FILE`.
CHECKPOINT_RECORD_FILE = "run_record.json"
# File of an output folder that is written when training has ended.
TRAINED_FILE = "train_results.json"
# File of an output folder and a checkpoint with Trainer's state: steps, epochs and logged values.
STATE_FILE = "trainer_state.json"
# Value of --resume_from_checkpoint that means the newest checkpoint.
LAST = "last"
# Arguments that may be larger when training resumes.
LENGTH_ARGUMENTS = ("num_train_epochs", "max_steps")
# Key in that record of a checkpoint that was saved only because a signal stopped the run.
FOR_SIGNAL = "for_signal"
# Key in that record of the fingerprint of all its other values.
OWN_FINGERPRINT = "fingerprint"
# Files of a checkpoint that hold the state of random numbers, optimizer and learning rate.
STATE_FILES = ("rng_state*.pth", "optimizer*", "scheduler.pt")


def find_resume_folder(
    resume: str | None, folder: Path, arguments: TrainingArguments, record: RunRecord
) -> Path | None:
    """Return the checkpoint to resume from, the folder itself if training has ended there, or None to begin anew.

    Args:
        resume: value from `parse_resume`; a checkpoint must have passed `check_resume`.
        folder: output folder of the training.
    """
    if resume is None:
        return None
    if resume != LAST:
        return Path(resume)
    if _has_ended(folder, arguments):
        return folder
    newest = last_checkpoint(folder, record)
    if newest is None:
        logger.warning("%s has no checkpoint yet: training begins anew", folder)
    return newest


def parse_resume(resume_from_checkpoint: str | None) -> str | None:
    """Return the meaning of `--resume_from_checkpoint`: `LAST`, the folder of a checkpoint, or None to begin anew."""
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    # The official scripts and Trainer spell `LAST` as "true".
    return LAST if resume_from_checkpoint.lower() in ("true", LAST) else resume_from_checkpoint


def assign_resume(resume_from_checkpoint: str | None, folders: Sequence[Path]) -> dict[Path, str | None]:
    """Return where each stage of a training resumes, by its folder: values as from `parse_resume`.

    A given checkpoint belongs to the stage whose folder contains it, else to the first stage. The stages before that
    one have ended (`LAST`), and the stages after it begin anew.
    """
    resume = parse_resume(resume_from_checkpoint)
    if resume is None or resume == LAST:
        return dict.fromkeys(folders, resume)
    resolved = [folder.resolve() for folder in folders]
    parent = Path(resume).resolve().parent
    stage = resolved.index(parent) if parent in resolved else 0
    return dict(zip(folders, [LAST] * stage + [resume] + [None] * (len(folders) - stage - 1), strict=True))


def check_resume(resume: str | None, record: RunRecord | None = None) -> None:
    """Check that a training can resume from a given checkpoint; without a record, only that it is complete.

    Raises:
        BadInput: if it cannot.
    """
    if resume is not None and resume != LAST and (fault := find_fault(Path(resume), record)) is not None:
        raise BadInput(
            f"--resume_from_checkpoint {resume}: {fault}; use 'last' for the newest checkpoint in --output_dir, or the "
            "folder of a complete checkpoint of the same run"
        )


def _has_ended(folder: Path, arguments: TrainingArguments) -> bool:
    """Return whether the training in a folder has ended, after at least the steps or epochs that the arguments set."""
    if not (folder / TRAINED_FILE).exists():
        return False
    with naming(f"--output_dir {folder}: {STATE_FILE}", OSError, ValueError, TypeError):
        state = TrainerState.load_from_json(str(folder / STATE_FILE))
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    # The recorded epoch is a sum of fractions, so it may be slightly too small.
    return (state.epoch or 0.0) > arguments.num_train_epochs - 1e-6


def record_checkpoint(checkpoint: Path, record: RunRecord, loss_sum: float | None, for_signal: bool = False) -> None:
    """Write a checkpoint's record; call it after all other writes.

    Args:
        loss_sum: sum of all training losses so far; `None` if it is not finite.
        for_signal: whether the checkpoint was saved only because a signal stopped the run, see `remove_for_signal`.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKPOINT_RECORD_FILE)
    files = {str(path.relative_to(checkpoint)): file_fingerprint(path) for path in paths}
    fields = {"record": record.flatten(), "loss_sum": loss_sum, "files": files, FOR_SIGNAL: for_signal}
    write_json(checkpoint / CHECKPOINT_RECORD_FILE, fields | {OWN_FINGERPRINT: digest_of(_as_read(fields))})


def _as_read(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with the types that they have when they are read from JSON."""
    return json.loads(json.dumps(fields))


def read_loss_sum(checkpoint: Path) -> float | None:
    """Return the sum of all training losses up to a checkpoint; `None` if it was not finite."""
    return read_json(checkpoint / CHECKPOINT_RECORD_FILE)["loss_sum"]


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first, including damaged ones."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(folder: Path, record: RunRecord | None = None) -> Path | None:
    """Return the newest checkpoint in a folder that the run can resume from, and warn of those that are skipped.

    Args:
        record: record of the run; `None` accepts checkpoints of any run.
    """
    for path in checkpoints(folder):
        fault = find_fault(path, record)
        if fault is None:
            return path
        logger.warning("warning: %s is skipped: %s", path, fault)
    return None


def find_fault(checkpoint: Path, record: RunRecord | None = None) -> str | None:
    """Describe why a run (without a record, any run) cannot resume from a checkpoint; `None` if it can."""
    try:
        written = read_json(checkpoint / CHECKPOINT_RECORD_FILE)
        files, checkpoint_record = written["files"], RunRecord.parse(written["record"])
        if written.pop(OWN_FINGERPRINT) != digest_of(written):
            return f"its {CHECKPOINT_RECORD_FILE} has changed"
    except (BadInput, ValueError, KeyError, TypeError):
        return f"it has no readable {CHECKPOINT_RECORD_FILE}, so it is incomplete or another program wrote it"
    for pattern in STATE_FILES:
        if not any(checkpoint.glob(pattern)) and not any(checkpoint.glob("global_step*")):  # DeepSpeed's own folder
            return f"it has no {pattern}, so it cannot restore the state of the training"
    for name in files:
        path = checkpoint / name
        if not path.is_file() or file_fingerprint(path) != files[name]:
            return f"its {name} has changed or is missing"
    different = None if record is None else checkpoint_record.difference(record, LENGTH_ARGUMENTS)
    return None if different is None else f"it is of another run ({different})"


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in a folder, before a training begins anew there."""
    for path in checkpoints(folder):
        _remove(path)


def remove_for_signal(folder: Path, before: float) -> None:
    """Remove checkpoints that were saved only because a signal stopped the run.

    Without them, a run that was stopped leaves the same checkpoints as one that was not.

    Args:
        before: checkpoints of this many steps or more stay.
    """
    for path in checkpoints(folder):
        record = path / CHECKPOINT_RECORD_FILE
        if _step(path) < before and record.is_file() and read_json(record).get(FOR_SIGNAL, False):
            _remove(path)


def remove_old_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the checkpoints with the fewest steps until `limit` are left; the newest and the best one stay.

    transformers removes the ones that were written first by the file system's clock, which may have been set back.

    Args:
        limit: largest number of checkpoints; `None` for any number.
        best: folder of the best checkpoint, if any.
    """
    found = checkpoints(folder)
    if limit is None or len(found) <= limit:
        return
    kept = {found[0].resolve(), *([] if best is None else [Path(best).resolve()])}
    removable = [path for path in found if path.resolve() not in kept]
    for path in reversed(removable[max(limit - len(kept), 0) :]):
        _remove(path)


def _remove(checkpoint: Path) -> None:
    # The record goes first, so that an interrupted removal leaves no checkpoint that looks complete.
    (checkpoint / CHECKPOINT_RECORD_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
