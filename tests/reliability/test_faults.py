# SPDX-License-Identifier: Apache-2.0
"""A fault of the machine loses no work and gives no wrong result: one case of some faults of `make reliability`."""

from __future__ import annotations

import pytest

from tests.reliability.cases import all_faults

CASES = {case.id: case for case in all_faults()}
TRIED = (
    "full disk: a write fails: run_glue: one stage",
    "memory: a worker is killed: run_glue: one stage, worker processes",
    "signals: SIGTERM in a training step: run_image: two stages, augmented",
    "signals: SIGTERM at any time: eval_sweep: retrained cells",
    "clock: an hour back: run_glue: one checkpoint is kept",
    "output: both streams: run_glue: a searched schedule, retrained",
    "damaged files: newest checkpoint, one bit: run_glue: one stage: model.safetensors",
    "two runs in one folder: run_glue: two stages, then run_glue.py in out/finetuned",
    "the Hub: never answers: the commit",
)


@pytest.mark.parametrize("name", TRIED)
def test_a_fault_of_the_machine_is_survived(check, name):
    check(CASES[name])


def test_there_are_enough_of_every_fault():
    cases = list(all_faults())
    assert len(cases) == len(CASES) >= 150
