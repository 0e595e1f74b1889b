# SPDX-License-Identifier: Apache-2.0
"""Make a finetuned Perceiver smaller and faster without training: fixed groups of latents, from unlabelled samples.

  python calibrate.py --model_name_or_path outputs/sst2/finetuned --task_name sst2 \\
      --num_groups 16 --do_eval --output_dir outputs/sst2_16
  python calibrate.py --model_name_or_path outputs/fashion_mnist --dataset_name zalando-datasets/fashion_mnist \\
      --flops_ratio 0.4 --merge_layer 1 --do_eval --output_dir outputs/fashion_mnist_04

Which latents say the same is read off --calibration_samples training samples, without their labels: the latents that
reach --merge_layer (counted from 0) are clustered by their mean similarity into --num_groups, or into as many as
--flops_ratio leaves room for. Several merges: --num_groups 32,8 --merge_layer 0,4. --merge_layer start merges the
learned latents themselves, into a smaller model that merges nothing. What comes out can be trained on, by run_glue.py
and run_image.py with --model_name_or_path OUTPUT_DIR --do_train; fixed groups stay. The data are those of run_glue.py
for a text checkpoint and of run_image.py for an image checkpoint.

OUTPUT_DIR gets the checkpoint with its groups in config.json, calibration_results.json and a model card; with --do_eval
both have the figures of the checkpoint unmerged and with its groups. To the Hub: --push_to_hub, or later --push_only.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

from tqdm import tqdm
from transformers import set_seed

from budget_tome_perceiver import Merging
from cost_tome_perceiver import forward_cost
from experiments.command_line import parse_arguments
from experiments.errors import Stopped, exit_on_bad_input
from experiments.files import save_whole
from experiments.measurement import describe_environment
from experiments.merging.arguments import apply_fields
from experiments.merging.latent_parameters import merge_latent_parameters
from experiments.merging.similarity import SIMILARITIES
from experiments.publishing.card import scores
from experiments.publishing.hub import push_checkpoint
from experiments.publishing.hub_arguments import HubArguments, check_push, open_to_push
from experiments.runs.calibration_arguments import CalibrationArguments
from experiments.runs.calibration_report import CalibrationResults
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.finetune_stages import COUNTED_INPUTS
from experiments.training.identity import (
    CONTENT,
    config_fingerprint,
    content,
    evaluation_fields,
    noted_arguments,
    weights_fingerprint,
)
from experiments.training.loading import load_model_and_task
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import CONFIG, START, claim
from experiments.training.stage import changes, check_sharding, evaluate, rehearse, task_trainer
from experiments.training.trainer_arguments import TrainerArguments
from groups_tome_perceiver import fixed_groups

COMMIT_MESSAGE = "Checkpoint with fixed groups of latents"


def main() -> None:
    model_args, data, calibration, hub, training = parse_arguments(
        __doc__, ModelArguments, SweepDataArguments, CalibrationArguments, HubArguments, TrainerArguments
    )
    output_dir, revision = Path(training.output_dir), training.hub_revision or "main"
    if hub.push_only:
        print(push_checkpoint(open_to_push(training, model_args.token), output_dir, COMMIT_MESSAGE, revision))
        return
    calibration.check_given()
    check_sharding("--do_eval" if training.do_eval else None)
    repository = check_push(training, model_args.token)

    set_seed(training.seed)
    # The task draws so many training samples, and tokenizes no others.
    data.max_train_samples = min(calibration.calibration_samples, data.max_train_samples or sys.maxsize)
    with training.main_process_first(desc="loading the data"):
        task = load_sweep_task(data, model_args, training.seed)
    model, prepared = load_model_and_task(model_args, {}, task, training)
    batch = next(iter(prepared.unlabelled(prepared.train, COUNTED_INPUTS)))
    input_shape, architecture = (1, *batch[task.input_name].shape[1:]), type(model).__name__
    left_after = calibration.left_after(model.config, input_shape, architecture)
    rehearse(model, prepared, [training])
    arguments = noted_arguments(model_args, data, calibration) | evaluation_fields(training) | {"seed": training.seed}
    start = {START: weights_fingerprint(model), CONFIG: config_fingerprint(model.config)}
    noted = arguments | {CONTENT: start | content(task, prepared, train=True)}
    claim(output_dir, noted, longer=False, write=training.should_save)

    start = time.perf_counter()
    batches = prepared.unlabelled(prepared.train, training.per_device_eval_batch_size)
    bar = tqdm(batches, desc="calibrating", unit="batch")
    try:
        similarity = SIMILARITIES[calibration.similarity]
        merge_groups = fixed_groups(model.to(training.device), bar, left_after, similarity)
    except FloatingPointError as error:
        raise Stopped(str(error)) from error
    seconds = {"calibrating": time.perf_counter() - start}

    Merging.none(model.config).apply(model.config)
    unmerged = copy.deepcopy(model.config)
    flops, evaluations, metrics = {}, {}, {}
    trainer = task_trainer(model, prepared, training, output_dir)
    for stage in ("unmerged", "calibrated"):
        if stage == "calibrated" and calibration.at_start:
            merge_latent_parameters(model, merge_groups[0])
        elif stage == "calibrated":
            apply_fields(model.config, {"merge_groups": merge_groups})
        flops[stage] = forward_cost(model.config, input_shape, architecture).total_with_matching
        if training.do_eval:
            start = time.perf_counter()
            evaluations[stage] = evaluate(trainer, prepared, stage)
            metrics[stage] = scores(evaluations[stage].metrics, stage)
            seconds[f"evaluating {stage}"] = time.perf_counter() - start
    if training.do_eval:
        metrics["calibrated"] |= changes(prepared.kind, evaluations["calibrated"], evaluations["unmerged"].predictions)
    if not training.should_save:
        return
    results = CalibrationResults(
        arguments=arguments,
        environment=describe_environment(),
        source=task.source,
        calibrated_on=len(prepared.train),
        evaluated_on=len(prepared.evaluation[""]) if training.do_eval else 0,
        input_shape=input_shape,
        latents_left=left_after,
        gflops=flops["calibrated"] / 1e9,
        flops_ratio=flops["calibrated"] / flops["unmerged"],
        seconds=seconds,
        **metrics,
    )
    save_whole(output_dir, model.save_pretrained)
    save_whole(output_dir, prepared.processing_class.save_pretrained)
    results.save(output_dir)
    results.write_card(output_dir, model.config, unmerged, task, model_args.model_name_or_path)
    print(f"{results.summary()}\n\nCheckpoint, results and card: {output_dir}")
    if repository is not None:
        print(push_checkpoint(repository, output_dir, COMMIT_MESSAGE, revision))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
