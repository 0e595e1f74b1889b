# SPDX-License-Identifier: Apache-2.0
"""Output folders: each belongs to one run, recorded by fingerprint, and holds no half-written file."""

from __future__ import annotations

import json
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

from experiments.errors import BadInput, naming
from experiments.files import made_for_a_while, write_text
from experiments.training.checkpoint import LENGTH_FIELDS, checkpoints, difference
from experiments.training.identity import CONTENT, Noted

logger = logging.getLogger(__name__)

ARGUMENTS_FILE = "arguments.json"
LOCK_FILE = ".lock"
TRAINED_FILE = "train_results.json"
SWEEP_FILE = "sweep_results.json"
# What only an experiment leaves behind.
TRACES = ("config.json", "trainer_state.json", SWEEP_FILE, "all_results.json")
# Under `CONTENT`: the weights that training began with, and those that it ended with or that were evaluated.
START, WEIGHTS, CONFIG = "weights_to_start_from", "weights", "config"
# What an experiment merges, once a budget has been resolved, and what that followed from.
RESOLVED = "resolved_merging"
# What of an experiment is noted as it goes on, and decides nothing.
NOTES = (RESOLVED, "continued_from")
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


def claim(output_dir: Path, noted: Noted, longer: bool, write: bool) -> None:
    """Note in a folder which training it holds.

    A note alone owns nothing: where nothing came of it, another training may begin.

    Args:
        output_dir: the folder.
        noted: arguments and contents that decide what comes out.
        longer: whether training may be longer than was noted, because it goes on from there.
        write: whether this process is the one that writes.

    Raises:
        BadInput: if another experiment is there.
    """
    earlier = read_note(output_dir)
    if found := traces(output_dir):
        if START not in earlier.get(CONTENT, {}):
            raise another_experiment(output_dir, f"({', '.join(found)})")
        extended = [name for name in LENGTH_FIELDS if longer and _is_longer(earlier.get(name), noted.get(name))]
        check_same_experiment(output_dir, earlier, noted, tuple(extended))
        noted = _with_notes(earlier, noted, extended)
    if write:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / ARGUMENTS_FILE, noted)


def claim_for_evaluation(output_dir: Path, noted: Noted, write: bool) -> None:
    """Note in a folder which evaluation it holds; where a training has ended, only what it left is evaluated.

    Args:
        output_dir: the folder.
        noted: arguments and contents that decide the figures.
        write: whether this process is the one that writes.

    Raises:
        BadInput: if figures or weights of something else are there.
    """
    earlier = read_note(output_dir)
    contents = earlier.get(CONTENT, {})
    if found := traces(output_dir):
        if WEIGHTS not in contents and not _is_only_a_checkpoint(output_dir, found, noted):
            raise another_experiment(output_dir, f"({', '.join(found)})")
        # A training notes more than decides an evaluation, and a first evaluation less than comes with a second.
        shared = {name: value for name, value in noted.items() if name in earlier}
        shared[CONTENT] = {name: value for name, value in noted[CONTENT].items() if name in contents}
        check_same_experiment(output_dir, earlier, shared)
        noted = earlier | noted | {CONTENT: contents | noted[CONTENT]}
    if write:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / ARGUMENTS_FILE, noted)


def note(output_dir: Path, name: str, value: Any) -> None:
    """Add to the note of a folder one of `NOTES`."""
    write_json(output_dir / ARGUMENTS_FILE, read_note(output_dir) | {name: value})


def note_content(output_dir: Path, name: str, fingerprint: str | None) -> None:
    """Note what has become known of a content of a folder, or with `None` that it is not known any more."""
    noted = read_note(output_dir)
    contents = noted.get(CONTENT, {}) | {name: fingerprint}
    known = {key: value for key, value in contents.items() if value is not None}
    write_json(output_dir / ARGUMENTS_FILE, noted | {CONTENT: known})


def read_note(output_dir: Path) -> Noted:
    """The note of a folder; empty if there is none.

    Raises:
        BadInput: if it cannot be read, or is none.
    """
    path = output_dir / ARGUMENTS_FILE
    if not path.exists():
        return {}
    noted = read_json(path)
    if not isinstance(noted, dict) or not isinstance(noted.get(CONTENT), dict):
        raise BadInput(
            f"--output_dir {output_dir}: its {ARGUMENTS_FILE} does not say what the folder holds; allowed is the file "
            "as a run wrote it, or another folder"
        )
    return noted


def check_same_experiment(output_dir: Path, noted: Noted, current: Noted, ignored: tuple[str, ...] = ()) -> None:
    """Check that a folder holds what the arguments would make.

    Args:
        output_dir: the folder.
        noted: what made what is in it.
        current: what would be made now.
        ignored: names that may differ.

    Raises:
        BadInput: naming the first argument or content that differs.
    """
    different = difference(noted, current, (*ignored, *NOTES))
    if different is not None:
        raise another_experiment(output_dir, different)


def another_experiment(output_dir: Path, what: str) -> BadInput:
    """The error that says what a folder holds, if not what is asked for."""
    return BadInput(
        f"--output_dir {output_dir}: holds another experiment, {what}; allowed is the same command, to continue it, "
        "or another folder"
    )


def check_no_other_experiment(output_dir: Path, own: str) -> None:
    """Check that whatever is in a folder came with the file `own`.

    Raises:
        BadInput: if there is another experiment.
    """
    found = traces(output_dir)
    if found and not (output_dir / own).exists():
        raise another_experiment(output_dir, f"({', '.join(found)})")


def traces(output_dir: Path) -> list[str]:
    """What experiments have left in a folder, by name; a note alone is none."""
    return [
        *(name for name in TRACES if (output_dir / name).exists()),
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


def read_json(path: Path) -> Any:
    """What a JSON file of a folder of results holds.

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


def _is_only_a_checkpoint(output_dir: Path, found: list[str], noted: Noted) -> bool:
    """Whether a folder is the checkpoint, of another program, that is to be evaluated, and holds no figures."""
    name = noted.get("model_name_or_path")
    unnoted = not (output_dir / ARGUMENTS_FILE).exists()
    return (
        unnoted
        and name is not None
        and Path(name).resolve() == output_dir.resolve()
        and not any("results" in trace for trace in found)
    )


def _is_longer(noted: Any, current: Any) -> bool:
    return isinstance(noted, (int, float)) and isinstance(current, (int, float)) and 0 < noted < current


def _with_notes(earlier: Noted, noted: Noted, extended: list[str]) -> Noted:
    """The note of now, with what was added to the earlier one, and what it was longer than."""
    kept = {name: earlier[name] for name in NOTES if name in earlier}
    if extended:
        kept["continued_from"] = {name: earlier[name] for name in extended}
    return kept | noted | {CONTENT: earlier[CONTENT] | noted[CONTENT]}
