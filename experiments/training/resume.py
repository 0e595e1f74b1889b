# SPDX-License-Identifier: Apache-2.0
"""Where a training begins: at the start, at a checkpoint, or not at all since it has ended; see `starting_point`.

Beside what Trainer writes, a checkpoint has `run_record.json`: the record of its run and the fingerprint of each of its
files. It is written last, so a checkpoint that was cut short has none, and one that has changed since shows.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from experiments.errors import BadInput
from experiments.files import read_json, write_json
from experiments.training.fingerprints import file_fingerprint
from experiments.training.run_record import RunRecord

logger = logging.getLogger(__name__)

RECORD_FILE = "run_record.json"
# Written when training has ended.
TRAINED_FILE = "train_results.json"
# Value of --resume_from_checkpoint for the newest checkpoint.
LAST = "last"
# Arguments that may grow when training resumes.
LENGTHS = ("num_train_epochs", "max_steps")
# Files of a checkpoint without which the optimizer and the learning rate would start anew.
STATES = ("rng_state*.pth", "optimizer*", "scheduler.pt")


def starting_point(resume: str | None, folder: Path, arguments: TrainingArguments, record: RunRecord) -> Path | None:
    """Return where the training in a folder begins: a checkpoint, the folder itself if training has ended there, or
    None for the start.

    Args:
        resume: from `parse_resume`; a checkpoint has passed `check_resume`.
    """
    if resume is None:
        return None
    if resume != LAST:
        return Path(resume)
    if _has_ended(folder, arguments):
        return folder
    newest = last_checkpoint(folder, record)
    if newest is None:
        logger.warning("no checkpoint in %s yet: training begins at the start", folder)
    return newest


def parse_resume(resume_from_checkpoint: str | None) -> str | None:
    """Return what a training resumes from: `LAST`, the folder of a checkpoint, or None."""
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    # The official scripts and Trainer spell `LAST` as "true".
    return LAST if resume_from_checkpoint.lower() in ("true", LAST) else resume_from_checkpoint


def stage_starts(resume_from_checkpoint: str | None, folders: Sequence[Path]) -> dict[Path, str | None]:
    """Return what each stage of a training resumes from, by folder, as `parse_resume` does.

    A named checkpoint belongs to the stage in whose folder it is, or to the first one. The stages before that have
    ended, those after it have not begun.
    """
    name = parse_resume(resume_from_checkpoint)
    if name is None or name == LAST:
        return dict.fromkeys(folders, name)
    places = [folder.resolve() for folder in folders]
    inside = Path(name).resolve().parent
    own = places.index(inside) if inside in places else 0
    return dict(zip(folders, [LAST] * own + [name] + [None] * (len(folders) - own - 1), strict=True))


def check_resume(resume: str | None, record: RunRecord | None = None) -> None:
    """Check a checkpoint that a training is to resume from; without a record, only that it is whole.

    Raises:
        BadInput: if the run cannot resume from it.
    """
    if resume is not None and resume != LAST and (found := fault(Path(resume), record)) is not None:
        raise BadInput(
            f"--resume_from_checkpoint {resume}: {found}; use 'last' for the newest one in --output_dir, or the folder "
            "of a whole checkpoint of the same run"
        )


def _has_ended(folder: Path, arguments: TrainingArguments) -> bool:
    """Return whether a training in a folder has ended and was as long as the arguments say."""
    if not (folder / TRAINED_FILE).exists():
        return False
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    # Epochs are sums of fractions, so rounded.
    return (state.epoch or 0.0) > arguments.num_train_epochs - 1e-6


def record_checkpoint(checkpoint: Path, record: RunRecord, loss_sum: float | None) -> None:
    """Write the record of a checkpoint, when all else of it is written; with the sum of the losses up to there."""
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
    """Return the newest whole checkpoint of a run, `None` for any, and warn of those that are passed over."""
    for path in checkpoints(folder):
        found = fault(path, record)
        if found is None:
            return path
        logger.warning("%s is passed over: %s", path, found)
    return None


def fault(checkpoint: Path, record: RunRecord | None = None) -> str | None:
    """Say why a run, or any if there is no record, cannot resume from a folder; `None` if it can."""
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


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints in a folder, before a training begins there at the start."""
    for path in checkpoints(folder):
        # First, so that a removal that is cut short leaves nothing that looks whole.
        (path / RECORD_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)
