# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/serving.py: a real server under a short load, and the figures of a tally."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PerceiverTokenizer

from benchmarks.serving import FALL_BACK, UNMERGED, Tally, summarize
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_models import tiny_model
from tests.support.tiny_texts import write_table

SCRIPT = "benchmarks.serving.py"
BUDGET = "flops_ratio 0.7"


def test_every_variant_is_measured_against_the_unmerged_server(tmp_path, capsys):
    model = tiny_model("ForSequenceClassification", torch.float32, max_position_embeddings=40, r=2)
    model.save_pretrained(tmp_path / "model")
    PerceiverTokenizer(model_max_length=40).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    texts = [letter * length for letter in "abcdef" for length in range(3, 15)]
    write_table(tmp_path / "data" / "test.csv", {"text": texts})
    call_script(
        SCRIPT, "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data", "--flops_ratio", 0.7,
        "--clients", 1, 4, "--rounds", 2, "--seconds", 0.3, "--calibration_samples", 48, "--distinct_requests", 8,
        "--fall_back_inputs", 1, "--max_requests", 3, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "serving.json").read_text())
    rows = {(row["clients"], row["variant"]): row for row in report["rows"]}
    assert set(rows) == {(clients, name) for clients in (1, 4) for name in (UNMERGED, BUDGET, FALL_BACK)}
    for (clients, name), row in rows.items():
        assert row["failed"] == 0 and 0 < row["milliseconds"][0] <= row["milliseconds"][1]
        assert (row["refused"] > 0) == (clients == 4)
        assert (row["degraded"] > 0) == (name == FALL_BACK)
        if name == UNMERGED:
            assert row["equal"] == row["flops_ratio"] == row["times_unmerged"] == 1
        else:
            assert row["flops_ratio"] < 1
    assert (tmp_path / "out" / "serving.md").read_text() in capsys.readouterr().out


def test_shares_are_of_the_answered_requests():
    unmerged = Tally(seconds=[0.1] * 10, equal=10, flops_ratio=10, elapsed=1)
    merged = Tally(seconds=[0.05] * 20, refused=5, degraded=4, equal=19, flops_ratio=8, failed=1, elapsed=1)
    _, row = summarize({(4, UNMERGED): [unmerged], (4, BUDGET): [merged]})
    assert row.milliseconds == pytest.approx([50, 50]) and row.requests_per_second == 20 and row.times_unmerged == 2
    assert (row.refused, row.degraded, row.equal, row.flops_ratio, row.failed) == (0.2, 0.2, 0.95, 0.4, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--clients", 1, 0), "--clients 0: must be above 0"),
        (("--model_name_or_path", "a"), "--model_name_or_path, --dataset_name: give both or neither"),
        (("--flops_ratio", 2), "--flops_ratio 2.0: must be above 0 and at most 1"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(capsys, arguments, words):
    assert words in bad_input_line(capsys, SCRIPT, *arguments)
