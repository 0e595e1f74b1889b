# SPDX-License-Identifier: Apache-2.0
"""The model files import each other and nothing else of this repository: a checkpoint carries only them.

`lint-imports` keeps the direction within packages (pyproject.toml).
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.script_run import ROOT

MODEL_FILES = sorted(ROOT.glob("*_tome_perceiver.py"))
MODEL_MODULES = {path.stem for path in MODEL_FILES}
OTHERS = {path.stem for path in ROOT.glob("*.py")} - MODEL_MODULES | {"benchmarks", "examples", "experiments", "tests"}


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_a_model_file_imports_no_other_part_of_the_repository(path: Path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    assert not {name.partition(".")[0] for name in names} & OTHERS


def test_pip_installs_the_model_files_and_nothing_else():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {*setuptools["py-modules"]} == MODEL_MODULES and setuptools["packages"] == []


def test_a_model_runs_without_the_modules_of_cost_and_frontier():
    """A model imports them only when a budget is given."""
    run = (
        "import sys, torch, tests.support.tiny_models as tiny\n"
        "tiny.tiny_model('ForSequenceClassification', r=2)(**tiny.tiny_inputs('ForSequenceClassification'))\n"
        "print(sorted(name for name in sys.modules if name.endswith('_tome_perceiver')))"
    )
    shown = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=True)
    names = ("configuration", "layers", "merging", "modeling")
    assert shown.stdout.strip() == str([f"{name}_tome_perceiver" for name in names])
