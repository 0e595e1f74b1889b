# SPDX-License-Identifier: Apache-2.0
"""The scores of a task as a metric of the `evaluate` library, computed without a network.

A module of its own, imported where it is needed: `evaluate` takes seconds to import.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import datasets
import evaluate
import numpy as np

from experiments.tasks.scores import SCORES, values

REGRESSION = ("stsb", "regression")


class TaskMetric(evaluate.Metric):
    """`evaluate.load("glue", TASK)`, also for masked language modelling and other data, by scikit-learn and scipy.

    Args:
        config_name: a key of `SCORES`.
    """

    def _info(self) -> evaluate.MetricInfo:
        kind = datasets.Value("float64" if self.config_name in REGRESSION else "int64")
        return evaluate.MetricInfo(
            description="Scores of the GLUE benchmark (Wang et al., 2019); NaN where one is undefined.",
            citation="https://arxiv.org/abs/1804.07461",
            inputs_description="Classes, or numbers for stsb and regression; for masked_lm tokens, with -100 among the "
            "references where nothing is asked.",
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray, **kwargs: Any) -> dict[str, float]:
        computed = values(self.config_name, predictions, references)
        return dict(zip(SCORES[self.config_name], computed.tolist(), strict=True))


def compute_scores(kind: str, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the values of `SCORES[kind]`, in their order, as `experiments.tasks.scores.score` takes the arguments."""
    # The library makes a folder, though it keeps the examples in memory.
    with TemporaryDirectory() as folder:
        metric = TaskMetric(config_name=kind, cache_dir=folder, keep_in_memory=True)
        computed = metric.compute(predictions=predictions.ravel(), references=references.ravel())
    return np.array([computed[name] for name in SCORES[kind]])
