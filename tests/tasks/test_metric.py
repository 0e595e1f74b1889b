# SPDX-License-Identifier: Apache-2.0
"""The metric that `evaluate.load("glue", TASK)` would download."""

from __future__ import annotations

import subprocess
import sys

import pytest

from experiments.tasks.metric import GlueMetric
from tests.support.script_run import ROOT


def test_is_a_metric_of_evaluate():
    metric = GlueMetric(config_name="mrpc", keep_in_memory=True)
    assert metric.compute(predictions=[1, 0, 1], references=[1, 1, 1]) == {
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "combined_score": pytest.approx((2 / 3 + 0.8) / 2),
    }


def test_collects_predictions_batch_by_batch():
    metric = GlueMetric(config_name="stsb", keep_in_memory=True)
    metric.add_batch(predictions=[0.5, 1.5], references=[1.0, 2.0])
    metric.add(prediction=2.5, reference=3.0)
    assert metric.compute()["pearson"] == pytest.approx(1)


def test_takes_rows_of_tokens():
    metric = GlueMetric(config_name="masked_lm", keep_in_memory=True)
    values = metric.compute(predictions=[[1, 2], [3, 3]], references=[[1, -100], [-100, 4]])
    assert values == {"accuracy": 0.5}


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'glue'.*mrpc"):
        GlueMetric(config_name="glue", keep_in_memory=True)


def test_evaluate_is_not_imported_before_it_is_needed():
    """It takes seconds."""
    code = "import sys, experiments.runs.finetune, experiments.runs.sweep; assert 'evaluate' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0
