# SPDX-License-Identifier: Apache-2.0
"""Finetune a Perceiver on images, merge its latents, evaluate it, and retrain it with merging.

Merge a finetuned checkpoint to at most 0.6 of its FLOPs, without training. A search chooses the merging on unlabelled
samples; the checkpoint is evaluated unmerged and merged, and saved merged:

  python run_image.py --model_name_or_path outputs/fashion \\
      --dataset_name zalando-datasets/fashion_mnist --flops_ratio 0.6 --do_eval --output_dir outputs/fashion-06

Finetune a stock checkpoint (saved in OUTPUT_DIR/finetuned), merge and evaluate it, then retrain it merged for an epoch:

  python run_image.py --model_name_or_path deepmind/vision-perceiver-conv --ignore_mismatched_sizes \\
      --dataset_name zalando-datasets/fashion_mnist --flops_ratio 0.6 --do_train --do_eval \\
      --num_train_epochs 2 --retrain_epochs 1 --output_dir outputs/fashion

To merge 8 latents in every layer, as in the paper: use --r 8 instead of --flops_ratio 0.6.

Your own images: use --train_dir, --validation_dir and --test_dir, each with a folder of images for each class. A small
model from scratch: use --config_name FILE.json and --config_overrides num_latents=64,... instead of
--model_name_or_path. Arguments from a file: python run_image.py FILE.yaml (or .json). To resume a stopped run: repeat
the command with --resume_from_checkpoint last. To push to the Hub: use --push_to_hub, or later --push_only.
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
