# SPDX-License-Identifier: Apache-2.0
"""Load the task of a sweep: GLUE, images or masked language modelling, depending on the checkpoint's model class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from experiments.errors import BadInput
from experiments.tasks.base import Task
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.tasks.images import ImageDataArguments, load_image_task
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task
from experiments.training.loading import requested_config
from experiments.training.model_arguments import ModelArguments


class TaskKind(NamedTuple):
    """A kind of task: the dataclass of its data arguments, its loading function, and its purpose in messages."""

    arguments: type
    load: Callable[..., Task]
    purpose: str


TASK_KINDS: dict[str, TaskKind] = {
    "ForSequenceClassification": TaskKind(GlueDataArguments, load_glue_task, "classifies text"),
    "ForMaskedLM": TaskKind(MlmDataArguments, load_mlm_task, "finds masked tokens"),
    "ForImageClassification": TaskKind(ImageDataArguments, load_image_task, "classifies images"),
}
"""Kinds of tasks, by the end of the model class's name."""


@dataclass
class SweepDataArguments(MlmDataArguments, GlueDataArguments, ImageDataArguments):
    """Sentences or images to evaluate on, with the arguments of run_glue.py, run_mlm.py and run_image.py.

    All of their data arguments are accepted, since the kind of task is known only once the checkpoint is read.
    """

    _argument_group_name: ClassVar[str] = "sentences or images"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset: a Hub id or a local folder. With --task_name: the one that holds the GLUE tasks."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Your own sentences, in a file that run_glue.py or run_mlm.py accepts."}
    )

    def for_kind(self, kind: TaskKind) -> Any:
        """Return the data arguments of one kind of task."""
        return kind.arguments(**{argument.name: getattr(self, argument.name) for argument in fields(kind.arguments)})


def load_sweep_task(data: SweepDataArguments, model: ModelArguments, seed: int, calibration_samples: int = 0) -> Task:
    """Load the data of the task that the checkpoint was trained for.

    Args:
        calibration_samples: largest number of unlabelled test examples to load for calibration.

    Raises:
        BadInput: for a missing checkpoint or data, or data that do not fit the checkpoint.
    """
    if model.model_name_or_path is None:
        raise BadInput("--model_name_or_path: is missing; use a Hub id or a folder with a finetuned checkpoint")
    architectures = requested_config(model).architectures
    name = f"--model_name_or_path {model.model_name_or_path}"
    kind = next((kind for part, kind in TASK_KINDS.items() if part in str(architectures)), None)
    if kind is None:
        raise BadInput(
            f"{name}: architectures = {architectures}; use a finetuned text or image classifier, or a masked "
            "language model"
        )
    if data.task_name is not None and kind.arguments is not GlueDataArguments:
        raise BadInput(
            f"--task_name {data.task_name}: needs a finetuned text classifier, but {name}, "
            f"architectures = {architectures}, {kind.purpose}"
        )
    options = {"calibration_samples": calibration_samples, **model.dataset_options()}
    return kind.load(data.for_kind(kind), predict=False, seed=seed, **options)
