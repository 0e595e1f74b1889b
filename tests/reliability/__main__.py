# SPDX-License-Identifier: Apache-2.0
"""Try every bad input, every change between two runs and many kills, and report the verdicts (`make reliability`).

  python -m tests.reliability                               # all of them, and docs/reliability.md
  python -m tests.reliability --only "run_image: images"    # those whose kind or name contains this
  python -m tests.reliability --only "faults: "             # those of the page's second report

OUTPUT_DIR/log.jsonl has a line of JSON for each case, with its command and what came out. Ends with exit code 1 if any
case did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tests.support.script_run import isolated_environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Cases whose kind or name contains this.")
    parser.add_argument("--workers", type=int, default=2, help="Cases at a time.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reliability"), help="Of the log.")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        folder = Path(name).resolve()
        os.environ |= isolated_environment(folder / "home")
        # Imported only here, because libraries read the environment when they are imported.
        from experiments.measurement import describe_environment, environment_line
        from tests.reliability.verdicts import ALL, report, write_report

        verdicts = _try_all(folder, arguments)
    minutes = (time.monotonic() - start) / 60
    heading = (
        f"`{shlex.join(['python', '-m', 'tests.reliability', *sys.argv[1:]])}`, {arguments.workers} cases at a time, "
        f"{minutes:.0f} minutes: {len(verdicts)} cases, {sum(verdict.passed for verdict in verdicts)} passed.\n\n"
        f"{environment_line(describe_environment())}"
    )
    text = report(verdicts, heading)
    print(text)
    (arguments.output_dir / "report.md").write_text(text + "\n")
    write_report(Path("docs/reliability.md"), text, shlex.join(sys.argv[1:]) or ALL)
    return 0 if verdicts and all(verdict.passed for verdict in verdicts) else 1


def _try_all(folder: Path, arguments: argparse.Namespace) -> list:
    """Return the verdicts in the order of the cases, and log each one at once."""
    from datasets import disable_progress_bars

    from tests.reliability.case import try_case
    from tests.reliability.cases import all_cases
    from tests.reliability.inputs import Inputs

    cases = [case for case in all_cases() if arguments.only in f"{case.kind}: {case.id}"]
    disable_progress_bars()
    inputs = Inputs.write(folder / "inputs")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (
        ThreadPoolExecutor(arguments.workers) as pool,
        (arguments.output_dir / "log.jsonl").open("w") as log,
        tqdm(total=len(cases), unit="case") as bar,
    ):
        futures = [pool.submit(try_case, case, inputs, folder / "cases" / str(at)) for at, case in enumerate(cases)]
        for future in as_completed(futures):
            verdict = future.result()
            log.write(json.dumps(asdict(verdict)) + "\n")
            log.flush()
            if not verdict.passed:
                failed += 1
                bar.write(f"{verdict.id} ({verdict.fault}): {verdict.wrong}")
            bar.set_postfix(failed=failed)
            bar.update()
    return [future.result() for future in futures]


if __name__ == "__main__":
    sys.exit(main())
