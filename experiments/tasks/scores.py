# SPDX-License-Identifier: Apache-2.0
"""Scores of predictions: value, standard error, and paired change from a baseline's predictions.

Evaluation calls `score`; reports and cards use `Score`, `flatten_scores` and `parse_scores`.

Shapes: B number of examples, K classes, S positions of an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, mean_squared_error

# Number of bootstrap resamples behind a standard error.
RESAMPLES = 200
IGNORE_INDEX = -100
"""Reference of a position that is not scored, the default `ignore_index` of PyTorch's losses."""


@dataclass(frozen=True)
class Score:
    """One score of a model; a figure that is undefined on the examples is `None`.

    Attributes:
        value: the score.
        stderr: standard error of the score; `None` for a single example.
        compared: whether the score was compared with a baseline on the same examples.
        change, change_stderr: difference from the baseline, paired by example, and its standard error, which is far
            smaller than the standard errors of the two scores, since the models agree on most examples.
    """

    value: float | None
    stderr: float | None = None
    change: float | None = None
    change_stderr: float | None = None
    compared: bool = False


Scores = dict[str, Score]
"""Scores by name, such as "accuracy"; those of MNLI's second evaluation split end in its suffix: "accuracy_mm"."""


def flatten_scores(scores: Scores, prefix: str = "") -> dict[str, float | None]:
    """Return scores under their names in result files: `eval_accuracy`, `eval_accuracy_stderr`, ...

    Args:
        scores: scores by name.
        prefix: prefix of every name, such as "eval_".
    """
    flat: dict[str, float | None] = {}
    for name, score in scores.items():
        flat |= {f"{prefix}{name}": score.value, f"{prefix}{name}_stderr": score.stderr}
        if score.compared:
            flat |= {f"{prefix}{name}_change": score.change, f"{prefix}{name}_change_stderr": score.change_stderr}
    return flat


def parse_scores(figures: Mapping[str, Any], prefix: str = "") -> Scores:
    """Return the scores in a result file, whose names come from `flatten_scores`; other figures are left out."""
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
    right, scored = _count_right(predictions, references)
    return float(right.sum() / scored.sum())


def _count_right(predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of right and of scored positions of each example, both (B,)."""
    scored = references != IGNORE_INDEX
    right = (predictions == references) & scored
    return right.reshape(len(references), -1).sum(axis=1), scored.reshape(len(references), -1).sum(axis=1)


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return F1 of the second class, which `_put_positive_last` in tasks/glue.py makes the positive one.

    NaN if neither the references nor the predictions have a positive.
    """
    return f1_score(references, predictions) if predictions.any() or references.any() else math.nan


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the Matthews correlation; NaN for constant references.

    By convention 0 for constant predictions (Chicco and Jurman, 2020).
    """
    return math.nan if np.ptp(references) == 0 else matthews_corrcoef(references, predictions)


def _correlation(correlate: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a correlation function that is NaN if predictions or references are constant."""

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
"""Functions of predictions and references, by score; NaN if the score is undefined."""
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
"""Names of the scores by kind of prediction: GLUE tasks (Wang et al., 2019, table 1), masked language modelling, own
data. `COMBINED` is the mean of the scores before it."""


def choose_classes(logits: np.ndarray) -> np.ndarray:
    """Return the most likely class of each example, (B,), from logits (B, K)."""
    return np.argmax(logits, axis=-1)


def squeeze_numbers(logits: np.ndarray) -> np.ndarray:
    """Return the predicted number of each example, (B,), from logits (B, 1)."""
    return np.squeeze(logits, axis=-1)


def score(kind: str, predictions: np.ndarray, references: np.ndarray, baseline: np.ndarray | None = None) -> Scores:
    """Score predictions, with standard errors: in closed form if accuracy is the only score, else by bootstrap.

    Standard errors treat examples as independent, but not the S positions of one example.

    Args:
        kind: a key of `SCORES`.
        predictions, references: classes or numbers (B,); for `masked_lm` tokens (B, S), with `IGNORE_INDEX` in the
            references at positions that are not scored.
        baseline: predictions of another model to compare with, of the same shape.
    """

    from experiments.tasks.metric import compute_scores  # takes seconds

    def measure(compute: Callable[..., np.ndarray], examples: Any) -> np.ndarray:
        """Return the value of each score and, with a baseline, the change of each."""
        own = compute(kind, predictions[examples], references[examples])
        return np.append(own, [] if baseline is None else own - compute(kind, baseline[examples], references[examples]))

    names, count = SCORES[kind], len(references)
    found = measure(compute_scores, slice(None))
    if names == ("accuracy",):
        right, scored = _count_right(predictions, references)
        parts = [right] if baseline is None else [right, right - _count_right(baseline, references)[0]]
        errors = np.array([_ratio_stderr(part, scored) for part in parts])
    else:
        # A generator of its own: evaluating must not change the random numbers of training.
        draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        drawn = np.ma.masked_invalid([measure(compute_values, examples) for examples in draws])
        errors = drawn.std(axis=0, ddof=1).filled(math.nan)
    if count == 1:
        errors[:] = math.nan
    errors[np.isnan(found)] = math.nan
    # Shape (value or standard error, score or change, name of the score).
    table = np.stack([found, errors]).reshape(2, -1, len(names))
    scores = {}
    for name, column in zip(names, np.moveaxis(table, 2, 0), strict=True):
        figures = [float(figure) if math.isfinite(figure) else None for figure in column.T.ravel()]
        value, stderr, change, change_stderr, *_ = [*figures, None, None]
        scores[name] = Score(value, stderr, change, change_stderr, compared=baseline is not None)
    return scores


def compute_values(kind: str, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the value of each of `SCORES[kind]`, in order."""
    computed = [SCORERS[name](predictions, references) for name in SCORES[kind] if name != COMBINED]
    return np.array(computed + [np.mean(computed)] * (COMBINED in SCORES[kind]))


def _ratio_stderr(parts: np.ndarray, scored: np.ndarray) -> float:
    """Return the standard error of `parts.sum() / scored.sum()`, both (B,), for independent examples.

    This is the linearised estimator of a ratio (Cochran, *Sampling Techniques*, 1977, section 6.3). With one scored
    position per example it is the binomial standard error.
    """
    return float(np.sqrt(np.sum((parts - parts.sum() / scored.sum() * scored) ** 2)) / scored.sum())
