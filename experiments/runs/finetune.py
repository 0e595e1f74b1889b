# SPDX-License-Identifier: Apache-2.0
"""The paper's experiment on one task: finetune, merge, evaluate, retrain with merging on, predict, push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from experiments.command_line import parse_arguments
from experiments.errors import BadInput
from experiments.merging.arguments import MergeArguments
from experiments.publishing.hub import HubArguments, open_to_push, push_checkpoint
from experiments.runs.finetune_stages import Run
from experiments.runs.start import load
from experiments.tasks.base import Task, hold_out
from experiments.tasks.glue import GlueDataArguments
from experiments.tasks.images import ImageDataArguments
from experiments.training.evaluation import predict_and_save
from experiments.training.loading import trained_classes
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import lock_folder
from experiments.training.progress import announce
from experiments.training.stage import RetrainArguments, check_resume, check_sharding, rehearse
from experiments.training.trainer_arguments import TrainerArguments
from frontier_tome_perceiver import GROUPS

COMMIT_MESSAGE = "Checkpoint with merged latents"


@dataclass
class Experiment:
    """What the command line says.

    Attributes:
        model, merging, data, retraining, hub, training: the arguments, by what they are about.
        load_task: reads the data that `data` means.
    """

    model: ModelArguments
    merging: MergeArguments
    data: Any
    retraining: RetrainArguments
    hub: HubArguments
    training: TrainingArguments
    load_task: Callable[..., Task]

    @property
    def leaves_checkpoint(self) -> bool:
        """Whether one comes out: trained, or merged to a budget."""
        return self.training.do_train or self.merging.has_budget

    @classmethod
    def from_command_line(cls, description: str, data_arguments: type, load_task: Callable[..., Task]) -> Experiment:
        """Parse the command line of a script.

        Args:
            description: what `--help` begins with.
            data_arguments: dataclass of the arguments that say which data.
            load_task: as `experiments.tasks.glue.load_glue_task`.

        Raises:
            BadInput: for values that cannot be meant.
        """
        groups = (ModelArguments, data_arguments, MergeArguments, TrainerArguments, RetrainArguments, HubArguments)
        model, data, merging, training, retraining, hub = parse_arguments(description, *groups)
        return cls(model, merging, data, retraining, hub, training, load_task)


def run_experiment(experiment: Experiment) -> None:
    """Do what the command line says, everything on disk first and the push last.

    Raises:
        BadInput: for what cannot be meant, before any long work.
        PushFailed: when all is done and on disk.
    """
    training = experiment.training
    output_dir, revision = Path(training.output_dir), training.hub_revision or "main"
    if experiment.hub.push_only:
        print(push_checkpoint(open_to_push(training, experiment.model.token), output_dir, COMMIT_MESSAGE, revision))
        return
    _check(experiment)
    repository = open_to_push(training, experiment.model.token) if training.push_to_hub else None
    with lock_folder(output_dir):
        _run(experiment)
        if repository is not None and training.should_save:
            print(push_checkpoint(repository, output_dir, COMMIT_MESSAGE, revision))


def _run(experiment: Experiment) -> None:
    """Load, claim the output folder, train, evaluate and predict."""
    training, retraining = experiment.training, experiment.retraining
    loaded = load(partial(_read_task, experiment), experiment.model, training, experiment.merging.config_fields())
    if not training.do_train:
        loaded.check_head(experiment.model)
    _check_groups(experiment, not loaded.has_new_head)
    rehearse(loaded.model, loaded.prepared, retraining.stages(training), retraining.trainer_class)
    run = Run(
        model_args=experiment.model,
        data=experiment.data,
        merging=experiment.merging,
        retraining=retraining,
        training=training,
        loaded=loaded,
    )
    # What another run left is refused before a search, which takes minutes; nothing is written before it.
    run.claim(write=False)
    run.resolve_merging()
    run.claim(write=True)
    trainer = run.train()
    if training.do_eval:
        run.evaluate(trainer)
    if training.do_predict:
        announce("predicting")
        predict_and_save(trainer, loaded.prepared, loaded.task.source.name)
    # In every process: each has a part of a sharded model.
    ending = run.end()
    if experiment.leaves_checkpoint and trainer.is_world_process_zero():
        run.write_card(ending)
    trainer.accelerator.wait_for_everyone()
    if ending is not None and trainer.is_world_process_zero():
        print(f"\n{ending}")


def _read_task(experiment: Experiment) -> Task:
    """Read the data, with samples to calibrate on that the model is not trained on, as far as there are any."""
    training, merging = experiment.training, experiment.merging
    evaluate = training.do_eval or experiment.retraining.retrain_epochs > 0 or training.eval_strategy != "no"
    options: dict[str, Any] = experiment.model.dataset_options() | {"calibration_samples": merging.most_samples}
    classifies = isinstance(experiment.data, (GlueDataArguments, ImageDataArguments))
    if classifies and not training.do_train:
        # No training split is needed then.
        options["classes"] = trained_classes(experiment.model)
    task = experiment.load_task(experiment.data, training.do_predict, training.seed, evaluate, **options)
    if task.calibration is None and merging.calibration_samples is not None and training.do_train:
        hold_out(task, merging.calibration_samples)
    return task


def _check(experiment: Experiment) -> None:
    """Check what the arguments of several groups say together.

    Raises:
        BadInput: for what they cannot mean.
    """
    training, retraining, output_dir = experiment.training, experiment.retraining, Path(experiment.training.output_dir)
    retrain = retraining.retrain_epochs > 0
    if retrain and not (training.do_train and (experiment.merging.merges or retraining.elastic)):
        raise BadInput(
            f"--retrain_epochs {retraining.retrain_epochs}: allowed only with --do_train, and with --r above 0, "
            "a budget or --elastic"
        )
    _check_groups(experiment, experiment.model.model_name_or_path is not None)
    retraining.check_elastic(None if training.do_train else "--do_train")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise BadInput("--do_train, --do_eval, --do_predict: none is given; allowed is one of them or more")
    if experiment.merging.has_budget and not training.do_train and not training.do_eval:
        raise BadInput(
            "--flops_ratio, --latency_ratio, --max_changed: use --do_train or --do_eval, which save a checkpoint"
        )
    if training.push_to_hub and not experiment.leaves_checkpoint and not (output_dir / "config.json").exists():
        raise BadInput(
            f"--push_to_hub: --output_dir {output_dir} holds no checkpoint, and without --do_train none comes"
        )
    untrained = "--retrain_epochs" if retrain else None if training.do_train else "--do_eval"
    if experiment.merging.max_changed is not None:
        untrained = "--max_changed"
    check_sharding(untrained)
    check_resume(training.resume_from_checkpoint)


def _check_groups(experiment: Experiment, has_learned: bool) -> None:
    """Check that fixed groups are found in a model that has learned something.

    Raises:
        BadInput: if not.
    """
    if experiment.merging.merge_method == GROUPS and not has_learned and experiment.retraining.retrain_epochs == 0:
        raise BadInput(
            f"--merge_method {GROUPS}: the latents of a model that has learned nothing do not show which are alike; "
            "use --retrain_epochs, or a finetuned checkpoint as --model_name_or_path"
        )
