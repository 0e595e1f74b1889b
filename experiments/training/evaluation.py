# SPDX-License-Identifier: Apache-2.0
"""Evaluate with transformers' Trainer, and predict and write the predictions."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import Stopped
from experiments.escaping import spreadsheet_cell
from experiments.files import write_text
from experiments.tasks.base import PreparedTask
from experiments.tasks.scores import Scores, flatten_scores, score
from experiments.training.output_folder import save_metrics
from experiments.training.trainer import TaskTrainer


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation on all evaluation splits.

    Attributes:
        split: prefix of names in result files, such as "eval" (final model) or "merged" (merged before retraining).
        scores: scores by name.
        figures: loss, time and number of examples, by their name in result files.
        predictions: predictions by suffix of the split, one for each example.
    """

    split: str
    scores: Scores
    figures: dict[str, Any]
    predictions: dict[str, np.ndarray]

    def flatten(self) -> dict[str, Any]:
        """Return all figures and scores by their name in result files."""
        return self.figures | flatten_scores(self.scores, f"{self.split}_")


def evaluate(
    trainer: TaskTrainer, task: PreparedTask, split: str, before: Mapping[str, np.ndarray] | None = None
) -> Evaluation:
    """Evaluate on all evaluation splits.

    Args:
        split: prefix of names in result files.
        before: earlier predictions by suffix of the split; scores then include the paired change from them.

    Raises:
        Stopped: for outputs that are not finite, whose scores would mean nothing.
    """
    evaluation = Evaluation(split, {}, {}, {})
    for suffix, dataset in task.evaluation.items():
        # Scores are computed below, together with their changes.
        compute_metrics, trainer.compute_metrics = trainer.compute_metrics, None
        try:
            output = trainer.predict(dataset, metric_key_prefix=split)
        finally:
            trainer.compute_metrics = compute_metrics
        loss = output.metrics.get(f"{split}_loss", 0.0)
        if not (math.isfinite(loss) and np.isfinite(output.predictions).all()):
            raise Stopped(
                f"the outputs of the model for '{split}{suffix}' are not finite (loss {loss}): the checkpoint is "
                "damaged, training has diverged or half precision is too coarse; use another checkpoint or float32"
            )
        predictions, references = task.predictions(output.predictions), task.references(output.label_ids)
        scores = score(task.kind, predictions, references, (before or {}).get(suffix))
        evaluation.scores.update({f"{name}{suffix}": value for name, value in scores.items()})
        evaluation.figures.update({f"{name}{suffix}": value for name, value in output.metrics.items()})
        evaluation.figures[f"{split}_samples{suffix}"] = len(dataset)
        evaluation.predictions[suffix] = predictions
    return evaluation


def predict_and_save(trainer: TaskTrainer, task: PreparedTask, name: str) -> None:
    """Predict the test inputs, and write `predict_results_NAME.txt` and `predict_results.json`.

    The text file is a table with a row for each input and the columns `index`, `prediction` and, for inputs from files,
    `file`, separated by tabs. Values with a tab, a line break or a quotation mark are quoted as by the `csv` module.
    Text that a spreadsheet would take for a formula gets an apostrophe in front.

    Args:
        name: name of the task, NAME.
    """
    folder = Path(trainer.args.output_dir)
    metrics: dict[str, Any] = {}
    for suffix, dataset in task.prediction.items():
        output = trainer.predict(dataset, metric_key_prefix="predict")
        metrics |= {f"{key}{suffix}": value for key, value in (output.metrics or {}).items()}
        metrics[f"predict_samples{suffix}"] = len(dataset)
        if trainer.is_world_process_zero():
            predicted = task.to_text(task.predictions(output.predictions))
            columns: dict[str, Sequence[Any]] = {"index": range(len(predicted)), "prediction": predicted}
            if files := task.file_names.get(suffix):
                columns["file"] = files
            table = io.StringIO(newline="")
            writer = csv.writer(table, "excel-tab", lineterminator="\n")
            rows = zip(*columns.values(), strict=True)
            writer.writerows([tuple(columns), *(map(spreadsheet_cell, row) for row in rows)])
            folder.mkdir(parents=True, exist_ok=True)
            # A configuration of a dataset may have a slash in its name.
            file_name = f"predict_results_{name.replace('/', '_')}{suffix.replace('_', '-')}.txt"
            write_text(folder / file_name, table.getvalue())
    trainer.log_metrics("predict", metrics)
    if trainer.is_world_process_zero():
        save_metrics(folder, "predict", metrics)
