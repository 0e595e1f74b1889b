# SPDX-License-Identifier: Apache-2.0
"""Tiny data and checkpoints in one folder, and working commands for them, from which all cases are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from modeling_tome_perceiver import (
    ToMePerceiverForImageClassificationConvProcessing,
    ToMePerceiverForMaskedLM,
    ToMePerceiverForSequenceClassification,
)
from tests.reliability.running import Outcome, run_forked
from tests.support import tiny_images, tiny_texts
from tests.support.tiny_models import spread_weights

Command = tuple[object, ...]
TRAINING: Command = (
    "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 2, "--per_device_train_batch_size", 6,
    "--learning_rate", 3e-3, "--save_strategy", "steps", "--save_steps", 3,
)  # fmt: skip
OUTPUT = "out"
TIMING: Command = ("--timing_rounds", 1, "--timing_batch_size", 2)
LAST: Command = ("--resume_from_checkpoint", "last")
KINDS = {"run_glue.py": "text", "run_image.py": "image", "run_mlm.py": "mlm"}
SCRIPTS = (*KINDS, "eval_sweep.py")


class Inputs:
    """Paths of data and checkpoints, and the first arguments of commands that use them.

    Attributes:
        folder: folder of all files.
        text_model: checkpoint that classifies the two classes of SST-2.
        text_scratch, image_scratch, mlm_scratch: train from scratch, without data arguments.
        text_training, image_training, mlm_training: train from scratch.
        text_training_on: train from a checkpoint with `run_glue.py`.
        text_evaluation: evaluate with `run_glue.py`.
        text_sweep, image_sweep, mlm_sweep: sweep with `eval_sweep.py`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.glue, self.sentences = folder / "glue", folder / "sentences"
        self.images, self.image_folders = folder / "images", folder / "image_folders"
        self.text_config, self.image_config = folder / "text_config.json", folder / "image_config.json"
        self.mlm_config = folder / "mlm_config.json"
        self.text_model, self.image_model = folder / "text_model", folder / "image_model"
        self.mlm_model = folder / "mlm_model"
        cache: Command = ("--cache_dir", folder / "cache")
        self.text_data: Command = ("--task_name", "sst2", "--dataset_name", self.glue, *cache)
        self.image_data: Command = ("--dataset_name", self.images, *cache)
        self.mlm_data: Command = ("--dataset_name", self.sentences, "--dataset_config_name", "one,two", *cache)
        self.own_files: Command = (
            "--train_file", folder / "train.csv", "--validation_file", folder / "validation.csv", *cache,
        )  # fmt: skip
        self.text_scratch: Command = ("--config_name", self.text_config, *TRAINING)
        self.image_scratch: Command = ("--config_name", self.image_config, *TRAINING)
        self.mlm_scratch: Command = ("--config_name", self.mlm_config, *TRAINING)
        self.text_training: Command = (*self.text_scratch, *self.text_data)
        self.text_training_on: Command = ("--model_name_or_path", self.text_model, *self.text_data, *TRAINING)
        self.image_training: Command = (*self.image_scratch, *self.image_data)
        self.mlm_training: Command = (*self.mlm_scratch, *self.mlm_data, "--max_train_samples", 24)
        self.text_evaluation = self.evaluation("run_glue.py")
        self.text_sweep: Command = ("--model_name_or_path", self.text_model, *self.text_data, "--use_cpu", *TIMING)
        self.image_sweep: Command = ("--model_name_or_path", self.image_model, *self.image_data, "--use_cpu", *TIMING)
        self.mlm_sweep: Command = ("--model_name_or_path", self.mlm_model, *self.mlm_data, "--use_cpu", *TIMING)
        self._finished: dict[str, Future[Outcome]] = {}

    @classmethod
    def write(cls, folder: Path) -> Inputs:
        """Write all files to a new folder; the same every time."""
        inputs = cls(folder)
        folder.mkdir(parents=True)
        for task in ("sst2", "mrpc", "stsb", "mnli"):
            tiny_texts.write_glue(inputs.glue, task)
        tiny_texts.write_sentences(inputs.sentences, "one", "two")
        tiny_images.write_images(inputs.images, {"train": 24, "test": 20})
        tiny_images.write_image_folders(inputs.image_folders, per_class=6)
        columns = {"text": ["aaa", "bbb", "aaab", "bbba"] * 3, "label": ["good", "bad"] * 6}
        for name in ("train", "validation", "test"):
            tiny_texts.write_table(folder / f"{name}.csv", columns)
        for path, model in ((inputs.text_config, tiny_texts.MODEL), (inputs.image_config, tiny_images.MODEL)):
            path.write_text(json.dumps(model))
        inputs.mlm_config.write_text(json.dumps(tiny_texts.MODEL | {"architectures": ["PerceiverForMaskedLM"]}))
        _write_checkpoints(inputs)
        return inputs

    def finished(self, scenario: Scenario) -> tuple[Path, Outcome]:
        """Return the folder in which a scenario ran to its end, and its outcome; it runs when first asked for."""
        folder = self.folder / "finished" / scenario.id
        future: Future[Outcome] = Future()
        if self._finished.setdefault(scenario.id, future) is future:
            folder.mkdir(parents=True)
            try:
                future.set_result(run_forked(scenario.script, scenario.command(self), folder))
            except BaseException as error:
                future.set_exception(error)
        return folder, self._finished[scenario.id].result()

    def checkpoint_of(self, script: str) -> Path:
        """Return a complete checkpoint after three steps of `usual(script)`."""
        folder, outcome = self.finished(Scenario("usual", script, KINDS[script] + "_training"))
        if outcome.exit_code:
            raise RuntimeError(f"{script} does not work: {outcome.stderr[-2000:]}")
        return folder / OUTPUT / "checkpoint-3"

    def evaluation(self, script: str) -> Command:
        """Return arguments that evaluate another checkpoint than that of `usual(script)`."""
        model, data = (getattr(self, f"{KINDS[script]}_{what}") for what in ("model", "data"))
        return ("--model_name_or_path", model, *data, "--use_cpu", "--do_eval")

    def usual(self, script: str) -> Command:
        """Return working arguments of a script, without `--output_dir`."""
        return self.image_sweep if script == "eval_sweep.py" else getattr(self, f"{KINDS[script]}_training")


