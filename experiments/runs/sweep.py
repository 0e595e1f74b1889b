# SPDX-License-Identifier: Apache-2.0
"""A sweep: a checkpoint merged in each of several ways, evaluated, timed and retrained, and the push of all that."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.command_line import shown_command
from experiments.files import check_writable, save_whole, write_whole
from experiments.measurement import Quartiles, describe_environment, peak_memory_mb, time_interleaved
from experiments.publishing.card import TOKEN_MERGING, Card, Measured, WhatMerges, shown_r
from experiments.publishing.hub import HubRepository, push_checkpoint
from experiments.runs.start import Loaded
from experiments.runs.sweep_arguments import SweepArguments, Variant, unmerged
from experiments.runs.sweep_report import PICTURE, Best, write_report
from experiments.runs.sweep_results import Row, SweepResults, plan_rows
from experiments.tasks.scores import flatten_scores, parse_scores
from experiments.training.evaluation import Evaluation, evaluate
from experiments.training.identity import (
    config_fingerprint,
    content,
    data_fields,
    digest_of,
    noted_arguments,
    training_fields,
    weights_fingerprint,
)
from experiments.training.loading import load_config, load_model
from experiments.training.model_arguments import ModelArguments
from experiments.training.output_folder import CONFIG, START, check_disk_space, claim
from experiments.training.progress import announce, results_line, say
from experiments.training.stage import RetrainArguments, task_trainer, train_and_save
from frontier_tome_perceiver import Frontier

MERGED = "merged"
PREDICTIONS = "predictions"
RETRAINED = "retrained"
# Folder below it, and branch, of the one checkpoint for all rows.
ELASTIC = "elastic"
WHAT = """and what merging its latents ({merging}) does to it on {source}. A row "r" merges that many latents in every \
self-attention layer; a row "flops" keeps to that share of the FLOPs, and a row "changed" to that share of changed \
answers; a row "frontier" is one of the checkpoint's own. The checkpoint here merges nothing until `model.merge_to` is \
called or `model.r` is set."""


