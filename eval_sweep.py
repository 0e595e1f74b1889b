# SPDX-License-Identifier: Apache-2.0
"""Merge a finetuned Perceiver in several ways: accuracy, FLOPs, speed, and what retraining gives back.

  python eval_sweep.py --model_name_or_path outputs/mrpc/finetuned --task_name mrpc \\
      --r 0 2 4 6 8 10 12 14 16 --retrain_epochs 5 --learning_rate 2e-5 --output_dir outputs/mrpc_sweep
  python eval_sweep.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --flops_ratio 0.8 0.6 --schedule search floor --output_dir outputs/fashion_mnist_sweep

The data are those of run_glue.py for a text checkpoint, of run_mlm.py for a masked language model and of run_image.py
for an image checkpoint. Each r is an integer or a comma-separated list with one entry a layer; each --flops_ratio or
--latency_ratio is a share of the unmerged model's FLOPs or time, spread over the layers by each --schedule. "search",
the default, finds that, with the method, the metric or fixed groups of latents if no method is given, on unlabelled
training samples. For each the checkpoint is evaluated with merging on ("merged") and, with --retrain_epochs, again
after training with merging on from the same starting point ("retrained"; the checkpoints are kept in
OUTPUT_DIR/retrained; with --elastic it is one checkpoint for all of them). Time and memory are measured on the first
evaluated inputs, in alternating rounds. OUTPUT_DIR/sweep_results.json is written after every cell, and the same command
continues where it was stopped; at the end there are also sweep_results.csv, sweep.png, sweep_report.md, the unmerged
checkpoint and its model card. It ends with the best row in a sentence, and saves that checkpoint in OUTPUT_DIR/merged
if it is not a retrained one: the fastest row, or untimed the cheapest, whose metric is not lower by more than two
standard errors of the change.

--push_to_hub, or later --push_only, pushes them: the unmerged checkpoint with the whole table to the main branch, and
each retrained one to a branch of its own, so that from_pretrained(..., revision="r8") gets it.
"""

from __future__ import annotations

from experiments.errors import exit_on_bad_input
from experiments.runs.sweep import run_sweep


def main() -> None:
    run_sweep(__doc__)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
