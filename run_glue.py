# SPDX-License-Identifier: Apache-2.0
"""Finetune a Perceiver on text, merge its latents, evaluate, and retrain it with merging on.

A GLUE task with a finetuned checkpoint, without training: what merges is chosen on unlabelled training samples so that
a forward pass keeps to 0.6 of its FLOPs; it is evaluated unmerged and merged, and saved merged:

  python run_glue.py --model_name_or_path outputs/mrpc --task_name mrpc --flops_ratio 0.6 \\
      --do_eval --output_dir outputs/mrpc-06

Finetune a stock checkpoint unmerged (saved in OUTPUT_DIR/finetuned), merge and evaluate, retrain merged for 5 epochs:

  python run_glue.py --model_name_or_path deepmind/language-perceiver --task_name mrpc \\
      --flops_ratio 0.6 --do_train --do_eval --num_train_epochs 20 --retrain_epochs 5 \\
      --output_dir outputs/mrpc

As in the paper, with 8 latents merged in every layer: --r 8 in place of --flops_ratio 0.6.

Own sentences: --train_file, --validation_file, --test_file (csv, tsv, json, jsonl or parquet with a column "label"). A
small model from scratch: --config_name FILE.json and --tokenizer_name FOLDER in place of --model_name_or_path. All
arguments may stand in one file: python run_glue.py FILE.yaml (or .json). Killed or stopped: the same command with
--resume_from_checkpoint last. To the Hub: --push_to_hub, or later --push_only.
"""

from __future__ import annotations

from experiments.errors import exit_on_bad_input
from experiments.runs.finetune import finetune
from experiments.tasks.glue import GlueDataArguments, load_glue_task


def main() -> None:
    finetune(__doc__, GlueDataArguments, load_glue_task)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
