# SPDX-License-Identifier: Apache-2.0
"""From the tables to verdicts, in processes that may fork."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.reliability.bad_input_case import try_bad_input
from tests.reliability.bad_inputs import BAD_INPUTS, in_interpreters
from tests.reliability.changed_runs import changes, run_to_the_end, try_change
from tests.reliability.inputs import Inputs
from tests.reliability.kills import SCENARIOS, kill_cases, run_whole, try_kill
from tests.reliability.verdicts import Verdict


def submitted(
    pool: ProcessPoolExecutor, inputs: Inputs, folder: Path, only: str, kills_at_random: int
) -> Iterator[Future[Verdict]]:
    """A future for each case whose kind and name have `only` in them.

    Args:
        pool: of processes that may fork.
        inputs: that cases are made from.
        folder: that has one for each case, for as long as it runs.
        only: such as "bad input: run_image", "interpreter", "changed: sweep", "kill: eval_sweep".
        kills_at_random: of each scenario.
    """
    number = 0

    def submit(tried: Callable[..., Verdict], *more: object) -> Future[Verdict]:
        nonlocal number
        number += 1
        return pool.submit(_guarded, tried, inputs, folder / str(number), *more)

    wanted = [change for change in changes() if only in f"changed: {change.id}"]
    kills = [case for case in kill_cases(kills_at_random) if only in f"kill: {case.id}"]
    # What several cases begin with, or are compared with, comes first.
    runs = dict.fromkeys(change.run for change in wanted if not change.edit)
    finished = {run: folder / "finished" / run for run in runs}
    ends = [pool.submit(run_to_the_end, run, inputs, finished[run]) for run in runs]
    wholes = {
        scenario.id: pool.submit(run_whole, scenario, inputs, folder / "whole" / str(place))
        for place, scenario in enumerate(SCENARIOS)
        if any(case.scenario == scenario for case in kills)
    }
    for run, end in zip(runs, ends, strict=True):
        if end.result().exit_code:
            finished.pop(run)  # each case says so
    for case in BAD_INPUTS:
        if only in f"bad input: {case.id}":
            yield submit(bad_input, case.id)
    for case in in_interpreters():
        if only in f"interpreter: {case.id}":
            yield submit(bad_input, case.id, True)
    for change in wanted:
        yield submit(changed, change, finished.get(change.run))
    for kill in kills:
        whole = wholes[kill.scenario.id]
        yield submit(killed, kill, None if whole.exception() else whole.result(), str(whole.exception()))


def bad_input(inputs: Inputs, folder: Path, case_id: str, real: bool = False) -> Verdict:
    """By its name, since what makes a case cannot go to another process."""
    case = next(case for case in BAD_INPUTS if case.id == case_id)
    return try_bad_input(case, inputs, folder, real)


def changed(inputs: Inputs, folder: Path, change: Any, finished: Path | None = None) -> Verdict:
    return try_change(change, inputs, folder, finished)


def killed(inputs: Inputs, folder: Path, case: Any, whole: Any, why: str = "") -> Verdict:
    if whole is None:
        return Verdict("kills", case.row, case.id, f"not killed: {why[:300]}", "other", "", why)
    return try_kill(case, inputs, folder, whole)


def _guarded(tried: Callable[..., Verdict], inputs: Inputs, folder: Path, *more: object) -> Verdict:
    """A verdict also where trying itself fails."""
    try:
        return tried(inputs, folder, *more)
    except Exception:
        name = str(getattr(more[0], "id", more[0]))
        return Verdict("not tried", "not tried", name, "could not be tried", "other", "", traceback.format_exc())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
