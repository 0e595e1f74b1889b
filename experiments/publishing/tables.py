# SPDX-License-Identifier: Apache-2.0
"""Text of reports and cards: Markdown tables, figures with errors, escaped names, and values without local paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.escaping import printable

ALIGNMENT_RULES = {"l": "---", "r": "---:"}
UNDEFINED = "undefined"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "l") -> str:
    """Return a Markdown table without a line break at its end.

    Args:
        header: headings of the columns.
        rows: cells of each row, in Markdown; `None` leaves a cell empty.
        align: "l" (left) or "r" (right) for each column; the last letter also aligns all further columns.

    Raises:
        ValueError: for a row with more or fewer cells than the header.
    """
    rules = [ALIGNMENT_RULES[align[min(column, len(align) - 1)]] for column in range(len(header))]
    lines = [_line(header), f"|{'|'.join(rules)}|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells under a header of {len(header)}: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    # A line break would end the row, and "|" would end the cell.
    shown = ("" if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(shown)} |"


def with_error(value: float | None, error: float | None, form: str = ".2f", scale: float = 1) -> str:
    """Return a figure with its standard error, "81.23 ± 0.40".

    Args:
        value: the figure; `None` if it is undefined.
        error: its standard error; `None` if there is none, as with a single example.
        form: format of both, such as "+.2f"; the error never has a sign.
        scale: factor that both are multiplied by.
    """
    if value is None:
        return UNDEFINED
    shown = f"{scale * value:{form}}"
    return shown if error is None else f"{shown} ± {scale * error:{form.removeprefix('+')}}"


def escape_markdown(value: object) -> str:
    """Return a name or value on one line, with control characters and Markdown's special characters escaped."""
    text = printable(" ".join(str(value).split()))
    # An underscore within a word has no meaning in Markdown; the Hub takes "$" for the start of a formula.
    return re.sub(r"([\\`*<>\[|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def without_local_paths(value: Any) -> Any:
    """Return a JSON value with every local path shortened to its last part, so that it shows nothing of this machine.

    A relative path of two parts that does not exist counts as a Hub id and stays.
    """
    if isinstance(value, dict):
        return {name: without_local_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    if not isinstance(value, str) or not value or "\n" in value or "://" in value:
        return value
    if re.match(r"--\w+ ", value):  # an argument with its value
        name, _, given = value.partition(" ")
        return f"{name} {without_local_paths(given)}"
    parts = value.split("/")
    if not (parts[0] in ("", ".", "..", "~") or len(parts) > 2 or "/" in value and Path(value).exists()):
        return value
    named = [part for part in parts if part not in ("", ".", "..", "~")]
    return named[-1] if named else Path(value).expanduser().resolve().name
