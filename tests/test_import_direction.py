# SPDX-License-Identifier: Apache-2.0
"""The model files import each other and nothing else of this repository: a checkpoint carries them, and only them.

`lint-imports` keeps the direction within `experiments/` (pyproject.toml); it reads packages only.
"""

from __future__ import annotations

import ast
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
