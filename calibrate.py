# SPDX-License-Identifier: Apache-2.0
"""Make a finetuned Perceiver smaller and faster without training: fixed groups of latents, from unlabelled samples.

  python calibrate.py --model_name_or_path outputs/sst2/finetuned --task_name sst2 \\
      --num_groups 16 --do_eval --output_dir outputs/sst2_16
  python calibrate.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --flops_ratio 0.4 --merge_layer 1 --do_eval --output_dir outputs/fashion_mnist_04

Which latents say the same is read off --calibration_samples training samples, without their labels: the latents that
reach --merge_layer (counted from 0) are clustered by their mean similarity into --num_groups, or into as many as
--flops_ratio leaves room for. Several merges: --num_groups 32,8 --merge_layer 0,4. --merge_layer start merges the
learned latents themselves, into a smaller model that merges nothing. What comes out can be trained on, by run_glue.py,
run_image.py or run_mlm.py with --model_name_or_path OUTPUT_DIR --do_train; fixed groups stay. The data are those of
run_glue.py for a text checkpoint, of run_mlm.py for a masked language model and of run_image.py for an image
checkpoint.

OUTPUT_DIR gets the checkpoint with its groups in config.json, calibration_results.json and a model card; with --do_eval
both have the figures of the checkpoint unmerged and with its groups. To the Hub: --push_to_hub, or later --push_only.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from experiments.command_line import parse_arguments
from experiments.errors import exit_on_bad_input
from experiments.publishing.hub import push_checkpoint
from experiments.publishing.hub_arguments import HubArguments, check_push, open_to_push
from experiments.runs.calibrate import Calibration
from experiments.runs.calibration_arguments import CalibrationArguments
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import load
from experiments.training.model_arguments import ModelArguments
from experiments.training.stage import check_sharding, rehearse
from experiments.training.trainer_arguments import TrainerArguments

COMMIT_MESSAGE = "Checkpoint with fixed groups of latents"


def main() -> None:
    model_args, data, groups, hub, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, CalibrationArguments, HubArguments, TrainerArguments
    )
    output_dir, revision = Path(training.output_dir), training.hub_revision or "main"
    if hub.push_only:
        print(push_checkpoint(open_to_push(training, model_args.token), output_dir, COMMIT_MESSAGE, revision))
        return
    groups.check_given()
    check_sharding("--do_eval" if training.do_eval else None)
    repository = check_push(training, model_args.token)
    # The task draws so many training samples, and tokenizes no others.
    data.max_train_samples = min(groups.calibration_samples, data.max_train_samples or sys.maxsize)
    loaded = load(partial(load_sweep_task, data, model_args, training.seed), model_args, training)
    calibration = Calibration(model_args=model_args, data=data, groups=groups, training=training, loaded=loaded)
    rehearse(loaded.model, loaded.prepared, [training])
    calibration.run()
    if repository is not None and training.should_save:
        print(push_checkpoint(repository, output_dir, COMMIT_MESSAGE, revision))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
