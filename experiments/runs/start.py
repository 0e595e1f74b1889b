# SPDX-License-Identifier: Apache-2.0
"""How a script starts: its data are read, and a model is loaded for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments, set_seed

from experiments.errors import BadInput
from experiments.merging.arguments import Samples
from experiments.tasks.base import PreparedTask, Task
from experiments.training.loading import load_model_and_task
from experiments.training.model_arguments import ModelArguments
from experiments.training.progress import quieten_transformers, say
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# FLOPs are for an input as long as the longest of so many evaluated ones.
COUNTED_INPUTS = 32


@dataclass(frozen=True)
class Loaded:
    """A task and a model for it.

    Attributes:
        task, prepared: the data, as they are and as the model sees them.
        model: as it was loaded.
        input_shape: of one input, (1, S) or (1, 3, height, width), that FLOPs are for.
    """

    task: Task
    prepared: PreparedTask
    model: ToMePerceiverPreTrainedModel
    input_shape: tuple[int, ...]

    @property
    def has_new_head(self) -> bool:
        """Whether the model is a checkpoint's with a head that began at random: its outputs say nothing yet."""
        return getattr(self.model, "head_is_new", False)

    def check_head(self, model_args: ModelArguments) -> None:
        """Check that there is something to evaluate without training.

        Raises:
            BadInput: for a head that has learned nothing.
        """
        if self.has_new_head:
            raise BadInput(
                f"--model_name_or_path {model_args.model_name_or_path}: its head for this task is new and has learned "
                "nothing; finetune it first, with --do_train"
            )

    @property
    def samples(self) -> Samples:
        """Unlabelled samples to calibrate on: training samples only where there are no others."""
        prepared, unseen = self.prepared, self.prepared.calibration is not None
        available = len(prepared.calibration if unseen else prepared.train)
        name = self.task.calibration_name if unseen else "training samples"
        return Samples(prepared.samples, available, name, unseen)


def load(
    load_task: Callable[[], Task],
    model_args: ModelArguments,
    training: TrainingArguments,
    merging: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read the data and load the model.

    Args:
        load_task: reads the data.
        model_args: which model.
        training: its seed decides whatever is drawn; of several processes, the first one reads first.
        merging: fields of the config that are given.

    Raises:
        BadInput: for data or a model that are not there or do not fit.
    """
    quieten_transformers()
    set_seed(training.seed)
    with training.main_process_first(desc="loading the data"):
        task = load_task()
    for line in task.read:
        say(line)
    model, prepared = load_model_and_task(model_args, dict(merging or {}), task, training)
    if (first := task.first_input(prepared)) is not None:
        say(first)
    return Loaded(task, prepared, model, (1, *prepared.batch(COUNTED_INPUTS)[task.input_name].shape[1:]))
