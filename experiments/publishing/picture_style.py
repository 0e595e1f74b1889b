# SPDX-License-Identifier: Apache-2.0
"""Shared style of all pictures: fixed colours, and names at the lines or in a legend below the panels.

Stock transformers are black, the unmerged model grey, searched merging blue, and what it is compared to orange.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.colors import Colormap

from experiments.files import write_whole

matplotlib.use("Agg")  # works without a screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Color = tuple[float, ...]
STOCK, UNMERGED = "black", "gray"
MERGED, CONTROL = (matplotlib.colormaps[name] for name in ("Blues", "Oranges"))
# Colours of the lines of a sweep that are neither searched nor a given r.
OTHER_SERIES: list[Color] = [matplotlib.colormaps["Dark2"](index) for index in range(8)]
MARKERS = "osD^vP*X<>hp8d"
POINT_STYLE: dict[str, Any] = {"markersize": 6, "linewidth": 1.5, "elinewidth": 1, "capsize": 3}
SCHEDULE_LABELS = {"r": "given r", "search": "searched (ours)", "frontier": "frontier (ours)"}


class LineEnd(NamedTuple):
    """Last point of a line, in data coordinates, with the line's name and colour."""

    x: float
    y: float
    name: str
    color: Color


def shades(base: Colormap, count: int) -> list[tuple[float, ...]]:
    """Return distinguishable shades of a base colour, such as `MERGED`, dark to light."""
    if count == 1:
        return [base(0.75)]
    return [base(0.95 - 0.5 * index / (count - 1)) for index in range(count)]


def series_colors(series: Sequence[str], stages: int) -> list[Color]:
    """Return a colour for each series of a sweep, repeated for its stages."""
    fixed: dict[str, Color] = {"search": MERGED(0.8), "frontier": MERGED(0.8), "r": CONTROL(0.7)}
    colors: list[Color] = []
    for place, name in enumerate(series):
        # Of several methods of one schedule, the first has the schedule's colour.
        colors += [fixed.pop(name.partition(" ")[0], OTHER_SERIES[place % len(OTHER_SERIES)])] * stages
    return colors


def series_label(series: str, is_constant_r: bool, is_retrained: bool) -> str:
    """Return the name of a line of a sweep: its schedule, its method if it names one, and whether it was retrained."""
    schedule, _, method = series.partition(" ")
    label = SCHEDULE_LABELS.get(schedule, f"schedule {schedule}")
    if is_constant_r and schedule == "r":
        label = "constant r (paper)"
    name, _, whose = label.partition(" (")
    words = f"{name}{f', {method}' if method else ''}{', retrained' if is_retrained else ''}"
    return f"{words} ({whose}" if whose else words


def name_lines(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Write the name of each line right of its end; names that would overlap move up or down."""
    low, high = axes.get_ylim()
    height = 0.055 * (high - low)  # of a line of text, in data coordinates
    free = high
    for end in sorted(ends, key=lambda end: -end.y):
        free = min(end.y, free - height)
        axes.annotate(
            f"  {end.name}", (end.x, end.y), xytext=(end.x, free), color=end.color, va="center", fontsize=10,
            annotation_clip=False,
        )  # fmt: skip


def add_legend(figure: Figure, panels: Iterable[Axes], columns: int, title: str | None = None) -> None:
    """Add a legend below the panels that lists each label once."""
    named = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        named.values(), named, loc="outside lower center", ncols=columns, fontsize=9, title=title, title_fontsize=9
    )


def save_picture(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, and close the figure."""
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
