# SPDX-License-Identifier: Apache-2.0
"""The figures by which predictions are judged, each with its standard error; `None` where one is not defined.

Letters: B examples, K classes, S positions of an example.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, mean_squared_error

Figures = dict[str, float | None]
Score = Callable[[np.ndarray, np.ndarray], float | None]

RESAMPLES = 200
NOT_ASKED = -100
"""The reference of a position where nothing is asked, as PyTorch's losses have it."""


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    right, asked = _right(predictions, references)
    return float(right.sum() / asked.sum())


def _right(predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each example is right, and how much of it is asked, both (B,)."""
    asked = references != NOT_ASKED
    right = (predictions == references) & asked
    return right.reshape(len(references), -1).sum(axis=1), asked.reshape(len(references), -1).sum(axis=1)


def _ratio_stderr(parts: np.ndarray, asked: np.ndarray) -> float:
    """The standard error of `parts.sum() / asked.sum()`, both (B,), for examples drawn independently of each other.

    The linearised estimator of a ratio (Cochran, *Sampling Techniques*, 1977, section 6.3): what is asked within an
    example may hang together. Where everything asks for one thing it is the binomial standard error.
    """
    return float(np.sqrt(np.sum((parts - parts.sum() / asked.sum() * asked) ** 2)) / asked.sum())


def _f1(predictions: np.ndarray, references: np.ndarray) -> float | None:
    if not (predictions.any() or references.any()):
        return None  # nothing is to be found, and nothing was
    return float(f1_score(references, predictions))


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float | None:
    """By convention 0 for predictions that are all alike (Chicco and Jurman, 2020)."""
    if np.ptp(references) == 0:
        return None
    return float(matthews_corrcoef(references, predictions))


def _mse(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(mean_squared_error(references, predictions))


def _correlation(correlate: Callable) -> Score:
    def score(predictions: np.ndarray, references: np.ndarray) -> float | None:
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return None  # what never changes says nothing of the other
        value = float(correlate(predictions, references).statistic)
        return value if np.isfinite(value) else None

    return score


_ACCURACY: dict[str, Score] = {"accuracy": _accuracy}
_ACCURACY_AND_F1: dict[str, Score] = {"accuracy": _accuracy, "f1": _f1}
_CORRELATIONS: dict[str, Score] = {"pearson": _correlation(pearsonr), "spearmanr": _correlation(spearmanr)}
SCORES: dict[str, dict[str, Score]] = {
    "cola": {"matthews_correlation": _matthews},
    "mnli": _ACCURACY,
    "mrpc": _ACCURACY_AND_F1,
    "qnli": _ACCURACY,
    "qqp": _ACCURACY_AND_F1,
    "rte": _ACCURACY,
    "sst2": _ACCURACY,
    "stsb": _CORRELATIONS,
    "wnli": _ACCURACY,
    "masked_lm": _ACCURACY,
    "classification": _ACCURACY,
    "regression": {**_CORRELATIONS, "mse": _mse},
}
"""GLUE's own scores for each of its tasks (Wang et al., 2019, table 1), and those of one's own data."""


def classes(logits: np.ndarray) -> np.ndarray:
    """From logits (B, K) to the likeliest of K classes, (B,)."""
    return np.argmax(logits, axis=-1)


def numbers(logits: np.ndarray) -> np.ndarray:
    """From logits (B, 1) to numbers (B,)."""
    return np.squeeze(logits, axis=-1)


def score(kind: str, predictions: np.ndarray, references: np.ndarray) -> Figures:
    """Score predictions.

    Args:
        kind: a key of `SCORES`.
        predictions, references: (B,), classes or numbers; of `masked_lm` (B, S), tokens, with `NOT_ASKED` among the
            references for all that does not count.

    Returns:
        The scores by name, `None` for one that is not defined; those of a GLUE task with more than one also have their
        mean, `combined_score`.
    """
    values: Figures = {name: scorer(predictions, references) for name, scorer in SCORES[kind].items()}
    if len(values) > 1 and kind != "regression":  # correlations and squared errors have no mean
        defined = [value for value in values.values() if value is not None]
        values["combined_score"] = float(np.mean(defined)) if len(defined) == len(values) else None
    return values


def standard_errors(kind: str, predictions: np.ndarray, references: np.ndarray) -> Figures:
    """The standard error of each score under NAME_stderr: an accuracy's in closed form, others' bootstrapped.

    Examples are independent of each other, the S positions of one are not. A single example has no standard error.

    Args:
        kind, predictions, references: as for `score`.
    """
    if list(SCORES[kind]) == ["accuracy"]:
        error = _ratio_stderr(*_right(predictions, references)) if len(references) > 1 else None
        return {"accuracy_stderr": error}
    values = score(kind, predictions, references)
    resampled = [score(kind, predictions[rows], references[rows]) for rows in _draws(len(references))]
    return {
        f"{name}_stderr": None if value is None else _spread([draw[name] for draw in resampled], len(references))
        for name, value in values.items()
    }


def _spread(values: list[float | None], count: int) -> float | None:
    """The standard deviation of resampled scores of `count` examples, of the draws in which they are defined."""
    defined = [value for value in values if value is not None]
    return float(np.std(defined, ddof=1)) if count > 1 and len(defined) > 1 else None


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def paired_change(kind: str, predictions: np.ndarray, before: np.ndarray, references: np.ndarray) -> Figures:
    """What each score has changed from other predictions for the same examples, under NAME_change.

    The standard error, NAME_change_stderr, is that of the difference: far smaller than those of the two scores, since
    they agree on most examples.

    Args:
        kind, predictions, references: as for `score`.
        before: of the same shape, the predictions to compare with.
    """
    after_scores, before_scores = score(kind, predictions, references), score(kind, before, references)
    count = len(references)
    change = {f"{name}_change": _difference(after_scores[name], before_scores[name]) for name in after_scores}
    if list(SCORES[kind]) == ["accuracy"]:
        (right, asked), (right_before, _) = (_right(values, references) for values in (predictions, before))
        return change | {"accuracy_change_stderr": _ratio_stderr(right - right_before, asked) if count > 1 else None}
    differences: dict[str, list[float | None]] = {name: [] for name in after_scores}
    for rows in _draws(count):
        after, earlier = (score(kind, values[rows], references[rows]) for values in (predictions, before))
        for name, values in differences.items():
            values.append(_difference(after[name], earlier[name]))
    return change | {
        f"{name}_change_stderr": None if change[f"{name}_change"] is None else _spread(values, count)
        for name, values in differences.items()
    }


def _draws(count: int) -> np.ndarray:
    """Resampled examples. Seeded by itself: an evaluation must not move the random numbers of a training."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
