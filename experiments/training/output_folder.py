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
from experiments.files import made_for_a_while, read_json, write_json
from experiments.training.resume import LENGTHS, TRAINED_FILE, check_resume, checkpoints, stage_starts
from experiments.training.run_record import ARGUMENTS_FILE, CONTINUED, START, WEIGHTS, RunRecord

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
SWEEP_FILE = "sweep_results.json"
# Files that show that a run has written here.
RESULTS = ("config.json", "trainer_state.json", SWEEP_FILE, "all_results.json")
# A checkpoint to go on from holds the weights, and two averages of the gradient for each.
ADAM_COPIES = 3


@contextmanager
def lock_folder(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as this one writes there; the lock ends with the process.

    A folder that is empty in the end goes, if it was not there before.

    Raises:
        BadInput: if another run is writing there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield  # the first process holds it for all
        return
    with made_for_a_while(output_dir):
        lock = FileLock(output_dir / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(
                f"--output_dir {output_dir}: another run is writing there now; wait for its end or use another "
                "--output_dir"
            ) from None
        except OSError as error:  # of a file system without locks, such as some that clusters share
            logger.warning("--output_dir %s: cannot be locked (%s); start no other run in it", output_dir, error)
        try:
            yield
        finally:
            with suppress(OSError):
                # Before the release: a file that another run has locked by then is not ours to remove.
                (output_dir / LOCK_FILE).unlink(missing_ok=True)
            lock.release()


def claim_training(
    stages: dict[Path, RunRecord], resume_from_checkpoint: str | None, write: bool
) -> dict[Path, str | None]:
    """Claim the folder of each stage of a training, and return what each resumes from.

    Args:
        stages: the record of each stage by its folder, in their order; the last one makes the result.
        resume_from_checkpoint: as given.
        write: whether to write the records, or only to check.

    Raises:
        BadInput: if a folder holds another run, if a named checkpoint is not whole or of another run, or if a stopped
            training would begin anew unasked, which removes its checkpoints.
    """
    starts = stage_starts(resume_from_checkpoint, list(stages))
    for folder, record in stages.items():
        # A second stage began from the result of the first one, so it is not extended.
        is_first = folder == next(iter(stages))
        claim(folder, record, write, longer=is_first and starts[folder] is not None)
        check_resume(starts[folder], record)
    *_, output_dir = stages
    if resume_from_checkpoint is None and not (output_dir / TRAINED_FILE).exists():
        for folder in reversed(stages):
            ended = (folder / TRAINED_FILE).exists()
            if ended or checkpoints(folder):
                state = "has ended" if ended else f"was stopped after {checkpoints(folder)[0].name}"
                raise BadInput(
                    f"--output_dir {output_dir}: the training in {folder} {state}; use --resume_from_checkpoint last "
                    "to continue it, or --resume_from_checkpoint false to begin anew"
                )
    return starts


def claim(output_dir: Path, record: RunRecord, write: bool, longer: bool = False) -> None:
    """Claim a folder for a training or an evaluation, by its record.

    A record alone owns nothing: where no results followed, another run may begin. A folder with results takes the same
    training again, and evaluations of the weights that it made.

    Args:
        record: of the run; that of a training has the weights to start from.
        write: whether to write the record, or only to check.
        longer: whether training may be longer than was recorded, because it resumes.

    Raises:
        BadInput: if the folder holds another run.
    """
    earlier = RunRecord.read(output_dir)
    if found := run_files(output_dir):
        trains = START in record.content
        is_known = START in earlier.content if trains else WEIGHTS in earlier.content
        if not is_known and (trains or not _is_only_a_checkpoint(output_dir, found, record)):
            raise another_run(output_dir, ", ".join(found))
        extended = {
            name: old
            for name, old in earlier.arguments.items()
            if longer and name in LENGTHS and isinstance(old, (int, float)) and 0 < old < record.arguments[name]
        }
        # Training records more than evaluation, and a first evaluation less than a second one.
        different = earlier.difference(record, extended, shared=not trains)
        if different is not None:
            raise another_run(output_dir, different)
        record = RunRecord(
            {**earlier.arguments, **record.arguments},
            {**earlier.content, **record.content},
            {**earlier.notes, **({CONTINUED: extended} if extended else {}), **record.notes},
        )
    if write:
        for path in (*output_dir.glob(".*.partial"), *output_dir.glob("checkpoint-*/.*.partial")):
            path.unlink()  # half-written, by a run that was killed
        record.write(output_dir)


def another_run(output_dir: Path, what: str) -> BadInput:
    """Return the error for a folder that holds another run."""
    return BadInput(
        f"--output_dir {output_dir}: holds another run ({what}); repeat its command to continue it, or use another "
        "--output_dir"
    )


def run_files(output_dir: Path) -> list[str]:
    """List the files in a folder that show that a run has written results there."""
    return [
        *(name for name in RESULTS if (output_dir / name).exists()),
        *(path.name for path in checkpoints(output_dir)),
        *(path.name for path in sorted(output_dir.glob("predict_results_*.txt"))),
    ]


def check_disk_space(output_dir: Path, model: nn.Module, arguments: TrainingArguments, models: int) -> None:
    """Check that the disk has room for what training writes at the least.

    Args:
        arguments: whether it keeps checkpoints.
        models: how many trained models stay.

    Raises:
        BadInput: with the bytes that are free and those that are needed.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = size * (models + (ADAM_COPIES if arguments.save_strategy != "no" else 0))
    folder = output_dir.resolve()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise BadInput(
            f"--output_dir {output_dir}: {free / 1e9:.2f} GB are free there; training writes at least "
            f"{needed / 1e9:.2f} GB"
        )


def save_metrics(folder: Path, split: str, metrics: dict[str, Any]) -> None:
    """Write `SPLIT_results.json`, and add to `all_results.json`, each whole or not at all.

    `Trainer.save_metrics` writes the same files in place: a kill leaves half of one, which stops the next run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = folder / "all_results.json"
    earlier = read_json(everything) if everything.exists() else {}
    write_json(everything, earlier | metrics)
    write_json(folder / f"{split}_results.json", metrics)


def _is_only_a_checkpoint(output_dir: Path, found: list[str], record: RunRecord) -> bool:
    """Return whether a folder is the evaluated checkpoint of another program, without figures."""
    name = record.arguments.get("model_name_or_path")
    return (
        not (output_dir / ARGUMENTS_FILE).exists()
        and name is not None
        and Path(name).resolve() == output_dir.resolve()
        and not any("results" in name for name in found)
    )
