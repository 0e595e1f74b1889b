# SPDX-License-Identifier: Apache-2.0
"""Tests of scores: values, standard errors, paired changes, and names in result files."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from experiments.tasks.scores import IGNORE_INDEX, SCORES, Score, Scores, flatten_scores, parse_scores, score
from tests.support.script_run import ROOT

PREDICTIONS, REFERENCES = np.array([1, 0, 1, 1, 0, 1]), np.array([1, 0, 0, 1, 1, 1])


def values(scores: Scores) -> dict[str, float | None]:
    return {name: each.value for name, each in scores.items()}


def undefined(scores: Scores) -> set[str]:
    return {name for name, each in scores.items() if each.value is None}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sst2", {"accuracy": 4 / 6}),
        ("mrpc", {"accuracy": 4 / 6, "f1": 6 / 8, "combined_score": (4 / 6 + 6 / 8) / 2}),
        ("cola", {"matthews_correlation": (3 - 1) / (4 * 2)}),
    ],
)
def test_scores_of_known_classes(kind, expected):
    """By hand: 4 of 6 right; 3 true positives, 1 false positive, 1 false negative, 1 true negative."""
    assert values(score(kind, PREDICTIONS, REFERENCES)) == pytest.approx(expected)


def test_scores_of_known_numbers():
    """Ranks agree fully, values do not lie on a line."""
    predictions, references = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 3.0, 4.0])
    pearson = np.corrcoef(predictions, references)[0, 1]
    expected = {"pearson": pearson, "spearmanr": 1, "combined_score": (1 + pearson) / 2}
    assert values(score("stsb", predictions, references)) == pytest.approx(expected)
    assert score("regression", predictions, references)["mse"].value == pytest.approx(6**2 / 4)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [(np.ones(4), np.arange(4.0)), (np.arange(4.0), np.ones(4)), (np.ones(1), np.zeros(1))],
)
@pytest.mark.parametrize("kind", ["stsb", "regression"])
def test_a_correlation_with_a_constant_is_undefined(kind, predictions, references):
    scores = score(kind, predictions, references, baseline=predictions)
    assert undefined(scores) == {"pearson", "spearmanr", *(["combined_score"] if kind == "stsb" else [])}
    assert scores["pearson"] == Score(None, compared=True)
    json.dumps(flatten_scores(scores), allow_nan=False)


@pytest.mark.parametrize(
    ("kind", "predictions", "references", "expected"),
    [
        ("mrpc", [0, 0], [0, 0], {"f1", "combined_score"}),
        ("mrpc", [1, 0], [0, 0], set()),
        ("cola", [0, 1], [1, 1], {"matthews_correlation"}),
        ("cola", [0, 0], [0, 1], set()),
    ],
)
def test_a_score_of_classes_that_are_missing_is_undefined(kind, predictions, references, expected):
    assert undefined(score(kind, np.array(predictions), np.array(references))) == expected


def test_one_example_has_no_standard_error():
    one = np.ones(1, int)
    assert score("sst2", one, one, one) == {"accuracy": Score(1.0, None, 0.0, None, compared=True)}


def test_the_standard_error_of_an_accuracy_is_binomial():
    """Compared with the formula; MRPC's accuracy is bootstrapped with F1, and 200 draws are accurate to about 5 %."""
    random = np.random.default_rng(1)
    references = random.integers(2, size=400)
    predictions = np.where(random.random(400) < 0.8, references, 1 - references)
    closed, drawn = (score(kind, predictions, references)["accuracy"] for kind in ("sst2", "mrpc"))
    assert closed.stderr == pytest.approx(math.sqrt(closed.value * (1 - closed.value) / 400))
    assert drawn.stderr == pytest.approx(closed.stderr, rel=0.2)


def test_a_standard_error_moves_no_random_numbers():
    np.random.seed(0)
    before = np.random.get_state()[2]
    first = score("cola", PREDICTIONS, REFERENCES)
    assert np.random.get_state()[2] == before
    assert score("cola", PREDICTIONS, REFERENCES) == first


def test_a_change_is_paired():
    """One of four examples becomes right and none wrong: +0.25, with the standard error of (0, 0, 0, 1)."""
    references, before, after = np.array([1, 1, 1, 1]), np.array([1, 0, 0, 1]), np.array([1, 0, 1, 1])
    change = score("sst2", after, references, before)["accuracy"]
    assert (change.change, change.change_stderr) == (0.25, pytest.approx(math.sqrt(0.25 * 0.75 / 4)))


