# SPDX-License-Identifier: Apache-2.0
"""Mistakes in folders: not writable, occupied, without a checkpoint to resume from; and training that diverges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability.bad_input import BadInputCase, Make, usual
from tests.reliability.inputs import KINDS, LAST, OUTPUT, SCRIPTS, Command, Inputs, cut

FOLDERS, RESUMED, DIVERGES = "output folders", "checkpoints to resume from", "training that diverges"
RESUME = "--resume_from_checkpoint"


def folder_mistakes() -> Iterator[BadInputCase]:
    for script in SCRIPTS:
        for name, (output_dir, says) in NOT_WRITTEN.items():
            yield BadInputCase(FOLDERS, name, script, _into(script, output_dir), ("--output_dir", *says))
        for name, place in CACHES.items():
            yield BadInputCase(FOLDERS, name, script, _usual(script, "--cache_dir", place), ("--cache_dir",))
        for name, file in OCCUPIED.items():
            if (name, script) != ("a sweep", "eval_sweep.py"):
                make = _into(script, _holding({file: json.dumps({"of": "another experiment"})}))
                yield BadInputCase(FOLDERS, f"with {name}", script, make, (OUTPUT, file))
    for script, file in (("run_glue.py", "arguments.json"), ("eval_sweep.py", "sweep_results.json")):
        for what, text in (("empty", ""), ("cut", '{"r": '), ("a list", "[]"), ("of nothing", "{}")):
            make = _into(script, _holding({file: text, "config.json": "{}"}))
            yield BadInputCase(FOLDERS, f"whose {file} is {what}", script, make, (OUTPUT,))
    for script in KINDS:
        for name, change in NO_CHECKPOINTS.items():
            yield BadInputCase(RESUMED, name, script, _resumed(script, change), (RESUME, "checkpoint-3"))
        name = "with training of another model, to evaluate in"
        yield BadInputCase(FOLDERS, name, script, _evaluation_into_training(script), ("--output_dir",))
    for script, words, below in (
        ("run_glue.py", RETRAINED, "finetuned"),
        ("eval_sweep.py", RETRAINED, "retrained"),
        ("eval_sweep.py", (), "predictions"),
    ):
        make = _into(script, _holding({below: "hello"}), *words)
        yield BadInputCase(FOLDERS, f"with a file called {below}", script, make, ("--output_dir", below))
    make = lambda inputs, folder: (*inputs.text_training, RESUME, inputs.checkpoint_of("run_image.py"))  # noqa: E731
    yield BadInputCase(RESUMED, "of another task", "run_glue.py", make, (RESUME,))
    yield BadInputCase(RESUMED, "a word", "run_glue.py", _usual("run_glue.py", RESUME, "newest"), (RESUME, "newest"))
    for name, (script, words) in DIVERGING.items():
        yield BadInputCase(DIVERGES, name, script, _usual(script, *words), ("loss",), exit_code=1, works=True)


def _usual(script: str, *words: object) -> Make:
    return usual(script, *(("--r", 1) if script == "eval_sweep.py" else ()), *words)


def _into(script: str, output_dir: Callable[[Path], Path], *words: object) -> Make:
    """Make a working command with another --output_dir, which `output_dir` creates inside an empty folder."""
    return lambda inputs, folder: (*_usual(script, *words)(inputs, folder), "--output_dir", output_dir(folder))


def _a_file(folder: Path) -> Path:
    (folder / "file").write_text("hello")
    return folder / "file"


def _dangling(folder: Path) -> Path:
    (folder / "link").symlink_to("/proc/no/such/place")
    return folder / "link"


def _holding(files: dict[str, str]) -> Callable[[Path], Path]:
    def output_dir(folder: Path) -> Path:
        (folder / OUTPUT).mkdir()
        for name, content in files.items():
            (folder / OUTPUT / name).write_text(content)
        return folder / OUTPUT

    return output_dir


# Paths that cannot be written to. None relies on permissions, because root may write anywhere.
NOT_WRITTEN: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "a file": (_a_file, ("file",)),
    "below a file": (lambda folder: _a_file(folder) / "out", ("file",)),
    "where nothing can be made": (lambda folder: Path("/proc/reliability/out"), ("/proc",)),
    "a link to nowhere": (_dangling, ("link",)),
    "with a name that is too long": (lambda folder: folder / ("x" * 300), ()),
}
CACHES = {
    "a cache that is a file": __file__,
    "a cache where nothing can be made": "/proc/reliability/cache",
    "a cache whose name is not UTF-8": "cache\udcff",
}
OCCUPIED = {"a checkpoint": "config.json", "a sweep": "sweep_results.json", "training": "trainer_state.json"}


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
        return (*inputs.usual(script), RESUME, checkpoint)

    return make


def _weights_only(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()


NO_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "not there": shutil.rmtree,
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("hello")),
    "weights alone": _weights_only,
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut state": lambda folder: cut(folder / "trainer_state.json"),
    "cut weights": lambda folder: cut(folder / "model.safetensors"),
    "cut optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "empty scheduler": lambda folder: (folder / "scheduler.pt").write_bytes(b""),
}
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