@dataclass(kw_only=True)
class Sweep:
    """A sweep with all that it needs: `run` fills its cells, one after another.

    Attributes:
        model_args, data, sweep_args, retraining, training: what the command line says.
        loaded: the checkpoint, and the task to evaluate and train it on.
    """

    model_args: ModelArguments
    data: Any
    sweep_args: SweepArguments
    retraining: RetrainArguments
    training: TrainingArguments
    loaded: Loaded

    def __post_init__(self) -> None:
        task, model = self.loaded.task, self.loaded.model
        self.output_dir, self.writes = Path(self.training.output_dir), self.training.should_save
        self.retrains = self.retraining.retrain_epochs > 0
        self.baseline = unmerged(model)
        noted = noted_arguments(self.model_args, self.data, self.sweep_args, self.retraining)
        read = content(task, self.loaded.prepared, train=self.retrains, calibrates=self.sweep_args.searches)
        if self.sweep_args.frontier and model.config.merge_frontier is not None:
            read["frontier"] = digest_of(model.config.merge_frontier)
        self.results = SweepResults(
            arguments=noted | training_fields(self.training),
            content={START: weights_fingerprint(model), CONFIG: config_fingerprint(model.config)} | read,
            environment=describe_environment(),
            source=task.source,
            evaluated_on=len(self.loaded.prepared.evaluation[""]),
            input_shape=self.loaded.input_shape,
            metric=task.main_metric,
        )

    def run(self) -> None:
        """Resolve what the rows merge, evaluate and time them, retrain, and write the report.

        With cells of an earlier run of the same sweep in its folder, it goes on from there.

        Raises:
            BadInput: if another experiment is there, or for what the config cannot mean.
        """
        self.continued = self.results.take_over(self.output_dir)
        for folder in (MERGED, PREDICTIONS, *([RETRAINED] if self.retrains else [])):
            check_writable(f"--output_dir {self.output_dir}", self.output_dir / folder)
        # Budgets take minutes, and only then all rows are known.
        check_disk_space(self.output_dir, self.loaded.model, self.training, models=3 if self.retrains else 2)
        if self.continued:
            self.loaded.model.config.merge_frontier = self.results.frontier
        else:
            self._resolve()
        self.variants = self.results.variants
        retrained = 1 if self.retraining.elastic else len(self.variants)
        # The unmerged one, that of the best row, and the retrained ones.
        models = 2 + (retrained if self.retrains else 0)
        check_disk_space(self.output_dir, self.loaded.model, self.training, models)
        self._evaluate()
        self._time()
        if self.retrains:
            self._retrain()
        self._write()

    def _resolve(self) -> None:
        start = time.perf_counter()
        model = self.loaded.model.to(self.training.device)
        samples, input_shape = self.loaded.samples, self.loaded.input_shape
        if count := self.sweep_args.sample_count(model, samples, input_shape):
            say(f"calibrating on {count:,} {samples.name}, without labels")
        variants = self.sweep_args.variants(model, samples, input_shape, self.output_dir if self.writes else None)
        self.results.frontier = model.config.merge_frontier
        self.results.rows = plan_rows(model, variants, self.baseline, input_shape)
        self.results.spend("resolving budgets", start)

    def _evaluate(self) -> None:
        """Evaluate the checkpoint with every variant."""
        model = self.loaded.model
        trainer = task_trainer(model, self.loaded.prepared, self.training, self.output_dir)

        def merged(variant: Variant) -> Trainer:
            variant.merging.apply(model.config)
            return trainer

        self._fill("merged", merged)

    def _fill(
        self,
        stage: str,
        trainer_for: Callable[[Variant], Trainer],
        done: Callable[[Variant, Row, Trainer], None] | None = None,
    ) -> None:
        """Evaluate every row that lacks a stage, and save after each.

        Args:
            stage: `"merged"` or `"retrained"`.
            trainer_for: the Trainer to evaluate for a variant, trained if the stage says so.
            done: called, in the process that writes, with each variant, its row and its trainer.
        """
        missing = [
            (row, variant) for row, variant in zip(self.results.rows, self.variants, strict=True) if stage not in row
        ]
        # What all are compared with comes first.
        missing.sort(key=lambda cell: not self._is_unmerged(cell[1]))
        for row, variant in (bar := tqdm(missing, desc=stage, unit="cell", disable=not self.writes)):
            bar.set_description(f"{stage} {variant.name}")
            trainer = trainer_for(variant)
            start = time.perf_counter()
            evaluation = evaluate(trainer, self.loaded.prepared, stage, self._unmerged_predictions(stage, variant))
            row[stage] = flatten_scores(evaluation.scores)
            self._save_predictions(evaluation, variant)
            self.results.spend(f"evaluating {stage}", start)
            say(f"{stage} {variant.name}: {results_line(stage, evaluation.flatten())}")
            if self.writes:
                # A cell that is saved is not filled again, so what is done for it comes before.
                if done is not None:
                    done(variant, row, trainer)
                self.results.save(self.output_dir)

    def _time(self) -> None:
        """Time a forward pass for every row, interleaved, all together since they are compared, and its memory."""
        model, rows, rounds = self.loaded.model, self.results.rows, self.sweep_args.timing_rounds
        timed = self.results.timing is not None and self.results.timing["rounds"] == rounds
        if not self.writes or rounds == 0 or timed:
            return
        start = time.perf_counter()
        batch = self.loaded.prepared.batch(self.sweep_args.timing_batch_size)
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        size = len(next(iter(inputs.values())))
        model.eval()

        def forward(variant: Variant) -> None:
            variant.merging.apply(model.config)
            with torch.inference_mode():
                model(**inputs)

        timings = time_interleaved(forward, self.variants, baseline=self.baseline, rounds=rounds)
        self.results.timing = {"rounds": rounds, "batch_size": size}
        if (here := describe_environment()) != self.results.environment:
            self.results.timing["environment"] = here
        for row, variant, timing in zip(rows, self.variants, timings, strict=True):
            row["latency_ms"], row["speedup"] = asdict(timing.latency_ms), asdict(timing.speedup)
            row["throughput"] = 1e3 * size / timing.latency_ms.median
            row["peak_memory_mb"] = peak_memory_mb(lambda variant=variant: forward(variant), model)  # type: ignore[misc]
        self.results.spend("timing", start)
        self.results.save(self.output_dir)

    def _unmerged_predictions(self, stage: str, variant: Variant) -> dict[str, np.ndarray]:
        """Read the predictions of the unmerged checkpoint, by split; empty for the row that these come from."""
        if stage == "merged" and self._is_unmerged(variant):
            return {}
        paths = {suffix: self._predictions_file("unmerged", suffix) for suffix in self.loaded.prepared.evaluation}
        return {suffix: np.load(path) for suffix, path in paths.items() if path.exists()}

    def _save_predictions(self, evaluation: Evaluation, variant: Variant) -> None:
        """Save predictions: later rows and a resumed sweep are compared with the unmerged ones."""
        if not self.writes:
            return
        is_baseline = evaluation.split == "merged" and self._is_unmerged(variant)
        names = [f"{evaluation.split}_{variant.branch}", *(["unmerged"] if is_baseline else [])]
        for suffix, predicted in evaluation.predictions.items():
            for name in names:
                _save_array(self._predictions_file(name, suffix), predicted)

    def _predictions_file(self, name: str, suffix: str) -> Path:
        return self.output_dir / PREDICTIONS / f"{name}{suffix}.npy"

    def _is_unmerged(self, variant: Variant) -> bool:
        return not variant.merging.merges(self.baseline.merging.asked_of(self.loaded.model.config))

    def _retrain(self) -> None:
        """Train the checkpoint, evaluate it with every merge, and write its card.

        It is trained with every merge, each from the same start; or, with `--elastic`, once for all of them.
        """
        if not self.retraining.elastic:
            self._fill("retrained", lambda variant: self._trained(variant, variant.branch), self._write_its_card)
            return
        trained = cache(lambda: self._trained(self.baseline, ELASTIC))

        def merged(variant: Variant) -> Trainer:
            trainer = trained()
            variant.merging.apply(trainer.model.config)
            return trainer

        self._fill("retrained", merged)
        if self.writes:
            config = ToMePerceiverConfig.from_pretrained(self.output_dir / RETRAINED / ELASTIC)
            self._write_retrained_card(ELASTIC, config, self._measured("retrained"))

    def _trained(self, variant: Variant, branch: str) -> Trainer:
        """The checkpoint, trained from its start; with some of the results there, from where an earlier run was."""
        start = time.perf_counter()
        set_seed(self.training.seed)
        config = load_config(self.model_args, {}, self.loaded.task)
        variant.merging.apply(config)
        model = load_model(self.model_args, config, self.loaded.task)
        self.results.spend("loading", start)
        start = time.perf_counter()
        arguments = self.retraining.training_arguments(self.training)
        folder = self.output_dir / RETRAINED / branch
        # What the sweep is, and which of its rows.
        experiment = self.results.noted | {"row": asdict(variant.merging)}
        claim(folder, experiment, longer=False, write=self.writes)
        trainer = task_trainer(
            model, self.loaded.prepared, arguments, folder, self.retraining.trainer_class, experiment
        )
        announce(f"retraining, {'for every row' if branch == ELASTIC else variant.name}")
        train_and_save(trainer, "last" if self.continued else None)
        self.results.spend("retraining", start)
        return trainer

    def _write_its_card(self, variant: Variant, row: Row, trainer: Trainer) -> None:
        measured = [
            Measured(name, shown_r(trainer.model.config), parse_scores(row[stage]))
            for stage, name in self._stage_names.items()
        ]
        self._write_retrained_card(variant.branch, trainer.model.config, measured, variant.name, self._timed(row))

    def _timed(self, row: Row) -> tuple[Quartiles, int] | None:
        """How fast a row is, and with so many inputs at once, if it was timed."""
        timing = self.results.timing
        return None if timing is None or "speedup" not in row else (Quartiles(**row["speedup"]), timing["batch_size"])

    def _write_retrained_card(
        self,
        branch: str,
        config: ToMePerceiverConfig,
        measured: list[Measured],
        budget: str | None = None,
        timed: tuple[Quartiles, int] | None = None,
    ) -> None:
        distilled = {"elastic": True, "distillation_weight": self.retraining.distillation_weight}
        elastic = distilled if self.retraining.elastic else {}
        card = replace(
            self._row_card(config, measured, budget, timed),
            model_id=str(self.output_dir),
            revision=branch,
            steps={"Retraining": training_fields(self.retraining.training_arguments(self.training)) | elastic},
            trained_on=len(self.loaded.prepared.train),
        )
        card.write(self.output_dir / RETRAINED / branch)

    def _row_card(
        self,
        config: ToMePerceiverConfig,
        measured: list[Measured],
        budget: str | None,
        timed: tuple[Quartiles, int] | None,
    ) -> Card:
        """The card of a checkpoint that merges as a row does, as if nothing had been trained for it."""
        budget_line = None if budget is None else f"row '{budget}' of the sweep"
        unmerged = self.baseline.merging.asked_of(config)
        return Card(
            model_id=str(self.output_dir / MERGED),
            source=self.loaded.task.source,
            hub_task=self.loaded.task.hub_task,
            base_model=self.model_args.model_name_or_path,
            merging=WhatMerges(config, self.results.input_shape, budget_line, unmerged, *(timed or ())),
            frontier=Frontier.of(config),
            measured=measured,
            evaluated_on=self.results.evaluated_on,
            labels=self.loaded.prepared.labels,
            data_fields=data_fields(self.data),
        )

    @property
    def _stage_names(self) -> dict[str, str]:
        """What the figures of each stage are called in cards."""
        retrained = "retrained for every r" if self.retraining.elastic else "retrained"
        return {"merged": "merged without retraining", "retrained": retrained}

    def _measured(self, *stages: str) -> list[Measured]:
        """The figures of every row, for cards."""
        return [
            Measured(_named(self._stage_names[stage], variant), shown_r(variant.merging), parse_scores(row[stage]))
            for variant, row in zip(self.variants, self.results.rows, strict=True)
            for stage in stages
            if stage in row
        ]

    def _write(self) -> None:
        """Write the report, the best row's checkpoint, and the unmerged one with a card that is the report, last."""
        if not self.writes:
            return
        model = self.loaded.model
        self.baseline.merging.apply(model.config)
        save_whole(self.output_dir, model.save_pretrained)
        save_whole(self.output_dir, self.loaded.prepared.processing_class.save_pretrained)
        self.results.save(self.output_dir)
        report, best = write_report(self.results, shown_command(), self.output_dir)
        saved = None if best is None else self._save_best(best)
        self.write_card(report)
        print(report.partition("\n\n")[0])
        print(f"\nReport and unmerged checkpoint: {self.output_dir}")
        if best is not None:
            print(f"Result: {best.sentence}")
            print(f"Its checkpoint: {saved}")
        print(f"Picture: {self.output_dir / PICTURE}")

    def _save_best(self, best: Best) -> Path:
        """Save the checkpoint merged as the best row is, with its card, if it is not kept as a retrained one."""
        row, variant = self.results.rows[best.index], self.variants[best.index]
        if best.stage == "retrained":
            return self.output_dir / RETRAINED / (ELASTIC if self.retraining.elastic else variant.branch)
        model, folder = self.loaded.model, self.output_dir / MERGED
        with variant.merging.applied(model.config):
            save_whole(folder, model.save_pretrained)
            save_whole(folder, self.loaded.prepared.processing_class.save_pretrained)
            unmerged = Measured("unmerged", 0, parse_scores(self.results.rows[0]["merged"]))
            merged = Measured(self._stage_names["merged"], shown_r(model.config), parse_scores(row["merged"]))
            self._row_card(model.config, [unmerged, merged], variant.name, self._timed(row)).write(folder)
        return folder

    def write_card(self, report: str) -> None:
        """Write the card of the unmerged checkpoint, which is the report."""
        card = Card(
            model_id=str(self.output_dir),
            source=self.loaded.task.source,
            hub_task=self.loaded.task.hub_task,
            base_model=self.model_args.model_name_or_path,
            what=WHAT.format(merging=TOKEN_MERGING, source=self.loaded.task.source.name),
            frontier=Frontier.of(self.loaded.model.config),
            measured=self._measured(*self._stage_names),
            evaluated_on=self.results.evaluated_on,
            labels=self.loaded.prepared.labels,
            data_fields=data_fields(self.data),
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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        message = "Retrained for every r" if folder.name == ELASTIC else f"Retrained with r = {config['r']}"
        print(push_checkpoint(repository, folder, message, revision=folder.name))


def _save_array(path: Path, array: np.ndarray) -> None:
    def save(partial: Path) -> None:
        # By a name that does not end in .npy, numpy would write to another.
        with partial.open("wb") as file:
            np.save(file, array)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save)
