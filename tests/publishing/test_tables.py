# SPDX-License-Identifier: Apache-2.0
"""Tests of tables, figures with standard errors, escaped names, and values without local paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.publishing.tables import escape_markdown, markdown_table, with_error, without_local_paths


def test_a_table_has_a_line_for_header_alignment_and_each_row():
    """The last alignment applies to all further columns; pipes and line breaks in cells are escaped."""
    rows = [("ours", 2, 1.5), ("a\n d|e", None, "")]
    assert markdown_table(["", "r", "ms"], rows, "lr").splitlines() == [
        "|  | r | ms |",
        "|---|---:|---:|",
        "| ours | 2 | 1.5 |",
        "| a d\\|e |  |  |",
    ]
    with pytest.raises(ValueError, match="header of 2"):
        markdown_table(["a", "b"], [[1]])


def test_a_figure_stands_with_its_standard_error():
    assert with_error(81.234, 0.4) == "81.23 ± 0.40"
    assert with_error(-1.0, 0.25, "+.1f") == "-1.0 ± 0.2" and with_error(0.5, 0.25, "+.2f") == "+0.50 ± 0.25"


def test_names_are_escaped():
    assert escape_markdown("a_b *c*\n<d> [e](f) _g_ `h` i|j") == r"a_b \*c\* \<d\> \[e](f) \_g\_ \`h\` i\|j"


@pytest.mark.parametrize(
    ("value", "pushed"),
    [
        ("nyu-mll/glue", "nyu-mll/glue"), ("outputs/here", "here"), ("outputs/gone/model", "model"),
        ("/home/me/data", "data"), ("~/data/", "data"), ("../data.csv", "data.csv"), ("./data", "data"),
        ("~", Path.home().name), ("outputs", "outputs"), ("", ""), ("http://127.0.0.1/a", "http://127.0.0.1/a"),
        ("num_latents=64,d_latents=32", "num_latents=64,d_latents=32"), ("two\nlines /a", "two\nlines /a"),
        ("--dataset_name nyu-mll/glue", "--dataset_name nyu-mll/glue"), ("--dataset_name /a/b", "--dataset_name b"),
        (["/a/b", {"/x/y": "/a/c"}, 1.5, None], ["b", {"/x/y": "c"}, 1.5, None]),
    ],
)  # fmt: skip
def test_paths_of_this_machine_are_reduced_to_names(tmp_path, monkeypatch, value, pushed):
    (tmp_path / "outputs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_local_paths(value) == pushed
