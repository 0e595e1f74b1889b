# SPDX-License-Identifier: Apache-2.0
"""A mistake is refused in one line, before any work, without any change on disk: one case of each kind and script.

All of them: `make reliability`.
"""

from __future__ import annotations

import pytest

from tests.reliability.cases import BAD_INPUTS

FIRST_OF_EACH_CLASS_AND_SCRIPT = {(case.row, case.script): case for case in reversed(BAD_INPUTS)}.values()


@pytest.mark.parametrize("case", FIRST_OF_EACH_CLASS_AND_SCRIPT, ids=lambda case: case.id)
def test_a_mistake_is_one_line(check, case):
    check(case)


def test_there_are_enough_of_every_kind():
    """Every case has its own id."""
    assert len({case.id for case in BAD_INPUTS}) == len(BAD_INPUTS) >= 150
