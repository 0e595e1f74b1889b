# SPDX-License-Identifier: Apache-2.0
"""One experiment on a loaded model: what decides it, the folders it owns, its stages and its card."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging, undisturbed
from experiments.files import check_writable, save_whole
from experiments.merging.arguments import MergeArguments, naming_arguments
from experiments.publishing.card import Card, Measured, WhatMerges, measured_in, shown_r
from experiments.runs.ending import Ending, cost_and_speed
from experiments.runs.start import Loaded
from experiments.training.evaluation import Evaluation, evaluate_and_save
from experiments.training.fingerprints import config_fingerprint, weights_fingerprint
from experiments.training.model_arguments import ModelArguments
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
    RetrainArguments,
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

FINETUNED = "finetuned"
# What is recorded of the chosen row of a frontier.
FIGURES = ("flops_ratio", "divergence", "changed", "changed_bound", "who")
# How fast a run ends up is measured with so many.
SPEED_INPUTS = 8
# Of the data arguments, what decides predictions and no training.
ONLY_PREDICTED = ("max_predict_samples",)


@dataclass(kw_only=True)
class Run:
    """An experiment with what it works on.

    Attributes:
        model_args, data, merging, retraining, training: what the command line says.
        loaded: the model, and the data for it.
    """

    model_args: ModelArguments
    data: Any
    merging: MergeArguments
    retraining: RetrainArguments
    training: TrainingArguments
    loaded: Loaded

    def __post_init__(self) -> None:
        self.task, self.prepared, self.model = self.loaded.task, self.loaded.prepared, self.loaded.model
        self.input_shape = self.loaded.input_shape
        self.output_dir = Path(self.training.output_dir)
        self.finetuned_dir = self.output_dir / FINETUNED
        self.retrains = self.retraining.retrain_epochs > 0
        self.writes = self.training.should_save
        read = content(self.task, self.prepared, train=self.training.do_train, calibrates=self.merging.searches)
        # Predictions are of other data than training and its figures.
        self.predicted = {name: read.pop(name) for name in (PREDICTION,) if name in read}
        calibrated = {name: read.pop(name) for name in (CALIBRATION,) if name in read}
        self.read = read
        start = {START: weights_fingerprint(self.model)} | read
        self.unmerged: Evaluation | None = None
        self._resolved: dict[str, Any] = {}
        self.choice: FrontierRow | None = None
        # Before a budget changes the config. Finetuning in a stage of its own merges nothing.
        self.start, self.unmerged_start = (
            start | {START_CONFIG: config_fingerprint(self.model.config, merging=merging)} for merging in (True, False)
        )
        self.start |= calibrated

    @cached_property
    def finetuning(self) -> RunRecord:
        """Record of the first of two stages: nothing that merges, and nothing of the second."""
        return self._record(self.unmerged_start, self.model_args, self.data)

    @cached_property
    def whole(self) -> RunRecord:
        """Record of all results."""
        return self._record(self.start, self.model_args, self.data, self.merging, self.retraining)

    def _record(self, contents: dict[str, str], *groups: Any) -> RunRecord:
        recorded = recorded_arguments(*groups) | training_fields(self.training)
        return RunRecord({name: value for name, value in recorded.items() if name not in ONLY_PREDICTED}, contents)

    def claim(self, write: bool) -> None:
        """Claim the folder of each stage, or of an evaluation, before anything is written.

        Args:
            write: whether to note it, once a budget has been resolved; if not, only check that it can be claimed.

        Raises:
            BadInput: if another experiment is there, or a part of this one that nobody said what to do with.
        """
        training, resume = self.training, self.training.resume_from_checkpoint
        if self.saves_merged:
            arguments = recorded_arguments(self.model_args, self.data, self.merging) | evaluation_fields(training)
            # Before a budget is resolved, the config is not yet the one that comes out.
            config = {CONFIG: config_fingerprint(self.model.config)} if self._resolved else {}
            record = RunRecord(arguments, self.start | config, self._resolved)
            claim(self.output_dir, record, longer=False, write=write and self.writes)
            return
        if not training.do_train:
            contents = {WEIGHTS: self.start[START], CONFIG: config_fingerprint(self.model.config)} | self.predicted
            if self.prepared.evaluation:
                contents |= {name: self.read[name] for name in ("evaluation", "inputs")}
            # Of how the model was made, its weights and config are what is left.
            arguments = {"model_name_or_path": self.model_args.model_name_or_path} | evaluation_fields(training)
            claim_for_evaluation(self.output_dir, RunRecord(arguments, contents), write and self.writes)
            return
        stages = {self.finetuned_dir: self.finetuning} if self.retrains else {}
        stages[self.output_dir] = self.whole
        check_disk_space(self.output_dir, self.model, training, models=len(stages))
        for folder, record in stages.items():
            check_writable(f"--output_dir {self.output_dir}", folder)
            # What was retrained began from what finetuning left.
            longer = resumes(resume) and (folder == self.finetuned_dir or not self.retrains)
            resolved = self._resolved if folder == self.output_dir else {}
            claim(folder, replace(record, notes=resolved), longer=longer, write=write and self.writes)
            check_resume(stage_resume(resume, folder, self.output_dir) if self.retrains else resume, record)
        check_begins(resume, *stages)

    @property
    def saves_merged(self) -> bool:
        """Whether the checkpoint, merged to a budget and not trained, is what is to come out."""
        return self.merging.has_budget and not self.training.do_train

    @property
    def chooses_last(self) -> bool:
        """Whether the trained weights decide what merges: a share of changed answers is promised of them alone."""
        return self.training.do_train and self.merging.max_changed is not None

    def resolve_merging(self) -> None:
        """Turn a budget into what merges, or as long as there is no finetuned model, make sure that it can be kept."""
        if not self.merging.has_budget:
            return
        self.model.to(self.training.device)
        if self.merging.searches:
            self.sample_count = self.merging.sample_count(self.model, self.loaded.samples, self.input_shape)
        if self.chooses_last:
            return
        if self.retrains and self.merging.searches and self.merging.flops_ratio is not None:
            with naming_arguments():
                check_reach(self.model, self.merging.flops_ratio, self.input_shape)
        elif self.retrains:
            with undisturbed(self.model):
                self.merging.without_samples.choose(self.model, self.loaded.samples, self.input_shape)
        else:
            self._resolve()

    def _resolve(self) -> None:
        """Resolve a budget, or take over what it came to here before: time is not measured the same twice."""
        contents = self.start | {START: weights_fingerprint(self.model)}
        of = RunRecord(recorded_arguments(self.merging), contents).flatten()
        earlier, config = RunRecord.read(self.output_dir).notes.get(RESOLVED) or {}, self.model.config
        if earlier.get("of") == of:
            self.choice = FrontierRow(**earlier["chosen"] | {"merging": Merging(**earlier["chosen"]["merging"])})
            self.choice.merging.apply(config)
            config.merge_frontier = earlier["frontier"]
        else:
            # What has learned nothing has no outputs to keep.
            new_head = self.loaded.has_new_head
            trained = self.retrains or self.model_args.model_name_or_path is not None and not new_head
            merging = self.merging if trained else self.merging.without_samples
            if merging is not self.merging:
                logger.warning(
                    "%s has learned nothing for a search to keep: it merges by schedule %s; --retrain_epochs N "
                    "finetunes it unmerged, then searches and trains on with merging",
                    "a new head" if new_head else "a model from scratch",
                    merging.schedule,
                )
            self._merge(merging, self.output_dir if self.writes else None)
        assert self.choice is not None
        self._resolved = {RESOLVED: {"of": of, "chosen": asdict(self.choice), "frontier": config.merge_frontier}}

    def _merge(self, merging: MergeArguments, log_dir: Path | None) -> None:
        """Merge to the budget, and say by what."""
        announce(f"choosing what merges: {merging.budget_line}")
        self._calibrate(merging, log_dir)
        choice = merging.choose(self.model, self.loaded.samples, self.input_shape)
        assert choice is not None
        self.choice = choice.chosen
        say(f"chosen: {self.choice.describe(self.model.unmerged.num_blocks)}")

    def _calibrate(self, merging: MergeArguments, log_dir: Path | None) -> None:
        """Measure the frontier of the weights as they are, if anything is searched for."""
        if merging.searches:
            say(f"calibrating on {self._samples}")
            merging.calibrate(self.model, self.loaded.samples, self.sample_count, self.input_shape, log_dir)

    @property
    def _samples(self) -> str:
        return f"{self.sample_count:,} {self.loaded.samples.name}, without labels"

    def _finish(self, trainer: TaskTrainer) -> None:
        """Give the trained checkpoint a frontier of its own weights, from which `--max_changed` chooses."""
        # Sharded weights run by the trainer alone.
        if not self.merging.searches or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return
        log_dir = self.output_dir if self.writes else None
        if self.chooses_last:
            self._merge(self.merging, log_dir)
        else:
            announce("measuring the frontier of the trained weights")
            self._calibrate(self.merging, log_dir)
        if self.writes:
            # Weights that were loaded where training had ended leave the rest of the config as it began.
            saved = ToMePerceiverConfig.from_pretrained(self.output_dir)
            saved.merge_frontier = self.model.config.merge_frontier
            Merging.of(self.model.config).apply(saved)
            save_whole(self.output_dir, saved.save_pretrained)

    def train(self) -> TaskTrainer:
        """Train as asked, if at all; the trainer has the model as it is to be evaluated."""
        training, resume = self.training, self.training.resume_from_checkpoint
        if not self.retrains:
            trainer = task_trainer(
                self.model, self.prepared, training, self.output_dir, self.retraining.trainer_class, self.whole
            )
            if training.do_train:
                elastic = ", for every r" if self.retraining.elastic else ""
                announce(f"training{elastic or self._merged}")
                train_and_save(trainer, resume)
                self._finish(trainer)
            return trainer
        with Merging.of(self.model.config).by(0).applied(self.model.config):
            finetuning = task_trainer(self.model, self.prepared, training, self.finetuned_dir, record=self.finetuning)
            announce("finetuning, unmerged")
            train_and_save(finetuning, stage_resume(resume, self.finetuned_dir, self.output_dir))
            announce("evaluating what was finetuned, unmerged")
            self.unmerged = evaluate_and_save(finetuning, self.prepared, "eval")
        if self.merging.has_budget:
            self._resolve()
            if self.writes:
                update_record(self.output_dir, notes=self._resolved)
        arguments = self.retraining.training_arguments(training)
        trainer = task_trainer(
            self.model, self.prepared, arguments, self.output_dir, self.retraining.trainer_class, self.whole
        )
        if self.merging.merges or any(self.model.config.merge_schedule):
            announce("evaluating the same, merged without retraining")
            evaluate_and_save(trainer, self.prepared, "merged", self.unmerged)
        announce("retraining, for every r" if self.retraining.elastic else f"retraining{self._merged}")
        train_and_save(trainer, stage_resume(resume, self.output_dir, self.output_dir))
        self._finish(trainer)
        return trainer

    def evaluate(self, trainer: TaskTrainer) -> None:
        """Evaluate what came out; with a budget and no training, unmerged too, and save it."""
        if self.saves_merged or self.chooses_last and not self.retrains:
            announce("evaluating, unmerged")
            with self.model.unmerged.applied(self.model.config):
                self.unmerged = evaluate_and_save(trainer, self.prepared, "unmerged")
        announce(f"evaluating{' what was retrained' if self.retrains else ''}{self._merged}")
        evaluate_and_save(trainer, self.prepared, "eval", self.unmerged)
        if self.saves_merged and self.writes:
            save_whole(self.output_dir, self.model.save_pretrained)
            save_whole(self.output_dir, self.prepared.processing_class.save_pretrained)
            update_record(self.output_dir, {WEIGHTS: weights_fingerprint(self.model)})

    @property
    def _merged(self) -> str:
        """Whether anything merges, to be said after what is done."""
        return ", merged" if Merging.of(self.model.config).merges(self._unmerged_config) else ", unmerged"

    @cached_property
    def measured(self) -> list[Measured]:
        """The figures of each stage, for the card and the end of the run."""
        r = shown_r(self.model.config)
        last = "retrained" if self.retrains else "trained"
        stages = [("eval", f"{last} for every r" if self.retraining.elastic else last, self.output_dir, r)]
        if self.retrains:
            stages = [
                ("eval", "finetuned", self.finetuned_dir, 0),
                ("merged", "merged without retraining", self.output_dir, r),
                *stages,
            ]
        elif self.saves_merged or self.chooses_last:
            stages = [
                ("unmerged", "unmerged", self.output_dir, 0),
                ("eval", "merged without training", self.output_dir, r),
            ]
        return [row for split, name, folder, r in stages for row in measured_in(folder, split, name, r)]

    @property
    def _unmerged_config(self) -> ToMePerceiverConfig:
        """What the cost is compared with."""
        return self.model.unmerged.asked_of(self.model.config)

    def end(self) -> Ending | None:
        """What merging came to, if anything merges and was evaluated."""
        config = self.model.config
        if not self.measured or not Merging.of(config).merges(self._unmerged_config):
            return None
        batch = self.prepared.batch(SPEED_INPUTS)
        share, speedup = cost_and_speed(self.model, batch, self.input_shape)
        removed, start = sum(config.merge_schedule), config.latents_at_start
        how = f"{removed} of {start} latents in layers, r = {config.merge_schedule}" if removed else "none in layers"
        # What was chosen names its groups itself.
        if config.latent_groups is not None and self.choice is None:
            how = f"learned latents in {start} fixed groups, then {how}"
        fixed = "fixed groups" if config.merge_groups else f"{config.merge_method} {config.merge_metric}"
        return Ending(
            measured=[row for row in self.measured if not row.name.endswith("_mm")],
            metric=self.task.main_metric,
            flops_ratio=share,
            speedup=speedup,
            batch_size=len(next(iter(batch.values()))),
            chosen=f"{how}, {fixed}"
            if self.choice is None
            else f"{self.choice.describe(self.model.unmerged.num_blocks)}; {how}",
            changes=self._changes,
            saved=str(self.output_dir),
        )

    @property
    def _changes(self) -> list[str]:
        """Whose answers change by what was chosen, on the weights that it was chosen on."""
        if self.choice is None:
            return []
        current = self.saves_merged or self.chooses_last
        when = "" if current else "before retraining, " if self.retrains else "before training, "
        return [f"{when}{line}" for line in self.choice.lines()]

    def write_card(self, ending: Ending | None) -> None:
        """Write the card of the checkpoint that the run left, and note its config, which is what is evaluated."""
        update_record(self.output_dir, {CONFIG: config_fingerprint(self.model.config)})
        budget = self.merging.budget_line
        if self.choice is not None:
            searched = "" if self.choice.divergence is None else f", calibrated on {self._samples}"
            budget = "; ".join(
                [f"{budget}{searched}: {self.choice.describe(self.model.unmerged.num_blocks)}", *self._changes]
            )
            figures = {f"merging_{name}": value for name, value in asdict(self.choice).items() if name in FIGURES}
            save_metrics(self.output_dir, "merging", figures)
        card = Card(
            model_id=str(self.output_dir),
            source=self.task.source,
            hub_task=self.task.hub_task,
            base_model=self.model_args.model_name_or_path,
            merging=WhatMerges(
                self.model.config,
                self.input_shape,
                budget,
                start=self._unmerged_config,
                speedup=None if ending is None else ending.speedup,
                batch_size=0 if ending is None else ending.batch_size,
            ),
            frontier=Frontier.of(self.model.config),
            measured=self.measured,
            evaluated_on=len(self.prepared.evaluation.get("", ())),
            steps=self._steps,
            trained_on=len(self.prepared.train),
            labels=self.prepared.labels,
            data_fields=data_fields(self.data),
        )
        card.write(self.output_dir)

    @property
    def _steps(self) -> dict[str, dict[str, Any]]:
        """What decided each training, by its name."""
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
