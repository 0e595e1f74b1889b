# SPDX-License-Identifier: Apache-2.0
"""Work of eval_sweep.py: evaluate, time and retrain a checkpoint with several merging settings, and report on them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import set_seed

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.command_line import shown_command
from experiments.errors import BadInput
from experiments.files import check_writable, save_whole
from experiments.measurement import describe_environment, peak_memory_mb, time_interleaved
from experiments.publishing.card import Card, MergingSummary, ResultRow, shown_r
from experiments.publishing.hub import HubRepository, open_to_push, push_checkpoint
from experiments.runs.checkpoint_task import SweepDataArguments, load_sweep_task
from experiments.runs.start import Loaded, RunArguments, load
from experiments.runs.sweep_arguments import SweepArguments
from experiments.runs.sweep_report import PICTURE, Best, Row, SweepResults, write_report
from experiments.training.evaluation import Evaluation, evaluate
from experiments.training.fingerprints import config_fingerprint, digest_of, weights_fingerprint
from experiments.training.loading import load_config, load_model
from experiments.training.output_folder import check_disk_space, claim_folder, lock_folder
from experiments.training.progress import announce, results_line, say
from experiments.training.resume import LAST, parse_resume
from experiments.training.run_record import (
    CONFIG,
    INITIAL_WEIGHTS,
    content_fingerprints,
    recorded_arguments,
    training_fields,
)
from experiments.training.stage import rehearse, task_trainer, train_and_save
from experiments.training.trainer import TaskTrainer
from frontier_tome_perceiver import Frontier

MERGED_FOLDER = "merged"
PREDICTIONS_FOLDER = "predictions"
RETRAINED_FOLDER = "retrained"
# Hub branch, and folder in `retrained/`, of the checkpoint that is retrained once for all rows.
ELASTIC_BRANCH = "elastic"


def run_sweep(description: str) -> None:
    """Run the sweep that the command line of eval_sweep.py describes, and push only once everything is on disk.

    Args:
        description: first part of `--help`.

    Raises:
        BadInput: for arguments that cannot be fulfilled, before any long work.
        PushFailed: if the push fails; by then everything else is on disk.
    """
    args = RunArguments.parse(description, SweepDataArguments, SweepArguments)
    training, retraining = args.training, args.retraining
    if args.hub.push_only:
        repository = open_to_push(training, args.push_token)
        with lock_folder(args.output_dir):
            push_sweep(repository, args.output_dir, args.branch)
        return
    if retraining.elastic and not args.retrains:
        raise BadInput("--elastic: needs --retrain_epochs")
    if training.resume_from_checkpoint is not None and parse_resume(training.resume_from_checkpoint) != LAST:
        raise BadInput(
            f"--resume_from_checkpoint {training.resume_from_checkpoint}: a sweep always continues what its folder "
            "holds; use another --output_dir to begin anew"
        )
    to_push = open_to_push(training, args.push_token) if training.push_to_hub else None
    with lock_folder(args.output_dir):
        load_task = partial(load_sweep_task, args.data, args.model, training.seed, args.merge_args.most_samples)
        loaded = load(load_task, args.model, training)
        loaded.check_head(args.model)
        rehearse(loaded.model, loaded.prepared, retraining.stages(training), retraining.trainer_class)
        Sweep(args, loaded).run()
        if to_push is not None and training.should_save:
            push_sweep(to_push, args.output_dir, args.branch)


class Sweep:
    """A sweep over merging settings; each is a row, and each score of a row is saved as soon as it is measured.

    Args:
        args: command line arguments.
        loaded: the checkpoint and its task.
    """

    def __init__(self, args: RunArguments, loaded: Loaded) -> None:
        self.args, self.loaded = args, loaded
        self.sweep_args: SweepArguments = args.merge_args
        self.training, self.retraining, self.retrains = args.training, args.retraining, args.retrains
        self.output_dir, self.writes = args.output_dir, self.training.should_save
        task, model, prepared = loaded.task, loaded.model, loaded.prepared
        self.unmerged = model.unmerged
        recorded = recorded_arguments(args.model, args.data, self.sweep_args, self.retraining)
        read = content_fingerprints(task, prepared, train=self.retrains, calibrates=self.sweep_args.calibrates)
        if self.sweep_args.frontier and model.config.merge_frontier is not None:
            read["frontier"] = digest_of(model.config.merge_frontier)
        self.results = SweepResults(
            arguments=recorded | training_fields(self.training),
            content={INITIAL_WEIGHTS: weights_fingerprint(model), CONFIG: config_fingerprint(model.config)} | read,
            environment=describe_environment(),
            source=task.source,
            evaluated_on=len(prepared.evaluation[""]),
            input_shape=self.loaded.input_shape,
            metric=task.main_metric,
        )
        retrained = "retrained for every r" if self.retraining.elastic else "retrained"
        self.stage_names = {"merged": "merged without retraining", "retrained": retrained}

    def run(self) -> None:
        """Resolve the rows, evaluate, time and retrain them, and write the report.

        Measurements of an earlier run of the same sweep in the output folder are kept.

        Raises:
            BadInput: if the folder holds another run, or for settings that the model's config rejects.
        """
        self.is_resumed = self.results.take_over(self.output_dir)
        for folder in (MERGED_FOLDER, PREDICTIONS_FOLDER, *([RETRAINED_FOLDER] if self.retrains else [])):
            check_writable(f"--output_dir {self.output_dir}", self.output_dir / folder)
        model = self.loaded.model
        # Check the disk for the fewest possible checkpoints now, because resolving budgets takes minutes, and again
        # below, once the number of rows is known.
        check_disk_space(self.output_dir, model, self.training, models=3 if self.retrains else 2)
        if self.is_resumed:
            model.config.merge_frontier = self.results.frontier
        else:
            with self.results.spending("resolving budgets"):
                model.to(self.training.device)
                self.results.rows = self.sweep_args.resolve(model, self.loaded.samples, self.loaded.input_shape)
            self.results.frontier = model.config.merge_frontier
        # Checkpoints to save: the unmerged one, the best row's, and the retrained ones.
        retrained = (1 if self.retraining.elastic else len(self.results.rows)) if self.retrains else 0
        check_disk_space(self.output_dir, model, self.training, models=2 + retrained)
        self._complete_stage("merged")
        self._time()
        if self.retrains:
            self._complete_stage("retrained")
        if self.writes:
            self._write_results()

    def _complete_stage(self, stage: str) -> None:
        """Evaluate every row that lacks a stage's scores, the unmerged model first, and save after each.

        The stage "retrained" first trains a checkpoint for each row from the same weights, or one for all rows with
        `--elastic`.
        """
        missing = [row for row in self.results.rows if stage not in row.scores]
        missing.sort(key=lambda row: not self._is_unmerged(row))
        trainer: TaskTrainer | None = None
        for row in (bar := tqdm(missing, desc=stage, unit="cell", disable=not self.writes)):
            bar.set_description(f"{stage} {row.name}")
            if stage == "retrained" and (trainer is None or not self.retraining.elastic):
                trainer = self._train(row)
            elif trainer is None:
                trainer = task_trainer(self.loaded.model, self.loaded.prepared, self.training, self.output_dir)
            row.merging.apply(trainer.model.config)
            with self.results.spending(f"evaluating {stage}"):
                evaluation = evaluate(trainer, self.loaded.prepared, stage, self._unmerged_predictions(stage, row))
            row.scores[stage] = evaluation.scores
            say(f"{stage} {row.name}: {results_line(stage, evaluation.flatten())}")
            if self.writes:
                self._save_predictions(evaluation, row, stage)
                # Write the card before saving the scores: a resumed sweep skips rows with saved scores.
                if stage == "retrained":
                    self._write_retrained_card(row, trainer.model.config)
                self.results.save(self.output_dir)

    def _is_unmerged(self, row: Row) -> bool:
        return not row.merging.merges(self.unmerged.asked_of(self.loaded.model.config))

    def _unmerged_predictions(self, stage: str, row: Row) -> dict[str, np.ndarray]:
        """Read the unmerged checkpoint's predictions, by suffix of the split; empty for the unmerged row itself."""
        if stage == "merged" and self._is_unmerged(row):
            return {}
        folder = self.output_dir / PREDICTIONS_FOLDER
        paths = {suffix: folder / f"unmerged{suffix}.npy" for suffix in self.loaded.prepared.evaluation}
        return {suffix: np.load(path) for suffix, path in paths.items() if path.exists()}

    def _save_predictions(self, evaluation: Evaluation, row: Row, stage: str) -> None:
        """Save predictions; later rows, and a resumed sweep, are compared with those of the unmerged checkpoint."""
        is_unmerged = stage == "merged" and self._is_unmerged(row)

        def save(folder: Path) -> None:
            for suffix, predicted in evaluation.predictions.items():
                for name in (f"{stage}_{row.branch}", *(["unmerged"] if is_unmerged else [])):
                    np.save(folder / f"{name}{suffix}.npy", predicted)

        save_whole(self.output_dir / PREDICTIONS_FOLDER, save)

    def _retrained_branch(self, row: Row) -> str:
        """Return the Hub branch, and folder in `retrained/`, of the checkpoint that is retrained for a row."""
        return ELASTIC_BRANCH if self.retraining.elastic else row.branch

    def _train(self, row: Row) -> TaskTrainer:
        """Train the checkpoint with a row's merging, or for all rows with --elastic; resume if the sweep is resumed."""
        name, merging = ("for every row", self.unmerged) if self.retraining.elastic else (row.name, row.merging)
        with self.results.spending("loading"):
            set_seed(self.training.seed)
            config = load_config(self.args.model, {}, self.loaded.task)
            merging.apply(config)
            model = load_model(self.args.model, config, self.loaded.task)
        with self.results.spending("retraining"):
            folder = self.output_dir / RETRAINED_FOLDER / self._retrained_branch(row)
            record = replace(self.results.record, arguments={**self.results.arguments, "row": asdict(merging)})
            claim_folder(folder, record, self.writes)
            arguments = self.retraining.training_arguments(self.training)
            trainer = task_trainer(
                model, self.loaded.prepared, arguments, folder, self.retraining.trainer_class, record
            )
            announce(f"retraining, {name}")
            train_and_save(trainer, LAST if self.is_resumed else None)
        return trainer

    def _time(self) -> None:
        """Time a forward pass of all rows in interleaved rounds, and measure the peak memory of each."""
        model, rows, rounds = self.loaded.model, self.results.rows, self.sweep_args.timing_rounds
        timed = self.results.timing is not None and self.results.timing["rounds"] == rounds
        if not self.writes or rounds == 0 or timed:
            return
        batch = self.loaded.prepared.batch(self.sweep_args.timing_batch_size)
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        size = len(next(iter(inputs.values())))
        model.eval()

        def forward(row: Row) -> None:
            row.merging.apply(model.config)
            with torch.inference_mode():
                model(**inputs)

        with self.results.spending("timing"):
            unmerged_row = rows[0]
            timings = time_interleaved(forward, rows, baseline=unmerged_row, rounds=rounds)
            self.results.timing = {"rounds": rounds, "batch_size": size}
            if (here := describe_environment()) != self.results.environment:
                self.results.timing["environment"] = here
            for row, timing in zip(rows, timings, strict=True):
                row.latency_ms, row.speedup = timing.latency_ms, timing.speedup
                row.throughput = 1e3 * size / timing.latency_ms.median
                row.peak_memory_mb = peak_memory_mb(lambda row=row: forward(row), model)  # type: ignore[misc]
        self.results.save(self.output_dir)

    def _card(self, **given: Any) -> Card:
        """Return a card for a checkpoint of this sweep."""
        return Card(**self.loaded.card_fields(self.args) | given)

    def _summarize_merging(self, row: Row, config: ToMePerceiverConfig) -> MergingSummary:
        """Return the card's summary of a row's merging, with its measured speed."""
        batch_size = self.results.timing["batch_size"] if self.results.timing is not None else 0
        unmerged = self.unmerged.asked_of(config)
        return MergingSummary(
            config, self.results.input_shape, f"row '{row.name}' of the sweep", unmerged, row.speedup, batch_size
        )

    def _write_retrained_card(self, row: Row, config: ToMePerceiverConfig) -> None:
        """Write the card of the checkpoint that was retrained for a row, or for all rows, with the scores so far."""
        arguments = training_fields(self.retraining.training_arguments(self.training))
        if self.retraining.elastic:
            arguments |= {"elastic": True, "distillation_weight": self.retraining.distillation_weight}
            config = self.unmerged.asked_of(config)
            merging = MergingSummary(config, self.results.input_shape, None, config)
            result_rows = self._result_rows("retrained")
        else:
            merging, r = self._summarize_merging(row, config), shown_r(row.merging)
            result_rows = [ResultRow(name, r, row.scores[stage]) for stage, name in self.stage_names.items()]
        branch = self._retrained_branch(row)
        self._card(
            revision=branch,
            merging=merging,
            frontier=Frontier.of(config),
            results=result_rows,
            trainings={"Retraining": arguments},
            trained_on=len(self.loaded.prepared.train),
        ).write(self.output_dir / RETRAINED_FOLDER / branch)

    def _result_rows(self, *stages: str) -> list[ResultRow]:
        """Return the results of all rows for a card; rows of a search are named, since several may have the same r."""
        return [
            ResultRow(
                self.stage_names[stage] if row.series == "r" else f"{self.stage_names[stage]}, {row.name}",
                shown_r(row.merging),
                row.scores[stage],
            )
            for row in self.results.rows
            for stage in stages
            if stage in row.scores
        ]

    def _write_results(self) -> None:
        """Write the unmerged checkpoint, the report, the best row's checkpoint, and last the card with the report."""
        model = self.loaded.model
        self.unmerged.apply(model.config)
        self.loaded.save(self.output_dir)
        self.results.save(self.output_dir)
        report, best = write_report(self.results, shown_command(), self.output_dir)
        saved = None if best is None else self._save_best(best)
        branches = ""
        if self.retrains and self.retraining.elastic:
            branches = (
                "The retrained checkpoint, one for all rows, trained with random merging in every step, is on a "
                f'branch of its own: `revision="{ELASTIC_BRANCH}"`.'
            )
        elif self.retrains:
            names = ", ".join(row.branch for row in self.results.rows)
            branches = f"Each retrained checkpoint is on a branch of its own; choose one by `revision`: {names}."
        self._card(
            frontier=Frontier.of(model.config),
            results=self._result_rows(*self.stage_names),
            report=report,
            sections={"Retrained checkpoints": branches},
            environment=self.results.environment,
        ).write(self.output_dir)
        print(report.partition("\n\n")[0])
        print(f"\nReport and unmerged checkpoint: {self.output_dir}")
        if best is not None:
            print(f"Result: {best.sentence}")
            print(f"Checkpoint of this result: {saved}")
        print(f"Picture: {self.output_dir / PICTURE}")

    def _save_best(self, best: Best) -> Path:
        """Save the best row's checkpoint with its card, unless it is a retrained one, and return its folder."""
        if best.stage == "retrained":
            return self.output_dir / RETRAINED_FOLDER / self._retrained_branch(best.row)
        model, folder = self.loaded.model, self.output_dir / MERGED_FOLDER
        with best.row.merging.applied(model.config):
            self.loaded.save(folder)
            unmerged = ResultRow("unmerged", 0, self.results.rows[0].scores["merged"])
            merged = ResultRow(self.stage_names["merged"], shown_r(model.config), best.row.scores["merged"])
            self._card(
                model_id=str(folder),
                merging=self._summarize_merging(best.row, model.config),
                frontier=Frontier.of(model.config),
                results=[unmerged, merged],
            ).write(folder)
        return folder


def push_sweep(repository: HubRepository, output_dir: Path, revision: str) -> None:
    """Push the unmerged checkpoint to `revision` and each retrained one to its branch, in one commit each.

    Raises:
        BadInput: if the folder holds no sweep.
        PushFailed: if a push fails; checkpoints pushed before it stay, and pushing again completes the rest.
    """
    print(push_checkpoint(repository, output_dir, "Sweep over r", revision))
    for folder in sorted((output_dir / RETRAINED_FOLDER).glob("*")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        message = "Retrained for every r" if folder.name == ELASTIC_BRANCH else f"Retrained with r = {config['r']}"
        print(push_checkpoint(repository, folder, message, revision=folder.name))
