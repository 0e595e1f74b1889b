# SPDX-License-Identifier: Apache-2.0
"""Try every bad input, every change and many kills, and write what came of it; `make reliability`.

  python -m tests.reliability                               # all of them, and docs/reliability.md
  python -m tests.reliability --only "run_image: images"    # those whose name has this in it; the page stays

A line of JSON for each case, with its command and what came out, is in OUTPUT_DIR/log.jsonl. Ends with exit code 1 if
any case did not pass.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from experiments.measurement import describe_environment, environment_line
from tests.reliability.bad_input_case import try_bad_input
from tests.reliability.bad_inputs import BAD_INPUTS, in_interpreters
from tests.reliability.changed_runs import changes, try_change
from tests.reliability.forked import isolate, warm_pool
from tests.reliability.inputs import Inputs
from tests.reliability.kills import SCENARIOS, Whole, kill_cases, run_whole, try_kill
from tests.reliability.verdicts import Verdict, report, write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Cases whose kind or name has this in it.")
    parser.add_argument("--kills", type=int, default=6, help="Kills of each scenario at random times.")
    parser.add_argument("--workers", type=int, default=2, help="Cases at a time.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reliability"), help="Of the log.")
    parser.add_argument("--report", type=Path, default=Path("docs/reliability.md"), help="Page with the tables.")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        folder = Path(name).resolve()
        isolate(folder)
        with warm_pool(arguments.workers) as pool:
            environment = pool.submit(describe_environment).result()
            inputs = pool.submit(Inputs.write, folder / "inputs").result()
            verdicts = _try_all(pool, inputs, folder / "cases", arguments)
    minutes = (time.monotonic() - start) / 60
    heading = (
        f"`{_command()}`, {arguments.workers} cases at a time, {minutes:.0f} minutes: {len(verdicts)} cases, "
        f"{sum(verdict.passed for verdict in verdicts)} passed.\n\n{environment_line(environment)}"
    )
    text = report(verdicts, heading)
    print(text)
    (arguments.output_dir / "report.md").write_text(text + "\n")
    if not arguments.only:
        write_report(arguments.report, text)
    return 0 if verdicts and all(verdict.passed for verdict in verdicts) else 1


def _command() -> str:
    return " ".join(["python -m tests.reliability", *sys.argv[1:]])


def _try_all(pool: ProcessPoolExecutor, inputs: Inputs, folder: Path, arguments: argparse.Namespace) -> list[Verdict]:
    """Verdicts in the order of the tables, logged as they come."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    futures = list(_submitted(pool, inputs, folder, arguments))
    places = {future: place for place, future in enumerate(futures)}
    verdicts: dict[int, Verdict] = {}
    failed = 0
    with (arguments.output_dir / "log.jsonl").open("w") as log:
        for future in (bar := tqdm(as_completed(futures), total=len(futures), unit="case")):
            verdict = future.result()
            verdicts[places[future]] = verdict
            log.write(json.dumps(asdict(verdict)) + "\n")
            log.flush()
            if not verdict.passed:
                failed += 1
                bar.write(f"{verdict.id} ({verdict.fault}): {verdict.wrong}")
            bar.set_postfix(failed=failed)
    return [verdicts[place] for place in sorted(verdicts)]


def _submitted(
    pool: ProcessPoolExecutor, inputs: Inputs, folder: Path, arguments: argparse.Namespace
) -> Iterator[Future[Verdict]]:
    """A future for each case that is wanted."""
    number = 0

    def submit(tried: Callable[..., Verdict], case: object, kind: str, *more: object) -> Future[Verdict]:
        nonlocal number
        number += 1
        return pool.submit(_guarded, tried, case, kind, inputs, folder / str(number), *more)

    kills = [case for case in kill_cases(arguments.kills) if arguments.only in f"kill: {case.id}"]
    scenarios = [scenario for scenario in SCENARIOS if any(case.scenario == scenario for case in kills)]
    wholes = {
        scenario.id: pool.submit(run_whole, scenario, inputs, folder / "whole" / str(place))
        for place, scenario in enumerate(scenarios)
    }
    for case in BAD_INPUTS:
        if arguments.only in f"bad input: {case.id}":
            yield submit(try_bad_input, case, "bad input")
    for case in in_interpreters():
        if arguments.only in f"interpreter: {case.id}":
            yield submit(try_bad_input, case, "bad input", True)
    for change in changes():
        if arguments.only in f"changed: {change.id}":
            yield submit(try_change, change, "changed")
    for case in kills:
        whole = wholes[case.scenario.id]
        if error := whole.exception():
            yield submit(_not_run, case, "kill", str(error))
        else:
            yield submit(try_kill, case, "kill", whole.result())


def _not_run(case: object, inputs: Inputs, folder: Path, why: str) -> Verdict:
    raise RuntimeError(why)


def _guarded(tried: Callable[..., Verdict], case: object, kind: str, inputs: Inputs, folder: Path, *more: Whole):
    """A verdict also where trying itself fails."""
    try:
        return tried(case, inputs, folder, *more)
    except Exception as error:
        wrong = f"could not be tried: {str(error)[:500]}"
        return Verdict(kind, case.row, case.id, wrong, "other", "", traceback.format_exc())  # type: ignore[attr-defined]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
