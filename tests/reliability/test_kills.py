# SPDX-License-Identifier: Apache-2.0
"""A run that gets SIGKILL ends, called again, as if nothing had happened: some of the kills of `make reliability`."""

from __future__ import annotations

import pytest

from tests.reliability.kills import SCENARIOS, KillCase, kill_cases, run_whole
from tests.reliability.trying import killed

CASES = (
    KillCase(SCENARIOS[1], 0),
    KillCase(SCENARIOS[1], 1, "transformers.modeling_utils:safe_save_file", half=True),
    KillCase(SCENARIOS[6], 2, "transformers.trainer:Trainer._save_rng_state"),
    KillCase(SCENARIOS[7], 3, "shutil:copyfile", half=True),
    KillCase(SCENARIOS[9], 4),
    KillCase(SCENARIOS[11], 5, "pathlib:Path.write_text", half=True),
)


@pytest.fixture(scope="module")
def wholes(warm, tmp_path_factory):
    """What a scenario leaves that is never killed, run when it is first asked for."""
    pool, inputs = warm
    found = {}

    def whole(scenario):
        if scenario.id not in found:
            folder = tmp_path_factory.mktemp("whole") / "case"
            found[scenario.id] = pool.submit(run_whole, scenario, inputs, folder).result()
        return found[scenario.id]

    return whole


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_killed_run_ends_as_if_it_never_was(run, wholes, case: KillCase):
    verdict = run(killed, case, wholes(case.scenario))
    assert verdict.passed, f"{verdict.wrong}: {verdict.command}\n{verdict.detail}"
    assert verdict.met


def test_there_are_enough_of_every_script():
    cases = list(kill_cases(6))
    assert len({case.id for case in cases}) == len(cases) >= 60
    assert len({case.scenario.script for case in cases}) == 4
