# SPDX-License-Identifier: Apache-2.0
"""The model files at the root, all of them: pyproject.toml, which has the rest, takes no pattern for modules."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

setup(py_modules=sorted(path.stem for path in ROOT.glob("*_tome_perceiver.py")))
