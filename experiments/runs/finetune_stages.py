# SPDX-License-Identifier: Apache-2.0
"""One run on a loaded model: its records, the folders it claims, and its stages."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging, undisturbed
from experiments.files import check_writable, save_whole
from experiments.merging.arguments import MergeArguments, naming_arguments
from experiments.publishing.card import ResultRow, shown_r
from experiments.runs.start import Loaded, RunArguments
from experiments.training.evaluation import Evaluation, evaluate
from experiments.training.fingerprints import config_fingerprint, weights_fingerprint
from experiments.training.output_folder import check_disk_space, claim, claim_training, save_metrics
from experiments.training.progress import announce, say
from experiments.training.run_record import (
    CALIBRATION,
    CONFIG,
    PREDICTION,
    RESOLVED,
    START,
    START_CONFIG,
    WEIGHTS,
    RunRecord,
    content,
    evaluation_fields,
    recorded_arguments,
    training_fields,
    update_record,
)
from experiments.training.stage import task_trainer, train_and_save
from experiments.training.trainer import TaskTrainer
from frontier_tome_perceiver import FrontierRow, check_reach

logger = logging.getLogger(__name__)

# Data arguments that decide predictions and no training.
PREDICTION_ONLY = ("max_predict_samples",)


class Run:
    """One run on a loaded model.

    Args:
        args: arguments of the command line.
        loaded: the model, and the data for it.
    """

    def __init__(self, args: RunArguments, loaded: Loaded) -> None:
        self.args, self.loaded = args, loaded
        self.training, self.retraining, self.merge_args = args.training, args.retraining, args.merge_args
        self.task, self.prepared, self.model = loaded.task, loaded.prepared, loaded.model
        self.output_dir, self.finetuned_dir = args.output_dir, args.output_dir / "finetuned"
        self.retrains, self.writes = args.retrains, self.training.should_save
        # The checkpoint, merged to a budget and not trained, is the result.
        self.saves_untrained = self.merge_args.has_budget and not self.training.do_train
        # A share of changed answers is promised of the trained weights, so these decide what merges.
        self.chooses_after_training = self.training.do_train and self.merge_args.max_changed is not None
        self.measured: list[ResultRow] = []
        self.unmerged: Evaluation | None = None
        self.choice: FrontierRow | None = None
        self.sample_count = 0
        self._resolved: dict[str, Any] = {}
        # What each stage resumes from, by its folder.
        self.starts: dict[Path, str | None] = {}
        self._content = content(
            self.task, self.prepared, train=self.training.do_train, calibrates=self.merge_args.searches
        )
        self._content |= {START: weights_fingerprint(self.model)}
        # Before a budget changes the config: records of the run, and of finetuning as a stage of its own, which depends
        # on nothing that merges and nothing of the second stage.
        self.record = self._record(args.model, args.data, self.merge_args, self.retraining)
        self.finetuning_record = self._record(args.model, args.data)

    def _record(self, *groups: Any) -> RunRecord:
        arguments = recorded_arguments(*groups) | training_fields(self.training)
        merges = self.merge_args in groups
        # Predictions are of other data than training and its figures; only a search depends on what it calibrates on.
        left_out = (PREDICTION,) if merges else (PREDICTION, CALIBRATION)
        contents = {name: value for name, value in self._content.items() if name not in left_out}
        contents[START_CONFIG] = config_fingerprint(self.model.config, merging=merges)
        return RunRecord({name: value for name, value in arguments.items() if name not in PREDICTION_ONLY}, contents)

    def claim(self, write: bool) -> None:
        """Claim the folder of each stage, or of an evaluation, before anything is written.

        Args:
            write: whether to write the record, once a budget has been resolved; if not, only check.

        Raises:
            BadInput: if a folder holds another run, or a part of this one and nothing says what to do with it.
        """
        args, training = self.args, self.training
        write = write and self.writes
        if self.saves_untrained:
            arguments = recorded_arguments(args.model, args.data, self.merge_args) | evaluation_fields(training)
            # Before a budget is resolved, the config is not yet that of the result.
            config = {CONFIG: config_fingerprint(self.model.config)} if self._resolved else {}
            record = RunRecord(arguments, {**self.record.content, **config}, self._resolved)
            claim(self.output_dir, record, write)
            return
        if not training.do_train:
            # Of how the model was made, its weights and config are what is left.
            contents = {WEIGHTS: self._content[START], CONFIG: config_fingerprint(self.model.config)}
            read = (PREDICTION, *(("evaluation", "inputs") if self.prepared.evaluation else ()))
            contents |= {name: self._content[name] for name in read if name in self._content}
            arguments = {"model_name_or_path": args.model.model_name_or_path} | evaluation_fields(training)
            claim(self.output_dir, RunRecord(arguments, contents), write)
            return
        stages = {self.finetuned_dir: self.finetuning_record} if self.retrains else {}
        stages[self.output_dir] = replace(self.record, notes=self._resolved)
        check_disk_space(self.output_dir, self.model, training, models=len(stages))
        for folder in stages:
            check_writable(f"--output_dir {self.output_dir}", folder)
        self.starts = claim_training(stages, training.resume_from_checkpoint, write)

    def resolve_merging(self) -> None:
        """Choose what merges within a budget; before there is a finetuned model, check that the budget can be met."""
        model, merging, input_shape = self.model, self.merge_args, self.loaded.input_shape
        if not merging.has_budget:
            return
        model.to(self.training.device)
        if merging.searches:
            self.sample_count = merging.sample_count(model, self.loaded.samples, input_shape)
        if self.chooses_after_training:
            return
        if self.retrains and merging.searches and merging.flops_ratio is not None:
            with naming_arguments():
                check_reach(model, merging.flops_ratio, input_shape)
        elif self.retrains:
            with undisturbed(model):
                merging.without_samples.choose(model, self.loaded.samples, input_shape)
        else:
            self._resolve()

    def _resolve(self) -> None:
        """Choose what merges, or take an earlier choice of this run: time is not measured the same twice."""
        contents = {**self.record.content, START: weights_fingerprint(self.model)}
        of = RunRecord(recorded_arguments(self.merge_args), contents).flatten()
        earlier, config = RunRecord.read(self.output_dir).notes.get(RESOLVED) or {}, self.model.config
        if earlier.get("of") == of:
            self.choice = FrontierRow(**earlier["chosen"] | {"merging": Merging(**earlier["chosen"]["merging"])})
            self.choice.merging.apply(config)
            config.merge_frontier = earlier["frontier"]
        else:
            # A model that has learned nothing has no outputs to keep.
            new_head = self.loaded.has_new_head
            trained = self.retrains or self.args.model.model_name_or_path is not None and not new_head
            merging = self.merge_args if trained else self.merge_args.without_samples
            if merging is not self.merge_args:
                logger.warning(
                    "%s has learned nothing for a search to keep: it merges by schedule %s; --retrain_epochs N "
                    "finetunes it unmerged, then searches and trains on with merging",
                    "a new head" if new_head else "a model from scratch",
                    merging.schedule,
                )
            self._choose(merging)
        assert self.choice is not None
        self._resolved = {RESOLVED: {"of": of, "chosen": asdict(self.choice), "frontier": config.merge_frontier}}

    def _choose(self, merging: MergeArguments) -> None:
        """Choose what merges within the budget, from a frontier that is measured first if anything is searched for."""
        announce(f"choosing what merges: {merging.budget_line}")
        self._calibrate(merging)
        choice = merging.choose(self.model, self.loaded.samples, self.loaded.input_shape)
        assert choice is not None
        self.choice = choice.chosen
        say(f"chosen: {self.chosen}")

    def _calibrate(self, merging: MergeArguments) -> None:
        """Measure the frontier of the present weights, if anything is searched for."""
        if merging.searches:
            say(f"calibrating on {self.samples}")
            merging.calibrate(self.model, self.loaded.samples, self.sample_count, self.loaded.input_shape)

    @property
    def chosen(self) -> str:
        """What was chosen to merge, in words."""
        assert self.choice is not None
        return self.choice.describe(self.model.unmerged.num_blocks)

    @property
    def samples(self) -> str:
        """What a search calibrates on, in words."""
        return f"{self.sample_count:,} {self.loaded.samples.name}, without labels"

    def train(self) -> TaskTrainer:
        """Train as asked, if at all, and return the trainer with the model as it is to be evaluated."""
        arguments = self.training
        if self.retrains:
            self._finetune()
            arguments = self.retraining.training_arguments(self.training)
        trainer = task_trainer(
            self.model, self.prepared, arguments, self.output_dir, self.retraining.trainer_class, self.record
        )
        if self.retrains and (self.merge_args.merges or any(self.model.config.merge_schedule)):
            announce("evaluating the same, merged without retraining")
            self._evaluate(trainer, "merged", "merged without retraining")
        if self.training.do_train:
            how = "for every r" if self.retraining.elastic else "merged" if self.merges else "unmerged"
            announce(f"{'retraining' if self.retrains else 'training'}, {how}")
            train_and_save(trainer, self.starts[self.output_dir])
            self._measure_frontier(trainer)
        return trainer

    def _finetune(self) -> None:
        """Finetune and evaluate unmerged, the first of two stages, and then resolve the budget."""
        with Merging.of(self.model.config).by(0).applied(self.model.config):
            trainer = task_trainer(
                self.model, self.prepared, self.training, self.finetuned_dir, record=self.finetuning_record
            )
            announce("finetuning, unmerged")
            train_and_save(trainer, self.starts[self.finetuned_dir])
            announce("evaluating what was finetuned, unmerged")
            self.unmerged = self._evaluate(trainer, "eval", "finetuned")
        if self.merge_args.has_budget:
            self._resolve()
            if self.writes:
                update_record(self.output_dir, notes=self._resolved)

    def _measure_frontier(self, trainer: TaskTrainer) -> None:
        """Give the trained checkpoint a frontier of its own weights, from which `--max_changed` chooses."""
        # Sharded weights run by the trainer alone.
        if not self.merge_args.searches or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        if self.chooses_after_training:
            self._choose(self.merge_args)
        else:
            announce("measuring the frontier of the trained weights")
            self._calibrate(self.merge_args)
        if self.writes:
            # Weights that were loaded where training had ended leave the rest of the config as it began.
            saved = ToMePerceiverConfig.from_pretrained(self.output_dir)
            saved.merge_frontier = self.model.config.merge_frontier
            Merging.of(self.model.config).apply(saved)
            save_whole(self.output_dir, saved.save_pretrained)

    def evaluate(self, trainer: TaskTrainer) -> None:
        """Evaluate the result; where merging was chosen for weights that are not trained with it, unmerged too."""
        name = "retrained" if self.retrains else "trained"
        name += " for every r" if self.retraining.elastic else ""
        if self.saves_untrained or self.chooses_after_training and not self.retrains:
            announce("evaluating, unmerged")
            with self.model.unmerged.applied(self.model.config):
                self.unmerged = self._evaluate(trainer, "unmerged", "unmerged")
            name = "merged without training"
        announce(
            f"evaluating{' what was retrained' if self.retrains else ''}, {'merged' if self.merges else 'unmerged'}"
        )
        self._evaluate(trainer, "eval", name)
        if self.saves_untrained and self.writes:
            self.loaded.save(self.output_dir)
            update_record(self.output_dir, {WEIGHTS: weights_fingerprint(self.model)})

    def _evaluate(self, trainer: TaskTrainer, split: str, name: str) -> Evaluation:
        """Evaluate, compare with the unmerged model if that was evaluated, and write the results."""
        before = None if self.unmerged is None else self.unmerged.predictions
        evaluation = evaluate(trainer, self.prepared, split, before)
        trainer.log_metrics(split, evaluation.flatten())
        if self.writes:
            save_metrics(Path(trainer.args.output_dir), split, evaluation.flatten())
        self.measured.append(ResultRow(name, shown_r(self.model.config), evaluation.scores))
        return evaluation

    @property
    def merges(self) -> bool:
        """Whether anything merges at present."""
        return Merging.of(self.model.config).merges(self.model.unmerged.asked_of(self.model.config))
