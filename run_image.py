# SPDX-License-Identifier: Apache-2.0
"""Finetune a Perceiver on images, merge its latents, evaluate, and retrain it with merging on.

A finetuned checkpoint, without training: what merges is chosen on unlabelled training samples so that a forward pass
keeps to 0.6 of its FLOPs; it is evaluated unmerged and merged, and saved merged:

  python run_image.py --model_name_or_path outputs/fashion \\
      --dataset_name zalando-datasets/fashion_mnist --flops_ratio 0.6 --do_eval --output_dir outputs/fashion-06

Finetune a stock checkpoint unmerged (saved in OUTPUT_DIR/finetuned), merge and evaluate, retrain merged for an epoch:

  python run_image.py --model_name_or_path deepmind/vision-perceiver-conv --ignore_mismatched_sizes \\
      --dataset_name zalando-datasets/fashion_mnist --flops_ratio 0.6 --do_train --do_eval \\
      --num_train_epochs 2 --retrain_epochs 1 --output_dir outputs/fashion

As in the paper, with 8 latents merged in every layer: --r 8 in place of --flops_ratio 0.6.

Own images: --train_dir, --validation_dir, --test_dir, each with one folder of images for each class. A small model from
scratch: --config_name FILE.json and --config_overrides num_latents=64,... in place of --model_name_or_path. All
arguments may stand in one file: python run_image.py FILE.yaml (or .json). Killed or stopped: the same command with
--resume_from_checkpoint last. To the Hub: --push_to_hub, or later --push_only.
"""

from __future__ import annotations

from experiments.errors import exit_on_bad_input
from experiments.runs.finetune import finetune
from experiments.tasks.images import ImageDataArguments, load_image_task


def main() -> None:
    finetune(__doc__, ImageDataArguments, load_image_task)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
