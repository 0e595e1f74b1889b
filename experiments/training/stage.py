# SPDX-License-Identifier: Apache-2.0
"""One training with transformers' Trainer: its arguments, its Trainer, a rehearsal, and its files."""

from __future__ import annotations

import copy
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_model
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.hf_argparser import HfArg

from experiments.errors import BadInput, naming
from experiments.files import save_whole
from experiments.tasks.base import PreparedTask
from experiments.tasks.scores import SCORES
from experiments.training.elastic import ElasticTrainer
from experiments.training.fingerprints import weights_fingerprint
from experiments.training.output_folder import save_metrics
from experiments.training.resume import TRAINED_FILE, remove_checkpoints, starting_point
from experiments.training.run_record import WEIGHTS, RunRecord, update_record
from experiments.training.trainer import TaskTrainer

logger = logging.getLogger(__name__)

# With fewer bytes free, a failed write is the fault of a full disk.
NOTHING_FREE = 1_000_000
# Largest number of epochs, learning rate and weight that is no typing error.
MOST = 1e6
WEIGHTS_FILE = "model.safetensors"


@dataclass
class RetrainArguments:
    """Training once more, with merging on."""

    _argument_group_name: ClassVar[str] = "retraining"

    retrain_epochs: float = HfArg(default=0.0, help="Epochs of training with merging on, after finetuning. 0: none.")
    retrain_learning_rate: float | None = HfArg(
        default=None, help="Learning rate of these epochs; by default --learning_rate."
    )
    elastic: bool = HfArg(
        default=False,
        help="One checkpoint for every r and budget: the last training, so retraining if there is any, draws the "
        "merging anew in every step, and teaches the merged model what the unmerged one says.",
    )
    distillation_weight: float = HfArg(
        default=1.0, help="With --elastic: of what it is taught, beside the loss of the task unmerged."
    )

    def __post_init__(self) -> None:
        for name in ("retrain_epochs", "retrain_learning_rate", "distillation_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST:
                raise BadInput(f"--{name} {value}: must be a number from 0 to {MOST:g}")

    def training_arguments(self, finetuning: TrainingArguments) -> TrainingArguments:
        """Return the arguments of finetuning with the epochs and the learning rate of retraining."""
        arguments = copy.deepcopy(finetuning)
        arguments.num_train_epochs = self.retrain_epochs
        arguments.max_steps = -1  # it takes precedence over epochs
        if self.retrain_learning_rate is not None:
            arguments.learning_rate = self.retrain_learning_rate
        return arguments

    def stages(self, finetuning: TrainingArguments) -> list[TrainingArguments]:
        """Return the arguments of finetuning, and of retraining if there is any."""
        return [finetuning, *([self.training_arguments(finetuning)] if self.retrain_epochs > 0 else [])]

    @property
    def trainer_class(self) -> Callable[..., TaskTrainer]:
        """Return the function that makes the Trainer of the last training."""
        return partial(ElasticTrainer, distillation_weight=self.distillation_weight) if self.elastic else TaskTrainer


def task_trainer(
    model: PreTrainedModel,
    task: PreparedTask,
    arguments: TrainingArguments,
    output_dir: Path,
    trainer_class: Callable[..., TaskTrainer] = TaskTrainer,
    record: RunRecord | None = None,
) -> TaskTrainer:
    """Make a Trainer for a task, which saves the tokenizer or image processor beside the model.

    Args:
        output_dir: used in place of that of the arguments.
        record: of the run; needed to train.

    Raises:
        BadInput: for a task with a trainer of its own and another one than the plain one.
    """
    if task.trainer_class is not None:
        if trainer_class is not TaskTrainer:
            raise BadInput("--elastic: this task is trained in its own way; train without --elastic")
        trainer_class = task.trainer_class
    arguments = copy.deepcopy(arguments)
    arguments.output_dir = str(output_dir)
    # The run pushes at its end, from disk.
    arguments.push_to_hub = False
    # Columns that the model does not name are inputs of `collate`.
    arguments.remove_unused_columns = False
    if arguments.torch_compile:
        # Layer by layer: Trainer would compile the whole model, so anew for each r and length of a batch.
        model.compile_repeated_blocks(backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)
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
        callbacks=[*task.callbacks, NameOfSharded()],
        record=record,
    )
    if trainer.is_fsdp_enabled:
        # accelerate shards the module of the input embeddings by itself; a Perceiver has none.
        model.get_input_embeddings = lambda: None
    return trainer


