# SPDX-License-Identifier: Apache-2.0
"""Output folders: each belongs to one run, recorded by fingerprint, and holds no half-written file."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainingArguments

from experiments.errors import BadInput
from experiments.files import folder_kept_if_used, read_json, remove_partial, write_json
from experiments.training.resume import LAST, LENGTH_ARGUMENTS, TRAINED_FILE, assign_resume, check_resume, checkpoints
from experiments.training.run_record import ARGUMENTS_FILE, CONTINUED, INITIAL_WEIGHTS, WEIGHTS, RunRecord
from experiments.training.saved_files import check_saved_files

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
SWEEP_FILE = "sweep_results.json"
# Files that show that a run has written results here.
RESULT_FILES = ("config.json", "trainer_state.json", SWEEP_FILE, "all_results.json")
# Size of a checkpoint in copies of the weights: the weights and two running averages that Adam keeps.
ADAM_COPIES = 3


@contextmanager
def lock_folder(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of a folder while this one writes there; the lock ends with the process.

    The folder is created if needed, and removed at the end if it is new and empty. A run may lock a folder again
    that it holds.

    Raises:
        BadInput: if another run is writing there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield  # the first process holds the lock for all
        return
    with folder_kept_if_used(output_dir):
        lock = FileLock(output_dir.resolve() / LOCK_FILE, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(
                f"--output_dir {output_dir}: another run is writing there now; wait for its end or use another folder"
            ) from None
        except OSError as error:  # some shared file systems of clusters have no locks
            logger.warning("--output_dir %s: cannot be locked (%s); start no other run there", output_dir, error)
        try:
            yield
        finally:
            if lock.lock_counter <= 1:
                with suppress(OSError):
                    # Remove the lock file before releasing the lock: afterwards another run may have locked the file.
                    (output_dir / LOCK_FILE).unlink(missing_ok=True)
            lock.release()


def claim_training(
    stages: dict[Path, RunRecord], resume_from_checkpoint: str | None, write: bool
) -> dict[Path, str | None]:
    """Claim the folder of each stage of a training, and return where each stage resumes.

    Args:
        stages: record of each stage by its folder, in order; the last stage makes the final model.
        resume_from_checkpoint: value of the argument.
        write: write the records; if false, only check.

    Returns:
        For each folder, `LAST`, a checkpoint, or None to begin anew.

    Raises:
        BadInput: if a folder holds another run or a trained file that has changed, if the given checkpoint is damaged
            or of another run, or if the folders hold an unfinished training and the argument is not given. (`false`
            begins anew and removes checkpoints.)
    """
    resume_by_folder = assign_resume(resume_from_checkpoint, list(stages))
    for folder, record in stages.items():
        # Only the first stage may be extended: extending it changes the model that the second stage starts from.
        is_first = folder == next(iter(stages))
        claim_folder(folder, record, write, longer=is_first and resume_by_folder[folder] is not None)
        check_resume(resume_by_folder[folder], record)
        if resume_by_folder[folder] == LAST and (folder / TRAINED_FILE).exists():
            check_saved_files(folder)
    *_, output_dir = stages
    if resume_from_checkpoint is None and not (output_dir / TRAINED_FILE).exists():
        for folder in reversed(stages):
            has_ended = (folder / TRAINED_FILE).exists()
            if has_ended or checkpoints(folder):
                state = "has ended" if has_ended else f"was stopped after {checkpoints(folder)[0].name}"
                raise BadInput(
                    f"--output_dir {output_dir}: the training in {folder} {state}; use --resume_from_checkpoint last "
                    "to continue it, or --resume_from_checkpoint false to begin anew"
                )
    return resume_by_folder


def claim_folder(output_dir: Path, record: RunRecord, write: bool, longer: bool = False) -> None:
    """Claim a folder for a training or an evaluation, and write its run record there.

    A folder with a record and no results is free for any run. A folder with results accepts the same training again,
    and evaluations of the weights in it.

    Args:
        record: record of the run; only that of a training has `INITIAL_WEIGHTS`.
        write: write the record; if false, only check.
        longer: accept more epochs or steps than recorded, because training resumes.

    Raises:
        BadInput: if the folder holds another run.
    """
    earlier = RunRecord.read(output_dir)
    if found := list_result_files(output_dir):
        trains = INITIAL_WEIGHTS in record.content
        is_known = INITIAL_WEIGHTS in earlier.content if trains else WEIGHTS in earlier.content
        if not is_known and (trains or not _is_only_a_checkpoint(output_dir, found, record)):
            raise another_run_error(output_dir, ", ".join(found))
        extended = {
            name: old
            for name, old in earlier.arguments.items()
            if longer
            and name in LENGTH_ARGUMENTS
            and isinstance(old, (int, float))
            and 0 < old < record.arguments[name]
        }
        # Compare an evaluation only by fields in both records: training records more, a first evaluation maybe less.
        different = earlier.difference(record, extended, only_shared=not trains)
        if different is not None:
            raise another_run_error(output_dir, different)
        record = RunRecord(
            {**earlier.arguments, **record.arguments},
            {**earlier.content, **record.content},
            {**earlier.notes, **({CONTINUED: extended} if extended else {}), **record.notes},
        )
    if write:
        with lock_folder(output_dir):
            for folder in (output_dir, *checkpoints(output_dir)):
                remove_partial(folder)
            record.write(output_dir)


def another_run_error(output_dir: Path, evidence: str) -> BadInput:
    """Return the error for a folder that holds another run, with the difference or files that show it."""
    return BadInput(
        f"--output_dir {output_dir}: holds another run ({evidence}); repeat its command to continue it, or use "
        "another folder"
    )


def list_result_files(output_dir: Path) -> list[str]:
    """List the files that show that a run has written results in a folder."""
    return [
        *(name for name in RESULT_FILES if (output_dir / name).exists()),
        *(path.name for path in checkpoints(output_dir)),
        *(path.name for path in sorted(output_dir.glob("predict_results_*.txt"))),
    ]


def check_disk_space(output_dir: Path, model: nn.Module, arguments: TrainingArguments, models: int) -> None:
    """Check that the disk has room for the least that training writes.

    Args:
        arguments: training arguments, which say whether checkpoints are saved.
        models: number of trained models that are kept.

    Raises:
        BadInput: if the disk has too little room; the message gives the free and the needed space.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = size * (models + (ADAM_COPIES if arguments.save_strategy != "no" else 0))
    folder = output_dir.resolve()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise BadInput(
            f"--output_dir {output_dir}: {free / 1e9:.2f} GB are free there; make room or use another disk: training "
            f"writes at least {needed / 1e9:.2f} GB"
        )


def save_metrics(folder: Path, split: str, metrics: dict[str, Any]) -> None:
    """Write `SPLIT_results.json` and update `all_results.json`, each atomically.

    `Trainer.save_metrics` writes the same files in place: if it is killed, half a file may stay and stop the next run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    all_results = folder / "all_results.json"
    earlier = read_json(all_results) if all_results.exists() else {}
    write_json(all_results, earlier | metrics)
    write_json(folder / f"{split}_results.json", metrics)


def _is_only_a_checkpoint(output_dir: Path, found: list[str], record: RunRecord) -> bool:
    """Return whether a folder is the evaluated checkpoint itself, written by another program and without results."""
    name = record.arguments.get("model_name_or_path")
    return (
        not (output_dir / ARGUMENTS_FILE).exists()
        and name is not None
        and Path(name).resolve() == output_dir.resolve()
        and not any("results" in name for name in found)
    )
