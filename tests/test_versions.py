# SPDX-License-Identifier: Apache-2.0
"""`make test-oldest` tests the lower bounds of pyproject.toml."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.script_run import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lower_bounds(entries: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the lower bound of each requirement by name, as numbers."""
    bounds = {}
    for requirement in map(Requirement, entries):
        (bound,) = [one.version for one in requirement.specifier if one.operator in (">=", "==")]
        bounds[requirement.name] = Version(bound).release
    return bounds


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    """Except those of torch, which stays as in .venv, of packaging, of which pytest needs a newer one, and of the
    huggingface_hub of the model files, which transformers 5.0 raises."""
    model = lower_bounds(PROJECT["dependencies"])
    scripts = model | lower_bounds(PROJECT["optional-dependencies"]["scripts"])
    for name, bounds, untested in (
        ("oldest", scripts, {"torch", "packaging", "huggingface_hub"}),
        ("oldest-model", {name: model[name] for name in ("transformers", "huggingface_hub")}, set()),
    ):
        lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
        tested = lower_bounds([line.partition(" ")[0] for line in lines if not line.startswith("#")])
        for package in bounds.keys() - untested:
            bound = bounds[package]
            assert tested[package][: len(bound)] == bound, (name, package)
