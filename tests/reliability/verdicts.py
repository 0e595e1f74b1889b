# SPDX-License-Identifier: Apache-2.0
"""From verdicts to the tables that are printed and stand in docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.files import write_text
from experiments.publishing.tables import markdown_table

FAULTS = ("wrong in silence", "traceback", "hang", "other")
BEGIN, END = "<!-- begin: written by make reliability -->", "<!-- end: written by make reliability -->"
MOST_SHOWN = 40


@dataclass(frozen=True)
class Verdict:
    """Of any case.

    Attributes:
        kind: which law it tries, a table.
        row: class in the table.
        id: of the case.
        wrong: what was wrong; empty if it passed.
        fault: which kind of wrong it is, one of `FAULTS`; empty if it passed.
        command: what was run.
        detail: what came out, for the log.
        met: stages that kills met.
    """

    kind: str
    row: str
    id: str
    wrong: str
    fault: str
    command: str
    detail: str
    met: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.wrong


def report(verdicts: list[Verdict], heading: str) -> str:
    """Tables of all that was tried, and what did not pass."""
    parts = [heading]
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        of_kind = [verdict for verdict in verdicts if verdict.kind == kind]
        parts.append(f"### {kind[0].upper()}{kind[1:]}\n\n{_table(of_kind)}")
    met = Counter(stage for verdict in verdicts for stage in verdict.met)
    if met:
        table = markdown_table(["while", "kills"], [*met.most_common(), ("**all**", met.total())], "lr")
        parts.append(f"### What the kills met\n\n{table}")
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        lines = [f"- {verdict.id} ({verdict.fault}): {_plain(verdict.wrong)}" for verdict in failed[:MOST_SHOWN]]
        if len(failed) > MOST_SHOWN:
            lines.append(f"- and {len(failed) - MOST_SHOWN} more")
        parts.append("\n".join(["### What did not pass", "", *lines]))
    return "\n\n".join(parts)


def write_report(path: Path, text: str) -> None:
    """Put a report between the markers of a page.

    Raises:
        ValueError: if the page has no markers.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: has no lines '{BEGIN}' and '{END}'")
    write_text(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _table(verdicts: list[Verdict]) -> str:
    classes: Mapping[str, list[Verdict]] = {verdict.row: [] for verdict in verdicts}
    for verdict in verdicts:
        classes[verdict.row].append(verdict)
    columns = ["class", "cases", "passed", "wrong in silence", "tracebacks", "hangs", "other"]
    rows = [_row(name, of_class) for name, of_class in sorted(classes.items())]
    return markdown_table(columns, [*rows, _row("**all**", verdicts)], "lr")


def _row(name: str, verdicts: Iterable[Verdict]) -> list[object]:
    of_row = list(verdicts)
    faults = Counter(verdict.fault for verdict in of_row if not verdict.passed)
    return [name, len(of_row), sum(verdict.passed for verdict in of_row), *(faults[fault] for fault in FAULTS)]


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]
