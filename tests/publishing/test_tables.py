# SPDX-License-Identifier: Apache-2.0
"""A Markdown table has every cell where its header says."""

from __future__ import annotations

import pytest

from experiments.publishing.tables import markdown_table, with_error


def test_a_line_for_the_header_one_for_the_alignment_and_one_for_each_row():
    assert markdown_table(["", "r", "ms"], [("ours", 2, 1.5), ("stock", None, "")], "lr").splitlines() == [
        "|  | r | ms |",
        "|---|---:|---:|",
        "| ours | 2 | 1.5 |",
        "| stock |  |  |",
    ]


@pytest.mark.parametrize(
    ("align", "rule"), [("l", "|---|---|---|"), ("rl", "|---:|---|---|"), ("rlr", "|---:|---|---:|")]
)
def test_the_last_alignment_is_for_all_that_come_after(align, rule):
    assert markdown_table(["a", "b", "c"], [], align).splitlines() == ["| a | b | c |", rule]


def test_no_cell_ends_its_cell_or_row():
    assert markdown_table(["a|b"], [["c\n d|e"]]).splitlines() == ["| a\\|b |", "|---|", "| c d\\|e |"]


@pytest.mark.parametrize("row", [[1], [1, 2, 3]])
def test_a_row_has_as_many_cells_as_the_header(row):
    with pytest.raises(ValueError, match="header of 2"):
        markdown_table(["a", "b"], [row])


def test_a_figure_stands_with_its_standard_error():
    assert with_error(81.234, 0.4) == "81.23 ± 0.40"
    assert with_error(-1.0, 0.25, "+.1f") == "-1.0 ± 0.2" and with_error(0.5, 0.25, "+.2f") == "+0.50 ± 0.25"
