# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint with its merging to ONNX, OpenVINO or a compiled PyTorch package, and check the exported model.

  python export.py --model_name_or_path outputs/mrpc --task_name mrpc --format onnx --output_dir outputs/mrpc_onnx
  python export.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --format openvino --dtype bfloat16 --flops_ratio 0.5 --output_dir outputs/fashion_mnist_openvino
  python export.py --model_name_or_path outputs/mrpc --format pt2 --r 8 --output_dir outputs/mrpc_pt2

Text and image classifiers and masked language models can be exported, with any matching method or fixed groups. The
batch size and the length of a text stay open. Without --r and --flops_ratio, the model merges as its config says.

The data arguments are those of run_glue.py, run_mlm.py and run_image.py. The exported model is compared with PyTorch on
evaluation samples, at batch sizes 1, 3 and 8 and, for a text, two lengths, and so are the unmerged model and a model
with equal latents. Both are scored on the evaluation split and timed. Without data, the samples are random tokens or
pixels, nothing is scored, and the report says so.

OUTPUT_DIR, which must be new or empty, gets the exported model, config.json, the tokenizer or image processor,
README.md, and export_report.json with all figures. If the exported model does not agree with PyTorch, only the report
is written, and the exit code is 1. docs/export.md says how to load the model.
"""

from __future__ import annotations

from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.runs.checkpoint_task import SweepDataArguments
from experiments.runs.export import ExportArguments, run_export
from experiments.training.model_arguments import ModelArguments


def main() -> None:
    run_export(*parse_arguments(__doc__ or "", ModelArguments, SweepDataArguments, ExportArguments))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
