# SPDX-License-Identifier: Apache-2.0
"""Folders that cannot be written or hold something else, checkpoints to resume from, and training that diverges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability.bad_input import BadInputCase, Make
from tests.reliability.inputs import LAST, OUTPUT, SCRIPTS, Command, Inputs

FOLDERS, RESUMED, DIVERGES = "output folders", "checkpoints to resume from", "training that diverges"


def folder_mistakes() -> Iterator[BadInputCase]:
    for script in SCRIPTS:
        for name, (make, says) in NOT_WRITTEN.items():
            yield BadInputCase(FOLDERS, name, script, _into(script, make), says)
        for name, place in CACHES.items():
            yield BadInputCase(FOLDERS, name, script, _usual(script, ("--cache_dir", place)), ("--cache_dir",))
        for name, file in OCCUPIED.items():
            if name == OWN.get(script):
                continue
            yield BadInputCase(FOLDERS, f"with {name}", script, _into(script, _occupied(file)), (OUTPUT, file))
    for script, file in RESULTS.items():
        for what, text in (("empty", ""), ("cut", '{"r": '), ("a list", "[]"), ("of nothing", "{}")):
            make = _into(script, _holding(file, text, **{"config.json": "{}"}))
            yield BadInputCase(FOLDERS, f"whose {file} is {what}", script, make, (OUTPUT,))
    for script in ("run_glue.py", "run_image.py", "run_mlm.py"):
        for name, change in NO_CHECKPOINTS.items():
            make = _resumed(script, change)
            says = ("--resume_from_checkpoint", "checkpoint-3")
            yield BadInputCase(RESUMED, name, script, make, says)
    for script in ("run_glue.py", "run_image.py", "run_mlm.py"):
        make = _evaluation_into_training(script)
        yield BadInputCase(FOLDERS, "with training of another model, to evaluate in", script, make, ("--output_dir",))
    for script, words, below in (
        ("run_glue.py", ("--r", 1, "--retrain_epochs", 1), "finetuned"),
        ("eval_sweep.py", ("--r", 1, "--retrain_epochs", 1), "retrained"),
        ("eval_sweep.py", ("--r", 1), "predictions"),
    ):
        make = _with_file_below(script, words, below)
        yield BadInputCase(FOLDERS, f"with a file called {below}", script, make, ("--output_dir", below))
    yield BadInputCase(RESUMED, "of another task", "run_glue.py", _of_another_task, ("--resume_from_checkpoint",))
    yield BadInputCase(RESUMED, "a word", "run_glue.py", _word, ("--resume_from_checkpoint", "newest"))
    for name, (script, words) in DIVERGING.items():
        yield BadInputCase(DIVERGES, name, script, _usual(script, words), ("loss",), exit_code=1, works=True)


def _usual(script: str, words: Command) -> Make:
    return lambda inputs, folder: (*inputs.usual(script), *STAGE.get(script, ()), *words)


STAGE: dict[str, Command] = {"eval_sweep.py": ("--r", 1)}


def _into(script: str, make: Callable[[Inputs, Path], Path]) -> Make:
    """A good command with another folder to write to."""

    def with_folder(inputs: Inputs, folder: Path) -> Command:
        output_dir = make(inputs, folder)
        return (*inputs.usual(script), *STAGE.get(script, ()), "--output_dir", output_dir)

    return with_folder


def _with_file_below(script: str, words: Command, below: str) -> Make:
    """A good command whose folder has a file in the place of one of the folders in it."""

    def make(inputs: Inputs, folder: Path) -> Command:
        (folder / OUTPUT).mkdir()
        (folder / OUTPUT / below).write_text("hello")
        return (*inputs.usual(script), *words)

    return make


def _a_file(inputs: Inputs, folder: Path) -> Path:
    (folder / "file").write_text("hello")
    return folder / "file"


def _below_a_file(inputs: Inputs, folder: Path) -> Path:
    return _a_file(inputs, folder) / "out"


def _dangling(inputs: Inputs, folder: Path) -> Path:
    (folder / "link").symlink_to("/proc/no/such/place")
    return folder / "link"


# Not by their permissions, which the administrator may pass over.
NOT_WRITTEN: dict[str, tuple[Callable[[Inputs, Path], Path], tuple[str, ...]]] = {
    "a file": (_a_file, ("--output_dir", "file")),
    "below a file": (_below_a_file, ("--output_dir", "file")),
    "where nothing can be made": (lambda inputs, folder: Path("/proc/reliability/out"), ("--output_dir", "/proc")),
    "a link to nowhere": (_dangling, ("--output_dir", "link")),
    "with a name that is too long": (lambda inputs, folder: folder / ("x" * 300), ("--output_dir",)),
}
CACHES = {
    "a cache that is a file": __file__,
    "a cache where nothing can be made": "/proc/reliability/cache",
    "a cache whose name is not UTF-8": "cache\udcff",
}
OCCUPIED = {
    "a checkpoint": "config.json",
    "a sweep": "sweep_results.json",
    "training": "trainer_state.json",
}
OWN = {"eval_sweep.py": "a sweep"}
RESULTS = {"run_glue.py": "arguments.json", "eval_sweep.py": "sweep_results.json"}


def _occupied(file: str) -> Callable[[Inputs, Path], Path]:
    return _holding(file, json.dumps({"of": "another experiment"}))


def _holding(file: str, text: str, **others: str) -> Callable[[Inputs, Path], Path]:
    def make(inputs: Inputs, folder: Path) -> Path:
        output_dir = folder / OUTPUT
        output_dir.mkdir()
        for name, content in {file: text, **others}.items():
            (output_dir / name).write_text(content)
        return output_dir

    return make


def _evaluation_into_training(script: str) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        shutil.copytree(inputs.checkpoint_of(script).parent, folder / OUTPUT)
        return (*inputs.evaluation(script), "--output_dir", folder / OUTPUT)

    return make


def _resumed(script: str, change: Callable[[Path], object]) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        checkpoint = folder / "checkpoint-3"
        shutil.copytree(inputs.checkpoint_of(script), checkpoint)
        change(checkpoint)
        return (*inputs.usual(script), "--resume_from_checkpoint", checkpoint)

    return make


def _weights_only(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()


def _cut_state(folder: Path) -> None:
    state = folder / "trainer_state.json"
    state.write_text(state.read_text()[:100])


def _cut(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


NO_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "not there": shutil.rmtree,
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("hello")),
    "weights alone": _weights_only,
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut state": _cut_state,
    "cut weights": _cut("model.safetensors"),
    "cut optimizer": _cut("optimizer.pt"),
    "empty scheduler": lambda folder: (folder / "scheduler.pt").write_bytes(b""),
}


def _of_another_task(inputs: Inputs, folder: Path) -> Command:
    return (*inputs.text_training, "--resume_from_checkpoint", inputs.checkpoint_of("run_image.py"))


def _word(inputs: Inputs, folder: Path) -> Command:
    return (*inputs.text_training, "--resume_from_checkpoint", "newest")


RETRAINED: Command = ("--r", 1, "--retrain_epochs", 1)
DIVERGES_AT: Command = ("--learning_rate", 1e6, "--max_grad_norm", 0, "--optim", "sgd")
DIVERGING: dict[str, tuple[str, Command]] = {
    "text": ("run_glue.py", DIVERGES_AT),
    "text, resumed": ("run_glue.py", (*DIVERGES_AT, *LAST)),
    "text, logged at every step": ("run_glue.py", (*DIVERGES_AT, "--logging_steps", 1)),
    "text, retrained": ("run_glue.py", (*RETRAINED, *DIVERGES_AT)),
    "images": ("run_image.py", DIVERGES_AT),
    "images, for every r": ("run_image.py", ("--elastic", *DIVERGES_AT)),
    "images, evaluated on the way": (
        "run_image.py", ("--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", *DIVERGES_AT)
    ),
    "masked tokens": ("run_mlm.py", DIVERGES_AT),
    "regression": ("run_glue.py", ("--task_name", "stsb", *DIVERGES_AT)),
    "in retraining alone": (
        "run_glue.py", (*RETRAINED, "--retrain_learning_rate", 1e6, "--max_grad_norm", 0, "--optim", "sgd")
    ),
    "in a sweep": ("eval_sweep.py", ("--retrain_epochs", 1, *DIVERGES_AT)),
    "in a sweep, for every r": ("eval_sweep.py", ("--retrain_epochs", 1, "--elastic", *DIVERGES_AT)),
}  # fmt: skip
