# SPDX-License-Identifier: Apache-2.0
"""A mistake is one line, before any work, with everything on disk as it was: a part of the cases in every table.

All of them: `make reliability`.
"""

from __future__ import annotations

import pytest

from tests.reliability.bad_input_case import BadInputCase
from tests.reliability.bad_inputs import BAD_INPUTS
from tests.reliability.trying import bad_input

EVERY = 6


@pytest.mark.parametrize("case", BAD_INPUTS[::EVERY], ids=lambda case: case.id)
def test_a_mistake_is_one_line(run, case: BadInputCase):
    verdict = run(bad_input, case.id)
    assert verdict.passed, f"{verdict.wrong}: {verdict.command}\n{verdict.detail}"


def test_there_are_enough_of_every_kind():
    """The names tell them apart, in the tables and on the command line."""
    assert len({case.id for case in BAD_INPUTS}) == len(BAD_INPUTS) >= 150
    assert {case.script for case in BAD_INPUTS[::EVERY]} == {case.script for case in BAD_INPUTS}
    assert {case.mistake for case in BAD_INPUTS[::EVERY]} == {case.mistake for case in BAD_INPUTS}
