# SPDX-License-Identifier: Apache-2.0
"""A calibration: fixed groups of latents for a checkpoint, evaluated beside it unmerged, and saved with its card."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainingArguments

from budget_tome_perceiver import Merging
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import forward_cost
from experiments.errors import Stopped
from experiments.files import save_whole
from experiments.measurement import describe_environment
from experiments.merging.arguments import apply_fields
from experiments.merging.latent_parameters import merge_latent_parameters
from experiments.merging.similarity import SIMILARITIES
from experiments.publishing.card import scores
from experiments.runs.calibration_arguments import CalibrationArguments
from experiments.runs.calibration_report import CalibrationResults
from experiments.runs.start import COUNTED_INPUTS, Loaded
from experiments.training.evaluation import changes, evaluate
from experiments.training.identity import (
    CONTENT,
    config_fingerprint,
    content,
    evaluation_fields,
    noted_arguments,
    weights_fingerprint,
)
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import CONFIG, START, claim
from experiments.training.stage import task_trainer
from groups_tome_perceiver import fixed_groups


@dataclass(kw_only=True)
class Calibration:
    """A calibration with all that it needs.

    Attributes:
        model_args, data, groups, training: what the command line says.
        loaded: the checkpoint, and its samples.

    Raises:
        BadInput: for groups that the model cannot have.
    """

    model_args: ModelArguments
    data: Any
    groups: CalibrationArguments
    training: TrainingArguments
    loaded: Loaded

    def __post_init__(self) -> None:
        self.output_dir = Path(self.training.output_dir)
        prepared, task, self.model = self.loaded.prepared, self.loaded.task, self.loaded.model
        batch = next(iter(prepared.unlabelled(prepared.train, COUNTED_INPUTS)))
        self.input_shape = (1, *batch[task.input_name].shape[1:])
        self.left_after = self.groups.left_after(self.model.config, self.input_shape, type(self.model).__name__)
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Find the groups, evaluate, and save.

        Raises:
            BadInput: if another experiment is in the folder.
            Stopped: if similarities are not finite.
        """
        arguments = self._claim()
        merge_groups = self._merge_groups()
        Merging.none(self.model.config).apply(self.model.config)
        unmerged, stages = copy.deepcopy(self.model.config), {}
        stages["unmerged"] = self._measured("unmerged")
        if self.groups.at_start:
            merge_latent_parameters(self.model, merge_groups[0] or [])
        else:
            apply_fields(self.model.config, {"merge_groups": merge_groups})
        stages["calibrated"] = self._measured("calibrated")
        if self.training.should_save:
            self._save(arguments, unmerged, stages)

    def _claim(self) -> dict[str, Any]:
        arguments = noted_arguments(self.model_args, self.data, self.groups) | evaluation_fields(self.training)
        arguments |= {"seed": self.training.seed}
        start = {START: weights_fingerprint(self.model), CONFIG: config_fingerprint(self.model.config)}
        noted = arguments | {CONTENT: start | content(self.loaded.task, self.loaded.prepared, train=True)}
        claim(self.output_dir, noted, longer=False, write=self.training.should_save)
        return arguments

    def _merge_groups(self) -> list[list[int] | None]:
        start, prepared = time.perf_counter(), self.loaded.prepared
        batches = prepared.unlabelled(prepared.train, self.training.per_device_eval_batch_size)
        bar = tqdm(batches, desc="calibrating", unit="batch")
        try:
            similarity = SIMILARITIES[self.groups.similarity]
            return fixed_groups(self.model.to(self.training.device), bar, self.left_after, similarity)
        except FloatingPointError as error:
            raise Stopped(str(error)) from error
        finally:
            self.seconds["calibrating"] = time.perf_counter() - start

    def _measured(self, stage: str) -> tuple[int, dict[str, float]]:
        """FLOPs, and with `--do_eval` the figures."""
        flops = forward_cost(self.model.config, self.input_shape, type(self.model).__name__).total_with_matching
        if not self.training.do_eval:
            return flops, {}
        start, prepared = time.perf_counter(), self.loaded.prepared
        evaluation = evaluate(task_trainer(self.model, prepared, self.training, self.output_dir), prepared, stage)
        self.seconds[f"evaluating {stage}"] = time.perf_counter() - start
        metrics = scores(evaluation.metrics, stage)
        if stage == "unmerged":
            self.before = evaluation.predictions
            return flops, metrics
        return flops, metrics | changes(prepared.kind, evaluation, self.before)

    def _save(
        self, arguments: dict[str, Any], unmerged: ToMePerceiverConfig, stages: dict[str, tuple[int, dict[str, float]]]
    ) -> None:
        (most, before), (flops, after) = stages["unmerged"], stages["calibrated"]
        results = CalibrationResults(
            arguments=arguments,
            environment=describe_environment(),
            source=self.loaded.task.source,
            calibrated_on=len(self.loaded.prepared.train),
            evaluated_on=len(self.loaded.prepared.evaluation[""]) if self.training.do_eval else 0,
            input_shape=self.input_shape,
            latents_left=self.left_after,
            gflops=flops / 1e9,
            flops_ratio=flops / most,
            unmerged=before,
            calibrated=after,
            seconds=self.seconds,
        )
        save_whole(self.output_dir, self.model.save_pretrained)
        save_whole(self.output_dir, self.loaded.prepared.processing_class.save_pretrained)
        results.save(self.output_dir)
        base_model = str(self.model_args.model_name_or_path)
        results.write_card(self.output_dir, self.model.config, unmerged, self.loaded.task, base_model)
        print(f"{results.summary()}\n\nCheckpoint, results and card: {self.output_dir}")