@pytest.mark.parametrize("kind", sorted(SCORES))
def test_every_score_has_a_standard_error_and_no_change_from_itself(kind):
    scores = score(kind, PREDICTIONS, REFERENCES, PREDICTIONS)
    assert set(scores) == set(SCORES[kind]) == set(score(kind, PREDICTIONS, REFERENCES))
    for each in scores.values():
        assert 0 < each.stderr < 5 and each.change == each.change_stderr == 0


@pytest.mark.parametrize("kind", ["mrpc", "stsb"])
def test_a_bootstrapped_change_is_surer_than_its_two_scores(kind):
    """The predictions agree on most examples."""
    random = np.random.default_rng(0)
    references = random.integers(2, size=300)
    before = np.where(random.random(300) < 0.8, references, 1 - references)
    after = np.where(random.random(300) < 0.97, before, 1 - before)
    earlier = score(kind, before, references)
    for name, each in score(kind, after, references, before).items():
        assert each.change == pytest.approx(each.value - earlier[name].value)
        assert 0 < each.change_stderr < 0.7 * each.stderr


def test_only_masked_tokens_count():
    """By hand: two of three masked tokens are right; a prediction of -100 at an unmasked position does not count."""
    predictions = np.array([[3, 5, IGNORE_INDEX], [7, 7, 7]])
    references = np.array([[3, 4, IGNORE_INDEX], [IGNORE_INDEX, 7, IGNORE_INDEX]])
    # The sentences have 1 of 2 and 1 of 1 tokens right; at the mean accuracy, 2/3, they would have 4/3 and 2/3.
    error = ((1 - 4 / 3) ** 2 + (1 - 2 / 3) ** 2) ** 0.5 / 3
    assert score("masked_lm", predictions, references)["accuracy"] == Score(2 / 3, pytest.approx(error))


def test_with_one_masked_token_each_scores_are_those_of_classes():
    before = np.roll(PREDICTIONS, 1)
    tokens = score("masked_lm", PREDICTIONS[:, None], REFERENCES[:, None], before[:, None])
    assert tokens == score("sst2", PREDICTIONS, REFERENCES, before)


def test_standard_errors_know_that_the_tokens_of_a_sentence_hang_together():
    """They equal the spread of accuracies and changes over many samples; binomial errors over tokens would not.

    Sentences have 1 to 12 positions asked, of 20, that are all right or all wrong; one in ten then becomes wrong.
    """

    def sample(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        references = random.integers(9, size=(200, 20))
        references[np.arange(20) >= random.integers(1, 13, size=(200, 1))] = IGNORE_INDEX
        before = np.where(random.random((200, 1)) < 0.6, references, 99)
        return np.where(random.random((200, 1)) < 0.1, 99, before), references, before

    samples = [score("masked_lm", *sample(seed))["accuracy"] for seed in range(120)]
    for value, error in (("value", "stderr"), ("change", "change_stderr")):
        spread = np.std([getattr(each, value) for each in samples])
        assert np.mean([getattr(each, error) for each in samples]) == pytest.approx(spread, rel=0.15)
    predictions, references, _ = sample(0)
    asked = references != IGNORE_INDEX
    assert samples[0].stderr > 1.8 * score("sst2", predictions[asked], references[asked])["accuracy"].stderr


def test_names_of_result_files():
    scores = {"f1": Score(0.5, 0.1, -0.2, 0.05, compared=True), "f1_mm": Score(None), "mse": Score(None, compared=True)}
    flat = flatten_scores(scores, "eval_")
    assert flat["eval_f1_change_stderr"] == 0.05 and "eval_f1_mm_change" not in flat
    assert parse_scores(flat | {"eval_runtime": 3.0, "epoch": 1.0, "train_f1": 1.0}, "eval_") == scores


def test_values_are_those_of_a_metric_of_evaluate(tmp_path):
    """Predictions are given at once or in batches, as metrics of `evaluate.load` take them."""
    from experiments.tasks.metric import TaskMetric

    metric = TaskMetric(config_name="mrpc", cache_dir=tmp_path, keep_in_memory=True)
    metric.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    metric.add_batch(predictions=PREDICTIONS[2:], references=REFERENCES[2:])
    assert metric.compute() == values(score("mrpc", PREDICTIONS, REFERENCES))


def test_evaluate_is_not_imported_before_it_is_needed():
    """Because importing it takes seconds."""
    code = "import sys, experiments.runs.finetune, experiments.runs.sweep; assert 'evaluate' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0
