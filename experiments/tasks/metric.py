# SPDX-License-Identifier: Apache-2.0
"""The GLUE metric for the `evaluate` library, which otherwise has to be downloaded.

A module of its own, imported where it is needed: `evaluate` takes seconds to import.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from experiments.tasks.scores import SCORES, score

REGRESSION = ("stsb", "regression")


class GlueMetric(evaluate.Metric):
    """`evaluate.load("glue", TASK)` without a network.

    Modifications: scikit-learn and scipy are called from here (`experiments.tasks.scores`); a figure that is not
    defined, such as a correlation with predictions that are all alike, is `None`; `combined_score` is among the
    results, as in the official run_glue.py.

    Args:
        config_name: a GLUE task, "classification" or "regression" for other data, or "masked_lm".
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in SCORES:
            raise ValueError(f"config_name = {self.config_name!r}: allowed are {', '.join(sorted(SCORES))}")
        kind = datasets.Value("float64" if self.config_name in REGRESSION else "int64")
        if self.config_name == "masked_lm":
            kind = datasets.Sequence(kind)  # a row for each example
        return evaluate.MetricInfo(
            description="The scores of the GLUE benchmark (Wang et al., 2019).",
            citation="https://arxiv.org/abs/1804.07461",
            inputs_description="predictions and references: classes, or numbers for stsb and regression; for masked_lm "
            "a row of tokens for each example, with -100 among the references where nothing is asked.",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float | None]:
        return score(self.config_name, np.asarray(predictions), np.asarray(references))
