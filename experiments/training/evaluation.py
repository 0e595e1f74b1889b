# SPDX-License-Identifier: Apache-2.0
"""Evaluating and predicting with transformers' Trainer, and what has changed from an earlier evaluation."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import Stopped
from experiments.files import write_text
from experiments.tasks.base import PreparedTask
from experiments.tasks.scores import Figures, paired_change
from experiments.training.output_folder import save_metrics
from experiments.training.trainer import TaskTrainer


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Attributes:
        metrics: figures by name, each beginning with the split and, of a second split, ending in its suffix.
        predictions, references: by suffix, one for each example.
    """

    metrics: dict[str, Any]
    predictions: dict[str, np.ndarray]
    references: dict[str, np.ndarray]


def evaluate(trainer: TaskTrainer, task: PreparedTask, split: str) -> Evaluation:
    """Evaluate on every evaluation split.

    Args:
        trainer: with the model to evaluate.
        task: with the splits.
        split: what figures begin with: "eval" for the model that is saved, "merged" before it is retrained.

    Raises:
        Stopped: for outputs that are not finite, of which any figure would be a fiction.
    """
    evaluation = Evaluation({}, {}, {})
    for suffix, dataset in task.evaluation.items():
        # As `Trainer.evaluate`, and with the predictions.
        output = trainer.predict(dataset, metric_key_prefix=split)
        loss = output.metrics.get(f"{split}_loss", 0.0)
        if not (math.isfinite(loss) and np.isfinite(output.predictions).all()):
            raise Stopped(
                f"the outputs of the model for '{split}{suffix}' are not finite (loss {loss}): its weights are damaged "
                "or training has diverged, or half precision does not suffice for them"
            )
        evaluation.metrics.update({with_suffix(name, suffix): value for name, value in output.metrics.items()})
        evaluation.metrics[f"{split}_samples{suffix}"] = len(dataset)
        evaluation.predictions[suffix] = task.predictions(output.predictions)
        evaluation.references[suffix] = task.references(output.label_ids)
    return evaluation


def changes(kind: str, after: Evaluation, before: dict[str, np.ndarray]) -> Figures:
    """What has changed from other predictions for the same examples, as `experiments.tasks.scores.paired_change`.

    Args:
        kind: how predictions are scored.
        after: the evaluation.
        before: the other predictions, by suffix.
    """
    return {
        with_suffix(name, suffix): value
        for suffix, predicted in before.items()
        for name, value in paired_change(kind, after.predictions[suffix], predicted, after.references[suffix]).items()
    }


def evaluate_and_save(
    trainer: TaskTrainer, task: PreparedTask, split: str, before: Evaluation | None = None
) -> Evaluation:
    """`evaluate`, and write `SPLIT_results.json`, and `all_results.json`.

    Args:
        trainer, task, split: as for `evaluate`.
        before: the same unmerged; its results are then followed by what has changed, example by example.
    """
    evaluation = evaluate(trainer, task, split)
    metrics = evaluation.metrics
    if before is not None:
        changed = changes(task.kind, evaluation, before.predictions)
        metrics = metrics | {f"{split}_{name}": value for name, value in changed.items()}
    trainer.log_metrics(split, metrics)
    if trainer.is_world_process_zero():
        save_metrics(Path(trainer.args.output_dir), split, metrics)
    return evaluation


def predict_and_save(trainer: TaskTrainer, task: PreparedTask, name: str) -> None:
    """Predict, and write `predict_results_NAME.txt`, a row for each input, and `predict_results.json`.

    The table has the columns `index`, `prediction` and, for inputs that are files, `file`, separated by tabs; a value
    with a tab, a line break or a quotation mark in it is quoted, as by the `csv` module.

    Args:
        trainer: with the model.
        task: with the splits to predict.
        name: of the task.
    """
    folder = Path(trainer.args.output_dir)
    metrics: dict[str, Any] = {}
    for suffix, dataset in task.prediction.items():
        output = trainer.predict(dataset, metric_key_prefix="predict")
        metrics |= {with_suffix(key, suffix): value for key, value in (output.metrics or {}).items()}
        metrics[f"predict_samples{suffix}"] = len(dataset)
        predicted = task.written(task.predictions(output.predictions))
        if trainer.is_world_process_zero():
            columns: dict[str, Sequence[Any]] = {"index": range(len(predicted)), "prediction": predicted}
            if files := task.file_names.get(suffix):
                columns["file"] = files
            table = io.StringIO(newline="")
            writer = csv.writer(table, "excel-tab", lineterminator="\n")
            writer.writerows([tuple(columns), *zip(*columns.values(), strict=True)])
            path = folder / f"predict_results_{name}{suffix.replace('_', '-')}.txt"
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, table.getvalue())
    trainer.log_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        save_metrics(folder, "predict", metrics)


def with_suffix(name: str, suffix: str) -> str:
    """The name of a figure of another evaluation split: "accuracy_stderr" and "_mm" give "accuracy_mm_stderr"."""
    metric = re.sub(r"(_change)?(_stderr)?$", "", name)
    return f"{metric}{suffix}{name[len(metric) :]}"
