# SPDX-License-Identifier: Apache-2.0
"""Run the code blocks of the pages that are marked as runnable, as they are written (`make docs-check`).

  python -m tests.documents                       # all pages
  python -m tests.documents --only docs/merge.md  # pages whose path contains this

Each page runs in a fresh copy of the repository, without a network, on tiny data and checkpoints: first its bash
blocks, one by one, then its Python blocks as one program. All other blocks are checked without running them, and the
links of all pages too. Ends with exit code 1 if anything failed. `tests/documents/pages.py` describes the marks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support.script_run import isolated_environment

# A block may take this long, in seconds.
TIME_LIMIT = 600
# Lines of the output of a failed block that are shown.
SHOWN_LINES = 15


@dataclass
class Result:
    """Outcome of a block that ran."""

    commands: int
    failed: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Pages whose path contains this.")
    parser.add_argument("--workers", type=int, default=2, help="Pages at a time.")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="documents-") as name:
        folder = Path(name).resolve()
        os.environ |= isolated_environment(folder / "home")
        # Imported only here, because libraries read the environment when they are imported.
        from tests.documents.pages import ROOT, all_pages
        from tests.documents.stand_ins import write_stand_ins

        pages = [page for page in all_pages() if arguments.only in str(page.path.relative_to(ROOT))]
        mistakes = _check(pages)
        write_stand_ins(folder / "stand-ins")
        with ThreadPoolExecutor(arguments.workers) as pool:
            results = [result for page in pool.map(lambda page: _run_page(page, folder), pages) for result in page]
    failures = sum(result.failed for result in results)
    print(*mistakes, sep="\n")
    commands = sum(result.commands for result in results)
    print(
        f"{len(results)} blocks with {commands} commands ran on {len(pages)} pages in "
        f"{(time.monotonic() - start) / 60:.1f} minutes: {failures} failed, {len(mistakes)} other mistakes"
    )
    return 1 if failures or mistakes or not pages else 0


def _check(pages: list) -> list[str]:
    """Return the mistakes that are found without running anything."""
    from tests.documents.commands import check_block

    return [
        *(f"{page.path}: broken link {link}" for page in pages for link in page.broken_links()),
        *(f"{block.place}: {mistake}" for page in pages for block in page.blocks for mistake in check_block(block)),
    ]


def _run_page(page, folder: Path) -> list[Result]:
    """Run the marked blocks of a page, and print a line for each."""
    from tests.documents.commands import spell_commands
    from tests.documents.stand_ins import TASK, TASK_OF_STAND_IN

    marked = [block for block in page.blocks if block.mark == "run"]
    if not marked:
        return []
    copy = Path(tempfile.mkdtemp(prefix="clone-", dir=folder))
    _copy_repository(copy)
    shutil.copytree(folder / "stand-ins", copy, dirs_exist_ok=True)
    results = []
    for block in marked:
        if block.language == "bash":
            program = block.program.replace(TASK, TASK_OF_STAND_IN)
            words = ["bash", "-e", "-o", "pipefail", "-c", program]
            results.append(_run(block.place, words, len(spell_commands(block.text)), copy))
    if python := [block for block in marked if block.language == "python"]:
        program = "\n".join(block.program for block in python)
        results.append(_run(python[0].place, [sys.executable, "-c", program], len(python), copy))
    shutil.rmtree(copy)
    return results


def _run(place: str, words: list[str], commands: int, cwd: Path) -> Result:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    start = time.monotonic()
    try:
        done = subprocess.run(
            words, cwd=cwd, env=os.environ | {"PATH": path}, timeout=TIME_LIMIT, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        failure = "" if done.returncode == 0 else f"exit code {done.returncode}\n{_end_of(done.stdout)}"
    except subprocess.TimeoutExpired as error:
        failure = f"ran longer than {TIME_LIMIT} s\n{_end_of((error.stdout or b'').decode(errors='replace'))}"
    outcome = f"FAILED, {failure}" if failure else "passed"
    print(f"{place}: {commands} commands, {time.monotonic() - start:.0f} s, {outcome}", flush=True)
    return Result(commands, bool(failure))


def _end_of(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-SHOWN_LINES:])


def _copy_repository(folder: Path) -> None:
    """Copy the files that a clean clone of the repository would have."""
    from tests.documents.pages import ROOT

    for name in _files_of_a_clone(ROOT):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)


def _files_of_a_clone(root: Path) -> Iterator[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return (name for name in listed.stdout.split("\0") if name and (root / name).is_file())


if __name__ == "__main__":
    sys.exit(main())
