# SPDX-License-Identifier: Apache-2.0
"""Tables and figures in Markdown, the same in cards, reports and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

RULES = {"l": "---", "r": "---:"}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "l") -> str:
    """A table: a line for the header, one for the alignment, one for each row, none of them ended.

    Args:
        header: what stands over each column.
        rows: a cell for each column; `None` is an empty one.
        align: "l" (left) or "r" (right) for each column; the last letter is for all that come after it too.

    Raises:
        ValueError: for a row with more or fewer cells than the header.
    """
    rules = [RULES[align[min(column, len(align) - 1)]] for column in range(len(header))]
    lines = [_line(header), f"|{'|'.join(rules)}|"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells under a header of {len(header)}: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Iterable[object]) -> str:
    # A line break would end the row, and a bar the cell.
    shown = ("" if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(shown)} |"


UNDEFINED = "undefined"


def with_error(value: float | None, error: float | None, form: str = ".2f", scale: float = 1) -> str:
    """A figure with its standard error, "81.23 ± 0.40", both in one format; a sign that it asks for is the figure's.

    Args:
        value: `None` for a figure that is not defined.
        error: `None` for a figure that has none, such as that of a single example.
        form: of both.
        scale: what both are multiplied by.
    """
    if value is None:
        return UNDEFINED
    shown = f"{scale * value:{form}}"
    return shown if error is None else f"{shown} ± {scale * error:{form.removeprefix('+')}}"