@dataclass(frozen=True)
class Scenario:
    """A working command of a script."""

    name: str  # names what is special in it
    script: str  # that is called
    base: str  # attribute of `Inputs` that is the start of its arguments
    added: Command = ()  # the rest of them, but for `--output_dir`
    resume: Command = ()  # arguments added when it is called again, if it can resume

    @property
    def id(self) -> str:
        return f"{self.script.removesuffix('.py')}: {self.name}"

    def command(self, inputs: Inputs) -> Command:
        return (*getattr(inputs, self.base), *self.added, "--output_dir", OUTPUT)


def edit_value(path: Path, column: str, change: Callable[[Any], Any], row: int = 1) -> None:
    """Change one value of a parquet file."""
    data = Dataset.from_parquet(str(path), keep_in_memory=True)
    columns = {name: list(data[name]) for name in data.column_names}
    columns[column][row] = change(columns[column][row])
    Dataset.from_dict(columns, features=data.features).to_parquet(path)


def edit_json(path: Path, **values: object) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_checkpoints(inputs: Inputs) -> None:
    torch.manual_seed(0)

    def labels(names: list[str]) -> dict[str, Any]:
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    def save(model_class: type, path: Path, **fields: Any) -> None:
        spread_weights(model_class(ToMePerceiverConfig(**fields))).save_pretrained(path)

    ours = {"model_type": "tome_perceiver"}
    text, two = tiny_texts.MODEL | ours, labels(tiny_texts.LABELS["sst2"])
    problem = {"problem_type": "single_label_classification"}
    save(ToMePerceiverForSequenceClassification, inputs.text_model, **text | two | problem)
    save(ToMePerceiverForMaskedLM, inputs.mlm_model, **text | {"architectures": ["PerceiverForMaskedLM"]})
    for folder in (inputs.text_model, inputs.mlm_model):
        PerceiverTokenizer(model_max_length=tiny_texts.POSITIONS).save_pretrained(folder)
    image = tiny_images.MODEL | ours | labels(tiny_images.LABELS)
    save(ToMePerceiverForImageClassificationConvProcessing, inputs.image_model, **image)
    size = {"height": 16, "width": 16}
    PerceiverImageProcessorPil(do_center_crop=False, size=size).save_pretrained(inputs.image_model)
