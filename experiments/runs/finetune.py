# SPDX-License-Identifier: Apache-2.0
"""Steps of run_glue.py, run_image.py and run_mlm.py: finetune, merge, evaluate, retrain, predict and push."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from experiments.errors import BadInput
from experiments.merging.arguments import MergeArguments
from experiments.publishing.hub import open_to_push, push_checkpoint
from experiments.runs.finetune_report import leaves_checkpoint, report
from experiments.runs.finetune_stages import Run
from experiments.runs.start import RunArguments, load
from experiments.tasks.base import Task, hold_out
from experiments.tasks.glue import GlueDataArguments
from experiments.tasks.images import ImageDataArguments
from experiments.training.evaluation import predict_and_save
from experiments.training.loading import trained_classes
from experiments.training.output_folder import lock_folder
from experiments.training.progress import announce
from experiments.training.resume import check_resume, parse_resume
from experiments.training.stage import rehearse
from frontier_tome_perceiver import GROUPS
from merging_tome_perceiver import EXPERIMENT_ONLY_METHODS

logger = logging.getLogger(__name__)

COMMIT_MESSAGE = "Checkpoint with merged latents"


def finetune(description: str, data_arguments: type, load_task: Callable[..., Task]) -> None:
    """Run the command line's steps, and push only once everything is on disk.

    Args:
        description: first part of `--help`.
        data_arguments: dataclass of the data arguments.
        load_task: loads the task from these, such as `experiments.tasks.glue.load_glue_task`.

    Raises:
        BadInput: for arguments that cannot be fulfilled, before any long work.
        PushFailed: if the push fails; by then everything else is on disk.
    """
    args = RunArguments.parse(description, data_arguments, MergeArguments)
    if args.hub.push_only:
        repository = open_to_push(args.training, args.push_token)
        with lock_folder(args.output_dir):
            print(push_checkpoint(repository, args.output_dir, COMMIT_MESSAGE, args.branch))
        return
    _check(args)
    to_push = open_to_push(args.training, args.push_token) if args.training.push_to_hub else None
    with lock_folder(args.output_dir):
        _run(args, load_task)
        if to_push is not None and args.training.should_save:
            print(push_checkpoint(to_push, args.output_dir, COMMIT_MESSAGE, args.branch))


def _run(args: RunArguments, load_task: Callable[..., Task]) -> None:
    """Load, claim the output folder, train, evaluate, predict and report."""
    training, retraining = args.training, args.retraining
    loaded = load(partial(_read_task, args, load_task), args.model, training, args.merge_args.config_fields())
    if not training.do_train:
        loaded.check_head(args.model)
    _check_groups(args, has_learned=not loaded.has_new_head)
    rehearse(loaded.model, loaded.prepared, retraining.stages(training), retraining.trainer_class)
    run = Run(args, loaded)
    # Refuse another run's folder before the search, which takes minutes; write the record only after it.
    run.claim(write=False)
    run.resolve_merging()
    run.claim(write=True)
    trainer = run.train()
    if training.do_eval:
        run.evaluate(trainer)
    if training.do_predict:
        announce("predicting")
        predict_and_save(trainer, loaded.prepared, loaded.task.source.name)
    # Every process reports: each may hold a part of a sharded model.
    lines = report(run, is_first=trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()
    if lines and trainer.is_world_process_zero():
        print("\n" + "\n".join(lines))


def _read_task(args: RunArguments, load_task: Callable[..., Task]) -> Task:
    """Load the task, with unlabelled samples to calibrate on: the test split, or else held-out training samples."""
    training, merge_args = args.training, args.merge_args
    evaluate = training.do_eval or args.retrains or training.eval_strategy != "no"
    options: dict[str, Any] = args.model.dataset_options() | {"calibration_samples": merge_args.most_samples}
    if isinstance(args.data, (GlueDataArguments, ImageDataArguments)) and not training.do_train:
        # The checkpoint knows its classes, so the training split need not be read.
        options["classes"] = trained_classes(args.model)
    task = load_task(args.data, training.do_predict, training.seed, evaluate, **options)
    if task.calibration is None and merge_args.calibration_samples is not None and training.do_train:
        hold_out(task, merge_args.calibration_samples)
    return task


def _check(args: RunArguments) -> None:
    """Check combinations of arguments.

    Raises:
        BadInput: for a combination that cannot be fulfilled.
    """
    training, merge_args, retraining = args.training, args.merge_args, args.retraining
    if args.retrains and not (training.do_train and (merge_args.merges or retraining.elastic)):
        raise BadInput(
            f"--retrain_epochs {retraining.retrain_epochs}: needs --do_train, and --r above 0, a budget or --elastic"
        )
    _check_groups(args, has_learned=args.model.model_name_or_path is not None)
    if retraining.elastic and not training.do_train:
        raise BadInput("--elastic: needs --do_train")
    if not (training.do_train or training.do_eval or training.do_predict):
        raise BadInput("use at least one of --do_train, --do_eval, --do_predict")
    if merge_args.has_budget and not training.do_train and not training.do_eval:
        raise BadInput(
            "--flops_ratio, --latency_ratio, --max_changed: use --do_train or --do_eval, which save a checkpoint"
        )
    if training.push_to_hub and not leaves_checkpoint(args) and not (args.output_dir / "config.json").exists():
        raise BadInput(f"--push_to_hub: --output_dir {args.output_dir} holds no checkpoint; use --do_train to make one")
    if merge_args.merge_method in EXPERIMENT_ONLY_METHODS and leaves_checkpoint(args):
        limit = f"--merge_method {merge_args.merge_method}: is for experiments only; its checkpoint loads in this"
        if training.push_to_hub:
            raise BadInput(f"{limit} repository only, so do not use --push_to_hub")
        logger.warning("%s repository only", limit)
    check_resume(parse_resume(training.resume_from_checkpoint))


def _check_groups(args: RunArguments, has_learned: bool) -> None:
    """Refuse a search for fixed groups on untrained weights.

    Raises:
        BadInput: if the model has a new head or was not loaded from a checkpoint.
    """
    if args.merge_args.merge_method == GROUPS and not has_learned and not args.retrains:
        raise BadInput(
            f"--merge_method {GROUPS}: latents of an untrained model do not show which of them are similar; "
            "use --retrain_epochs, or a finetuned checkpoint as --model_name_or_path"
        )
