# SPDX-License-Identifier: Apache-2.0
"""Train a Perceiver to predict masked tokens, merge its latents, evaluate it, and retrain it with merging.

Merge a stock checkpoint to at most 0.6 of its FLOPs, without training. A search chooses the merging on unlabelled
samples; the checkpoint is evaluated unmerged and merged, and saved merged:

  python run_mlm.py --model_name_or_path deepmind/language-perceiver --dataset_name Salesforce/wikitext \\
      --dataset_config_name wikitext-2-raw-v1 --flops_ratio 0.6 --do_eval --output_dir outputs/wikitext-06

Train a small model from scratch, on the sentences of several configurations of a dataset:

  python run_mlm.py --config_name examples/small_mlm_perceiver.json --tokenizer_name FOLDER \\
      --dataset_name nyu-mll/glue --dataset_config_name sst2,mrpc,rte,stsb --max_seq_length 48 \\
      --do_train --do_eval --output_dir outputs/mlm

To initialise a Perceiver from BERT's layers: examples/language/from_bert.py; to train it on a teacher's hidden states:
examples/language/learn_from_teacher.py.

Each line or column of text is an input of its own, unless inputs are joined. Training masks tokens at random in every
epoch; evaluation always masks the same tokens, so that models can be compared token by token. Your own sentences: use
--train_file and --validation_file. Everything else is as in run_glue.py.
"""

from __future__ import annotations

from experiments.errors import exit_on_bad_input
from experiments.runs.finetune import finetune
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task


def main() -> None:
    finetune(__doc__, MlmDataArguments, load_mlm_task)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
