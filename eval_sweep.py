# SPDX-License-Identifier: Apache-2.0
"""Merge a finetuned Perceiver with each of several r: accuracy, FLOPs, speed, and what retraining gives back.

  python eval_sweep.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --r 0 2 4 6 8 --retrain_epochs 1 --learning_rate 5e-4 --output_dir outputs/sweep

Each r is an integer or a comma-separated list with one entry a layer. For each of them the checkpoint is evaluated
with merging on ("merged") and, with --retrain_epochs, again after training with merging on from the same starting
point ("retrained"; the checkpoints are kept in OUTPUT_DIR/retrained). The speed is measured on random input in
alternating rounds. Written to OUTPUT_DIR after every cell: sweep_results.json; at the end also sweep_results.csv,
sweep.png and sweep_report.md. The same command continues where it was stopped.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from experiments.bad_input import BadInput, exit_on_bad_input
from experiments.command_line import parse_arguments
from experiments.image_task import ImageDataArguments, load_image_task
from experiments.measurement import describe_environment
from experiments.model_arguments import ModelArguments, load_image_model, load_image_processor
from experiments.report import write_report
from experiments.sweep import SweepArguments, SweepResults, fill_cells, plan_rows, time_rows
from experiments.training import RetrainArguments, image_trainer, train_and_save

# What a retrained cell depends on beside the model, the data and r: another value is another sweep.
TRAINING_FIELDS = (
    "seed", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_steps", "bf16", "fp16",
    "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip


def main() -> None:
    model_args, data_args, sweep_args, retrain_args, training_args = parse_arguments(
        __doc__, ModelArguments, ImageDataArguments, SweepArguments, RetrainArguments, TrainingArguments
    )
    if model_args.model_name_or_path is None:
        raise BadInput("--model_name_or_path: not given; allowed is a Hub id or a folder with a finetuned checkpoint")
    output_dir = Path(training_args.output_dir)

    set_seed(training_args.seed)
    task = load_image_task(data_args, training_args.seed, model_args.cache_dir)
    model = load_image_model(model_args, {}, task.labels)
    image_processor = load_image_processor(model_args, model.config)
    image_shape = task.processed(task.evaluation, image_processor)[0]["pixel_values"].shape
    results = SweepResults(
        arguments={
            **asdict(model_args) | asdict(data_args) | asdict(sweep_args) | asdict(retrain_args),
            **{name: getattr(training_args, name) for name in TRAINING_FIELDS},
        },
        environment=describe_environment(),
        dataset=task.name,
        evaluated_on=len(task.evaluation),
        metric="accuracy",
        rows=plan_rows(model, sweep_args, image_shape),
    )
    results.take_over(output_dir)

    def merged(r: str) -> Trainer:
        sweep_args.merge(model.config, r)
        return image_trainer(model, task, image_processor, training_args, output_dir)

    def retrained(r: str) -> Trainer:
        set_seed(training_args.seed)
        model = load_image_model(model_args, {}, task.labels)
        sweep_args.merge(model.config, r)
        arguments = retrain_args.training_arguments(training_args)
        folder = output_dir / "retrained" / f"r{r.replace(',', '_')}"
        trainer = image_trainer(model, task, image_processor, arguments, folder)
        train_and_save(trainer)
        return trainer

    fill_cells(results, "merged", merged, sweep_args.r, output_dir)
    time_rows(results, model, sweep_args, image_shape)
    results.save(output_dir)
    if retrain_args.retrain_epochs > 0:
        fill_cells(results, "retrained", retrained, sweep_args.r, output_dir)

    print(write_report(results, shlex.join(["python", *sys.argv]), output_dir))
    print(f"\nPicture: {output_dir / 'sweep.png'}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
