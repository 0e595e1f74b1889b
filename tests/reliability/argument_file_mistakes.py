# SPDX-License-Identifier: Apache-2.0
"""Mistakes in argument files: the message names the file, or the argument as on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from tests.reliability.bad_input import ONLY, BadInputCase, Make
from tests.reliability.inputs import OUTPUT, SCRIPTS, Command, Inputs

MISTAKE = "argument files"
# Content of the file, in bytes.
WHOLE = {
    "empty.yaml": b"",
    "empty.json": b"",
    "a list.yaml": b"- learning_rate\n- 3\n",
    "a list.json": b"[1, 2]",
    "a word.yaml": b"hello\n",
    "a number.json": b"5",
    "nothing.json": b"null",
    "broken.yaml": b"learning_rate: [1, 2\n",
    "broken.json": b'{"learning_rate": 3,',
    "tabs.yaml": b"a:\n\t- b: {\n",
    "not text.yaml": b"\xff\xfe\x00\x01\x80",
    "not text.json": b"\x80\x81\x82",
    "two documents.yaml": b"do_eval: true\n---\ndo_train: true\n",
}
# Values of wrong types, and what the message must contain beside the argument's name.
VALUES: dict[str, tuple[object, str]] = {
    "learning_rate": ([1, 2], "[1,2]"),
    "max_steps": ("many", "many"),
    "do_train": ("maybe", "maybe"),
    "seed": ({"a": 1}, "a"),
    "num_train_epochs": ("two", "two"),
    "per_device_train_batch_size": (2.5, "2.5"),
    "weight_decay": (None, "None"),
    "task_name": (5, "5"),
    "r": ({"layer": 1}, "layer"),
    "dataset_name": ([1], "1"),
    "max_train_samples": ("all", "all"),
    "min_latents": ([4], "4"),
    "flops_ratio": ("most", "most"),
    "retrain_epochs": ("one", "one"),
    "config_name": (7, "7"),
    "lr_scheduler_type": (3, "3"),
    "not_an_argument": (1, "not_an_argument"),
    "pad_to_max_length": ("sometimes", "sometimes"),
}


def argument_file_mistakes() -> Iterator[BadInputCase]:
    for number, (name, data) in enumerate(WHOLE.items()):
        file = name.replace(" ", "_")
        make = _file(file, lambda inputs, path, data=data: path.write_bytes(data))
        yield BadInputCase(MISTAKE, name, SCRIPTS[number % len(SCRIPTS)], make, (file,))
    for name in ("not_there.yaml", "not_there.json"):
        yield BadInputCase(MISTAKE, name, "run_glue.py", _file(name, lambda inputs, path: None), (name,))
    make = _file("folder.yaml", lambda inputs, path: path.mkdir())
    yield BadInputCase(MISTAKE, "a folder.yaml", "eval_sweep.py", make, ("folder.yaml",))
    for number, (name, (value, says)) in enumerate(VALUES.items()):
        ending = (".yaml", ".json")[number % 2]
        make = _file(f"arguments{ending}", _arguments(name, value))
        yield BadInputCase(MISTAKE, f"{name} is {value}{ending}", "run_glue.py", make, (name, says))
    for what, folder in (("a list", ["a", "b"]), ("a mapping", {"a": 1})):
        make = _file("arguments.yaml", _arguments("output_dir", folder))
        yield BadInputCase(MISTAKE, f"output_dir is {what}", "run_glue.py", make, ("output_dir",))


def _file(name: str, write: Callable[[Inputs, Path], object]) -> Make:
    """Make a command whose only argument is a file with all arguments."""

    def make(inputs: Inputs, folder: Path) -> Command:
        write(inputs, folder / name)
        return (ONLY, folder / name)

    return make


def _arguments(name: str, value: object) -> Callable[[Inputs, Path], object]:
    """Write good arguments, except for one."""

    def write(inputs: Inputs, path: Path) -> None:
        arguments = {
            "config_name": str(inputs.text_config), "task_name": "sst2", "dataset_name": str(inputs.glue),
            "do_train": True, "do_eval": True, "use_cpu": True, "save_strategy": "no",
            "output_dir": str(path.parent / OUTPUT),
        }  # fmt: skip
        text = json.dumps(arguments | {name: value})
        path.write_text(text if path.suffix == ".json" else yaml.safe_dump(json.loads(text)))

    return write
