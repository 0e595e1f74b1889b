# SPDX-License-Identifier: Apache-2.0
"""Tables say what was measured and leave empty what was not."""

from __future__ import annotations

import csv

from experiments.runs.sweep_report import flat_row, sweep_table, write_csv

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
        "| r=2 | 81.23 ± 0.40 | -1.00 ± 0.20 | 90.00 ± 0.30 |  | 0.5 | 0.250 | 4 | 812.3 "
        "| 2.50x (2.25 to 2.75) | 3 | 123 |"
    )  # fmt: skip
    assert lines[3] == "| r=4 |  |  |  |  | 0.25 | 0.125 | 1 |  |  |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_csv_has_a_number_a_column(tmp_path):
    write_csv(ROWS, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        measured, planned = csv.DictReader(file)
    assert (measured["merged"], measured["retrained_stderr"], measured["speedup_upper"]) == ("0.8123", "0.003", "2.75")
    assert (measured["merged_change"], measured["retrained_change"]) == ("-0.01", "")
    assert (planned["merged"], planned["speedup"]) == ("", "")
