# SPDX-License-Identifier: Apache-2.0
"""Finetune a Perceiver on images, merge its latents, evaluate, and retrain it with merging on.

From a stock checkpoint, with 8 latents merged in every layer while it is finetuned:

  python run_image.py --model_name_or_path deepmind/vision-perceiver-conv --ignore_mismatched_sizes \\
      --dataset_name zalando-datasets/fashion_mnist --r 8 --do_train --do_eval --output_dir outputs/r8

As in the paper: finetune unmerged (saved in OUTPUT_DIR/finetuned), merge and evaluate, retrain merged for an epoch:

  python run_image.py ... --r 8 --do_train --do_eval --num_train_epochs 2 --retrain_epochs 1 --output_dir outputs/r8

Own images: --train_dir, --validation_dir, --test_dir, each with one folder of images for each class. A small model from
scratch: --config_name FILE.json and --config_overrides num_latents=64,... in place of --model_name_or_path. All
arguments may stand in one file: python run_image.py FILE.yaml (or .json). Killed or stopped: the same command with
--resume_from_checkpoint last. To the Hub: --push_to_hub, or later --push_only.
"""

from __future__ import annotations

from experiments.bad_input import exit_on_bad_input
from experiments.command_line import TrainerArguments, parse_arguments
from experiments.experiment import Experiment, run_experiment
from experiments.hub_arguments import HubArguments
from experiments.image_task import ImageDataArguments, load_image_task
from experiments.model_arguments import MergeArguments, ModelArguments
from experiments.training import RetrainArguments


def main() -> None:
    model, merging, data, retraining, hub, training = parse_arguments(
        __doc__, ModelArguments, MergeArguments, ImageDataArguments, RetrainArguments, HubArguments, TrainerArguments
    )
    run_experiment(
        Experiment(model, merging, retraining, hub, training),
        data,
        lambda: load_image_task(data, training.do_predict, training.seed, **model.dataset_options()),
    )


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
