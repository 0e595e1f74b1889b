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
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from experiments.measurement import describe_environment, environment_line
from tests.reliability.forked import isolate, warm_pool
from tests.reliability.inputs import Inputs
from tests.reliability.trying import submitted
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
    futures = list(submitted(pool, inputs, folder, arguments.only, arguments.kills))
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


if __name__ == "__main__":
    sys.exit(main())
