# SPDX-License-Identifier: Apache-2.0
"""examples/merge_your_perceiver.ipynb, really executed, with a model that is hardly trained."""

from __future__ import annotations

import re

import nbformat
from nbclient import NotebookClient

from tests.support.script_run import ROOT

NOTEBOOK = ROOT / "examples" / "merge_your_perceiver.ipynb"


def test_every_cell_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = "EPOCHS, TRAIN_IMAGES, MAX_CHANGED = 1, 64, 1.0"
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "times as fast" in printed and "modeling_tome_perceiver.py" in printed
    assert "as saved, latents left at the end:" in printed


def test_what_is_committed_was_executed_and_names_no_machine():
    """Every cell in its order, with what it gave; no path from the root of a disk, so nothing between two slashes."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    for cell in code:
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    assert not re.search(r"/\w+/", nbformat.writes(notebook))
