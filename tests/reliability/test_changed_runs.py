# SPDX-License-Identifier: Apache-2.0
"""After any change, an old result is never taken for a new one: some of the changes of `make reliability`."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

from tests.reliability.changed_runs import VALUES, changes, other_values

CHANGES = {change.id: change for change in changes()}
TRIED_CHANGES = (
    "training: label_smoothing_factor, resumed",
    "training: adam_beta1, resumed",
    "training: one label to train on, resumed",
    "training on from a checkpoint: one byte of the text weights, resumed",
    "two stages: --retrain_learning_rate 1e-3, resumed",
    "masked tokens: one masked sentence",
    "sweep: one byte of the text weights",
    "sweep: one label to evaluate on",
    "sweep: --max_grad_norm 0.1",
    "sweep of budgets: --calibration_samples 5",
    "fixed groups: one sentence to train on",
    "evaluation: one byte of the text weights",
)


@pytest.mark.parametrize("name", TRIED_CHANGES)
def test_the_old_result_is_never_served(check, name):
    check(CHANGES[name])


def test_every_training_argument_is_changed():
    """Arguments that cannot change here, such as the folder itself, are listed as `None`."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(VALUES) <= names
    assert names == set(other_values()) | {name for name, value in VALUES.items() if value is None}


def test_every_change_has_its_own_name():
    assert len(CHANGES) == len(list(changes()))
