# SPDX-License-Identifier: Apache-2.0
"""One run on a loaded model: its records, the folders it claims, its stages, and the report at its end."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from torch import inference_mode

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging, undisturbed
from experiments.files import check_writable, save_whole
from experiments.measurement import Quartiles, time_interleaved
from experiments.merging.arguments import MergeArguments, naming_arguments
from experiments.publishing.card import Card, Measured, WhatMerges, metric_name, shown_r
from experiments.publishing.tables import with_error
from experiments.runs.start import Loaded, RunArguments
from experiments.tasks.base import Batch
from experiments.training.evaluation import Evaluation, evaluate_and_save
from experiments.training.fingerprints import config_fingerprint, weights_fingerprint
from experiments.training.output_folder import check_disk_space, claim, claim_for_evaluation, save_metrics
from experiments.training.progress import announce, say
from experiments.training.run_record import (
    CALIBRATION,
    CONFIG,
    CONTINUED,
    PREDICTION,
    RESOLVED,
    START,
    START_CONFIG,
    WEIGHTS,
    RunRecord,
    content,
    data_fields,
    evaluation_fields,
    recorded_arguments,
    training_fields,
    update_record,
)
from experiments.training.stage import (
    check_begins,
    check_resume,
    resumes,
    stage_resume,
    task_trainer,
    train_and_save,
)
from experiments.training.trainer import TaskTrainer
from frontier_tome_perceiver import Frontier, FrontierRow, check_reach

logger = logging.getLogger(__name__)

# Figures of the chosen row of a frontier that are saved.
FIGURES = ("flops_ratio", "divergence", "changed", "changed_bound", "who")
# Inputs in the batch that the speed of a run's result is measured with, and rounds.
SPEED_INPUTS, ROUNDS = 8, 5
# Data arguments that decide predictions and no training.
ONLY_PREDICTED = ("max_predict_samples",)


def leaves_checkpoint(args: RunArguments) -> bool:
    """Whether a run saves a checkpoint: trained, or merged to a budget."""
    return args.training.do_train or args.merging.has_budget


class Run:
    """One run on a loaded model.

    Args:
        args: arguments of the command line.
        loaded: the model, and the data for it.
    """

    def __init__(self, args: RunArguments, loaded: Loaded) -> None:
        self.args, self.loaded = args, loaded
        self.training, self.retraining, self.merging = args.training, args.retraining, args.merging
        self.task, self.prepared, self.model = loaded.task, loaded.prepared, loaded.model
        self.output_dir, self.finetuned_dir = args.output_dir, args.output_dir / "finetuned"
        self.retrains, self.writes = args.retrains, self.training.should_save
        # The checkpoint, merged to a budget and not trained, is the result.
        self.saves_merged = self.merging.has_budget and not self.training.do_train
        # A share of changed answers is promised of the trained weights, so these decide what merges.
        self.chooses_last = self.training.do_train and self.merging.max_changed is not None
        self.measured: list[Measured] = []
        self.unmerged: Evaluation | None = None
        self.choice: FrontierRow | None = None
        self.sample_count = 0
        self._resolved: dict[str, Any] = {}
        self._content = content(
            self.task, self.prepared, train=self.training.do_train, calibrates=self.merging.searches
        )
        self._content |= {START: weights_fingerprint(self.model)}
        # Before a budget changes the config. Finetuning in a stage of its own merges nothing.
        self._start_config, self._unmerged_start_config = (
            config_fingerprint(self.model.config, merging=merging) for merging in (True, False)
        )

    @cached_property
    def finetuning_record(self) -> RunRecord:
        """Record of finetuning as the first of two stages: nothing that merges, and nothing of the second stage."""
        return self._record(self._unmerged_start_config, self.args.model, self.args.data)

    @cached_property
    def record(self) -> RunRecord:
        """Record of the whole run."""
        return self._record(self._start_config, self.args.model, self.args.data, self.merging, self.retraining)

    def _record(self, start_config: str, *groups: Any) -> RunRecord:
        arguments = recorded_arguments(*groups) | training_fields(self.training)
        # Predictions are of other data than training and its figures; only a search depends on what it calibrates on.
        left_out = (PREDICTION,) if self.merging in groups else (PREDICTION, CALIBRATION)
        contents = {name: value for name, value in self._content.items() if name not in left_out}
        kept = {name: value for name, value in arguments.items() if name not in ONLY_PREDICTED}
        return RunRecord(kept, contents | {START_CONFIG: start_config})

    def claim(self, write: bool) -> None:
        """Claim the folder of each stage, or of an evaluation, before anything is written.

        Args:
            write: whether to write the record, once a budget has been resolved; if not, only check.

        Raises:
            BadInput: if a folder holds another run, or a part of this one and nothing says what to do with it.
        """
        args, training, resume = self.args, self.training, self.training.resume_from_checkpoint
        write = write and self.writes
        if self.saves_merged:
            arguments = recorded_arguments(args.model, args.data, self.merging) | evaluation_fields(training)
            # Before a budget is resolved, the config is not yet that of the result.
            config = {CONFIG: config_fingerprint(self.model.config)} if self._resolved else {}
            record = RunRecord(arguments, {**self.record.content, **config}, self._resolved)
            claim(self.output_dir, record, longer=False, write=write)
            return
        if not training.do_train:
            # Of how the model was made, its weights and config are what is left.
            contents = {WEIGHTS: self._content[START], CONFIG: config_fingerprint(self.model.config)}
            read = (PREDICTION, *(("evaluation", "inputs") if self.prepared.evaluation else ()))
            contents |= {name: self._content[name] for name in read if name in self._content}
            arguments = {"model_name_or_path": args.model.model_name_or_path} | evaluation_fields(training)
            claim_for_evaluation(self.output_dir, RunRecord(arguments, contents), write)
            return
        stages = {self.finetuned_dir: self.finetuning_record} if self.retrains else {}
        stages[self.output_dir] = self.record
        check_disk_space(self.output_dir, self.model, training, models=len(stages))
        for folder, record in stages.items():
            check_writable(f"--output_dir {self.output_dir}", folder)
            # Retraining began from the result of finetuning, so it is not extended.
            longer = resumes(resume) and (folder == self.finetuned_dir or not self.retrains)
            notes = self._resolved if folder == self.output_dir else {}
            claim(folder, replace(record, notes=notes), longer=longer, write=write)
            check_resume(stage_resume(resume, folder, self.output_dir) if self.retrains else resume, record)
        check_begins(resume, *stages)

    def resolve_merging(self) -> None:
        """Choose what merges within a budget; before there is a finetuned model, check that the budget can be met."""
        model, merging, input_shape = self.model, self.merging, self.loaded.input_shape
        if not merging.has_budget:
            return
        model.to(self.training.device)
        if merging.searches:
            self.sample_count = merging.sample_count(model, self.loaded.samples, input_shape)
        if self.chooses_last:
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
        of = RunRecord(recorded_arguments(self.merging), contents).flatten()
        earlier, config = RunRecord.read(self.output_dir).notes.get(RESOLVED) or {}, self.model.config
        if earlier.get("of") == of:
            self.choice = FrontierRow(**earlier["chosen"] | {"merging": Merging(**earlier["chosen"]["merging"])})
            self.choice.merging.apply(config)
            config.merge_frontier = earlier["frontier"]
        else:
            # A model that has learned nothing has no outputs to keep.
            new_head = self.loaded.has_new_head
            trained = self.retrains or self.args.model.model_name_or_path is not None and not new_head
            merging = self.merging if trained else self.merging.without_samples
            if merging is not self.merging:
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
        say(f"chosen: {self._chosen}")

    def _calibrate(self, merging: MergeArguments) -> None:
        """Measure the frontier of the present weights, if anything is searched for."""
        if merging.searches:
            say(f"calibrating on {self._samples}")
            log_dir = self.output_dir if self.writes else None
            merging.calibrate(self.model, self.loaded.samples, self.sample_count, self.loaded.input_shape, log_dir)

    @property
    def _chosen(self) -> str:
        """The choice in words."""
        return "" if self.choice is None else self.choice.describe(self.model.unmerged.num_blocks)

    @property
    def _samples(self) -> str:
        return f"{self.sample_count:,} {self.loaded.samples.name}, without labels"

    def train(self) -> TaskTrainer:
        """Train as asked, if at all, and return the trainer with the model as it is to be evaluated."""
        arguments, resume = self.training, self.training.resume_from_checkpoint
        if self.retrains:
            self._finetune()
            arguments = self.retraining.training_arguments(self.training)
            resume = stage_resume(resume, self.output_dir, self.output_dir)
        trainer = task_trainer(
            self.model, self.prepared, arguments, self.output_dir, self.retraining.trainer_class, self.record
        )
        if self.retrains and (self.merging.merges or any(self.model.config.merge_schedule)):
            announce("evaluating the same, merged without retraining")
            self._evaluate(trainer, "merged", "merged without retraining")
        if self.training.do_train:
            how = ", for every r" if self.retraining.elastic else self._how
            announce(f"{'retraining' if self.retrains else 'training'}{how}")
            train_and_save(trainer, resume)
            self._measure_frontier(trainer)
        return trainer

    def _finetune(self) -> None:
        """Finetune and evaluate unmerged, the first of two stages, and then resolve the budget."""
        with Merging.of(self.model.config).by(0).applied(self.model.config):
            trainer = task_trainer(
                self.model, self.prepared, self.training, self.finetuned_dir, record=self.finetuning_record
            )
            announce("finetuning, unmerged")
            resume = self.training.resume_from_checkpoint
            train_and_save(trainer, stage_resume(resume, self.finetuned_dir, self.output_dir))
            announce("evaluating what was finetuned, unmerged")
            self.unmerged = self._evaluate(trainer, "eval", "finetuned")
        if self.merging.has_budget:
            self._resolve()
            if self.writes:
                update_record(self.output_dir, notes=self._resolved)

    def _measure_frontier(self, trainer: TaskTrainer) -> None:
        """Give the trained checkpoint a frontier of its own weights, from which `--max_changed` chooses."""
        # Sharded weights run by the trainer alone.
        if not self.merging.searches or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        if self.chooses_last:
            self._choose(self.merging)
        else:
            announce("measuring the frontier of the trained weights")
            self._calibrate(self.merging)
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
        if self.saves_merged or self.chooses_last and not self.retrains:
            announce("evaluating, unmerged")
            with self.model.unmerged.applied(self.model.config):
                self.unmerged = self._evaluate(trainer, "unmerged", "unmerged")
            name = "merged without training"
        announce(f"evaluating{' what was retrained' if self.retrains else ''}{self._how}")
        self._evaluate(trainer, "eval", name)
        if self.saves_merged and self.writes:
            save_whole(self.output_dir, self.model.save_pretrained)
            save_whole(self.output_dir, self.prepared.processing_class.save_pretrained)
            update_record(self.output_dir, {WEIGHTS: weights_fingerprint(self.model)})

    def _evaluate(self, trainer: TaskTrainer, split: str, name: str) -> Evaluation:
        """Evaluate, compare with the unmerged model if that was evaluated, and keep the scores for the report."""
        evaluation = evaluate_and_save(trainer, self.prepared, split, self.unmerged)
        self.measured.append(Measured(name, shown_r(self.model.config), evaluation.scores))
        return evaluation

    @property
    def _baseline(self) -> ToMePerceiverConfig:
        """Config of the unmerged model, with which the cost is compared."""
        return self.model.unmerged.asked_of(self.model.config)

    @property
    def _how(self) -> str:
        """Whether anything merges, to follow the name of a stage."""
        return ", merged" if Merging.of(self.model.config).merges(self._baseline) else ", unmerged"

    def report(self, is_first: bool) -> list[str]:
        """Write the card of a saved checkpoint, and return the last lines of the run: scores, cost, what merges, where.

        Args:
            is_first: whether this process writes; every process runs the model, of which each may hold a part.
        """
        speedup = batch_size = None
        if self.measured and Merging.of(self.model.config).merges(self._baseline):
            batch = self.prepared.batch(SPEED_INPUTS)
            speedup, batch_size = self._time(batch), len(next(iter(batch.values())))
        if leaves_checkpoint(self.args) and is_first:
            self._write_card(speedup, batch_size)
        if speedup is None:
            return []
        lines = []
        for row in self.measured:
            score = row.scores[self.task.main_metric]
            name = metric_name(self.task.main_metric)
            line = f"{row.name}: {name} {with_error(score.value, score.stderr, scale=100)}"
            if score.compared:
                change = with_error(score.change, score.change_stderr, "+.2f", scale=100)
                line += f", change, paired by example, {change}"
            lines.append(line)
        slower = "" if speedup.median >= 1 else "; slower than unmerged on this machine"
        cost = (
            f"cost: {self.model.flops_ratio(self.loaded.input_shape):.3f} of the FLOPs, {speedup.median:.2f} times as "
            f"fast as unmerged ({speedup.lower:.2f} to {speedup.upper:.2f}, batch {batch_size}){slower}"
        )
        return [*lines, cost, f"merges: {self._what_merges()}", *self._changes, f"saved: {self.output_dir}"]

    def _time(self, batch: Batch) -> Quartiles:
        """Time a batch merged and unmerged, in alternating rounds, and return the speed-up."""
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}

        def forward(merging: Merging) -> None:
            with merging.applied(self.model.config), inference_mode():
                self.model(**inputs)

        merged, unmerged = Merging.of(self.model.config), self.model.unmerged
        with undisturbed(self.model):
            (timing,) = time_interleaved(forward, [merged], unmerged, ROUNDS, desc="timing")
        return timing.speedup

    def _what_merges(self) -> str:
        config = self.model.config
        removed, start = sum(config.merge_schedule), config.latents_at_start
        layers = f"{removed} of {start} latents in layers, r = {config.merge_schedule}" if removed else "none in layers"
        if self.choice is not None:
            return f"{self._chosen}; {layers}"
        if config.latent_groups is not None:
            layers = f"learned latents in {start} fixed groups, then {layers}"
        method = "fixed groups" if config.merge_groups else f"{config.merge_method} {config.merge_metric}"
        return f"{layers}, {method}"

    @property
    def _changes(self) -> list[str]:
        """Whose answers change by the choice, on the weights that it was made for."""
        if self.choice is None:
            return []
        current = self.saves_merged or self.chooses_last
        when = "" if current else "before retraining, " if self.retrains else "before training, "
        return [f"{when}{line}" for line in self.choice.lines()]

    def _write_card(self, speedup: Quartiles | None, batch_size: int | None) -> None:
        """Write the card of the saved checkpoint, and record its config: an evaluation of the folder is compared."""
        update_record(self.output_dir, {CONFIG: config_fingerprint(self.model.config)})
        budget = self.merging.budget_line
        if self.choice is not None:
            searched = "" if self.choice.divergence is None else f", calibrated on {self._samples}"
            budget = "; ".join([f"{budget}{searched}: {self._chosen}", *self._changes])
            figures = {f"merging_{name}": value for name, value in asdict(self.choice).items() if name in FIGURES}
            save_metrics(self.output_dir, "merging", figures)
        Card(
            model_id=str(self.output_dir),
            source=self.task.source,
            hub_task=self.task.hub_task,
            base_model=self.args.model.model_name_or_path,
            merging=WhatMerges(
                self.model.config,
                self.loaded.input_shape,
                budget,
                start=self._baseline,
                speedup=speedup,
                batch_size=batch_size or 0,
            ),
            frontier=Frontier.of(self.model.config),
            measured=self.measured,
            evaluated_on=len(self.prepared.evaluation.get("", ())),
            steps=self._steps(),
            trained_on=len(self.prepared.train),
            labels=self.prepared.labels,
            data_fields=data_fields(self.args.data),
        ).write(self.output_dir)

    def _steps(self) -> dict[str, dict[str, Any]]:
        """Return the arguments of each training, by its name."""
        if not self.training.do_train:
            return {}
        trainings = {"Finetuning" if self.retrains else "Training": training_fields(self.training)}
        if self.retrains:
            trainings["Retraining"] = training_fields(self.retraining.training_arguments(self.training))
        extended = RunRecord.read(self.output_dir).notes.get(CONTINUED, {})
        trainings[list(trainings)[-1]] |= {
            "elastic": self.retraining.elastic or None,
            "distillation_weight": self.retraining.distillation_weight if self.retraining.elastic else None,
            **{f"{name} at first, then on from there": value for name, value in extended.items()},
        }
        return trainings
