# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions: value, standard error, and paired change from other predictions for the same examples.

Letters: B examples, K classes, S positions of an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, mean_squared_error

RESAMPLES = 200
NOT_ASKED = -100
"""The reference of a position where nothing is asked, as in PyTorch's losses."""


@dataclass(frozen=True)
class Score:
    """One score of a model on some examples; `None` for a figure that is undefined on them.

    Attributes:
        value: the score.
        stderr: its standard error over the examples; a single example has none.
        compared: whether it was compared with other predictions for the same examples.
        change, change_stderr: difference from those, paired by example, and the standard error of the difference, which
            is far smaller than those of the two scores, since they agree on most examples.
    """

    value: float | None
    stderr: float | None = None
    change: float | None = None
    change_stderr: float | None = None
    compared: bool = False


Scores = dict[str, Score]
"""Scores by name, such as "accuracy"; names of a second evaluation split end in its suffix, "accuracy_mm"."""


def flatten_scores(scores: Scores, prefix: str = "") -> dict[str, float | None]:
    """Return scores as result files name them: `eval_accuracy`, `eval_accuracy_stderr`, `eval_accuracy_change`, ...

    Args:
        scores: by name.
        prefix: put before every name, such as "eval_".
    """
    flat: dict[str, float | None] = {}
    for name, score in scores.items():
        flat |= {f"{prefix}{name}": score.value, f"{prefix}{name}_stderr": score.stderr}
        if score.compared:
            flat |= {f"{prefix}{name}_change": score.change, f"{prefix}{name}_change_stderr": score.change_stderr}
    return flat


def parse_scores(figures: Mapping[str, Any], prefix: str = "") -> Scores:
    """Return the scores among the figures of a result file, whose names `flatten_scores` made; others are left out."""
    scores = {}
    for name, value in figures.items():
        if f"{name}_stderr" in figures and name.startswith(prefix) and not name.endswith("_change"):
            change = f"{name}_change"
            scores[name.removeprefix(prefix)] = Score(
                value,
                figures[f"{name}_stderr"],
                figures.get(change),
                figures.get(f"{change}_stderr"),
                compared=change in figures,
            )
    return scores


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    right, asked = _count_right(predictions, references)
    return float(right.sum() / asked.sum())


def _count_right(predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of right and of asked positions of each example, both (B,)."""
    asked = references != NOT_ASKED
    right = (predictions == references) & asked
    return right.reshape(len(references), -1).sum(axis=1), asked.reshape(len(references), -1).sum(axis=1)


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return F1 of the second class, which `_positive_last` of tasks/glue.py makes the positive one; undefined where
    there is nothing to find and nothing was found."""
    return f1_score(references, predictions) if predictions.any() or references.any() else math.nan


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """By convention 0 for predictions that are all alike (Chicco and Jurman, 2020)."""
    return math.nan if np.ptp(references) == 0 else matthews_corrcoef(references, predictions)


def _correlation(correlate: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """Undefined where either side is constant."""

    def correlation(predictions: np.ndarray, references: np.ndarray) -> float:
        constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
        return math.nan if constant else correlate(predictions, references).statistic

    return correlation


def _mse(predictions: np.ndarray, references: np.ndarray) -> float:
    return mean_squared_error(references, predictions)


COMBINED = "combined_score"
SCORERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
    "mse": _mse,
}
"""Scores by name; NaN where one is undefined."""
SCORES: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1", COMBINED),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1", COMBINED),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr", COMBINED),
    "wnli": ("accuracy",),
    "masked_lm": ("accuracy",),
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr", "mse"),
}
"""Names of the scores of each GLUE task (Wang et al., 2019, table 1) and of a user's own data; `COMBINED` is the mean
of those before it."""


def classes(logits: np.ndarray) -> np.ndarray:
    """Return the most likely of K classes, (B,), from logits (B, K)."""
    return np.argmax(logits, axis=-1)


def numbers(logits: np.ndarray) -> np.ndarray:
    """Return numbers (B,) from logits (B, 1)."""
    return np.squeeze(logits, axis=-1)


def score(kind: str, predictions: np.ndarray, references: np.ndarray, before: np.ndarray | None = None) -> Scores:
    """Score predictions, with standard errors: an accuracy's in closed form, others' bootstrapped.

    Examples are independent of each other, the S positions of one example are not.

    Args:
        kind: a key of `SCORES`.
        predictions, references: (B,), classes or numbers; of `masked_lm` (B, S), tokens, with `NOT_ASKED` among the
            references for all that does not count.
        before: of the same shape, other predictions to compare with.
    """

    from experiments.tasks.metric import compute_scores  # takes seconds

    def measure(compute: Callable[..., np.ndarray], examples: Any) -> np.ndarray:
        """Return the value of each score and, with `before`, the change of each."""
        own = compute(kind, predictions[examples], references[examples])
        return np.append(own, [] if before is None else own - compute(kind, before[examples], references[examples]))

    names, count = SCORES[kind], len(references)
    found = measure(compute_scores, slice(None))
    if names == ("accuracy",):
        right, asked = _count_right(predictions, references)
        parts = [right] if before is None else [right, right - _count_right(before, references)[0]]
        errors = np.array([_ratio_stderr(part, asked) for part in parts])
    else:
        # Seeded by itself: an evaluation must not move the random numbers of a training.
        draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        drawn = np.ma.masked_invalid([measure(values, examples) for examples in draws])
        errors = drawn.std(axis=0, ddof=1).filled(math.nan)
    if count == 1:
        errors[:] = math.nan
    errors[np.isnan(found)] = math.nan
    # Value and standard error, of the score and of its change, by name.
    table = np.stack([found, errors]).reshape(2, -1, len(names))
    scores = {}
    for name, column in zip(names, np.moveaxis(table, 2, 0), strict=True):
        figures = [float(figure) if math.isfinite(figure) else None for figure in column.T.ravel()]
        value, stderr, change, change_stderr, *_ = [*figures, None, None]
        scores[name] = Score(value, stderr, change, change_stderr, compared=before is not None)
    return scores


def values(kind: str, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the values of `SCORES[kind]`, in their order."""
    computed = [SCORERS[name](predictions, references) for name in SCORES[kind] if name != COMBINED]
    return np.array(computed + [np.mean(computed)] * (COMBINED in SCORES[kind]))


def _ratio_stderr(parts: np.ndarray, asked: np.ndarray) -> float:
    """Return the standard error of `parts.sum() / asked.sum()`, both (B,), for independent examples.

    This is the linearised estimator of a ratio (Cochran, *Sampling Techniques*, 1977, section 6.3). Where every example
    asks for one thing it is the binomial standard error.
    """
    return float(np.sqrt(np.sum((parts - parts.sum() / asked.sum() * asked) ** 2)) / asked.sum())
