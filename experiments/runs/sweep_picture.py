# SPDX-License-Identifier: Apache-2.0
"""A picture of a sweep: what it keeps of its metric, over the FLOPs that are left and over the measured speed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments.publishing.card import metric_name
from experiments.publishing.picture_style import (
    CONTROL,
    MARKERS,
    MERGED,
    POINTS,
    TRAINED,
    UNMERGED,
    add_legend,
    is_control,
    save_picture,
    series_words,
    shades,
)
from experiments.publishing.tables import with_error

FlatRow = dict[str, Any]
"""A row of a sweep with one number for each thing that was measured; `None` for what was not."""

# For each stage its colour, and what it is called; and what a control is called.
STAGES = {"merged": (MERGED, "merged"), "retrained": (TRAINED, "merged and trained again")}
CONTROL_STAGES = {"merged": "control", "retrained": "control, trained again"}
# More lines could not be told apart.
MOST_SERIES = 8
# How much of a panel's width a letter of a name beside a point takes, and how far above the point names stand, in
# points of print: by turns, where two would meet.
LETTER, LEVELS = 0.017, (6, 17)


def draw_sweep(rows: Sequence[FlatRow], metric: str, title: str, path: Path) -> None:
    """Draw the metric over the share of the FLOPs and, if it was timed, over the speed.

    Args:
        rows: as in the CSV file, each with its `series`; the first one is the unmerged model.
        metric: its name.
        title: of the picture.
        path: of the PNG.
    """
    unmerged, *others = rows
    timed = any(row["speedup"] is not None for row in others)
    figure, panels = plt.subplots(
        1, 1 + timed, figsize=(8 + 4 * timed, 5.4), sharey=True, squeeze=False, constrained_layout=True
    )
    by_flops, *by_speed = panels[0]
    by_flops.invert_xaxis()
    for axes in panels[0]:
        for stage, mark, what in (("merged", "o", "unmerged"), ("retrained", "s", "unmerged, trained again")):
            if unmerged[stage] is not None:
                value, error = 100 * unmerged[stage], 100 * (unmerged[f"{stage}_stderr"] or 0)
                label = f"{what}: {with_error(value, error, '.1f')}"
                if stage == "merged":
                    # Without it a sweep that loses nothing would have no scale.
                    axes.axhspan(value - error, value + error, color=UNMERGED, alpha=0.15, linewidth=0)
                    axes.axhline(value, color=UNMERGED, linewidth=1, linestyle="--")
                    label += ", the band"
                axes.plot(1, value, mark, color=UNMERGED, markersize=8, label=label, zorder=3)
        axes.grid(alpha=0.3)
        axes.margins(x=0.15)  # room for names beside the points
    series, left_out = _series_to_draw(others)
    for index, name in enumerate(series):
        members = [row for row in others if row["series"] == name]
        for stage in STAGES:
            measured = [row for row in members if row[stage] is not None]
            measured.sort(key=lambda row: row["flops_ratio"], reverse=True)
            if measured:
                style = _style(stage, index, series)
                _draw_points(by_flops, measured, stage, [row["flops_ratio"] for row in measured], style)
                for axes in by_speed:
                    _draw_speeds(axes, measured, stage, style)
    if len(series) == 1:
        members = [row for row in others if row["series"] in series]
        _name_points(by_flops, members, "flops_ratio")
        for axes in by_speed:
            _name_points(axes, members, "speedup")
    by_flops.set(xlabel="share of the unmerged model's FLOPs", ylabel=f"{metric_name(metric)} x 100")
    for axes in by_speed:
        axes.set(xlabel="times as fast as unmerged, measured")
        if min(row["speedup"] for row in others if row["speedup"] is not None) < 1:
            left = axes.get_xlim()[0]
            axes.axvspan(left, 1, hatch="//", facecolor="none", edgecolor="lightgray", label="slower than unmerged")
            axes.set_xlim(left=left)
    paired = any(row[f"{stage}_change_stderr"] is not None for row in others for stage in STAGES)
    bars = "standard error of the change from unmerged, paired example by example" if paired else "standard error"
    below = f"Bars up and down: {bars}{'; to the sides: quartiles of the timed rounds' if timed else ''}"
    if left_out:
        below += f"\nNot drawn: {left_out} series that lose more, which are in the table"
    add_legend(figure, panels[0], 2 + timed, below)
    figure.suptitle("\n".join(textwrap.fill(line, 130 if timed else 88) for line in title.splitlines()), fontsize=11)
    save_picture(figure, path)


def _series_to_draw(rows: Sequence[FlatRow]) -> tuple[list[str], int]:
    """The series that save anything, in their order, and how many more there are; of too many, those that lose least in
    the row in which they lose most."""
    worst: dict[str, float] = {}
    for row in rows:
        values = [row[stage] for stage in STAGES if row[stage] is not None]
        # A row that merges nothing is the unmerged model again, unless it was trained.
        if values and (row["flops_ratio"] != 1 or row["retrained"] is not None):
            worst[row["series"]] = min(worst.get(row["series"], max(values)), max(values))
    kept = sorted(worst, key=lambda name: worst[name], reverse=True)[:MOST_SERIES]
    return [name for name in worst if name in kept], len(worst) - len(kept)


def _style(stage: str, index: int, series: Sequence[str]) -> dict[str, Any]:
    """Colour, mark and name of the points of a stage: of several series, each has a shade and a mark of its own."""
    name = series[index]
    kind, what = STAGES[stage]
    alike = [each for each in series if is_control(each) == is_control(name)]
    color = shades(CONTROL if is_control(name) else kind, len(alike))[alike.index(name)]
    if is_control(name):
        what = CONTROL_STAGES[stage]
    return POINTS | {
        "color": color,
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "--" if is_control(name) and stage == "retrained" else "-",
        "label": what if series == ["r"] else f"{what}, {series_words(name)}",
    }


def _draw_points(
    axes: Axes, rows: Sequence[FlatRow], stage: str, places: Sequence[float], style: dict[str, Any], **bars: Any
) -> None:
    values = [100 * row[stage] for row in rows]
    error = (
        f"{stage}_stderr" if all(row[f"{stage}_change_stderr"] is None for row in rows) else f"{stage}_change_stderr"
    )
    errors = [100 * (row[error] or 0) for row in rows]
    axes.errorbar(places, values, yerr=errors, **style, **bars)


def _draw_speeds(axes: Axes, rows: Sequence[FlatRow], stage: str, style: dict[str, Any]) -> None:
    """The same over the speed, with its quartiles, of what was timed."""
    timed = [row for row in rows if row["speedup"] is not None]
    speeds = [row["speedup"] for row in timed]
    below = [row["speedup"] - row["speedup_lower"] for row in timed]
    above = [row["speedup_upper"] - row["speedup"] for row in timed]
    if timed:
        _draw_points(axes, timed, stage, speeds, style, xerr=[below, above])


def _name_points(axes: Axes, rows: Sequence[FlatRow], place: str) -> None:
    """Above each merged point, what merges, as far as there is room."""
    shown = [row for row in rows if row["merged"] is not None and row[place] is not None]
    first, last = map(float, axes.get_xlim())
    taken = dict.fromkeys(LEVELS, 0.0)
    for row in sorted(shown, key=lambda row: row[place], reverse=first > last):
        name = row["name"].removesuffix(f" {row['series']}")
        width, at = LETTER * len(name), (row[place] - first) / (last - first)
        start = min(at, 1 - width)
        level = next((level for level in LEVELS if taken[level] <= start), None)
        if level is None:
            continue
        taken[level] = start + width
        axes.annotate(
            name,
            (row[place], 100 * row["merged"]),
            textcoords="offset points",
            xytext=(5 if start == at else -5, level),
            horizontalalignment="left" if start == at else "right",
            fontsize=8,
        )
