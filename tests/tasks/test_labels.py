# SPDX-License-Identifier: Apache-2.0
"""Tests of labels: classes are matched by name, in any order; missing and meaningless labels are refused."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.base import PreparedTask
from experiments.tasks.labels import has_labels, label_ids, label_names, listed, match_labels, with_labels
from experiments.tasks.scores import choose_classes


def prepared(names: list[str], ids: list[int], kind: str) -> PreparedTask:
    return PreparedTask(
        train=[],
        evaluation={},
        prediction={},
        processing_class=None,
        collate=dict,
        decode_logits=choose_classes,
        kind=kind,
        labels=names,
        label_ids=ids,
    )


@given(order=st.permutations(range(2)), seed=st.integers(0, 99), kind=st.sampled_from(["mrpc", "qqp", "cola", "rte"]))
def test_no_score_depends_on_the_order_of_label2id(order, seed, kind):
    """A model with permuted outputs has the same scores and predicts the same names."""
    random = np.random.default_rng(seed)
    logits, references = random.normal(size=(9, 2)), random.integers(2, size=9)
    plain, other = prepared(["no", "yes"], [0, 1], kind), prepared(["no", "yes"], list(order), kind)
    shuffled = np.empty_like(logits)
    shuffled[:, order] = logits
    ids = np.array(order)[references]
    with patch("experiments.tasks.scores.RESAMPLES", 3):
        assert other.metrics(EvalPrediction(shuffled, ids)) == plain.metrics(EvalPrediction(logits, references))
    assert other.to_text(other.predictions(shuffled)) == plain.to_text(plain.predictions(logits))
    assert other.references(ids).tolist() == references.tolist()


@pytest.mark.parametrize(
    ("data", "checkpoint", "expected"),
    [
        (["negative", "positive"], ["POSITIVE", "NEGATIVE"], [1, 0]),
        (["not_equivalent", "equivalent"], ["Equivalent", "not-equivalent"], [1, 0]),
        (["A", "a"], ["a", "A"], [1, 0]),
        (["x", "y"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["0", "1"], ["negative", "positive"], [0, 1]),
        (["x", "y"], ["LABEL_1", "LABEL_0"], None),
        (["x", "y"], ["x", "y", "z"], None),
        (["A", "b"], ["a", "A"], None),
        (["1", "2"], ["negative", "positive"], None),
        (["0", "1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        ([*map(str, range(12))], [f"LABEL_{index}" for index in range(12)], list(range(12))),
        ([*map(str, range(1, 13))], [*map(str, range(12))], None),
        (["01", "2"], ["2", "1"], [1, 0]),
        (["0.0", "1.0"], ["1", "0"], [1, 0]),
        (["caf\u00e9", "x"], ["X", "cafe\u0301"], [1, 0]),
        (["true", "false"], ["False", "True"], [1, 0]),
    ],
)
def test_which_label_is_which(data, checkpoint, expected):
    assert match_labels(data, checkpoint) == expected


def test_a_config_of_other_labels_is_refused_with_both_sets():
    config = ToMePerceiverConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    assert label_ids(config, ["dog", "cat"]) == [1, 0]
    with pytest.raises(BadInput, match="cat.*'bird', 'dog'"):
        label_ids(config, ["bird", "dog"])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["3", "x"], ["3", "x"]),
        ([str(index) for index in (10, 2, 1, 0)], ["0", "1", "2", "10"]),
        (["02", "10", "01"], ["01", "02", "10"]),
        (["18-25", "26+"], ["18-25", "26+"]),
        ([True, False], ["False", "True"]),
        ([0.5, 1.0], None),
        (["0.5", "-1", "2e-3"], None),
    ],
)
def test_names_of_own_labels(values, names):
    dataset = Dataset.from_dict({"label": values})
    assert label_names(dataset, "label", "here") == names
    if names:
        ids = with_labels(dataset, "label", names, "here")["label"]
        assert [names[index] for index in ids] == list(map(str, values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["0.2", "n/a", "1.5"], "numbers such as '0.2', and 'n/a'.*--do_regression false"),
        (["0", "1", "n/a"], "numbers such as '0', and 'n/a'"),
        (["2,5", "3"], "'2,5', which may be a number"),
        (["1.0", "2.0", "3.0"], "whole numbers with a point.*--do_regression true"),
        ([*range(100)], "100 whole numbers in 100 examples.*--do_regression true"),
        (["01", "1", "2"], "one number in two spellings, '01' and '1'"),
    ],
)
def test_labels_that_may_be_numbers_or_classes_are_refused(values, says):
    with pytest.raises(BadInput, match=f"^here: column 'label' .*{says}"):
        label_names(Dataset.from_dict({"label": values}), "label", "here")


@pytest.mark.parametrize("values", [["0.2", "n/a"], ["2,5", "3,5"], ["1.0", "2.0"], [1.0, 2.0], ["1.1", "1.10"]])
def test_labels_that_are_said_to_be_classes_are_accepted(values):
    dataset = Dataset.from_dict({"label": values})
    names = label_names(dataset, "label", "here", regression=False)
    assert [names[index] for index in with_labels(dataset, "label", names, "here")["label"]] == list(map(str, values))


@pytest.mark.parametrize("values", [[1, 2], ["1", "2"], ["1.0", "2"], [1.0, 2.0]])
def test_labels_that_are_said_to_be_numbers_are_accepted(values):
    dataset = Dataset.from_dict({"label": values})
    assert label_names(dataset, "label", "here", regression=True) is None
    assert with_labels(dataset, "label", [], "here")["label"] == [1.0, 2.0]


def test_one_name_in_two_forms_of_unicode_or_with_spaces_is_one_class():
    dataset = Dataset.from_dict({"label": ["caf\u00e9", "cafe\u0301", "x", "x ", "\u00a0x\u200b"]})
    names = label_names(dataset, "label", "here")
    assert names == ["caf\u00e9", "x"]
    assert with_labels(dataset, "label", names, "here")["label"] == [0, 0, 1, 1, 1]


def test_names_of_different_case_are_two_classes_and_said_to_be(caplog):
    assert label_names(Dataset.from_dict({"label": ["Good", "good"]}), "label", "here") == ["Good", "good"]
    assert "'Good' and 'good' as two classes" in caplog.text


@pytest.mark.parametrize(("values", "labels"), [(["1", "02"], ["01", "2"]), ([1.0, 2.0], ["1", "2"])])
def test_numbers_of_another_split_go_by_value(values, labels):
    assert with_labels(Dataset.from_dict({"label": values}), "label", labels, "here")["label"] == [0, 1]


@pytest.mark.parametrize("values", [[[1], [2]], [{"a": 1}, {"a": 2}], [None, None], [b"x", b"y"]])
def test_labels_of_other_kinds_are_refused(values):
    with pytest.raises(BadInput, match="column 'label' holds .*it must hold a name"):
        label_names(Dataset.from_dict({"label": values}), "label", "here")


def test_the_order_of_names_in_the_data_is_not_that_of_the_task():
    features = Features({"label": ClassLabel(names=["yes", "no"])})
    dataset = Dataset.from_dict({"label": [0, 1, 1]}, features=features)
    assert with_labels(dataset, "label", ["no", "yes"], "here")["label"] == [1, 0, 0]


@pytest.mark.parametrize("value", [-1, None, 7])
def test_missing_labels_are_counted(value):
    features = Features({"label": ClassLabel(names=["no", "yes"])})
    table = Dataset.from_dict({"label": [0, 1, 1, 1]}, features=features).data.table.to_pydict()
    table["label"][2:] = [value] * 2
    dataset = Dataset.from_dict(table, features=Features({"label": Value("int64")}))
    dataset.info.features = features
    with pytest.raises(BadInput, match="here: column 'label' has no value.* in 2 of 4 examples, .* example 2"):
        with_labels(dataset, "label", ["no", "yes"], "here")


@pytest.mark.parametrize("values", [["x", None, ""], [1, -1, -1], ["1", "-1", "-1"], ["x", "", None]])
def test_missing_names_are_counted(values):
    with pytest.raises(BadInput, match="2 of 3 examples, .* example 1"):
        with_labels(Dataset.from_dict({"label": values}), "label", ["x", "1"], "here")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.5, None], "1 of 2"),
        ([0.5, float("nan")], "1 of 2"),
        ([0.5, float("inf")], "no finite number in 1 of 2"),
        (["x", "y"], "'x' in example 0"),
        (["1.5", "2,5"], "'2,5' in example 1"),
    ],
)
def test_numbers_are_finite(values, says):
    with pytest.raises(BadInput, match=says):
        with_labels(Dataset.from_dict({"label": values}), "label", [], "here")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([-1, -1], False), (["-1", ""], False), ([None], False), ([-1.0], False), ([-1, 0], True), (["", "x"], True)],
)
def test_labels_that_are_kept_back(values, expected):
    assert has_labels(Dataset.from_dict({"label": values}), "label") is expected
    assert has_labels(Dataset.from_dict({"other": values}), "label") is False


def test_names_with_a_line_break_are_listed_on_one_line():
    assert listed(["b", "a\nb", "caf\u00e9"]) == "'a\\nb', 'b', 'caf\u00e9'"
