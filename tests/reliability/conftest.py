# SPDX-License-Identifier: Apache-2.0
"""The inputs of all cases, and the verdict on one, for the tests in this folder."""

import pytest

from tests.reliability.case import try_case
from tests.reliability.inputs import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return Inputs.write(tmp_path_factory.mktemp("reliability") / "inputs")


@pytest.fixture
def check(inputs, tmp_path):
    """Fail with what was run and what came out, if a case does not pass."""

    def checked(case):
        verdict = try_case(case, inputs, tmp_path / "case")
        assert verdict.passed, f"{verdict.wrong}: {verdict.command}\n{verdict.detail}"
        return verdict

    return checked
