# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests in this folder: inputs of all cases, and a check of one case."""

import pytest

from tests.reliability.case import try_case
from tests.reliability.inputs import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return Inputs.write(tmp_path_factory.mktemp("reliability") / "inputs")


@pytest.fixture
def check(inputs, tmp_path):
    """Return a function that tries a case and fails with its command and outcome if it does not pass."""

    def checked(case):
        verdict = try_case(case, inputs, tmp_path / "case")
        assert verdict.passed, f"{verdict.wrong}: {verdict.command}\n{verdict.detail}"
        return verdict

    return checked
