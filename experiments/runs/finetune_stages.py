# SPDX-License-Identifier: Apache-2.0
"""Stages of a run of run_glue.py, run_image.py or run_mlm.py, and the records of its output folders."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging, undisturbed
from experiments.errors import naming
from experiments.files import check_writable, save_whole
from experiments.merging.arguments import MergeArguments, naming_arguments
from experiments.publishing.card import ResultRow, shown_r
from experiments.runs.start import Loaded, RunArguments
from experiments.training.evaluation import Evaluation, evaluate
from experiments.training.fingerprints import config_fingerprint, weights_fingerprint
from experiments.training.output_folder import check_disk_space, claim_folder, claim_training, save_metrics
from experiments.training.progress import announce, say
from experiments.training.run_record import (
    CALIBRATION,
    CONFIG,
    INITIAL_CONFIG,
    INITIAL_WEIGHTS,
    PREDICTION,
    RESOLVED,
    WEIGHTS,
    RunRecord,
    content_fingerprints,
    evaluation_fields,
    recorded_arguments,
    training_fields,
    update_record,
)
from experiments.training.saved_files import rewriting_saved_file
from experiments.training.stage import task_trainer, train_and_save
from experiments.training.trainer import TaskTrainer
from frontier_tome_perceiver import FrontierRow, check_reach

logger = logging.getLogger(__name__)

# Data arguments that affect predictions but not training.
PREDICTION_ONLY = ("max_predict_samples",)


class Run:
    """A run: resolves the budget, trains and evaluates a loaded model, and collects the results.

    Args:
        args: command line arguments.
        loaded: the model and its task.
    """

    def __init__(self, args: RunArguments, loaded: Loaded) -> None:
        self.args, self.loaded = args, loaded
        self.training, self.retraining, self.merge_args = args.training, args.retraining, args.merge_args
        self.task, self.prepared, self.model = loaded.task, loaded.prepared, loaded.model
        self.output_dir, self.finetuned_dir = args.output_dir, args.output_dir / "finetuned"
        self.retrains, self.writes = args.retrains, self.training.should_save
        # Without training, the result is the loaded checkpoint, merged to a budget.
        self.saves_untrained = self.merge_args.has_budget and not self.training.do_train
        # --max_changed is a promise about the trained weights, so the merging is chosen after training.
        self.chooses_after_training = self.training.do_train and self.merge_args.max_changed is not None
        self.results: list[ResultRow] = []
        self.unmerged_evaluation: Evaluation | None = None
        self.choice: FrontierRow | None = None
        self.sample_count = 0
        self._resolved: dict[str, Any] = {}
        # Where each stage resumes, by its folder.
        self.resume_by_folder: dict[Path, str | None] = {}
        self._content = content_fingerprints(
            self.task, self.prepared, train=self.training.do_train, calibrates=self.merge_args.calibrates
        )
        self._content |= {INITIAL_WEIGHTS: weights_fingerprint(self.model)}
        # Make the records before a budget changes the config. Finetuning has its own record, because it depends neither
        # on the merging nor on the retraining.
        self.record = self._record(args.model, args.data, self.merge_args, self.retraining)
        self.finetuning_record = self._record(args.model, args.data)

    def _record(self, *groups: Any) -> RunRecord:
        arguments = recorded_arguments(*groups) | training_fields(self.training)
        merges = self.merge_args in groups
        # Training does not depend on the samples to predict; only a search depends on the calibration samples.
        left_out = (PREDICTION,) if merges else (PREDICTION, CALIBRATION)
        contents = {name: value for name, value in self._content.items() if name not in left_out}
        contents[INITIAL_CONFIG] = config_fingerprint(self.model.config, merging=merges)
        return RunRecord({name: value for name, value in arguments.items() if name not in PREDICTION_ONLY}, contents)

    def claim(self, write: bool) -> None:
        """Claim the output folder of each training stage, or of the evaluation, before anything else is written.

        Args:
            write: whether to write the run record, which is complete once the budget is resolved; otherwise only check.

        Raises:
            BadInput: if a folder holds another run, or an unfinished one without --resume_from_checkpoint.
        """
        args, training = self.args, self.training
        write = write and self.writes
        if self.saves_untrained:
            arguments = recorded_arguments(args.model, args.data, self.merge_args) | evaluation_fields(training)
            # The result's config is known once the budget is resolved.
            config = {CONFIG: config_fingerprint(self.model.config)} if self._resolved else {}
            record = RunRecord(arguments, {**self.record.content, **config}, self._resolved)
            claim_folder(self.output_dir, record, write)
            return
        if not training.do_train:
            # An evaluation depends on the model's weights and config, not on how these were trained.
            contents = {WEIGHTS: self._content[INITIAL_WEIGHTS], CONFIG: config_fingerprint(self.model.config)}
            read = (PREDICTION, *(("evaluation", "inputs") if self.prepared.evaluation else ()))
            contents |= {name: self._content[name] for name in read if name in self._content}
            arguments = {"model_name_or_path": args.model.model_name_or_path} | evaluation_fields(training)
            claim_folder(self.output_dir, RunRecord(arguments, contents), write)
            return
        stages = {self.finetuned_dir: self.finetuning_record} if self.retrains else {}
        stages[self.output_dir] = replace(self.record, notes=self._resolved)
        check_disk_space(self.output_dir, self.model, training, models=len(stages))
        for folder in stages:
            check_writable(f"--output_dir {self.output_dir}", folder)
        self.resume_by_folder = claim_training(stages, training.resume_from_checkpoint, write)

    def resolve_merging(self) -> None:
        """Choose the merging for a budget; if that must wait for finetuning, check that the budget is within reach."""
        model, merge_args, input_shape = self.model, self.merge_args, self.loaded.input_shape
        if not merge_args.has_budget:
            return
        model.to(self.training.device)
        if merge_args.calibrates:
            self.sample_count = merge_args.sample_count(model, self.loaded.samples, input_shape)
        if self.chooses_after_training:
            return
        if self.retrains and merge_args.calibrates and merge_args.flops_ratio is not None:
            with naming_arguments():
                check_reach(model, merge_args.flops_ratio, input_shape)
        elif self.retrains:
            with undisturbed(model):
                merge_args.without_samples.choose(model, self.loaded.samples, input_shape)
        else:
            self._resolve()

    def _resolve(self) -> None:
        """Choose the merging, or reuse this run's recorded choice: choosing again may differ, since times vary."""
        contents = {**self.record.content, INITIAL_WEIGHTS: weights_fingerprint(self.model)}
        inputs = RunRecord(recorded_arguments(self.merge_args), contents).flatten()
        earlier, config = RunRecord.read(self.output_dir).notes.get(RESOLVED) or {}, self.model.config
        if earlier.get("of") == inputs:
            self.choice = FrontierRow(**earlier["chosen"] | {"merging": Merging(**earlier["chosen"]["merging"])})
            self.choice.merging.apply(config)
            config.merge_frontier = earlier["frontier"]
        else:
            # A search looks for merging that changes outputs little; outputs of an untrained model mean nothing.
            new_head = self.loaded.has_new_head
            trained = self.retrains or self.args.model.model_name_or_path is not None and not new_head
            merge_args = self.merge_args if trained else self.merge_args.without_samples
            if merge_args is not self.merge_args:
                logger.warning(
                    "%s is untrained, so a search would be meaningless: using --schedule %s. Use --retrain_epochs N to "
                    "finetune unmerged, then search and retrain merged.",
                    "The head" if new_head else "The model",
                    merge_args.schedule,
                )
            self._choose(merge_args)
        assert self.choice is not None
        self._resolved = {RESOLVED: {"of": inputs, "chosen": asdict(self.choice), "frontier": config.merge_frontier}}

    def _choose(self, merge_args: MergeArguments) -> None:
        """Choose the merging for the budget; a search measures the frontier first."""
        announce(f"choosing the merging: {merge_args.budget_line}")
        self._calibrate(merge_args)
        choice = merge_args.choose(self.model, self.loaded.samples, self.loaded.input_shape)
        assert choice is not None
        self.choice = choice.chosen
        say(f"chosen: {self.chosen}")

    def _calibrate(self, merge_args: MergeArguments) -> None:
        """Measure the frontier of the current weights, if the budget needs one."""
        if merge_args.calibrates:
            say(f"calibrating on {self.samples}")
            merge_args.calibrate(self.model, self.loaded.samples, self.sample_count, self.loaded.input_shape)

    @property
    def chosen(self) -> str:
        """Description of the chosen merging."""
        assert self.choice is not None
        return self.choice.describe(self.model.unmerged.num_blocks)

    @property
    def samples(self) -> str:
        """Description of the samples that a search calibrates on."""
        return f"{self.sample_count:,} {self.loaded.samples.name}, without labels"

    def train(self) -> TaskTrainer:
        """Run the training stages, if any, and return a trainer with the model to evaluate."""
        arguments = self.training
        if self.retrains:
            self._finetune()
            arguments = self.retraining.training_arguments(self.training)
        trainer = task_trainer(
            self.model, self.prepared, arguments, self.output_dir, self.retraining.trainer_class, self.record
        )
        if self.retrains and (self.merge_args.merges or any(self.model.config.merge_schedule)):
            announce("evaluating the finetuned model, merged without retraining")
            self._evaluate(trainer, "merged", "merged without retraining")
        if self.training.do_train:
            how = "for every r" if self.retraining.elastic else "merged" if self.merges else "unmerged"
            announce(f"{'retraining' if self.retrains else 'training'}, {how}")
            train_and_save(trainer, self.resume_by_folder[self.output_dir])
            self._measure_frontier(trainer)
        return trainer

    def _finetune(self) -> None:
        """Finetune and evaluate the unmerged model, the first of two stages, then resolve the budget."""
        with Merging.of(self.model.config).by(0).applied(self.model.config):
            trainer = task_trainer(
                self.model, self.prepared, self.training, self.finetuned_dir, record=self.finetuning_record
            )
            announce("finetuning, unmerged")
            train_and_save(trainer, self.resume_by_folder[self.finetuned_dir])
            announce("evaluating the finetuned model, unmerged")
            self.unmerged_evaluation = self._evaluate(trainer, "eval", "finetuned")
        if self.merge_args.has_budget:
            self._resolve()
            if self.writes:
                update_record(self.output_dir, notes=self._resolved)

    def _measure_frontier(self, trainer: TaskTrainer) -> None:
        """Measure the frontier of the trained weights, choose from it for `--max_changed`, and save both."""
        # DeepSpeed's sharded weights can run only inside the trainer.
        if not self.merge_args.calibrates or trainer.is_deepspeed_enabled:
            return
        if self.chooses_after_training:
            self._choose(self.merge_args)
        else:
            announce("measuring the frontier of the trained weights")
            self._calibrate(self.merge_args)
        if self.writes:
            # If an earlier run did the training, the config in memory dates from before it, so update the saved one.
            with naming(f"--output_dir {self.output_dir}: {CONFIG_NAME}", Exception):
                saved = ToMePerceiverConfig.from_pretrained(self.output_dir)
            saved.merge_frontier = self.model.config.merge_frontier
            Merging.of(self.model.config).apply(saved)
            with rewriting_saved_file(self.output_dir, CONFIG_NAME):
                save_whole(self.output_dir, saved.save_pretrained)

    def evaluate(self, trainer: TaskTrainer) -> None:
        """Evaluate the result, and before it the unmerged model if the weights were not trained with merging."""
        name = "retrained" if self.retrains else "trained"
        name += " for every r" if self.retraining.elastic else ""
        if self.saves_untrained or self.chooses_after_training and not self.retrains:
            announce("evaluating, unmerged")
            with self.model.unmerged.applied(self.model.config):
                self.unmerged_evaluation = self._evaluate(trainer, "unmerged", "unmerged")
            name = "merged without training"
        announce(
            f"evaluating the {'retrained ' if self.retrains else ''}model, {'merged' if self.merges else 'unmerged'}"
        )
        self._evaluate(trainer, "eval", name)
        if self.saves_untrained and self.writes:
            self.loaded.save(self.output_dir)
            update_record(self.output_dir, {WEIGHTS: weights_fingerprint(self.model)})

    def _evaluate(self, trainer: TaskTrainer, prefix: str, name: str) -> Evaluation:
        """Evaluate, compare with the unmerged model if that was evaluated, and write the results.

        Args:
            trainer: holds the model.
            prefix: prefix of the result file's name and of the names in it.
            name: name of the row in the report and card.
        """
        unmerged = None if self.unmerged_evaluation is None else self.unmerged_evaluation.predictions
        evaluation = evaluate(trainer, self.prepared, prefix, unmerged)
        trainer.log_metrics(prefix, evaluation.flatten())
        if self.writes:
            save_metrics(Path(trainer.args.output_dir), prefix, evaluation.flatten())
        self.results.append(ResultRow(name, shown_r(self.model.config), evaluation.scores))
        return evaluation

    @property
    def merges(self) -> bool:
        """Whether the model currently merges anything."""
        return Merging.of(self.model.config).merges(self.model.unmerged.asked_of(self.model.config))
