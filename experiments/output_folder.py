# SPDX-License-Identifier: Apache-2.0
"""What a folder of results may hold: one experiment, whole files, checkpoints to go on from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from experiments.bad_input import BadInput
from experiments.whole_file import write_text

ARGUMENTS_FILE = "arguments.json"
TRAINED_FILE = "train_results.json"
# What only an experiment leaves behind.
TRACES = ("config.json", "trainer_state.json", "sweep_results.json", ARGUMENTS_FILE)
# What training depends on beside the model, the data and the merging: another value is another experiment.
TRAINING_FIELDS = (
    "seed", "data_seed", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "warmup_steps",
    "lr_scheduler_type", "optim", "bf16", "fp16", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
# Training may go on for longer than was first asked.
LENGTH_FIELDS = ("num_train_epochs", "max_steps")
# A checkpoint to go on from holds the weights, and two averages of the gradient for each.
ADAM_COPIES = 3


def training_fields(arguments: TrainingArguments) -> dict[str, Any]:
    """What of the training arguments an experiment depends on, as it stands in JSON."""
    return {name: _plain(getattr(arguments, name)) for name in TRAINING_FIELDS}


def check_same_experiment(output_dir: Path, noted: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Check that a folder holds what the arguments would make.

    Args:
        output_dir: the folder.
        noted: the arguments that made what is in it.
        arguments: those of now.

    Raises:
        BadInput: naming the first argument that differs.
    """
    # Through JSON, as the noted ones went.
    for name, value in json.loads(json.dumps(arguments)).items():
        if noted.get(name) != value:
            raise BadInput(
                f"--output_dir {output_dir}: holds another experiment, whose {name} is {noted.get(name)} and not "
                f"{value}; allowed is the same command, to continue it, or another folder"
            )


def check_no_other_experiment(output_dir: Path, own: str) -> None:
    """Check that whatever is in a folder came with the file `own`.

    Raises:
        BadInput: if there is another experiment.
    """
    traces = [name for name in TRACES if (output_dir / name).exists()]
    if (traces or _checkpoints(output_dir)) and own not in traces:
        raise BadInput(
            f"--output_dir {output_dir}: holds another experiment ({', '.join(traces) or 'checkpoints'}); allowed is "
            "an empty or a new folder"
        )


def claim(output_dir: Path, arguments: dict[str, Any], resume: bool, write: bool) -> None:
    """Note in a folder which training it holds.

    Args:
        output_dir: the folder.
        arguments: that decide what comes out.
        resume: training goes on from a checkpoint, so may be longer than was noted; not the first of two stages, since
            the second would not have begun from what it leaves.
        write: whether this process is the one that writes.

    Raises:
        BadInput: if another experiment is there.
    """
    path = output_dir / ARGUMENTS_FILE
    check_no_other_experiment(output_dir, ARGUMENTS_FILE)
    if path.exists():
        ignored = LENGTH_FIELDS if resume and not arguments.get("retrain_epochs") else ()
        compared = {name: value for name, value in arguments.items() if name not in ignored}
        check_same_experiment(output_dir, json.loads(path.read_text()), compared)
    if write:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, arguments)


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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may leave one that was not."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        if is_checkpoint(path):
            return path
    return None


def is_checkpoint(folder: Path) -> bool:
    """Whether training can go on from a folder: a whole checkpoint, with more than the weights.

    Weights alone are what training leaves at its end, and `--save_only_model` in between: going on from them would
    start the optimizer and the learning rate anew, and say nothing.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError):
        return False
    return any(folder.glob("rng_state*.pth"))


def save_metrics(folder: Path, split: str, metrics: dict[str, Any]) -> None:
    """Write `SPLIT_results.json`, and add to `all_results.json`, each whole or not at all.

    `Trainer.save_metrics` writes the same files in place: a kill leaves half of one, which stops the next run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = folder / "all_results.json"
    earlier = json.loads(everything.read_text()) if everything.exists() else {}
    write_json(everything, earlier | metrics)
    write_json(folder / f"{split}_results.json", metrics)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
