# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the one file that all arguments may stand in: each is named with the file, or as on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.reliability.bad_input import ONLY, BadInputCase, Make
from tests.reliability.inputs import OUTPUT, SCRIPTS, Command, Inputs

MISTAKE = "argument files"
# What is in the file, byte for byte.
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
# An argument of the wrong type among good ones, and what the line must say beside its name.
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
OUTPUT_DIRS: dict[str, object] = {"a list": ["a", "b"], "a mapping": {"a": 1}}


def argument_file_mistakes() -> Iterator[BadInputCase]:
    for number, (name, data) in enumerate(WHOLE.items()):
        script = SCRIPTS[number % len(SCRIPTS)]
        yield BadInputCase(MISTAKE, name, script, _whole(name.replace(" ", "_"), data), (name.replace(" ", "_"),))
    for name in ("not_there.yaml", "not_there.json"):
        yield BadInputCase(MISTAKE, name, "run_glue.py", _alone(name), (name,))
    yield BadInputCase(MISTAKE, "a folder.yaml", "eval_sweep.py", _a_folder, ("folder.yaml",))
    for number, (name, (value, says)) in enumerate(VALUES.items()):
        ending = (".yaml", ".json")[number % 2]
        yield BadInputCase(
            MISTAKE, f"{name} is {value}{ending}", "run_glue.py", _value(name, value, ending), (name, says)
        )
    for what, folder in OUTPUT_DIRS.items():
        make = _value("output_dir", folder, ".yaml")
        yield BadInputCase(MISTAKE, f"output_dir is {what}", "run_glue.py", make, ("output_dir",))


def _whole(name: str, data: bytes) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        (folder / name).write_bytes(data)
        return (ONLY, folder / name)

    return make


def _alone(name: str) -> Make:
    return lambda inputs, folder: (ONLY, folder / name)


def _a_folder(inputs: Inputs, folder: Path) -> Command:
    (folder / "folder.yaml").mkdir()
    return (ONLY, folder / "folder.yaml")


def _value(name: str, value: object, ending: str) -> Make:
    def make(inputs: Inputs, folder: Path) -> Command:
        arguments = {
            "config_name": str(inputs.text_config), "task_name": "sst2", "dataset_name": str(inputs.glue),
            "do_train": True, "do_eval": True, "use_cpu": True, "save_strategy": "no",
            "output_dir": str(folder / OUTPUT),
        }  # fmt: skip
        text = json.dumps(arguments | {name: value})
        path = folder / f"arguments{ending}"
        path.write_text(text if ending == ".json" else yaml.safe_dump(json.loads(text)))
        return (ONLY, path)

    return make
