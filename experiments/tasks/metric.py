# SPDX-License-Identifier: Apache-2.0
"""Scores of a task as a metric of the `evaluate` library, computed offline.

Imported by `experiments.tasks.scores` only when scores are computed, because importing `evaluate` takes seconds.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import datasets
import evaluate
import numpy as np

from experiments.tasks.scores import SCORES, compute_values

# Kinds of `SCORES` whose predictions are numbers, not classes or tokens.
REGRESSION_KINDS = ("stsb", "regression")


class TaskMetric(evaluate.Metric):
    """Offline `evaluate.load("glue", TASK)`, extended to masked language modelling and a user's own data.

    Args:
        config_name: a key of `SCORES`.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.config_name in REGRESSION_KINDS else "int64")
        return evaluate.MetricInfo(
            description="Scores of the GLUE benchmark (Wang et al., 2019); NaN where one is undefined.",
            citation="https://arxiv.org/abs/1804.07461",
            inputs_description="Classes, or numbers for stsb and regression; for masked_lm tokens, with -100 among the "
            "references at positions to ignore.",
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> dict[str, float]:
        computed = compute_values(self.config_name, predictions, references)
        return dict(zip(SCORES[self.config_name], computed.tolist(), strict=True))


def compute_scores(kind: str, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the value of each of `SCORES[kind]`; the arguments are those of `experiments.tasks.scores.score`."""
    # `evaluate` creates a cache folder even with `keep_in_memory`.
    with TemporaryDirectory() as folder:
        metric = TaskMetric(config_name=kind, cache_dir=folder, keep_in_memory=True)
        computed = metric.compute(predictions=predictions.ravel(), references=references.ravel())
    return np.array([computed[name] for name in SCORES[kind]])
