# SPDX-License-Identifier: Apache-2.0
"""The paper's experiment on one task: finetune, merge, evaluate, retrain with merging on, predict, push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from experiments.bad_input import BadInput
from experiments.command_line import TrainerArguments, parse_arguments
from experiments.elastic import merging_by
from experiments.hub_arguments import HubArguments, check_push, open_to_push
from experiments.hub_push import push_addressed
from experiments.model_arguments import MergeArguments, ModelArguments
from experiments.model_card import measured_in, write_checkpoint_card
from experiments.model_loading import load_model_and_task
from experiments.output_folder import check_disk_space, claim, training_fields
from experiments.schedule import DEFAULT_SCHEDULE
from experiments.schedule_search import SEARCH, undisturbed
from experiments.task import PreparedTask, Task
from experiments.training import (
    RetrainArguments,
    check_resume,
    check_sharding,
    evaluate_and_save,
    predict_and_save,
    resumes,
    stage_resume,
    task_trainer,
    train_and_save,
)
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

# Arguments that change where things are read and not what comes out.
NOT_NOTED = ("token", "cache_dir", "overwrite_cache")
FINETUNED = "finetuned"
COMMIT_MESSAGE = "Checkpoint with merged latents"
# FLOPs are for an input as long as the longest of so many evaluated ones.
COUNTED_INPUTS = 32


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

    @classmethod
    def from_command_line(cls, description: str, data_arguments: type, load_task: Callable[..., Task]) -> Experiment:
        """Parse the command line of a script.

        Args:
            description: what `--help` begins with.
            data_arguments: dataclass of the arguments that say which data.
            load_task: as `experiments.glue_task.load_glue_task`.

        Raises:
            BadInput: for values that cannot be meant.
        """
        groups = (ModelArguments, MergeArguments, data_arguments, RetrainArguments, HubArguments, TrainerArguments)
        model, merging, data, retraining, hub, training = parse_arguments(description, *groups)
        return cls(model, merging, data, retraining, hub, training, load_task)


def noted_arguments(*groups: Any) -> dict[str, Any]:
    """Dataclasses of arguments as one mapping, without those that say only where things are read."""
    return {name: value for group in groups for name, value in asdict(group).items() if name not in NOT_NOTED}


def run_experiment(experiment: Experiment) -> None:
    """Do what the command line says, everything on disk first and the push last.

    Raises:
        BadInput: for what cannot be meant, before any long work.
        PushFailed: when all is done and on disk.
    """
    training, retraining = experiment.training, experiment.retraining
    output_dir, revision = Path(training.output_dir), training.hub_revision or "main"
    if experiment.hub.push_only:
        print(push_addressed(open_to_push(training, experiment.model.token), output_dir, COMMIT_MESSAGE, revision))
        return
    merging = experiment.merging.config_fields()
    retrain = retraining.retrain_epochs > 0
    if retrain and not (training.do_train and (experiment.merging.merges or retraining.elastic)):
        raise BadInput(
            f"--retrain_epochs {retraining.retrain_epochs}: allowed only with --do_train, and with --r above 0, "
            "--flops_ratio or --elastic"
        )
    retraining.check_elastic(None if training.do_train else "--do_train")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise BadInput("--do_train, --do_eval, --do_predict: none is given; allowed is one of them or more")
    if training.push_to_hub and not training.do_train and not (output_dir / "config.json").exists():
        raise BadInput(
            f"--push_to_hub: --output_dir {output_dir} holds no checkpoint, and without --do_train none comes"
        )
    untrained = "--retrain_epochs" if retrain else None if training.do_train else "--do_eval"
    check_sharding(untrained)
    check_resume(training.resume_from_checkpoint)
    if experiment.merging.searches and experiment.model.model_name_or_path is None and not retrain:
        raise BadInput(
            f"--schedule {SEARCH}: allowed for a trained --model_name_or_path, or with --retrain_epochs, since a model "
            "from scratch has no outputs to keep"
        )
    repository = check_push(training, experiment.model.token)

    set_seed(training.seed)
    with training.main_process_first(desc="loading the data"):
        task = experiment.load_task(
            experiment.data, training.do_predict, training.seed, **experiment.model.dataset_options()
        )
    model, prepared = load_model_and_task(experiment.model, merging, task, training)
    input_shape = (1, *prepared.batch(COUNTED_INPUTS)[task.input_name].shape[1:])
    log_dir = output_dir if training.should_save else None
    if retrain:
        # Only whether the budget can be kept; it is resolved for good when finetuning, unmerged, has ended.
        with undisturbed(model):
            experiment.merging.apply_budget(model.to(training.device), prepared, input_shape, None, DEFAULT_SCHEDULE)
    else:
        experiment.merging.apply_budget(model.to(training.device), prepared, input_shape, log_dir)
    if training.do_train:
        arguments = noted_arguments(experiment.model, experiment.data, experiment.merging, retraining)
        check_disk_space(output_dir, model, training, models=2 if retrain else 1)
        claim(
            output_dir,
            arguments | training_fields(training),
            resume=resumes(training.resume_from_checkpoint),
            write=training.should_save,
        )

    trainer = _train(experiment, model, prepared, input_shape, output_dir)
    if training.do_eval:
        evaluate_and_save(trainer, prepared, "eval")
    if training.do_predict:
        predict_and_save(trainer, prepared, task.source.name)
    if trainer.is_world_process_zero():
        if training.do_train:
            _write_card(experiment, model, task, input_shape, len(prepared.evaluation[""]))
        if repository is not None:
            print(push_addressed(repository, output_dir, COMMIT_MESSAGE, revision))


def _write_card(
    experiment: Experiment,
    model: PreTrainedModel,
    task: Task,
    input_shape: tuple[int, ...],
    evaluated_on: int,
) -> None:
    output_dir = Path(experiment.training.output_dir)
    retrained = experiment.retraining.retrain_epochs > 0
    last = "retrained" if retrained else "trained"
    stages = [("eval", f"{last} for every r" if experiment.retraining.elastic else last, output_dir, model.r)]
    if retrained:
        stages = [
            ("eval", "finetuned", output_dir / FINETUNED, 0),
            ("merged", "merged without retraining", output_dir, model.r),
            *stages,
        ]
    write_checkpoint_card(
        output_dir,
        source=task.source,
        hub_task=task.hub_task,
        config=model.config,
        input_shape=input_shape,
        evaluated_on=evaluated_on,
        measured=[row for split, name, folder, r in stages for row in measured_in(folder, split, name, r)],
        training=training_fields(experiment.training) | asdict(experiment.retraining),
        base_model=experiment.model.model_name_or_path,
        model_id=str(output_dir),
    )


def _train(
    experiment: Experiment,
    model: ToMePerceiverPreTrainedModel,
    task: PreparedTask,
    input_shape: tuple[int, ...],
    output_dir: Path,
) -> Trainer:
    """Train as asked, if at all; the trainer has the model as it is to be evaluated."""
    training, retraining = experiment.training, experiment.retraining
    resume = training.resume_from_checkpoint
    if retraining.retrain_epochs == 0:
        trainer = task_trainer(model, task, training, output_dir, retraining.trainer_class)
        if training.do_train:
            train_and_save(trainer, resume)
        return trainer
    with merging_by(model.config, 0):
        finetuning = task_trainer(model, task, training, output_dir / FINETUNED)
        train_and_save(finetuning, stage_resume(resume, output_dir / FINETUNED, output_dir))
        evaluate_and_save(finetuning, task, "eval")
    experiment.merging.apply_budget(model, task, input_shape, output_dir if training.should_save else None)
    arguments = retraining.training_arguments(training)
    trainer = task_trainer(model, task, arguments, output_dir, retraining.trainer_class)
    if experiment.merging.merges or any(model.config.merge_schedule):
        evaluate_and_save(trainer, task, "merged")
    train_and_save(trainer, stage_resume(resume, output_dir, output_dir))
    return trainer
