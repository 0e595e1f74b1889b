# SPDX-License-Identifier: Apache-2.0
"""A sweep as people read it: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib

from experiments.files import write_text, write_whole
from experiments.measurement import environment_line
from experiments.publishing.card import metric_name
from experiments.runs.sweep import Row, SweepResults

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CSV_COLUMNS = (
    "name", "gflops", "flops_ratio", "latents_left", "throughput", "speedup", "speedup_lower", "speedup_upper",
    "latency_ms", "peak_memory_mb", "merged", "merged_stderr", "merged_change", "merged_change_stderr",
    "retrained", "retrained_stderr", "retrained_change", "retrained_change_stderr",
)  # fmt: skip

LINE_STYLES = ("-", "--", ":", "-.")


def flat_row(row: Row, metric: str) -> dict[str, Any]:
    """A row of `sweep_results.json` with one number for each of `CSV_COLUMNS`; `None` for what was not measured."""
    flat = {column: row.get(column) for column in CSV_COLUMNS}
    for stage in ("merged", "retrained"):
        measured = row.get(stage) or {}
        for ending in ("", "_stderr", "_change", "_change_stderr"):
            flat[f"{stage}{ending}"] = measured.get(f"{metric}{ending}")
    for name in ("speedup", "latency_ms"):
        quartiles = row.get(name) or {}
        flat[name] = quartiles.get("median")
    speedup = row.get("speedup") or {}
    flat["speedup_lower"], flat["speedup_upper"] = speedup.get("lower"), speedup.get("upper")
    return flat


def write_csv(rows: list[Row], metric: str, path: Path) -> None:
    """Write a sweep as CSV, one line a row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    writer.writerows(flat_row(row, metric) for row in rows)
    write_text(path, text.getvalue())


