# SPDX-License-Identifier: Apache-2.0
"""Running a sweep: its stages in order, what they leave on disk, and the push of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.command_line import shown_command
from experiments.files import save_whole
from experiments.publishing.card import TOKEN_MERGING, Card, Measured, WhatMerges
from experiments.publishing.hub import HubRepository, push_checkpoint
from experiments.runs.sweep import Cells, Row, SweepResults
from experiments.runs.sweep_arguments import SweepArguments, Variant
from experiments.runs.sweep_report import write_report
from experiments.tasks.base import Batch, PreparedTask, Task
from experiments.training.identity import training_fields
from experiments.training.loading import load_config, load_model
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import claim
from experiments.training.stage import RetrainArguments, task_trainer, train_and_save

RETRAINED = "retrained"
# Folder below it, and branch, of the one checkpoint for all rows.
ELASTIC = "elastic"
WHAT = """and what merging its latents ({merging}) does to it on {source}. In a row "r", so many latents go in every \
self-attention layer; in a row "flops", a schedule keeps to that share of the FLOPs. The checkpoint here merges \
nothing until `model.r` is set."""


@dataclass(frozen=True)
class SweepRun:
    """A sweep with all that it needs.

    Attributes:
        model_args, sweep_args, retraining, training: what the command line says.
        task, prepared: to evaluate and train on.
        variants: of the rows.
        baseline: merges nothing.
        results: rows to fill.
        continued: whether some of the results are of an earlier run.
    """

    model_args: ModelArguments
    sweep_args: SweepArguments
    retraining: RetrainArguments
    training: TrainingArguments
    task: Task
    prepared: PreparedTask
    variants: list[Variant]
    baseline: Variant
    results: SweepResults
    continued: bool

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def cells(self) -> Cells:
        return Cells(
            self.results, self.variants, self.baseline, self.prepared, self.output_dir, self.training.should_save
        )

    def measure(self, model: PreTrainedModel, batch: Batch) -> None:
        """Evaluate the checkpoint with every merge, and time it."""
        trainer = task_trainer(model, self.prepared, self.training, self.output_dir)

        def merged(variant: Variant) -> Trainer:
            variant.merging.apply(model.config)
            return trainer

        self.cells.fill("merged", merged)
        self.cells.measure(model, self.sweep_args, batch)

    def retrain(self) -> None:
        """Train the checkpoint, evaluate it with every merge, and write its card.

        It is trained with every merge, each from the same start; or, with `--elastic`, once for all of them.
        """
        if not self.retraining.elastic:
            self.cells.fill("retrained", lambda variant: self._trained(variant, variant.branch), self._write_its_card)
            return
        trained = cache(lambda: self._trained(self.baseline, ELASTIC))

        def merged(variant: Variant) -> Trainer:
            trainer = trained()
            variant.merging.apply(trainer.model.config)
            return trainer

        self.cells.fill("retrained", merged)
        if self.training.should_save:
            config = ToMePerceiverConfig.from_pretrained(self.output_dir / RETRAINED / ELASTIC)
            self._write_retrained_card(ELASTIC, config, self._measured("retrained"))

    def _trained(self, variant: Variant, branch: str) -> Trainer:
        """The checkpoint, trained from its start; with some of the results there, from where an earlier run was."""
        start = time.perf_counter()
        set_seed(self.training.seed)
        config = load_config(self.model_args, {}, self.task)
        variant.merging.apply(config)
        model = load_model(self.model_args, config, self.task)
        self.results.spend("loading", start)
        start = time.perf_counter()
        arguments = self.retraining.training_arguments(self.training)
        folder = self.output_dir / RETRAINED / branch
        # What the sweep is, and which of its rows.
        experiment = self.results.noted | {"row": asdict(variant.merging)}
        claim(folder, experiment, longer=False, write=self.training.should_save)
        trainer = task_trainer(model, self.prepared, arguments, folder, self.retraining.trainer_class, experiment)
        train_and_save(trainer, "last" if self.continued else None)
        self.results.spend("retraining", start)
        return trainer

    def _write_its_card(self, variant: Variant, row: Row, trainer: Trainer) -> None:
        config = trainer.model.config
        measured = [Measured(name, config.r, row[stage]) for stage, name in self._stage_names.items()]
        self._write_retrained_card(variant.branch, config, measured, variant.name)

    def _write_retrained_card(
        self, branch: str, config: ToMePerceiverConfig, measured: list[Measured], budget: str | None = None
    ) -> None:
        distilled = {"elastic": True, "distillation_weight": self.retraining.distillation_weight}
        elastic = distilled if self.retraining.elastic else {}
        budget_line = None if budget is None else f"row '{budget}' of the sweep"
        card = Card(
            model_id=str(self.output_dir),
            revision=branch,
            source=self.task.source,
            hub_task=self.task.hub_task,
            base_model=self.model_args.model_name_or_path,
            merging=WhatMerges(config, self.results.input_shape, budget_line),
            measured=measured,
            evaluated_on=self.results.evaluated_on,
            steps={"Retraining": training_fields(self.retraining.training_arguments(self.training)) | elastic},
            trained_on=len(self.prepared.train),
        )
        card.write(self.output_dir / RETRAINED / branch)

    @property
    def _stage_names(self) -> dict[str, str]:
        """What the figures of each stage are called in cards."""
        retrained = "retrained for every r" if self.retraining.elastic else "retrained"
        return {"merged": "merged without retraining", "retrained": retrained}

    def _measured(self, *stages: str) -> list[Measured]:
        """The figures of every row, for cards."""
        return [
            Measured(_named(self._stage_names[stage], variant), variant.merging.r, row[stage])
            for variant, row in zip(self.variants, self.results.rows, strict=True)
            for stage in stages
            if stage in row
        ]

    def write(self, model: PreTrainedModel) -> None:
        """Write the report, and the unmerged checkpoint with a card that is the report, last."""
        if not self.training.should_save:
            return
        self.baseline.merging.apply(model.config)
        save_whole(self.output_dir, model.save_pretrained)
        save_whole(self.output_dir, self.prepared.processing_class.save_pretrained)
        self.results.save(self.output_dir)
        report = write_report(self.results, shown_command(), self.output_dir)
        self.write_card(report)
        print(report.partition("\n\n")[0])
        print(f"\nReport, picture and card: {self.output_dir}")

    def write_card(self, report: str) -> None:
        """Write the card of the unmerged checkpoint, which is the report."""
        card = Card(
            model_id=str(self.output_dir),
            source=self.task.source,
            hub_task=self.task.hub_task,
            base_model=self.model_args.model_name_or_path,
            what=WHAT.format(merging=TOKEN_MERGING, source=self.task.source.name),
            measured=self._measured(*self._stage_names),
            report=report,
            sections={"Retrained checkpoints": self._branches()},
            environment=self.results.environment,
        )
        card.write(self.output_dir)

    def _branches(self) -> str:
        """Where the retrained checkpoints are, for the card, if there are any."""
        if self.retraining.retrain_epochs == 0:
            return ""
        if self.retraining.elastic:
            return (
                "The retrained checkpoint, one for all rows, trained with a merging drawn anew in every step, is on a "
                f'branch of its own: `revision="{ELASTIC}"`.'
            )
        names = ", ".join(variant.branch for variant in self.variants)
        return f"Each retrained checkpoint is on a branch of its own: `revision` is one of {names}."


def _named(stage: str, variant: Variant) -> str:
    """A stage, and what else tells a row from others with the same r."""
    return stage if variant.series == "r" else f"{stage}, {variant.name}"


def push_sweep(repository: HubRepository, output_dir: Path, revision: str) -> None:
    """Push what a sweep left: the unmerged checkpoint to `revision`, each retrained one to its branch, a commit each.

    Raises:
        BadInput: if there is no sweep.
        PushFailed: what was pushed stays; pushing again does the rest.
    """
    print(push_checkpoint(repository, output_dir, "Sweep over r", revision))
    for folder in sorted((output_dir / RETRAINED).glob("*")):
        config = json.loads((folder / "config.json").read_text())
        message = "Retrained for every r" if folder.name == ELASTIC else f"Retrained with r = {config['r']}"
        print(push_checkpoint(repository, folder, message, revision=folder.name))
