# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to go on from: whole, and of the experiment that goes on.

Beside what Trainer writes, a checkpoint has `experiment.json`: what decided it, and the fingerprint of each of its
files. It is written last, so what was cut short or has changed since is known for it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from experiments.errors import BadInput
from experiments.files import write_text
from experiments.training.identity import CONTENT, PLACES, Noted, file_fingerprint

logger = logging.getLogger(__name__)

STAMP_FILE = "experiment.json"
STATE_FILE = "trainer_state.json"
# Training may go on for longer than was first asked.
LENGTH_FIELDS = ("num_train_epochs", "max_steps")


def difference(noted: Noted, current: Noted, ignored: tuple[str, ...] = ()) -> str | None:
    """What tells two experiments apart, in words; `None` if nothing does.

    Args:
        noted: of the one that is there.
        current: of the one that is asked for; only what it names is compared.
        ignored: names that may differ.
    """
    # Through JSON, as the noted ones went.
    current = json.loads(json.dumps(current))
    for name, value in current.items():
        if name != CONTENT and name not in PLACES and name not in ignored and noted.get(name) != value:
            return f"whose {name} is {noted.get(name)} and not {value}"
    noted_contents = noted.get(CONTENT) or {}
    for name, value in current.get(CONTENT, {}).items():
        if noted_contents.get(name) != value:
            return f"with another content of its {name.replace('_', ' ')}"
    return None


def stamp(checkpoint: Path, experiment: Noted, loss_sum: float | None) -> None:
    """Note in a checkpoint, when all of it is written, what decided it.

    Args:
        checkpoint: its folder.
        experiment: whose it is.
        loss_sum: of the losses of all steps so far, if it is known.
    """
    files = {str(path.relative_to(checkpoint)): file_fingerprint(path) for path in _files(checkpoint)}
    stamped = {"experiment": experiment, "loss_sum": loss_sum, "files": files}
    write_text(checkpoint / STAMP_FILE, json.dumps(stamped, indent=1) + "\n")


def read_stamp(checkpoint: Path) -> dict[str, Any]:
    """What `stamp` wrote; nothing if it is not there, as in checkpoints of other programs."""
    try:
        return json.loads((checkpoint / STAMP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_checkpoint(folder: Path, experiment: Noted | None = None) -> Path | None:
    """The newest checkpoint that is whole and of this experiment; what is passed over is named in a warning.

    Args:
        folder: with the checkpoints.
        experiment: that goes on; `None`: whatever it is.
    """
    for path in checkpoints(folder):
        found = fault(path) or other_experiment(path, experiment)
        if found is None:
            return path
        logger.warning("%s is passed over: %s", path, found)
    return None


def other_experiment(checkpoint: Path, experiment: Noted | None) -> str | None:
    """What tells a checkpoint's experiment from another one, in words; `None` if nothing does, or it does not say."""
    noted = read_stamp(checkpoint).get("experiment")
    if noted is None or experiment is None:
        return None
    different = difference(noted, experiment, LENGTH_FIELDS)
    return None if different is None else f"it is of another experiment, {different}"


def fault(checkpoint: Path) -> str | None:
    """Why training cannot go on from a folder, in words; `None` if it can: a whole checkpoint, with more than weights.

    Weights alone are what training leaves at its end, and `--save_only_model` in between: going on from them would
    start the optimizer and the learning rate anew, and say nothing.
    """
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))  # written last by Trainer
    except (OSError, ValueError):
        return f"it has no whole {STATE_FILE}"
    for pattern in ("rng_state*.pth", "optimizer*", "scheduler.pt"):
        if not any(checkpoint.glob(pattern)) and not any(checkpoint.glob("global_step*")):  # DeepSpeed's own folder
            return f"it has no {pattern}, so holds only weights"
    files = read_stamp(checkpoint).get("files") or {}
    for name in files:
        path = checkpoint / name
        if not path.is_file() or file_fingerprint(path) != files[name]:
            return f"{name} is not what was written"
    return None if files else next((found for path in _files(checkpoint) if (found := _unreadable(path))), None)


def check_checkpoint(name: str, experiment: Noted | None) -> None:
    """Check a checkpoint that the user names.

    Args:
        name: of `--resume_from_checkpoint`.
        experiment: that is to go on from it; `None`, as long as it is not known.

    Raises:
        BadInput: if training cannot go on from it, or would go on as another experiment.
    """
    found = fault(Path(name)) or other_experiment(Path(name), experiment)
    if found is not None:
        raise BadInput(
            f"--resume_from_checkpoint {name}: {found}; allowed is 'true' or 'last', for the newest one in "
            "--output_dir, or the folder of a whole checkpoint of the same experiment, with the optimizer's state "
            "beside the weights"
        )


def remove_checkpoints(folder: Path) -> None:
    """Remove what an earlier training left in a folder, before another one begins there at the start."""
    for path in checkpoints(folder):
        # The stamp last would leave, of a removal that is cut short, a folder that looks whole without it.
        (path / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(path)


def _unreadable(path: Path) -> str | None:
    """Of a checkpoint that no stamp vouches for: whether a file of weights or states is cut or damaged."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return None if archive.testzip() is None else f"{path.name} is damaged"
    except (OSError, SafetensorError, zipfile.BadZipFile):
        return f"{path.name} is damaged"
    return None


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != STAMP_FILE)
