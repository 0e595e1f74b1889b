# SPDX-License-Identifier: Apache-2.0
"""Output folders: each belongs to one run, recorded by fingerprint, and holds no half-written file."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainingArguments

from experiments.errors import BadInput
from experiments.files import made_for_a_while, read_json, write_json
from experiments.training.resume import LENGTHS, checkpoints
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


def claim(output_dir: Path, record: RunRecord, longer: bool, write: bool) -> None:
    """Claim a folder for a training, by its record.

    A record alone owns nothing: where no results followed, another training may begin.

    Args:
        output_dir: the folder.
        record: of the training.
        longer: whether training may be longer than was recorded, because it resumes.
        write: whether this process is the one that writes.

    Raises:
        BadInput: if the folder holds another run.
    """
    earlier = RunRecord.read(output_dir)
    if found := run_files(output_dir):
        if START not in earlier.content:
            raise another_run(output_dir, ", ".join(found))
        lengths = {name: earlier.arguments.get(name) for name in LENGTHS} if longer else {}
        extended = {name: old for name, old in lengths.items() if _is_longer(old, record.arguments.get(name))}
        check_same_run(output_dir, earlier, record, extended)
        notes = {**earlier.notes, **({CONTINUED: extended} if extended else {}), **record.notes}
        record = RunRecord(record.arguments, {**earlier.content, **record.content}, notes)
    if write:
        record.write(output_dir)


def claim_for_evaluation(output_dir: Path, record: RunRecord, write: bool) -> None:
    """Claim a folder for an evaluation; where a training has ended, only for one of its result.

    Args:
        output_dir: the folder.
        record: of the evaluation.
        write: whether this process is the one that writes.

    Raises:
        BadInput: if the folder holds figures or weights of another run.
    """
    earlier = RunRecord.read(output_dir)
    if found := run_files(output_dir):
        if WEIGHTS not in earlier.content and not _is_only_a_checkpoint(output_dir, found, record):
            raise another_run(output_dir, ", ".join(found))
        # Training records more than evaluation, and a first evaluation less than a second one.
        check_same_run(output_dir, earlier, record, shared=True)
        record = RunRecord(
            {**earlier.arguments, **record.arguments}, {**earlier.content, **record.content}, earlier.notes
        )
    if write:
        record.write(output_dir)


def check_same_run(
    output_dir: Path, record: RunRecord, current: RunRecord, may_differ: Collection[str] = (), shared: bool = False
) -> None:
    """Check that a folder with a record holds the current run; see `RunRecord.difference`.

    Raises:
        BadInput: naming the first argument or content that differs.
    """
    different = record.difference(current, may_differ, shared)
    if different is not None:
        raise another_run(output_dir, different)


def another_run(output_dir: Path, what: str) -> BadInput:
    """Return the error for a folder that holds another run."""
    return BadInput(
        f"--output_dir {output_dir}: holds another run ({what}); repeat its command to continue it, or use another "
        "--output_dir"
    )


def check_no_other_run(output_dir: Path, own: str) -> None:
    """Check that the files of runs in a folder came with the file `own`.

    Raises:
        BadInput: if they did not.
    """
    found = run_files(output_dir)
    if found and not (output_dir / own).exists():
        raise another_run(output_dir, ", ".join(found))


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
        output_dir: where it writes.
        model: that it trains.
        arguments: whether it keeps checkpoints.
        models: how many trained models stay.

    Raises:
        BadInput: with the bytes that are free and those that are needed.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    copies = ADAM_COPIES if arguments.save_strategy != "no" else 0
    needed = size * (models + copies)
    folder = output_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
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


def _is_longer(earlier: Any, current: Any) -> bool:
    return isinstance(earlier, (int, float)) and isinstance(current, (int, float)) and 0 < earlier < current
