# SPDX-License-Identifier: Apache-2.0
"""All cases, from all tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.reliability.argument_file_mistakes import argument_file_mistakes
from tests.reliability.argument_mistakes import argument_mistakes
from tests.reliability.bad_input import BadInputCase
from tests.reliability.changed_runs import changes
from tests.reliability.checkpoint_mistakes import checkpoint_mistakes
from tests.reliability.damaged_files import damaged_file_cases
from tests.reliability.data_mistakes import data_mistakes
from tests.reliability.faults import fault_cases
from tests.reliability.folder_mistakes import folder_mistakes
from tests.reliability.hub_faults import hub_fault_cases
from tests.reliability.kills import kill_cases
from tests.reliability.two_runs import two_runs_cases

# One of every 35 bad inputs is also tried in a new interpreter.
FRESH_EVERY = 35
BAD_INPUTS: tuple[BadInputCase, ...] = (
    *argument_mistakes(), *argument_file_mistakes(), *data_mistakes(), *checkpoint_mistakes(), *folder_mistakes(),
)  # fmt: skip


def all_cases() -> Iterator[Any]:
    """Yield every bad input, change, kill and fault."""
    yield from BAD_INPUTS
    yield from (replace(case, fresh=True) for case in BAD_INPUTS[::FRESH_EVERY])
    yield from changes()
    yield from kill_cases()
    yield from all_faults()


def all_faults() -> Iterator[Any]:
    """Yield every fault of the machine, of files, of a second run and of the Hub."""
    yield from fault_cases()
    yield from damaged_file_cases()
    yield from two_runs_cases()
    yield from hub_fault_cases()
