# SPDX-License-Identifier: Apache-2.0
"""Merge a finetuned Perceiver with each of several r: accuracy, FLOPs, speed, and what retraining gives back.

  python eval_sweep.py --model_name_or_path outputs/mrpc/finetuned --task_name mrpc \\
      --r 0 2 4 6 8 10 12 14 16 --retrain_epochs 5 --learning_rate 2e-5 --output_dir outputs/mrpc_sweep
  python eval_sweep.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --r 0 2 4 6 8 --retrain_epochs 1 --output_dir outputs/fashion_mnist_sweep

The data are those of run_glue.py for a text checkpoint, of run_mlm.py for a masked language model and of run_image.py
for an image checkpoint. Each r is an integer or a comma-separated list with one entry a layer; each --flops_ratio or
--latency_ratio is a share of the unmerged model's FLOPs or time, spread over the layers by a --schedule ("search" finds
one). For each of them the checkpoint is evaluated with merging on ("merged") and, with --retrain_epochs, again after
training with merging on from the same starting point ("retrained"; the checkpoints are kept in OUTPUT_DIR/retrained;
with --elastic it is one checkpoint for all of them). Time and memory are measured on the first evaluated inputs, in
alternating rounds. OUTPUT_DIR/sweep_results.json is written after every cell, and the same command continues where it
was stopped; at the end there are also sweep_results.csv, sweep.png, sweep_report.md, the unmerged checkpoint and its
model card.

--push_to_hub, or later --push_only, pushes them: the unmerged checkpoint with the whole table to the main branch, and
each retrained one to a branch of its own, so that from_pretrained(..., revision="r8") gets it.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from transformers import set_seed

from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.measurement import describe_environment
from experiments.publishing.hub_arguments import HubArguments, check_push, open_to_push
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.sweep import SweepResults, plan_rows
from experiments.runs.sweep_arguments import SweepArguments, unmerged
from experiments.runs.sweep_run import SweepRun, push_sweep
from experiments.training.identity import (
    config_fingerprint,
    content,
    noted_arguments,
    training_fields,
    weights_fingerprint,
)
from experiments.training.loading import load_model_and_task
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import CONFIG, START, check_disk_space
from experiments.training.stage import RetrainArguments, check_sharding, rehearse
from experiments.training.trainer_arguments import TrainerArguments


def main() -> None:
    model_args, data, sweep_args, retraining, hub, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, SweepArguments, RetrainArguments, HubArguments, TrainerArguments
    )
    output_dir = Path(training.output_dir)
    if hub.push_only:
        push_sweep(open_to_push(training, model_args.token), output_dir, training.hub_revision or "main")
        return
    check_sharding("--r")
    retraining.check_elastic(None if retraining.retrain_epochs > 0 else "--retrain_epochs")
    repository = check_push(training, model_args.token)

    set_seed(training.seed)
    with training.main_process_first(desc="loading the data"):
        task = load_sweep_task(data, model_args, training.seed)
    model, prepared = load_model_and_task(model_args, {}, task, training)
    retrains = retraining.retrain_epochs > 0
    stages = [training, retraining.training_arguments(training)] if retrains else [training]
    rehearse(model, prepared, stages, retraining.trainer_class)
    batch = prepared.batch(sweep_args.timing_batch_size)
    input_shape, baseline = (1, *batch[task.input_name].shape[1:]), unmerged(model.config)
    results = SweepResults(
        arguments=noted_arguments(model_args, data, sweep_args, retraining) | training_fields(training),
        content={START: weights_fingerprint(model), CONFIG: config_fingerprint(model.config)}
        | content(task, prepared, train=retrains or sweep_args.searches),
        environment=describe_environment(),
        source=task.source,
        evaluated_on=len(prepared.evaluation[""]),
        input_shape=input_shape,
        metric=task.main_metric,
    )
    continued = results.take_over(output_dir)
    if not continued:
        start = time.perf_counter()
        log_dir = output_dir if training.should_save else None
        samples = partial(prepared.samples, batch_size=sweep_args.timing_batch_size)
        variants = sweep_args.variants(model.to(training.device), samples, input_shape, log_dir)
        results.rows = plan_rows(model, variants, baseline, input_shape)
        results.spend("resolving budgets", start)
    retrained = 1 if retraining.elastic else len(results.rows)
    models = 1 + (retrained if retrains else 0)
    check_disk_space(output_dir, model, training, models)

    run = SweepRun(
        model_args, sweep_args, retraining, training, task, prepared, results.variants, baseline, results, continued
    )
    run.measure(model, batch)
    if retrains:
        run.retrain()
    run.write(model)
    if repository is not None and training.should_save:
        push_sweep(repository, output_dir, training.hub_revision or "main")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
