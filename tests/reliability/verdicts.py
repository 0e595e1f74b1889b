# SPDX-License-Identifier: Apache-2.0
"""Write verdicts as tables, for the terminal and docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from experiments.files import write_text
from experiments.publishing.tables import markdown_table
from tests.reliability.case import FAULTS, Verdict

ALL = "make reliability"


def report(verdicts: list[Verdict], heading: str) -> str:
    """Return a table for each kind, the stages that were killed, and the cases that did not pass."""
    parts = [heading]
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        of_kind = [verdict for verdict in verdicts if verdict.kind == kind]
        parts.append(f"### {kind[0].upper()}{kind[1:]}\n\n{_table(of_kind)}")
    stages = Counter(stage for verdict in verdicts for stage in verdict.stages)
    if stages:
        table = markdown_table(["while", "kills"], [*stages.most_common(), ("**all**", stages.total())], "lr")
        parts.append(f"### What the kills met\n\n{table}")
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        lines = [f"- {verdict.id} ({verdict.fault}): {' '.join(verdict.wrong.split())[:300]}" for verdict in failed]
        parts.append("\n".join(["### What did not pass", "", *lines]))
    return "\n\n".join(parts)


def write_report(path: Path, text: str, command: str = ALL) -> None:
    """Replace the text between the markers of a command, if a page has them, by its report."""
    begin, end = (f"<!-- {mark}: written by {command} -->" for mark in ("begin", "end"))
    page = path.read_text()
    if begin in page:
        before, _, rest = page.partition(begin)
        write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def _table(verdicts: list[Verdict]) -> str:
    rows = []
    for name in [*sorted({verdict.row for verdict in verdicts}), None]:
        of_row = [verdict for verdict in verdicts if name in (verdict.row, None)]
        faults = Counter(verdict.fault for verdict in of_row)
        rows.append([name or "**all**", len(of_row), faults[""], *(faults[fault] for fault in FAULTS)])
    columns = ["class", "cases", "passed", "silently wrong", "tracebacks", "hangs", "other"]
    return markdown_table(columns, rows, "lr")