def rehearse(
    model: PreTrainedModel,
    task: PreparedTask,
    stages: Sequence[TrainingArguments],
    trainer_class: Callable[..., TaskTrainer] = TaskTrainer,
) -> None:
    """Make the Trainer, optimizer and scheduler of each stage before the first one begins, without training.

    This shows what `TrainingArguments` do not check: optimizers and trackers whose package is missing, values that an
    optimizer or a scheduler refuses, a metric that the task does not have.

    Raises:
        BadInput: for an argument that would stop a stage.
    """
    for arguments in stages:
        metric, metrics = arguments.metric_for_best_model, ["loss", *SCORES[task.kind]]
        chooses = arguments.load_best_model_at_end or arguments.save_strategy == "best"
        if chooses and metric is not None and metric.removeprefix("eval_") not in metrics:
            raise BadInput(f"--metric_for_best_model {metric}: choose from {', '.join(metrics)}")
        if arguments.label_smoothing_factor and model.config.problem_type == "regression":
            raise BadInput(
                f"--label_smoothing_factor {arguments.label_smoothing_factor}: must be 0 for regression, which has "
                "no classes"
            )
        with tempfile.TemporaryDirectory() as folder, naming("arguments of the training", Exception):
            trainer = task_trainer(model, task, arguments, Path(folder), trainer_class)
            if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:  # these make optimizers of their own
                trainer.create_optimizer_and_scheduler(num_training_steps=1)
            # Callbacks may hold files open there.
            trainer.callback_handler.callbacks.clear()


class NameOfSharded(TrainerCallback):
    """Restores the name of the model's class, which FSDP changes and checkpoints contain."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(model, FSDPModule):
            sharded = type(model)
            ours = next(base for base in sharded.__mro__[1:] if not issubclass(base, FSDPModule))
            sharded.__name__, sharded.__module__ = ours.__name__, ours.__module__


def check_sharding(untrained: str | None) -> None:
    """Check that no model is evaluated before FSDP shards it, which it does for training.

    Args:
        untrained: the argument that asks for such an evaluation, if any.

    Raises:
        BadInput: under FSDP, if there is one.
    """
    if untrained is not None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise BadInput(f"{untrained}: FSDP cannot evaluate a model before training; use examples/accelerate_ddp.yaml")


def train_and_save(trainer: TaskTrainer, resume: str | None) -> None:
    """Train, and write the checkpoint, `trainer_state.json` and then `train_results.json`.

    Args:
        trainer: with the model, and with a folder that is claimed for it.
        resume: from `claim_training`, or `LAST`. Where training has ended, the weights are loaded.

    Raises:
        Diverged: if the loss or the weights are not finite any more.
        BadInput: if the weights of an ended training have changed since.
    """
    folder, writes = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    # A frontier is of the weights that it was measured on.
    trainer.model.config.merge_frontier = None
    start = starting_point(resume, folder, trainer.args, trainer.record)
    if start == folder:
        _load_trained(trainer.model, folder)
        return
    trainer.accelerator.wait_for_everyone()
    if writes:
        (folder / TRAINED_FILE).unlink(missing_ok=True)
        update_record(folder, {WEIGHTS: None})
        if start is None:
            remove_checkpoints(folder)
    trainer.accelerator.wait_for_everyone()
    # An evaluation has prepared the model for evaluation alone. accelerate would take it as prepared for training, and
    # each of several processes would train a model of its own.
    trainer.model_wrapped = trainer.model
    trainer.model.__dict__.pop("_is_accelerate_prepared", None)
    try:
        result = trainer.train(resume_from_checkpoint=None if start is None else str(start))
        trainer.check_weights()
        if writes:
            save_whole(folder, lambda partial: trainer.save_model(str(partial)))
        else:
            trainer.save_model()  # each process has a part of sharded weights
        trainer.save_state()
    except RuntimeError as error:
        # On a full disk `torch.save` raises an "iostream error" that does not name it.
        if folder.exists() and shutil.disk_usage(folder).free < NOTHING_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    metrics = result.metrics | {"train_samples": len(trainer.train_dataset)}
    if start is not None:
        # Time and speed are those since then.
        metrics["train_resumed_from"] = start.name
    trainer.log_metrics("train", metrics)
    if writes:
        update_record(folder, {WEIGHTS: weights_fingerprint(folder / WEIGHTS_FILE)})
        save_metrics(folder, "train", metrics)
    trainer.accelerator.wait_for_everyone()


def _load_trained(model: PreTrainedModel, folder: Path) -> None:
    """Load the weights that an ended training left, if they are unchanged."""
    recorded = RunRecord.read(folder).content.get(WEIGHTS)
    with naming(f"--output_dir {folder}: {WEIGHTS_FILE}", Exception):
        if recorded not in (None, weights_fingerprint(folder / WEIGHTS_FILE)):
            raise ValueError("has changed since training; --resume_from_checkpoint false begins anew")
        load_model(model, folder / WEIGHTS_FILE)
