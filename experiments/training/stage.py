# SPDX-License-Identifier: Apache-2.0
"""Stages of training, finetuning and retraining: their arguments, Trainer, early checks and files."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_model
from transformers import PreTrainedModel, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import SAFE_WEIGHTS_NAME

from experiments.errors import BadInput, naming
from experiments.files import save_whole
from experiments.interruption import deferring
from experiments.tasks.base import PreparedTask
from experiments.tasks.scores import SCORES
from experiments.training.elastic import ElasticTrainer
from experiments.training.output_folder import lock_folder, save_metrics
from experiments.training.resume import (
    STATE_FILE,
    TRAINED_FILE,
    find_resume_folder,
    remove_checkpoints,
    remove_for_signal,
)
from experiments.training.run_record import WEIGHTS, RunRecord, update_record
from experiments.training.saved_files import check_saved_files, record_saved_files
from experiments.training.sharding import RestoreClassName, sharding_only_inside
from experiments.training.trainer import TaskTrainer

logger = logging.getLogger(__name__)

# Upper limit of arguments in this module; larger numbers are typing errors.
LARGEST_NUMBER = 1e6


@dataclass
class RetrainArguments:
    """Arguments of retraining, a second training with merging on, and of training for every r."""

    _argument_group_name: ClassVar[str] = "retraining"

    retrain_epochs: float = HfArg(
        default=0.0, help="Epochs of retraining with merging on, after finetuning; 0 for none."
    )
    retrain_learning_rate: float | None = HfArg(
        default=None, help="Learning rate of retraining (default: --learning_rate)."
    )
    elastic: bool = HfArg(
        default=False,
        help="Train one checkpoint for every r and budget: each step of the last training (retraining, if there is "
        "any) draws a merging at random, and the merged model learns the outputs of the unmerged one.",
    )
    distillation_weight: float = HfArg(
        default=1.0, help="With --elastic: weight of the distillation loss, added to the unmerged loss of the task."
    )

    def __post_init__(self) -> None:
        for name in ("retrain_epochs", "retrain_learning_rate", "distillation_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LARGEST_NUMBER:
                raise BadInput(f"--{name} {value}: must be a number from 0 to {LARGEST_NUMBER:g}")

    def training_arguments(self, finetuning: TrainingArguments) -> TrainingArguments:
        """Return the arguments of finetuning with the epochs and the learning rate of retraining."""
        arguments = copy.deepcopy(finetuning)
        arguments.num_train_epochs = self.retrain_epochs
        arguments.max_steps = -1  # max_steps would take precedence over epochs
        if self.retrain_learning_rate is not None:
            arguments.learning_rate = self.retrain_learning_rate
        return arguments

    def stages(self, finetuning: TrainingArguments) -> list[TrainingArguments]:
        """Return the arguments of finetuning, and of retraining if there is any."""
        return [finetuning, *([self.training_arguments(finetuning)] if self.retrain_epochs > 0 else [])]

    @property
    def trainer_class(self) -> Callable[..., TaskTrainer]:
        """Class of the Trainer for the last training, or a function that creates that Trainer."""
        return partial(ElasticTrainer, distillation_weight=self.distillation_weight) if self.elastic else TaskTrainer


def task_trainer(
    model: PreTrainedModel,
    task: PreparedTask,
    arguments: TrainingArguments,
    output_dir: Path,
    trainer_class: Callable[..., TaskTrainer] = TaskTrainer,
    record: RunRecord | None = None,
) -> TaskTrainer:
    """Return a Trainer for a task, which saves the tokenizer or image processor beside the model.

    Args:
        output_dir: folder to use instead of `arguments.output_dir`.
        record: record of the run; needed for training.

    Raises:
        BadInput: for `--elastic` with a task that has a Trainer of its own.
    """
    if task.trainer_class is not None:
        if trainer_class is not TaskTrainer:
            raise BadInput("--elastic: must be left out; this task has a Trainer of its own")
        trainer_class = task.trainer_class
    arguments = copy.deepcopy(arguments)
    arguments.output_dir = str(output_dir)
    # The run itself pushes at its end, from disk.
    arguments.push_to_hub = False
    # `collate` needs columns that are no arguments of the model.
    arguments.remove_unused_columns = False
    compile_options = None
    if arguments.torch_compile:
        # Compile layer by layer: Trainer would compile the whole model anew for each r and each input length.
        compile_options = {"backend": arguments.torch_compile_backend, "mode": arguments.torch_compile_mode}
        model.compile_repeated_blocks(**compile_options)
        arguments.torch_compile, arguments.torch_compile_backend, arguments.torch_compile_mode = False, None, None
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.evaluation.get(""),
        processing_class=task.processing_class,
        data_collator=task.collate,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.reduce_logits,
        callbacks=[*task.callbacks, RestoreClassName()],
        record=record,
    )
    trainer.compile_options = compile_options
    return trainer


def rehearse(
    model: PreTrainedModel,
    task: PreparedTask,
    stages: Sequence[TrainingArguments],
    trainer_class: Callable[..., TaskTrainer] = TaskTrainer,
) -> None:
    """Create the Trainer, optimizer and scheduler of each stage without training, to find errors early.

    This finds errors that `TrainingArguments` do not check: missing packages of optimizers and trackers, values that an
    optimizer or a scheduler refuses, and metrics that the task does not have.

    Raises:
        BadInput: for an argument that would stop a stage.
    """
    for arguments in stages:
        metric, metrics = arguments.metric_for_best_model, ["loss", *SCORES[task.kind]]
        keeps_best = arguments.load_best_model_at_end or arguments.save_strategy == "best"
        if keeps_best and metric is not None and metric.removeprefix("eval_") not in metrics:
            raise BadInput(f"--metric_for_best_model {metric}: choose from {', '.join(metrics)}")
        if arguments.label_smoothing_factor and model.config.problem_type == "regression":
            raise BadInput(
                f"--label_smoothing_factor {arguments.label_smoothing_factor}: must be 0 for regression, which has "
                "no classes"
            )
        with tempfile.TemporaryDirectory() as folder, naming("arguments of the training", Exception):
            trainer = task_trainer(model, task, arguments, Path(folder), trainer_class)
            if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # these create their own optimizers
                trainer.create_optimizer_and_scheduler(num_training_steps=1)
            # Callbacks may hold open files in the folder, which is about to be removed.
            trainer.callback_handler.callbacks.clear()


def train_and_save(trainer: TaskTrainer, resume: str | None) -> None:
    """Train, and write the checkpoint, `trainer_state.json` and, last, `train_results.json`.

    Args:
        trainer: Trainer whose output folder has been claimed.
        resume: value from `claim_training`, or `LAST`. If training has already ended, its weights are loaded instead.

    Raises:
        Diverged: if the loss or the weights are no longer finite.
        Interrupted: if a signal came; a checkpoint or, after the last step, the final model is saved first.
        BadInput: if the weights of a training that has ended were changed later, or another run trains in the folder.
    """
    folder, writes = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    # A frontier measured before training does not hold for the trained weights.
    trainer.model.config.merge_frontier = None
    resume_folder = find_resume_folder(resume, folder, trainer.args, trainer.record)
    # The lock keeps out a run whose output folder is this stage's folder.
    with lock_folder(folder):
        if resume_folder == folder:
            _load_trained(trainer.model, folder)
        else:
            with deferring():
                _train(trainer, resume_folder, folder, writes)
        if writes:
            remove_for_signal(folder, before=math.inf)


def _train(trainer: TaskTrainer, resume_folder: Path | None, folder: Path, writes: bool) -> None:
    trainer.accelerator.wait_for_everyone()
    if writes:
        (folder / TRAINED_FILE).unlink(missing_ok=True)
        update_record(folder, {WEIGHTS: None})
        if resume_folder is None:
            remove_checkpoints(folder)
    trainer.accelerator.wait_for_everyone()
    # An earlier evaluation marked the model as prepared, but only for evaluation. With that mark accelerate would not
    # prepare it for training, and each of several processes would train its own copy.
    trainer.model_wrapped = trainer.model
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)
    with sharding_only_inside(trainer):
        result = trainer.train(resume_from_checkpoint=None if resume_folder is None else str(resume_folder))
    trainer.check_weights()
    saved = {STATE_FILE}

    def save(partial: Path) -> None:
        trainer.save_model(str(partial))
        saved.update(path.name for path in partial.iterdir())

    if writes:
        save_whole(folder, save)
    else:
        trainer.save_model()  # every process takes part: DeepSpeed gathers sharded weights
    trainer.save_state()
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    if resume_folder is not None:
        # Time and speed in the metrics cover only the steps after this checkpoint.
        metrics["train_resumed_from"] = resume_folder.name
    trainer.log_metrics("train", metrics)
    if writes:
        record_saved_files(folder, saved)
        save_metrics(folder, "train", metrics)
    trainer.accelerator.wait_for_everyone()


def _load_trained(model: PreTrainedModel, folder: Path) -> None:
    """Load the weights of a training that has ended, after checking that its files are unchanged."""
    check_saved_files(folder)
    with naming(f"--output_dir {folder}: {SAFE_WEIGHTS_NAME}", Exception):
        load_model(model, folder / SAFE_WEIGHTS_NAME)
