# SPDX-License-Identifier: Apache-2.0
"""A killed run, called again, ends with the same results: some of the kills of `make reliability`."""

from __future__ import annotations

import pytest

from tests.reliability.kills import SCENARIOS, KillCase, kill_cases

CASES = (
    KillCase(SCENARIOS[1], 0),
    KillCase(SCENARIOS[1], 1, "transformers.modeling_utils:safe_save_file", half=True),
    KillCase(SCENARIOS[6], 2, "transformers.trainer:Trainer._save_rng_state"),
    KillCase(SCENARIOS[7], 3, "shutil:copyfile", half=True),
    KillCase(SCENARIOS[9], 4),
    KillCase(SCENARIOS[11], 5, "pathlib:Path.write_text", half=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_killed_run_ends_as_if_it_never_was(check, case):
    assert check(case).stages


def test_there_are_enough_of_every_script():
    cases = list(kill_cases())
    assert len({case.id for case in cases}) == len(cases) >= 60
    assert len({case.scenario.script for case in cases}) == 4
