# SPDX-License-Identifier: Apache-2.0
"""Parse the arguments of a script, then load its task and model. Every script starts here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from experiments.command_line import parse_arguments
from experiments.errors import BadInput
from experiments.files import save_whole
from experiments.merging.arguments import Samples
from experiments.publishing.hub import HubArguments
from experiments.tasks.base import PreparedTask, Task
from experiments.training.loading import load_model_and_task
from experiments.training.model_arguments import ModelArguments
from experiments.training.progress import quieten_transformers, say
from experiments.training.run_record import data_fields
from experiments.training.stage import RetrainArguments
from experiments.training.trainer_arguments import TrainerArguments
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# FLOPs are counted for the shape of a batch of this many evaluated inputs: text is as long as the longest of them.
INPUTS_FOR_SHAPE = 32


@dataclass
class RunArguments:
    """Arguments of a script, by group.

    Attributes:
        data: the script's dataclass of data arguments.
        merge_args: `MergeArguments`, or `SweepArguments` in eval_sweep.py.
    """

    model: ModelArguments
    data: Any
    merge_args: Any
    training: TrainingArguments
    retraining: RetrainArguments
    hub: HubArguments

    @classmethod
    def parse(cls, description: str, data: type, merge_args: type) -> RunArguments:
        """Parse the command line of a script.

        Args:
            description: first part of its `--help`.
            data, merge_args: dataclasses of these two groups.

        Raises:
            BadInput: for values that are out of range.
        """
        groups = (ModelArguments, data, merge_args, TrainerArguments, RetrainArguments, HubArguments)
        args = cls(*parse_arguments(description, *groups))
        # Trainer saves its arguments in training_args.bin of every checkpoint.
        args.hub.token, args.training.hub_token = args.training.hub_token, None
        return args

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def branch(self) -> str:
        """Branch of the Hub repository that the checkpoint is pushed to."""
        return self.training.hub_revision or "main"

    @property
    def push_token(self) -> str | None:
        """Token for pushing; `None` for that of HF_TOKEN or `hf auth login`."""
        return self.hub.token or self.model.token

    @property
    def retrains(self) -> bool:
        return self.retraining.retrain_epochs > 0


@dataclass(frozen=True)
class Loaded:
    """A task and a model for it.

    Attributes:
        task, prepared: the data before and after preprocessing.
        model: the loaded model.
        input_shape: shape of one input, (1, S) or (1, 3, height, width), for which FLOPs are counted.
    """

    task: Task
    prepared: PreparedTask
    model: ToMePerceiverPreTrainedModel
    input_shape: tuple[int, ...]

    @property
    def has_new_head(self) -> bool:
        """Whether the checkpoint had no head for this task, so that the model has a randomly initialised one."""
        return getattr(self.model, "head_is_new", False)

    def check_head(self, model_args: ModelArguments) -> None:
        """Check that the model can be evaluated without training.

        Raises:
            BadInput: for a new head.
        """
        if self.has_new_head:
            raise BadInput(
                f"--model_name_or_path {model_args.model_name_or_path}: has no trained head for this task; "
                "use --do_train to finetune it first"
            )

    def save(self, folder: Path) -> None:
        """Save the model and its tokenizer or image processor, each whole or not at all."""
        save_whole(folder, self.model.save_pretrained)
        save_whole(folder, self.prepared.processing_class.save_pretrained)

    def card_fields(self, args: RunArguments) -> dict[str, Any]:
        """Return the fields that the cards of all checkpoints of a run share: data, labels and base model."""
        return {
            "model_id": str(args.output_dir),
            "source": self.task.source,
            "hub_task": self.task.hub_task,
            "base_model": args.model.model_name_or_path,
            "evaluated_on": len(self.prepared.evaluation.get("", ())),
            "labels": self.prepared.labels,
            "data_fields": data_fields(args.data),
        }

    @property
    def samples(self) -> Samples:
        """Unlabelled samples to calibrate on; training samples only if there are no others."""
        prepared, unseen = self.prepared, self.prepared.calibration is not None
        available = len(prepared.calibration if unseen else prepared.train)
        name = self.task.calibration_name if unseen else "training samples"
        return Samples(prepared.samples, available, name, unseen)


def load(
    load_task: Callable[[], Task],
    model_args: ModelArguments,
    training: TrainingArguments,
    merging_fields: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load the task, then the model for it.

    Args:
        load_task: loads the data; among several processes, the first one does so before the others.
        model_args: arguments of the model to load.
        training: training arguments; their seed determines all random numbers.
        merging_fields: config fields on merging that the command line sets.

    Raises:
        BadInput: for missing data or a missing model, or a model that does not fit the data.
    """
    quieten_transformers()
    set_seed(training.seed)
    with training.main_process_first(desc="loading the data"):
        task = load_task()
    for line in task.summary:
        say(line)
    model, prepared = load_model_and_task(model_args, dict(merging_fields or {}), task, training)
    if (first := task.first_input(prepared)) is not None:
        say(first)
    return Loaded(task, prepared, model, (1, *prepared.batch(INPUTS_FOR_SHAPE)[task.input_name].shape[1:]))
