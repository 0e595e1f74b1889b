# SPDX-License-Identifier: Apache-2.0
"""Train a Perceiver to find masked tokens again, merge its latents, evaluate, and retrain it with merging on.

A stock checkpoint, without training: what merges is chosen on unlabelled training samples so that a forward pass keeps
to 0.6 of its FLOPs; it is evaluated unmerged and merged, and saved merged:

  python run_mlm.py --model_name_or_path deepmind/language-perceiver --dataset_name Salesforce/wikitext \\
      --dataset_config_name wikitext-2-raw-v1 --flops_ratio 0.6 --do_eval --output_dir outputs/wikitext-06

A small model from scratch, on the sentences of several configurations of a dataset:

  python run_mlm.py --config_name examples/small_mlm_perceiver.json --tokenizer_name FOLDER \\
      --dataset_name nyu-mll/glue --dataset_config_name sst2,mrpc,rte,stsb --max_seq_length 48 \\
      --do_train --do_eval --output_dir outputs/mlm

A BERT's layers as the start of a Perceiver, and training towards a teacher's states: examples/language/from_bert.py and
examples/language/learn_from_teacher.py.

Each line or column of text is an input of its own, unless they are joined. Training masks anew each time; what is
masked in the evaluated sentences is always the same, so that models can be compared token by token. Own sentences:
--train_file and --validation_file. Everything else is as for run_glue.py.
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
