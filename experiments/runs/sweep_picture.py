# SPDX-License-Identifier: Apache-2.0
"""A picture of a sweep: its metric against r and FLOPs, and the speed-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from experiments.files import write_whole
from experiments.publishing.card import metric_name

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FlatRow = dict[str, Any]
"""A row of a sweep with one number for each thing that was measured; `None` for what was not."""

LINE_STYLES = ("-", "--", ":", "-.")


def draw_sweep(rows: list[FlatRow], metric: str, title: str, path: Path) -> None:
    """Draw a sweep: over r alone, or of several schedules or methods at shares of the FLOPs.

    Args:
        rows: as in the CSV file, each with its `series`.
        metric: its name.
        title: of the picture.
        path: of the PNG.
    """
    series: dict[str, list[FlatRow]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    figure = _draw_r(rows, metric) if list(series) == ["r"] else _draw_series(series, metric)
    figure.suptitle(title)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def _draw_r(rows: list[FlatRow], metric: str) -> Figure:
    """The metric against r and against FLOPs, and the speed-up beside what the FLOPs imply."""
    names = [row["name"].removeprefix("r=") for row in rows]
    figure, (by_r, by_flops, speed) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    for stage, label, color, offset in (
        ("merged", "merged, no retraining", "tab:red", 0.0),
        # Side by side, so that the standard errors of both can be seen.
        ("retrained", "retrained with merging on", "tab:blue", 0.12),
    ):
        style: dict[str, Any] = dict(fmt="o-", capsize=3, color=color, label=label)
        places = [place for place, row in enumerate(rows) if row[stage] is not None]
        if places:
            measured = [rows[place] for place in places]
            by_r.errorbar([place + offset for place in places], *_values(measured, stage), **style)
            by_flops.errorbar([row["flops_ratio"] for row in measured], *_values(measured, stage), **style)
    for index, row in enumerate(rows):
        if row["merged"] is not None:
            # At large r the FLOPs lie close together.
            above = 5 if index % 2 == 0 else -12
            place = (row["flops_ratio"], 100 * row["merged"])
            by_flops.annotate(names[index], place, textcoords="offset points", xytext=(4, above), fontsize=8)
    speed.plot(range(len(rows)), [1 / row["flops_ratio"] for row in rows], "--", color="gray", label="the FLOPs imply")
    timed = [place for place, row in enumerate(rows) if row["speedup"] is not None]
    if timed:
        timed_style: dict[str, Any] = dict(fmt="o-", capsize=3, color="tab:green", label="measured")
        speed.errorbar(timed, *_speedups([rows[place] for place in timed]), **timed_style)
    by_r.set(xlabel="r, latents merged in each layer", ylabel=f"{metric_name(metric)} x 100")
    by_flops.set(xlabel="FLOPs, share of the unmerged model", ylabel=f"{metric_name(metric)} x 100")
    by_flops.invert_xaxis()
    speed.set(xlabel="r, latents merged in each layer", ylabel="speed-up over unmerged")
    for axes in (by_r, speed):
        axes.set_xticks(range(len(names)), names)
    for axes in (by_r, by_flops, speed):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _draw_series(series: dict[str, list[FlatRow]], metric: str) -> Figure:
    """The metric against FLOPs, a colour for each schedule, a line style for each method; the speed-up if timed."""
    timed = any(row["speedup"] is not None for members in series.values() for row in members)
    figure, panels = plt.subplots(1, 1 + timed, figsize=(9 + 5 * timed, 5), squeeze=False, constrained_layout=True)
    by_flops: Axes = panels[0, 0]
    schedules = list(dict.fromkeys(name.split()[0] for name in series))
    methods = list(dict.fromkeys(name.partition(" ")[2] for name in series))
    for name, members in series.items():
        schedule, _, method = name.partition(" ")
        line = LINE_STYLES[methods.index(method) % len(LINE_STYLES)]
        color = f"C{schedules.index(schedule)}"
        for stage, marker in (("merged", "o"), ("retrained", "s")):
            measured = sorted(
                (row for row in members if row[stage] is not None), key=lambda row: row["flops_ratio"], reverse=True
            )
            if measured:
                style: dict[str, Any] = dict(color=color, marker=marker, linestyle=line, capsize=3, markersize=4)
                ratios = [row["flops_ratio"] for row in measured]
                by_flops.errorbar(ratios, *_values(measured, stage), label=f"{name}, {stage}", **style)
        speeds = [row for row in members if row["speedup"] is not None]
        if speeds:
            implied = [1 / row["flops_ratio"] for row in speeds]
            timed_style: dict[str, Any] = dict(color=color, marker="o", linestyle=line, capsize=3, markersize=4)
            panels[0, 1].errorbar(implied, *_speedups(speeds), label=name, **timed_style)
    by_flops.set(xlabel="FLOPs, share of the unmerged model", ylabel=f"{metric_name(metric)} x 100")
    by_flops.invert_xaxis()
    if timed:
        panels[0, 1].axline((1, 1), slope=1, linestyle="--", color="gray")
        panels[0, 1].set(xlabel="speed-up that the FLOPs imply", ylabel="speed-up over unmerged")
    for axes in panels[0]:
        axes.grid(alpha=0.3)
    # Beside the panels: there may be more lines than room among them.
    by_flops.legend(fontsize=8, loc="center right", bbox_to_anchor=(-0.1, 0.5))
    return figure


def _values(rows: list[FlatRow], stage: str) -> tuple[list[float], list[float]]:
    """Metrics times 100, and their standard errors."""
    return [100 * row[stage] for row in rows], [100 * (row[f"{stage}_stderr"] or 0) for row in rows]


def _speedups(rows: list[FlatRow]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the quartiles lie below and above."""
    below = [row["speedup"] - row["speedup_lower"] for row in rows]
    above = [row["speedup_upper"] - row["speedup"] for row in rows]
    return [row["speedup"] for row in rows], [below, above]
