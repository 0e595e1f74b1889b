# SPDX-License-Identifier: Apache-2.0
"""Tests of examples/merge_your_perceiver.ipynb, executed with a shortly trained model."""

from __future__ import annotations

import re

import nbformat

from tests.support.script_run import ROOT, run_script

NOTEBOOK = ROOT / "examples" / "merge_your_perceiver.ipynb"


def test_every_cell_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "parameters" in cells[0].metadata["tags"]
    cells[0].source = "EPOCHS, TRAIN_IMAGES, MAX_CHANGED = 1, 64, 1.0"
    (tmp_path / "cells.py").write_text("\n".join(cell.source for cell in cells))
    done = run_script(tmp_path / "cells.py", cwd=NOTEBOOK.parent)
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout and "modeling_tome_perceiver.py" in done.stdout
    assert "as saved, latents left at the end:" in done.stdout


def test_what_is_committed_was_executed_and_names_no_machine():
    """All cells were executed in order, and no output holds an absolute path, which has text between two slashes."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    for cell in code:
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    assert not re.search(r"/\w+/", nbformat.writes(notebook))