def markdown_table(rows: list[Row], metric: str) -> str:
    """The sweep as a Markdown table, metrics times 100 with their standard error."""
    lines = [
        f"| | {metric_name(metric)}, merged | change | retrained | change | GFLOPs | of unmerged | latents left "
        "| items/s | speed-up | latency, ms | peak MB |",
        f"{'|---' * 12}|",
    ]
    for row in rows:
        flat = flat_row(row, metric)
        speedup = (
            ""
            if flat["speedup"] is None
            else (f"{flat['speedup']:.2f}x ({flat['speedup_lower']:.2f} to {flat['speedup_upper']:.2f})")
        )
        cells = [
            row["name"],
            _percent(flat["merged"], flat["merged_stderr"]),
            _change(row, "merged", metric),
            _percent(flat["retrained"], flat["retrained_stderr"]),
            _change(row, "retrained", metric),
            f"{row['gflops']:.4g}",
            f"{row['flops_ratio']:.3f}",
            str(row["latents_left"]),
            "" if flat["throughput"] is None else f"{flat['throughput']:.4g}",
            speedup,
            "" if flat["latency_ms"] is None else f"{flat['latency_ms']:.4g}",
            "" if flat["peak_memory_mb"] is None else f"{flat['peak_memory_mb']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_sweep(rows: list[Row], metric: str, title: str, path: Path) -> None:
    """Draw a sweep: over r alone, or of several schedules or methods at shares of the FLOPs."""
    flat = [flat_row(row, metric) | {"row": row} for row in rows]
    series: dict[str, list[dict[str, Any]]] = {}
    for row in flat:
        series.setdefault(row["row"].get("series", "r"), []).append(row)
    figure = _draw_r(flat, metric) if list(series) == ["r"] else _draw_series(series, metric)
    figure.suptitle(title)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def _draw_r(flat: list[dict[str, Any]], metric: str) -> Figure:
    """The metric against r and against FLOPs, and the speed-up beside what the FLOPs imply."""
    names = [row["name"].removeprefix("r=") for row in flat]
    figure, (by_r, by_flops, speed) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    for stage, label, color, offset in (
        ("merged", "merged, no retraining", "tab:red", 0.0),
        # Side by side, so that the standard errors of both can be seen.
        ("retrained", "retrained with merging on", "tab:blue", 0.12),
    ):
        style: dict[str, Any] = dict(fmt="o-", capsize=3, color=color, label=label)
        places = [place for place, row in enumerate(flat) if row[stage] is not None]
        if places:
            measured = [flat[place] for place in places]
            by_r.errorbar([place + offset for place in places], *_values(measured, stage), **style)
            by_flops.errorbar([row["flops_ratio"] for row in measured], *_values(measured, stage), **style)
    for index, row in enumerate(flat):
        if row["merged"] is not None:
            # At large r the FLOPs lie close together.
            above = 5 if index % 2 == 0 else -12
            place = (row["flops_ratio"], 100 * row["merged"])
            by_flops.annotate(names[index], place, textcoords="offset points", xytext=(4, above), fontsize=8)
    speed.plot(range(len(flat)), [1 / row["flops_ratio"] for row in flat], "--", color="gray", label="the FLOPs imply")
    timed = [place for place, row in enumerate(flat) if row["speedup"] is not None]
    if timed:
        timed_style: dict[str, Any] = dict(fmt="o-", capsize=3, color="tab:green", label="measured")
        speed.errorbar(timed, *_speedups([flat[place] for place in timed]), **timed_style)
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


def _draw_series(series: dict[str, list[dict[str, Any]]], metric: str) -> Figure:
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


def _values(rows: list[dict[str, Any]], stage: str) -> tuple[list[float], list[float]]:
    """Metrics times 100, and their standard errors."""
    return [100 * row[stage] for row in rows], [100 * (row[f"{stage}_stderr"] or 0) for row in rows]


def _speedups(rows: list[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the quartiles lie below and above."""
    below = [row["speedup"] - row["speedup_lower"] for row in rows]
    above = [row["speedup_upper"] - row["speedup"] for row in rows]
    return [row["speedup"] for row in rows], [below, above]


def write_report(results: SweepResults, command: str, output_dir: Path) -> str:
    """Write `sweep_results.csv`, `sweep.png` and `sweep_report.md` beside `sweep_results.json`.

    Args:
        results: what was measured.
        command: what made them.
        output_dir: where they go.

    Returns:
        The report, Markdown that begins with the table.
    """
    rows, metric = results.rows, results.metric
    title = f"{results.source.name}: {results.evaluated_on:,} examples"
    write_csv(rows, metric, output_dir / "sweep_results.csv")
    draw_sweep(rows, metric, title, output_dir / "sweep.png")
    others = [name for name in _metrics(rows) if name != metric]
    more = "".join(f"\n**{metric_name(name)}**\n\n{metric_table(rows, name)}\n" for name in others)
    report = f"""{markdown_table(rows, metric)}

{metric_name(metric)} times 100 with its standard error, on {results.evaluated_on:,} examples of the split
'{results.source.split}'; change: from the unmerged checkpoint, paired example by example. GFLOPs: for one input of
shape {tuple(results.input_shape[1:])}, with their matching. {_timing_line(results.timing)}

![{metric_name(metric)} against r and FLOPs, and the speed-up](sweep.png)
{more}
Where the time of the sweep went: {_shares(results.seconds)}.

Made by

```
{command}
```

Measured on: {environment_line(results.environment)}.
"""
    write_text(output_dir / "sweep_report.md", f"# {title}\n\n{report}")
    return report


def _timing_line(timing: dict[str, Any] | None) -> str:
    """How the rows were timed, if they were."""
    if timing is None:
        return "Nothing was timed."
    where = f" ({environment_line(timing['environment'])})" if "environment" in timing else ""
    return (
        "Speed-up: median of the per-round ratios to the unmerged model, with quartiles, at batch "
        f"{timing['batch_size']} over {timing['rounds']} interleaved rounds{where}."
    )


def metric_table(rows: list[Row], metric: str) -> str:
    """One metric of every row, merged and retrained, times 100."""
    lines = ["| | merged | retrained |", "|---|---|---|"]
    for row in rows:
        cells = [
            _percent(row.get(stage, {}).get(metric), row.get(stage, {}).get(f"{metric}_stderr"))
            for stage in ("merged", "retrained")
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _metrics(rows: list[Row]) -> list[str]:
    return [name for name in rows[0].get("merged", {}) if not name.endswith(("_stderr", "_change"))]


def _shares(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    parts = [f"{name} {value:,.0f} s ({value / total:.0%})" for name, value in seconds.items()]
    return ", ".join(parts) + f", together {total:,.0f} s"


def _change(row: Row, stage: str, metric: str) -> str:
    cell = row.get(stage, {})
    if f"{metric}_change" not in cell:
        return ""
    return f"{100 * cell[f'{metric}_change']:+.2f} ± {100 * cell[f'{metric}_change_stderr']:.2f}"


def _percent(value: float | None, stderr: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} ± {100 * (stderr or 0):.2f}"
