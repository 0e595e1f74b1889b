# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating a model on a task with transformers' Trainer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainingArguments

from experiments.bad_input import BadInput
from experiments.image_task import ImageTask, collate_images, image_metrics


@dataclass
class RetrainArguments:
    """Training once more, with merging on."""

    retrain_epochs: float = field(
        default=0.0, metadata={"help": "Epochs of training with merging on, after finetuning. 0: none."}
    )
    retrain_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of these epochs; by default --learning_rate."}
    )

    def training_arguments(self, finetuning: TrainingArguments) -> TrainingArguments:
        """Those of finetuning with the epochs and the learning rate of retraining."""
        arguments = copy.deepcopy(finetuning)
        arguments.num_train_epochs = self.retrain_epochs
        if self.retrain_learning_rate is not None:
            arguments.learning_rate = self.retrain_learning_rate
        return arguments

    def __post_init__(self) -> None:
        if self.retrain_epochs < 0:
            raise BadInput(f"--retrain_epochs {self.retrain_epochs}: allowed is a number of 0 or more")


def image_trainer(
    model: PreTrainedModel,
    task: ImageTask,
    image_processor: BaseImageProcessor,
    arguments: TrainingArguments,
    output_dir: Path,
) -> Trainer:
    """A Trainer for the task that writes to `output_dir` and saves the image processor beside the model."""
    arguments = copy.deepcopy(arguments)
    arguments.output_dir = str(output_dir)
    # The columns that the model does not name are what its pixel_values are made of.
    arguments.remove_unused_columns = False
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=task.processed(task.train, image_processor),
        eval_dataset=task.processed(task.evaluation, image_processor),
        processing_class=image_processor,
        data_collator=collate_images,
        compute_metrics=image_metrics,
    )


def train_and_save(trainer: Trainer, resume_from_checkpoint: str | None = None) -> None:
    """Train, and write the checkpoint, `train_results.json` and `trainer_state.json`."""
    result = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def evaluate_and_save(trainer: Trainer, split: str) -> dict[str, float]:
    """Evaluate on all of the evaluation images and write `SPLIT_results.json`, and `all_results.json`.

    Args:
        trainer: with the model to evaluate.
        split: what to call it: "eval" for the model that is saved, "finetuned" and "merged" on the way there.
    """
    metrics = trainer.evaluate(metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics
