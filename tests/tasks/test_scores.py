# SPDX-License-Identifier: Apache-2.0
"""GLUE's scores and their standard errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.tasks.scores import NOT_ASKED, SCORES, paired_change, score, standard_errors

PREDICTIONS, REFERENCES = np.array([1, 0, 1, 1, 0, 1]), np.array([1, 0, 0, 1, 1, 1])


def test_scores_of_known_predictions():
    """By hand: 4 of 6 right; 3 true positives, 1 false positive, 1 false negative, 1 true negative."""
    assert score("sst2", PREDICTIONS, REFERENCES) == {"accuracy": pytest.approx(4 / 6)}
    assert score("mrpc", PREDICTIONS, REFERENCES) == {
        "accuracy": pytest.approx(4 / 6),
        "f1": pytest.approx(6 / 8),
        "combined_score": pytest.approx((4 / 6 + 6 / 8) / 2),
    }
    assert score("cola", PREDICTIONS, REFERENCES) == {"matthews_correlation": pytest.approx((3 - 1) / (4 * 2))}


def test_correlations_of_known_predictions():
    """Ranks agree fully, values do not lie on a line."""
    values = score("stsb", np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert values["spearmanr"] == pytest.approx(1)
    assert values["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 10], [1, 2, 3, 4])[0, 1])
    assert values["combined_score"] == pytest.approx((1 + values["pearson"]) / 2)


@pytest.mark.parametrize("kind", ["stsb", "regression"])
@pytest.mark.parametrize(
    ("predictions", "references"),
    [(np.ones(4), np.arange(4.0)), (np.arange(4.0), np.ones(4)), (np.ones(1), np.zeros(1))],
)
def test_a_correlation_with_what_is_all_alike_is_not_defined(kind, predictions, references):
    values = score(kind, predictions, references) | standard_errors(kind, predictions, references)
    values |= paired_change(kind, predictions, predictions, references)
    undefined = {name for name, value in values.items() if value is None}
    names = ("pearson", "spearmanr", *(["combined_score"] if kind == "stsb" else []))
    expected = {f"{name}{end}" for name in names for end in ("", "_stderr", "_change", "_change_stderr")}
    single = {"mse_stderr", "mse_change_stderr"} if len(predictions) == 1 and kind == "regression" else set()
    assert undefined == expected | single
    assert json.loads(json.dumps(values, allow_nan=False)) == values


@pytest.mark.parametrize(
    ("kind", "predictions", "references", "undefined"),
    [
        ("mrpc", [0, 0], [0, 0], {"f1", "combined_score"}),
        ("mrpc", [1, 0], [0, 0], set()),
        ("cola", [0, 1], [1, 1], {"matthews_correlation"}),
        ("cola", [0, 0], [0, 1], set()),
    ],
)
def test_classes_of_which_nothing_is_asked_have_no_score(kind, predictions, references, undefined):
    values = score(kind, np.array(predictions), np.array(references))
    assert {name for name, value in values.items() if value is None} == undefined


def test_one_example_has_no_standard_error():
    one = np.ones(1, int)
    assert standard_errors("sst2", one, one) == {"accuracy_stderr": None}
    assert paired_change("sst2", one, one, one) == {"accuracy_change": 0.0, "accuracy_change_stderr": None}


def test_regression_has_its_squared_error():
    assert score("regression", np.array([1.0, 2.0]), np.array([1.0, 4.0]))["mse"] == pytest.approx(2)


@pytest.mark.parametrize("kind", sorted(SCORES))
def test_every_score_has_a_standard_error(kind):
    values = score(kind, PREDICTIONS, REFERENCES)
    errors = standard_errors(kind, PREDICTIONS, REFERENCES)
    assert set(errors) == {f"{name}_stderr" for name in values}
    assert all(0 < error < 5 for error in errors.values())


def test_the_standard_error_of_an_accuracy_is_binomial():
    errors = standard_errors("rte", PREDICTIONS, REFERENCES)
    assert errors["accuracy_stderr"] == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)


def test_a_bootstrapped_standard_error_is_the_binomial_one_where_there_is_one():
    """MRPC's accuracy comes with F1 and is bootstrapped; 200 draws know it to about 5%."""
    random = np.random.default_rng(1)
    references = random.integers(2, size=400)
    predictions = np.where(random.random(400) < 0.8, references, 1 - references)
    bootstrapped = standard_errors("mrpc", predictions, references)["accuracy_stderr"]
    assert bootstrapped == pytest.approx(standard_errors("sst2", predictions, references)["accuracy_stderr"], rel=0.2)


def test_a_standard_error_moves_no_random_numbers():
    np.random.seed(0)
    before = np.random.get_state()[2]
    first = standard_errors("cola", PREDICTIONS, REFERENCES)
    assert np.random.get_state()[2] == before
    assert standard_errors("cola", PREDICTIONS, REFERENCES) == first


def test_a_change_is_paired():
    """Of four examples one is gained and none lost: +0.25, with the standard error of (0, 0, 0, 1)."""
    references, before, after = np.array([1, 1, 1, 1]), np.array([1, 0, 0, 1]), np.array([1, 0, 1, 1])
    assert paired_change("sst2", after, before, references) == {
        "accuracy_change": 0.25,
        "accuracy_change_stderr": pytest.approx((0.25 * 0.75 / 4) ** 0.5),
    }


@pytest.mark.parametrize("kind", sorted(SCORES))
def test_predictions_have_not_changed_from_themselves(kind):
    change = paired_change(kind, PREDICTIONS, PREDICTIONS, REFERENCES)
    assert set(change) == {
        f"{name}_change{end}" for name in score(kind, PREDICTIONS, REFERENCES) for end in ("", "_stderr")
    }
    assert set(change.values()) == {0.0}


@pytest.mark.parametrize("kind", ["mrpc", "stsb"])
def test_a_bootstrapped_change_is_surer_than_its_two_scores(kind):
    """Predictions that agree on most examples."""
    random = np.random.default_rng(0)
    references = random.integers(2, size=300)
    before = np.where(random.random(300) < 0.8, references, 1 - references)
    after = np.where(random.random(300) < 0.97, before, 1 - before)
    change, errors = paired_change(kind, after, before, references), standard_errors(kind, after, references)
    for name, value in score(kind, after, references).items():
        assert change[f"{name}_change"] == pytest.approx(value - score(kind, before, references)[name])
        assert 0 < change[f"{name}_change_stderr"] < 0.7 * errors[f"{name}_stderr"]


def clustered(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Examples with 1 to 12 positions asked, of 20, that are all right or all wrong."""
    random = np.random.default_rng(seed)
    references = random.integers(9, size=(count, 20))
    references[np.arange(20) >= random.integers(1, 13, size=(count, 1))] = NOT_ASKED
    return np.where(random.random((count, 1)) < 0.6, references, 99), references


def test_only_what_is_asked_counts():
    """By hand: of three tokens that are asked two are right; a prediction of -100 where nothing is asked is not."""
    predictions = np.array([[3, 5, NOT_ASKED], [7, 7, 7]])
    references = np.array([[3, 4, NOT_ASKED], [NOT_ASKED, 7, NOT_ASKED]])
    assert score("masked_lm", predictions, references) == {"accuracy": pytest.approx(2 / 3)}
    # Sentences that have 1 of 2 and 1 of 1 right, where 2/3 of each would be 4/3 and 2/3.
    assert standard_errors("masked_lm", predictions, references) == {
        "accuracy_stderr": pytest.approx(((1 - 4 / 3) ** 2 + (1 - 2 / 3) ** 2) ** 0.5 / 3)
    }


def test_where_every_example_asks_once_tokens_are_classes():
    predictions, references = PREDICTIONS[:, None], REFERENCES[:, None]
    for measure in (score, standard_errors):
        assert measure("masked_lm", predictions, references) == measure("sst2", PREDICTIONS, REFERENCES)
    before = np.roll(PREDICTIONS, 1)
    assert paired_change("masked_lm", predictions, before[:, None], references) == paired_change(
        "sst2", PREDICTIONS, before, REFERENCES
    )


def test_the_standard_error_knows_that_the_tokens_of_a_sentence_hang_together():
    """It is what the accuracies of many samples spread by, and not the binomial one of so many tokens."""
    accuracies = [score("masked_lm", *clustered(200, seed))["accuracy"] for seed in range(300)]
    predictions, references = clustered(200)
    error = standard_errors("masked_lm", predictions, references)["accuracy_stderr"]
    assert error == pytest.approx(np.std(accuracies), rel=0.15)
    asked = references != NOT_ASKED
    assert error > 1.8 * standard_errors("sst2", predictions[asked], references[asked])["accuracy_stderr"]


def test_a_change_of_tokens_is_paired_by_sentence():
    """Of sentences that are all right or all wrong, one in ten becomes wrong."""

    def change(seed: int) -> dict[str, float]:
        before, references = clustered(200, seed)
        lost = np.random.default_rng(1000 + seed).random((200, 1)) < 0.1
        return paired_change("masked_lm", np.where(lost, 99, before), before, references)

    changes = [change(seed) for seed in range(300)]
    spread = np.std([each["accuracy_change"] for each in changes])
    assert np.mean([each["accuracy_change_stderr"] for each in changes]) == pytest.approx(spread, rel=0.15)
