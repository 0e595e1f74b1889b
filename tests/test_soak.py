# SPDX-License-Identifier: Apache-2.0
"""A short run of tests/soak.py, and tests that it notices wrong answers and growing memory."""

from __future__ import annotations

import threading
from itertools import combinations

import numpy as np
import pytest
import torch

from tests.soak import (
    CALLS,
    LENGTHS,
    Report,
    answer,
    calibrated_model,
    find_fault,
    fit_growth,
    random_texts,
    repeat_calls,
    soak,
)


@pytest.fixture(scope="module")
def model():
    return calibrated_model()


def test_a_short_run_finds_no_difference():
    report = soak(minutes=0.05)
    assert find_fault(report, max_growth_mb=1000) is None
    assert set(report.calls) == {str(call) for call in CALLS} and report.cycles > 0


def test_every_thread_expects_other_answers(model):
    """If two budgets gave equal answers, a mix-up of these two could not be seen."""
    (inputs,) = random_texts(1, LENGTHS[-1], seed=0)
    answers = [answer(model, inputs, call) for call in CALLS]
    assert not any(torch.equal(one, other) for one, other in combinations(answers, 2))


def test_a_call_that_takes_over_the_settings_of_another_thread_is_counted(model, monkeypatch):
    inputs, stop = random_texts(1, LENGTHS[0], seed=0), threading.Event()
    expected = [answer(model, each, {"r": 2}) for each in inputs]

    def mixed_up(model, inputs, call):
        stop.set()
        return answer(model, inputs, {"r": 0})

    monkeypatch.setattr("tests.soak.answer", mixed_up)
    repeat_calls(model, {"r": 2}, inputs, expected, report := Report(), stop)
    assert report.different["{'r': 2}"] == 1 and report.largest_difference > 0
    assert "1 of 1 answers with {'r': 2} differ" in find_fault(report, 1)


def test_growth_is_that_of_the_line_through_the_noise():
    seconds, noise = np.arange(600.0), np.random.default_rng(0).normal(0, 1, 600)
    growth, error = fit_growth(np.stack([seconds, 400 + seconds / 599 * 30 + noise], axis=1))
    assert abs(growth - 30) < 3 * error < 1.5
    assert "memory grew by" in find_fault(Report(cycles=1, growth_mb=growth), max_growth_mb=20)
