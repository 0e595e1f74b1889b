# SPDX-License-Identifier: Apache-2.0
"""The data of a sweep: those of a GLUE task, of images or of masked language modelling, as the checkpoint asks."""

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
    """A kind of task: the arguments that say which data, what loads them, and what a model of it does."""

    arguments: type
    load: Callable[..., Task]
    purpose: str


TASK_KINDS: dict[str, TaskKind] = {
    "ForSequenceClassification": TaskKind(GlueDataArguments, load_glue_task, "classifies text"),
    "ForMaskedLM": TaskKind(MlmDataArguments, load_mlm_task, "finds masked tokens"),
    "ForImageClassification": TaskKind(ImageDataArguments, load_image_task, "classifies images"),
}
"""By what is in the name of a model class."""


@dataclass
class SweepDataArguments(MlmDataArguments, GlueDataArguments, ImageDataArguments):
    """Which sentences or images; as for run_glue.py, run_mlm.py and run_image.py.

    The arguments of all kinds of tasks, since only the checkpoint says which it is. Files may be those of any kind.
    """

    _argument_group_name: ClassVar[str] = "sentences or images"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder, as `datasets.load_dataset` takes it. With --task_name: where GLUE is."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Own sentences, as run_glue.py or run_mlm.py takes them."}
    )

    def for_kind(self, kind: TaskKind) -> Any:
        """Those that this kind of task has."""
        return kind.arguments(**{each.name: getattr(self, each.name) for each in fields(kind.arguments)})


def load_sweep_task(data: SweepDataArguments, model: ModelArguments, seed: int, calibration_samples: int = 0) -> Task:
    """Load what the checkpoint was trained for: labelled sentences, sentences to be masked, or images.

    Args:
        calibration_samples: number of unlabelled examples of the test split to take at most.

    Raises:
        BadInput: for a checkpoint or data that are not there or do not fit.
    """
    if model.model_name_or_path is None:
        raise BadInput("--model_name_or_path: not given; allowed is a Hub id or a folder with a finetuned checkpoint")
    architectures = requested_config(model).architectures
    name = f"--model_name_or_path {model.model_name_or_path}"
    kind = next((kind for part, kind in TASK_KINDS.items() if part in str(architectures)), None)
    if kind is None:
        raise BadInput(
            f"{name}: architectures = {architectures}; allowed is a finetuned text or image classifier, or a masked "
            "language model"
        )
    if data.task_name is not None and kind.arguments is not GlueDataArguments:
        raise BadInput(
            f"--task_name {data.task_name}: allowed for a finetuned text classifier only, and {name}, "
            f"architectures = {architectures}, {kind.purpose}"
        )
    options = {"calibration_samples": calibration_samples, **model.dataset_options()}
    return kind.load(data.for_kind(kind), predict=False, seed=seed, **options)
