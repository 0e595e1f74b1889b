# SPDX-License-Identifier: Apache-2.0
"""The figures by which predictions are judged, each with its standard error.

Letters: B examples, K classes, S positions of an example.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, mean_squared_error

Score = Callable[[np.ndarray, np.ndarray], float]

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


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(f1_score(references, predictions, zero_division=0.0))


def _matthews(predictions: np.ndarray, references: np.ndarray) -> float:
    if np.ptp(np.concatenate([predictions, references])) == 0:
        return 0.0  # what scikit-learn says too, with a warning
    return float(matthews_corrcoef(references, predictions))


def _mse(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(mean_squared_error(references, predictions))


def _correlation(correlate: Callable) -> Score:
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        if np.ptp(predictions) == 0 or np.ptp(references) == 0:
            return 0.0  # undefined: what never changes says nothing of the other
        return float(correlate(predictions, references).statistic)

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


def score(kind: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Score predictions.

    Args:
        kind: a key of `SCORES`.
        predictions, references: (B,), classes or numbers; of `masked_lm` (B, S), tokens, with `NOT_ASKED` among the
            references for all that does not count.

    Returns:
        The scores by name; those of a GLUE task with more than one also have their mean, `combined_score`.
    """
    values = {name: scorer(predictions, references) for name, scorer in SCORES[kind].items()}
    if len(values) > 1 and kind != "regression":  # correlations and squared errors have no mean
        values["combined_score"] = float(np.mean(list(values.values())))
    return values


def standard_errors(kind: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The standard error of each score under NAME_stderr: an accuracy's in closed form, others' bootstrapped.

    Examples are independent of each other, the S positions of one are not.

    Args:
        kind, predictions, references: as for `score`.
    """
    if list(SCORES[kind]) == ["accuracy"]:
        return {"accuracy_stderr": _ratio_stderr(*_right(predictions, references))}
    resampled = [score(kind, predictions[rows], references[rows]) for rows in _draws(len(references))]
    return {f"{name}_stderr": float(np.std([values[name] for values in resampled], ddof=1)) for name in resampled[0]}


def paired_change(kind: str, predictions: np.ndarray, before: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """What each score has changed from other predictions for the same examples, under NAME_change.

    The standard error, NAME_change_stderr, is that of the difference: far smaller than those of the two scores, since
    they agree on most examples.

    Args:
        kind, predictions, references: as for `score`.
        before: of the same shape, the predictions to compare with.
    """
    after_scores, before_scores = score(kind, predictions, references), score(kind, before, references)
    change = {f"{name}_change": after_scores[name] - before_scores[name] for name in after_scores}
    if list(SCORES[kind]) == ["accuracy"]:
        (right, asked), (right_before, _) = (_right(values, references) for values in (predictions, before))
        return change | {"accuracy_change_stderr": _ratio_stderr(right - right_before, asked)}
    differences: dict[str, list[float]] = {name: [] for name in after_scores}
    for rows in _draws(len(references)):
        after, earlier = (score(kind, values[rows], references[rows]) for values in (predictions, before))
        for name, values in differences.items():
            values.append(after[name] - earlier[name])
    return change | {f"{name}_change_stderr": float(np.std(values, ddof=1)) for name, values in differences.items()}


def _draws(count: int) -> np.ndarray:
    """Resampled examples. Seeded by itself: an evaluation must not move the random numbers of a training."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
