# SPDX-License-Identifier: Apache-2.0
"""Finetune a Perceiver on images, merge its latents, evaluate, and retrain it with merging on.

From a stock checkpoint, with 8 latents merged in every layer while it is finetuned:

  python run_image.py --model_name_or_path deepmind/vision-perceiver-conv --ignore_mismatched_sizes \\
      --dataset_name zalando-datasets/fashion_mnist --r 8 --do_train --do_eval --output_dir outputs/r8

As in the paper: finetune unmerged (saved in outputs/r8/finetuned), merge and evaluate, retrain merged for an epoch:

  python run_image.py ... --r 8 --do_train --do_eval --num_train_epochs 2 --retrain_epochs 1 --output_dir outputs/r8

A small model from scratch: --config_name FILE.json and --config_overrides num_latents=64,... in place of
--model_name_or_path. All arguments may stand in one file: python run_image.py FILE.json (or .yaml).
"""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments, set_seed

from experiments.bad_input import BadInput, exit_on_bad_input
from experiments.command_line import parse_arguments
from experiments.image_task import ImageDataArguments, load_image_task
from experiments.model_arguments import MergeArguments, ModelArguments, load_image_model, load_image_processor
from experiments.training import RetrainArguments, evaluate_and_save, image_trainer, train_and_save


def main() -> None:
    model_args, merge_args, data_args, retrain_args, training_args = parse_arguments(
        __doc__, ModelArguments, MergeArguments, ImageDataArguments, RetrainArguments, TrainingArguments
    )
    merging = merge_args.config_fields()
    retrain = retrain_args.retrain_epochs > 0
    if retrain and not (training_args.do_train and merging.get("r")):
        raise BadInput(f"--retrain_epochs {retrain_args.retrain_epochs}: allowed only with --do_train and --r above 0")

    set_seed(training_args.seed)
    task = load_image_task(data_args, training_args.seed, model_args.cache_dir)
    model = load_image_model(model_args, merging, task.labels)
    image_processor = load_image_processor(model_args, model.config)
    output_dir = Path(training_args.output_dir)

    if retrain:
        r, model.r = model.r, 0
        finetuning = image_trainer(model, task, image_processor, training_args, output_dir / "finetuned")
        train_and_save(finetuning, training_args.resume_from_checkpoint)
        evaluate_and_save(finetuning, "eval")
        model.r = r
        trainer = image_trainer(
            model, task, image_processor, retrain_args.training_arguments(training_args), output_dir
        )
        evaluate_and_save(trainer, "merged")
        train_and_save(trainer)
    else:
        trainer = image_trainer(model, task, image_processor, training_args, output_dir)
        if training_args.do_train:
            train_and_save(trainer, training_args.resume_from_checkpoint)
    if training_args.do_eval:
        evaluate_and_save(trainer, "eval")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
