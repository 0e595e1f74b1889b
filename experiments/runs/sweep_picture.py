# SPDX-License-Identifier: Apache-2.0
"""A picture of a sweep: what it keeps of its metric, over the FLOPs that are left and over the measured speed.

In every picture of this project unmerged is grey, merged blue, trained again with merging on green.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from experiments.files import write_whole
from experiments.publishing.card import metric_name
from experiments.publishing.tables import with_error

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FlatRow = dict[str, Any]
"""A row of a sweep with one number for each thing that was measured; `None` for what was not."""

UNMERGED = "gray"
# For each stage its colour map, how dark it is with one series, and what it is called.
STAGES = {
    "merged": (matplotlib.colormaps["Blues"], 0.75, "merged"),
    "retrained": (matplotlib.colormaps["Greens"], 0.75, "merged and trained again"),
}
MARKERS = "osD^vP*X<>hp8d"
SERIES = {"r": "r as given", "search": "as a search found it"}


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
        1, 1 + timed, figsize=(6.5 + 5.5 * timed, 5.4), sharey=True, squeeze=False, constrained_layout=True
    )
    by_flops, *by_speed = panels[0]
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
    series = list(dict.fromkeys(row["series"] for row in others))
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
        _name_points(by_flops, others, "flops_ratio")
        for axes in by_speed:
            _name_points(axes, others, "speedup")
    by_flops.set(xlabel="share of the unmerged model's FLOPs", ylabel=f"{metric_name(metric)} x 100")
    by_flops.invert_xaxis()
    for axes in by_speed:
        axes.set(xlabel="times as fast as unmerged, measured")
        if min(row["speedup"] for row in others if row["speedup"] is not None) < 1:
            left = axes.get_xlim()[0]
            axes.axvspan(left, 1, hatch="//", facecolor="none", edgecolor="lightgray", label="slower than unmerged")
            axes.set_xlim(left=left)
    paired = any(row[f"{stage}_change_stderr"] is not None for row in others for stage in STAGES)
    bars = "standard error of the change from unmerged, paired example by example" if paired else "standard error"
    # What is in both panels stands there once.
    named = {label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(
        named.values(),
        named,
        loc="outside lower center",
        ncols=2 + timed,
        fontsize=9,
        title=f"Bars up and down: {bars}{'; to the sides: quartiles of the timed rounds' if timed else ''}",
        title_fontsize=9,
    )
    figure.suptitle("\n".join(textwrap.fill(line, 130 if timed else 70) for line in title.splitlines()), fontsize=11)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def _style(stage: str, index: int, series: Sequence[str]) -> dict[str, Any]:
    """Colour, mark and name of the points of a stage: of several series, each has a shade and a mark of its own."""
    colors, dark, what = STAGES[stage]
    shade = dark if len(series) == 1 else 0.95 - 0.5 * index / (len(series) - 1)
    schedule, _, way = series[index].partition(" ")
    words = [what]
    if series != ["r"]:
        words.append(SERIES.get(schedule, f"schedule {schedule}"))
    if way:
        words.append(way)
    return {
        "color": colors(shade), "marker": MARKERS[index % len(MARKERS)], "markersize": 6, "linewidth": 1.5,
        "elinewidth": 1, "capsize": 3, "label": ", ".join(words),
    }  # fmt: skip


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
    """Above each merged point, what merges, by turns lower and higher, since they may lie close together."""
    shown = [row for row in rows if row["merged"] is not None and row[place] is not None]
    shown.sort(key=lambda row: row[place])
    for index, row in enumerate(shown):
        axes.annotate(
            row["name"].removesuffix(f" {row['series']}"),
            (row[place], 100 * row["merged"]),
            textcoords="offset points",
            xytext=(5, 6 if index % 2 == 0 else 17),
            fontsize=8,
        )
