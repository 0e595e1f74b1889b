# SPDX-License-Identifier: Apache-2.0
"""Tables say what was measured and leave empty what was not; the result is that of the best row, in figures."""

from __future__ import annotations

import csv

import pytest

from experiments.runs.sweep_report import best_of, flat_row, sweep_table, write_csv

MEASURED = {
    "name": "r=2", "gflops": 0.5, "flops_ratio": 0.25, "latents_left": 4, "throughput": 812.34,
    "peak_memory_mb": 123.4,
    "merged": {
        "accuracy": 0.8123, "accuracy_stderr": 0.004, "accuracy_change": -0.01, "accuracy_change_stderr": 0.002,
    },
    "retrained": {"accuracy": 0.9, "accuracy_stderr": 0.003},
    "latency_ms": {"median": 3.0, "lower": 2.0, "upper": 4.0}, "speedup": {"median": 2.5, "lower": 2.25, "upper": 2.75},
}  # fmt: skip
PLANNED = {"name": "r=4", "gflops": 0.25, "flops_ratio": 0.125, "latents_left": 1}
ROWS = [flat_row(row, "accuracy") for row in (MEASURED, PLANNED)]


def test_table_has_a_line_for_each_row():
    lines = sweep_table(ROWS, "accuracy").splitlines()
    assert lines[2] == (
        "| r=2 | 81.23 ± 0.40 | -1.00 ± 0.20 | 90.00 ± 0.30 | 0.5 | 0.250 | 4 | 812.3 "
        "| 2.50x (2.25 to 2.75) | 3 | 123 |"
    )  # fmt: skip
    assert lines[3] == "| r=4 |  |  |  | 0.25 | 0.125 | 1 |  |  |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_table_has_no_column_that_is_empty_in_every_row():
    header, _, line = sweep_table([flat_row(PLANNED, "accuracy")], "accuracy").splitlines()
    assert header == "|  | GFLOPs | of unmerged | latents left |" and line == "| r=4 | 0.25 | 0.125 | 1 |"


def test_csv_has_a_number_a_column(tmp_path):
    write_csv(ROWS, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        measured, planned = csv.DictReader(file)
    assert (measured["merged"], measured["retrained_stderr"], measured["speedup_upper"]) == ("0.8123", "0.003", "2.75")
    assert (measured["merged_change"], measured["retrained_change"]) == ("-0.01", "")
    assert (planned["merged"], planned["speedup"]) == ("", "")


def row(
    name: str, flops_ratio: float, merged: float | None = None, speedup: float | None = None, **more: float
) -> dict:
    """A row whose metric has standard errors of one point, and of half a point for the change from 0.96."""
    flat = flat_row({"name": name, "series": name.partition(" ")[2] or "r", "flops_ratio": flops_ratio}, "accuracy")
    for stage, value in {"merged": merged, "retrained": more.get("retrained")}.items():
        if value is not None:
            flat |= {stage: value, f"{stage}_stderr": 0.01, f"{stage}_change_stderr": 0.005}
    return flat | {"speedup": speedup, "speedup_lower": speedup, "speedup_upper": speedup}


UNMERGED = row("r=0", 1.0, 0.96, 1.0)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.951, 1.4)],
            "0.50 of the FLOPs, 1.40 times as fast, accuracy 96.0 -> 95.1 ± 1.0 (flops=0.5 search, not trained again).",
        ),
        # It has fallen by more than two standard errors of its change.
        (
            [row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.949, 1.4)],
            "0.79 of the FLOPs, 1.10 times as fast, accuracy 96.0 -> 96.0 ± 1.0 (flops=0.8 search, not trained again).",
        ),
        (
            [row("r=2", 0.8, 0.9, 1.1, retrained=0.958)],
            "0.80 of the FLOPs, 1.10 times as fast, accuracy 96.0 -> 95.8 ± 1.0 (r=2, trained again).",
        ),
        # What is faster and loses goes before what is slower and does not.
        (
            [row("r=2", 0.8, 0.96, 0.9), row("r=4", 0.7, 0.90, 1.1)],
            "0.70 of the FLOPs, 1.10 times as fast, accuracy 96.0 -> 90.0 ± 1.0 (r=4, not trained again).",
        ),
        (
            [row("r=2", 0.8, 0.96, 0.9)],
            "0.80 of the FLOPs, 0.90 times as fast, slower than unmerged, accuracy 96.0 -> 96.0 ± 1.0 "
            "(r=2, not trained again).",
        ),
        (
            [row("r=2", 0.8, 0.96), row("r=4", 0.7, 0.955), row("r=8", 0.6, 0.5)],
            "0.70 of the FLOPs, not timed, accuracy 96.0 -> 95.5 ± 1.0 (r=4, not trained again).",
        ),
        ([row("r=4", 0.7, 0.8), row("r=8", 0.6, 0.5)],
         "0.70 of the FLOPs, not timed, accuracy 96.0 -> 80.0 ± 1.0 (r=4, not trained again)."),
    ],
    ids=["fastest", "holds", "trained again", "faster first", "only slower", "not timed", "all lose"],
)  # fmt: skip
def test_the_result_is_that_of_the_best_row(rows, sentence):
    best = best_of([UNMERGED, *rows], "accuracy")
    assert best is not None and best.sentence == sentence
    assert [UNMERGED, *rows][best.index]["name"] in sentence


def test_without_a_row_that_saves_anything_there_is_no_result():
    assert best_of([UNMERGED], "accuracy") is None
    assert best_of([row("r=0", 1.0), row("r=2", 0.8)], "accuracy") is None
    assert best_of([UNMERGED, row("latency=1 search", 1.0, 0.96)], "accuracy") is None


def test_a_figure_that_is_not_defined_is_said_to_be(tmp_path):
    merged = {"pearson": None, "pearson_stderr": None, "pearson_change": None, "pearson_change_stderr": None}
    rows = [flat_row(each | {"merged": merged}, "pearson") for each in (MEASURED | {"flops_ratio": 1.0}, PLANNED)]
    assert best_of(rows, "pearson") is None
    assert sweep_table(rows, "pearson").splitlines()[3].startswith("| r=4 | undefined | undefined | 0.25 |")
    write_csv(rows, tmp_path / "rows.csv")
    assert "undefined" not in (tmp_path / "rows.csv").read_text()
