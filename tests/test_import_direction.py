# SPDX-License-Identifier: Apache-2.0
"""The model files import each other and nothing else of this repository: a checkpoint carries them, and only them.

`lint-imports` keeps the direction within `experiments/` (pyproject.toml); it reads packages only.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.script_run import ROOT

MODEL_FILES = sorted(ROOT.glob("*_tome_perceiver.py"))
MODEL_MODULES = {path.stem for path in MODEL_FILES}
OTHERS = {path.stem for path in ROOT.glob("*.py")} - MODEL_MODULES | {"benchmarks", "examples", "experiments", "tests"}


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_a_model_file_imports_no_other_part_of_the_repository(path):
    assert not imported(path) & OTHERS


def test_an_import_is_seen_wherever_it_stands(tmp_path):
    (tmp_path / "module.py").write_text(
        "try:\n    from .a.b import c\nexcept ImportError:\n    import d.e as f\ndef g():\n    from . import h\n"
    )
    assert imported(tmp_path / "module.py") == {"a", "d", "h"}


def test_a_model_runs_without_the_modules_of_cost_and_frontier():
    """They are read when a budget is first asked for, and not by whoever only loads and runs a checkpoint."""
    run = (
        "import sys, torch, tests.support.tiny_models as tiny\n"
        "tiny.tiny_model('ForSequenceClassification', r=2)(**tiny.tiny_inputs('ForSequenceClassification'))\n"
        "print(sorted(name for name in sys.modules if name.endswith('_tome_perceiver')))"
    )
    shown = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=True)
    names = ("configuration", "layers", "merging", "modeling")
    assert shown.stdout.strip() == str([f"{name}_tome_perceiver" for name in names])
