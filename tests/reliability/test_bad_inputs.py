# SPDX-License-Identifier: Apache-2.0
"""A mistake is one line, before any work, with everything on disk as it was: some of the cases of every table.

All of them: `make reliability`.
"""

from __future__ import annotations

import pytest

from tests.reliability.cases import BAD_INPUTS

# The first mistake of each class for each script.
SOME = {(case.row, case.script): case for case in reversed(BAD_INPUTS)}.values()


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_a_mistake_is_one_line(check, case):
    check(case)


def test_there_are_enough_of_every_kind():
    """The names tell them apart, in the tables and on the command line."""
    assert len({case.id for case in BAD_INPUTS}) == len(BAD_INPUTS) >= 150
