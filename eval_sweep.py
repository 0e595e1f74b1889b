# SPDX-License-Identifier: Apache-2.0
"""Compare merging settings of a finetuned Perceiver: accuracy, FLOPs and speed, also after retraining.

  python eval_sweep.py --model_name_or_path outputs/mrpc/finetuned --task_name mrpc \\
      --r 0 2 4 6 8 10 12 14 16 --retrain_epochs 5 --learning_rate 2e-5 --output_dir outputs/mrpc_sweep
  python eval_sweep.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --flops_ratio 0.8 0.6 --schedule search floor --output_dir outputs/fashion_mnist_sweep

A text classifier takes the data arguments of run_glue.py, a masked language model those of run_mlm.py, and an image
classifier those of run_image.py.

Each setting is a row of the results: every --r (an integer, or a comma-separated list with one entry for each layer),
and every budget, such as --flops_ratio (a share of the unmerged model's FLOPs) or --latency_ratio (of its time), with
every --schedule, which spreads it over the layers. The default schedule, "search", also chooses the matching method and
similarity metric, or fixed groups of latents, on unlabelled samples.

Every row is evaluated with the checkpoint's weights ("merged") and, with --retrain_epochs, after retraining these with
merging ("retrained", saved in OUTPUT_DIR/retrained; with --elastic, one retrained checkpoint serves all rows). Time and
memory are measured on the first evaluated inputs, in rounds that alternate between the rows.

OUTPUT_DIR/sweep_results.json is updated after every evaluation, and the same command resumes a stopped sweep. At the
end, OUTPUT_DIR also holds sweep_results.csv, sweep.png, sweep_report.md, and the unmerged checkpoint with its card. The
last lines name the best row: the fastest (without timing, the one with the fewest FLOPs) whose score is at most two
standard errors of the change lower than unmerged. Its checkpoint is saved in OUTPUT_DIR/merged, unless it is a
retrained one.

--push_to_hub, or later --push_only, pushes the unmerged checkpoint with all results to the main branch, and each
retrained one to its own branch, which from_pretrained(..., revision="r8") loads.
"""

from __future__ import annotations

from experiments.errors import exit_on_bad_input
from experiments.runs.sweep import run_sweep


def main() -> None:
    run_sweep(__doc__)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
