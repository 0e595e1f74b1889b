# SPDX-License-Identifier: Apache-2.0
"""One process that may fork, and the inputs of all cases, for the tests in this folder."""

import os
import shutil

import pytest

from tests.reliability.forked import isolate, warm_pool
from tests.reliability.inputs import Inputs


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """The pool and the inputs."""
    folder = tmp_path_factory.mktemp("reliability")
    before = dict(os.environ)
    isolate(folder)
    with warm_pool(1) as pool:
        # The process starts now, and keeps the environment.
        inputs = pool.submit(Inputs.write, folder / "inputs").result()
        os.environ.clear()
        os.environ.update(before)
        yield pool, inputs
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(warm, tmp_path):
    """A case's function, called in the process that may fork with the inputs and a new folder."""
    pool, inputs = warm
    return lambda tried, *more: pool.submit(tried, inputs, tmp_path / "case", *more).result()
