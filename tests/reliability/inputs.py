# SPDX-License-Identifier: Apache-2.0
"""What cases are made from: tiny data and checkpoints in one folder, and the commands that run on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from configuration_tome_perceiver import ToMePerceiverConfig
from modeling_tome_perceiver import (
    ToMePerceiverForImageClassificationConvProcessing,
    ToMePerceiverForMaskedLM,
    ToMePerceiverForSequenceClassification,
)
from tests.reliability.forked import run_forked
from tests.support import tiny_images, tiny_texts
from tests.support.tiny_models import spread_weights

Command = tuple[object, ...]
TRAINING: Command = (
    "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 2, "--per_device_train_batch_size", 6,
    "--learning_rate", 3e-3, "--save_strategy", "steps", "--save_steps", 3,
)  # fmt: skip
TIMING: Command = ("--timing_rounds", 1, "--timing_batch_size", 2)
LAST: Command = ("--resume_from_checkpoint", "last")
SCRIPTS = ("run_glue.py", "run_image.py", "run_mlm.py", "eval_sweep.py")


@dataclass(frozen=True)
class Inputs:
    """Paths of data and checkpoints, and the start of every command that uses them.

    Attributes:
        folder: that all are in.
    """

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Inputs:
        """Write them to a new folder, in a process that may fork; the same every time."""
        inputs = cls(folder)
        folder.mkdir(parents=True)
        for task in ("sst2", "mrpc", "stsb", "mnli"):
            tiny_texts.write_glue(inputs.glue, task)
        tiny_texts.write_sentences(inputs.sentences, "one", "two")
        tiny_images.write_images(inputs.images, {"train": 24, "test": 20})
        tiny_images.write_image_folders(inputs.image_folders, per_class=6)
        texts = ["aaa", "bbb", "aaab", "bbba"] * 3
        for name in ("train", "validation", "test"):
            columns = {"text": texts, "label": ["good", "bad"] * 6}
            tiny_texts.write_table(folder / f"{name}.csv", columns)
        for path, model in ((inputs.text_config, tiny_texts.MODEL), (inputs.image_config, tiny_images.MODEL)):
            path.write_text(json.dumps(model))
        inputs.mlm_config.write_text(json.dumps(tiny_texts.MODEL | {"architectures": ["PerceiverForMaskedLM"]}))
        _write_checkpoints(inputs)
        for script in ("run_glue.py", "run_image.py", "run_mlm.py"):
            command = (*inputs.usual(script), "--output_dir", inputs.checkpoint_of(script).parent)
            outcome = run_forked(script, command, folder)
            if outcome.exit_code:
                raise RuntimeError(f"{script} does not work: {outcome.stderr[-2000:]}")
        return inputs

    @property
    def glue(self) -> Path:
        return self.folder / "glue"

    @property
    def sentences(self) -> Path:
        return self.folder / "sentences"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def image_folders(self) -> Path:
        return self.folder / "image_folders"

    @property
    def text_config(self) -> Path:
        return self.folder / "text_config.json"

    @property
    def mlm_config(self) -> Path:
        return self.folder / "mlm_config.json"

    @property
    def image_config(self) -> Path:
        return self.folder / "image_config.json"

    @property
    def text_model(self) -> Path:
        """Tells the two classes of SST-2 apart."""
        return self.folder / "text_model"

    @property
    def mlm_model(self) -> Path:
        return self.folder / "mlm_model"

    @property
    def image_model(self) -> Path:
        return self.folder / "image_model"

    @property
    def cache(self) -> Command:
        return ("--cache_dir", self.folder / "cache")

    @property
    def text_data(self) -> Command:
        return ("--task_name", "sst2", "--dataset_name", self.glue, *self.cache)

    @property
    def image_data(self) -> Command:
        return ("--dataset_name", self.images, *self.cache)

    @property
    def mlm_data(self) -> Command:
        return ("--dataset_name", self.sentences, "--dataset_config_name", "one,two", *self.cache)

    @property
    def own_files(self) -> Command:
        files = {name: self.folder / f"{name}.csv" for name in ("train", "validation")}
        return (*(word for name, path in files.items() for word in (f"--{name}_file", path)), *self.cache)

    @property
    def text_training(self) -> Command:
        """Of `run_glue.py`, from scratch."""
        return ("--config_name", self.text_config, *self.text_data, *TRAINING)

    @property
    def text_training_on(self) -> Command:
        """Of `run_glue.py`, from a checkpoint."""
        return ("--model_name_or_path", self.text_model, *self.text_data, *TRAINING)

    @property
    def text_evaluation(self) -> Command:
        """Of `run_glue.py`."""
        return self.evaluation("run_glue.py")

    @property
    def image_training(self) -> Command:
        """Of `run_image.py`, from scratch."""
        return ("--config_name", self.image_config, *self.image_data, *TRAINING)

    @property
    def mlm_training(self) -> Command:
        """Of `run_mlm.py`, from scratch."""
        return ("--config_name", self.mlm_config, *self.mlm_data, *TRAINING, "--max_train_samples", 24)

    @property
    def text_sweep(self) -> Command:
        """Of `eval_sweep.py`."""
        return ("--model_name_or_path", self.text_model, *self.text_data, "--use_cpu", *TIMING)

    @property
    def image_sweep(self) -> Command:
        """Of `eval_sweep.py`."""
        return ("--model_name_or_path", self.image_model, *self.image_data, "--use_cpu", *TIMING)

    @property
    def mlm_sweep(self) -> Command:
        """Of `eval_sweep.py`."""
        return ("--model_name_or_path", self.mlm_model, *self.mlm_data, "--use_cpu", *TIMING)

    def checkpoint_of(self, script: str) -> Path:
        """A whole checkpoint after three steps of `usual(script)`."""
        return self.folder / "trained" / script.removesuffix(".py") / "checkpoint-3"

    def evaluation(self, script: str) -> Command:
        """Of a checkpoint, that is not the one of `usual(script)`."""
        model, data = {
            "run_glue.py": (self.text_model, self.text_data),
            "run_image.py": (self.image_model, self.image_data),
            "run_mlm.py": (self.mlm_model, self.mlm_data),
        }[script]
        return ("--model_name_or_path", model, *data, "--use_cpu", "--do_eval")

    def usual(self, script: str) -> Command:
        """A command of a script that works, but for its `--output_dir`."""
        return {
            "run_glue.py": self.text_training,
            "run_image.py": self.image_training,
            "run_mlm.py": self.mlm_training,
            "eval_sweep.py": self.image_sweep,
        }[script]


def _write_checkpoints(inputs: Inputs) -> None:
    torch.manual_seed(0)
    text = tiny_texts.MODEL | {"model_type": "tome_perceiver"}
    names = tiny_texts.LABELS["sst2"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    classifier = ToMePerceiverConfig(**text | labels | {"problem_type": "single_label_classification"})
    spread_weights(ToMePerceiverForSequenceClassification(classifier)).save_pretrained(inputs.text_model)
    masked = ToMePerceiverConfig(**text | {"architectures": ["PerceiverForMaskedLM"]})
    spread_weights(ToMePerceiverForMaskedLM(masked)).save_pretrained(inputs.mlm_model)
    for folder in (inputs.text_model, inputs.mlm_model):
        PerceiverTokenizer(model_max_length=tiny_texts.POSITIONS).save_pretrained(folder)
    names = tiny_images.LABELS
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    config = ToMePerceiverConfig(**tiny_images.MODEL | labels | {"model_type": "tome_perceiver"})
    spread_weights(ToMePerceiverForImageClassificationConvProcessing(config)).save_pretrained(inputs.image_model)
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16}).save_pretrained(
        inputs.image_model
    )
