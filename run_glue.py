# SPDX-License-Identifier: Apache-2.0
"""Finetune a Perceiver on text, merge its latents, evaluate it, and retrain it with merging.

Merge a finetuned checkpoint to at most 0.6 of its FLOPs, without training. A search chooses the merging on unlabelled
samples; the checkpoint is evaluated unmerged and merged, and saved merged:

  python run_glue.py --model_name_or_path outputs/mrpc --task_name mrpc --flops_ratio 0.6 \\
      --do_eval --output_dir outputs/mrpc-06

Finetune a stock checkpoint (saved in OUTPUT_DIR/finetuned), merge and evaluate it, then retrain it merged for 5 epochs:

  python run_glue.py --model_name_or_path deepmind/language-perceiver --task_name mrpc \\
      --flops_ratio 0.6 --do_train --do_eval --num_train_epochs 20 --retrain_epochs 5 \\
      --output_dir outputs/mrpc

To merge 8 latents in every layer, as in the paper: use --r 8 instead of --flops_ratio 0.6.

Your own sentences: use --train_file, --validation_file and --test_file (csv, tsv, json, jsonl or parquet, with a column
"label"). A small model from scratch: use --config_name FILE.json and --tokenizer_name FOLDER instead of
--model_name_or_path. Arguments from a file: python run_glue.py FILE.yaml (or .json). To resume a stopped run: repeat
the command with --resume_from_checkpoint last. To push to the Hub: use --push_to_hub, or later --push_only.
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
