# SPDX-License-Identifier: Apache-2.0
"""All bad inputs, from the tables."""

from __future__ import annotations

from tests.reliability.argument_file_mistakes import argument_file_mistakes
from tests.reliability.argument_mistakes import argument_mistakes
from tests.reliability.bad_input_case import BadInputCase
from tests.reliability.checkpoint_mistakes import checkpoint_mistakes
from tests.reliability.data_mistakes import data_mistakes
from tests.reliability.folder_mistakes import folder_mistakes

# Every so many is tried in an interpreter of its own too.
SAMPLED = 35

BAD_INPUTS: tuple[BadInputCase, ...] = (
    *argument_mistakes(), *argument_file_mistakes(), *data_mistakes(), *checkpoint_mistakes(), *folder_mistakes(),
)  # fmt: skip


def in_interpreters() -> tuple[BadInputCase, ...]:
    """Some of them from all tables, for what a fork does not show: imports, and how an interpreter ends."""
    return BAD_INPUTS[::SAMPLED]
