# SPDX-License-Identifier: Apache-2.0
"""The data of a sweep: those of a GLUE task, of images or of masked language modelling, as the checkpoint asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from experiments.errors import BadInput
from experiments.tasks.base import Task
from experiments.tasks.glue import load_glue_task
from experiments.tasks.images import ImageDataArguments, load_image_task
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task
from experiments.training.loading import requested_config
from experiments.training.model_arguments import ModelArguments

TASKS: dict[str, tuple[Callable[..., Task], str]] = {
    "ForSequenceClassification": (load_glue_task, "classifies text"),
    "ForMaskedLM": (load_mlm_task, "finds masked tokens"),
    "ForImageClassification": (load_image_task, "classifies images"),
}
"""By what is in the name of a model class: who loads its data, and what it does."""


@dataclass
class SweepDataArguments(MlmDataArguments, ImageDataArguments):
    """Which sentences or images; as for run_glue.py, run_mlm.py and run_image.py."""

    _argument_group_name: ClassVar[str] = "sentences or images"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder, as `datasets.load_dataset` takes it. With --task_name: where GLUE is."
        },
    )


def load_sweep_task(data: SweepDataArguments, model: ModelArguments, seed: int) -> Task:
    """Load what the checkpoint was trained for: labelled sentences, sentences to be masked, or images.

    Raises:
        BadInput: for a checkpoint or data that are not there or do not fit.
    """
    if model.model_name_or_path is None:
        raise BadInput("--model_name_or_path: not given; allowed is a Hub id or a folder with a finetuned checkpoint")
    architectures = requested_config(model).architectures
    name = f"--model_name_or_path {model.model_name_or_path}"
    task = next((task for part, task in TASKS.items() if part in str(architectures)), None)
    if task is None:
        raise BadInput(
            f"{name}: architectures = {architectures}; allowed is a finetuned text or image classifier, or a masked "
            "language model"
        )
    load, does = task
    if data.task_name is not None and load is not load_glue_task:
        raise BadInput(
            f"--task_name {data.task_name}: allowed for a finetuned text classifier only, and {name}, "
            f"architectures = {architectures}, {does}"
        )
    return load(data, predict=False, seed=seed, **model.dataset_options())
