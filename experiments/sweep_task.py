# SPDX-License-Identifier: Apache-2.0
"""The data of a sweep: those of a GLUE task or of images, as the checkpoint asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from experiments.bad_input import BadInput
from experiments.glue_task import GlueDataArguments, load_glue_task
from experiments.image_task import ImageDataArguments, load_image_task
from experiments.model_arguments import ModelArguments
from experiments.model_loading import requested_config
from experiments.task import Task


@dataclass
class SweepDataArguments(GlueDataArguments, ImageDataArguments):
    """Which sentences or images; as for run_glue.py and run_image.py."""

    _argument_group_name: ClassVar[str] = "sentences or images"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder, as `datasets.load_dataset` takes it. With --task_name: where GLUE is."
        },
    )


def load_sweep_task(data: SweepDataArguments, model: ModelArguments, seed: int) -> Task:
    """Load sentences for a text checkpoint and images for an image checkpoint.

    Raises:
        BadInput: for a checkpoint or data that are not there or do not fit.
    """
    architectures = requested_config(model).architectures
    name = f"--model_name_or_path {model.model_name_or_path}"
    if "Classification" not in str(architectures):
        raise BadInput(f"{name}: architectures = {architectures}; allowed is a finetuned text or image classifier")
    image = "Image" in str(architectures)
    if image and data.task_name is not None:
        raise BadInput(f"--task_name {data.task_name}: allowed only for text, and {name} classifies images")
    load = load_image_task if image else load_glue_task
    return load(data, predict=False, seed=seed, **model.dataset_options())
