# SPDX-License-Identifier: Apache-2.0
"""A sweep as people read it: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import matplotlib

from experiments.model_card import metric_name
from experiments.sweep import Row, SweepResults
from experiments.whole_file import write_text, write_whole

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

CSV_COLUMNS = (
    "name", "gflops", "flops_ratio", "latents_left", "throughput", "speedup", "speedup_lower", "speedup_upper",
    "latency_ms", "peak_memory_mb", "merged", "merged_stderr", "merged_change", "merged_change_stderr",
    "retrained", "retrained_stderr", "retrained_change", "retrained_change_stderr",
)  # fmt: skip


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
    """Draw the metric against r and against FLOPs, and the speed-up beside what the FLOPs imply."""
    flat = [flat_row(row, metric) for row in rows]
    names = [row["name"].removeprefix("r=").removeprefix("flops=") for row in rows]
    series: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        series.setdefault(row.get("series", "r"), []).append(index)
    figure, (by_row, by_flops, speed) = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    figure.suptitle(title)
    for number, (name, members) in enumerate(series.items()):
        for stage, offset, line in (("merged", 0.0, "-"), ("retrained", 0.12, "--")):
            places = [index for index in members if flat[index][stage] is not None]
            if not places:
                continue
            style = dict(fmt=f"o{line}", capsize=3, markersize=4, color=_color(stage, number, len(series)))
            label = {"merged": "merged, no retraining", "retrained": "retrained with merging on"}[stage]
            style["label"] = label if len(series) == 1 else f"{name}, {stage}"
            values = [100 * flat[index][stage] for index in places]
            errors = [100 * (flat[index][f"{stage}_stderr"] or 0) for index in places]
            # Side by side, so that the standard errors of both can be seen.
            by_row.errorbar([place + offset for place in places], values, errors, **style)
            by_cost = sorted(zip([rows[index]["flops_ratio"] for index in places], values, errors, strict=True))
            by_flops.errorbar(*zip(*by_cost, strict=True), **style)
    if len(series) == 1:
        _annotate(by_flops, rows, flat, names)
    by_row.set(ylabel=f"{metric_name(metric)} x 100")
    by_flops.set(xlabel="FLOPs, share of the unmerged model", ylabel=f"{metric_name(metric)} x 100")
    by_flops.invert_xaxis()
    speed.plot(range(len(rows)), [1 / row["flops_ratio"] for row in rows], "--", color="gray", label="the FLOPs imply")
    timed = [i for i, row in enumerate(flat) if row["speedup"] is not None]
    if timed:
        medians = [flat[i]["speedup"] for i in timed]
        spread = [
            [flat[i]["speedup"] - flat[i]["speedup_lower"] for i in timed],
            [flat[i]["speedup_upper"] - flat[i]["speedup"] for i in timed],
        ]
        speed.errorbar(timed, medians, spread, fmt="o-", capsize=3, color="tab:green", label="measured")
    speed.set(ylabel="speed-up over unmerged")
    only_r = list(series) == ["r"]
    for axes in (by_row, speed):
        axes.set_xlabel("r, latents merged in each layer" if only_r else "r, or share of the FLOPs and schedule")
        axes.set_xticks(range(len(names)), names, rotation=0 if only_r else 60, ha="center" if only_r else "right")
        axes.tick_params(axis="x", labelsize=10 if only_r else 8)
    for axes in (by_row, by_flops, speed):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def _color(stage: str, number: int, count: int) -> str:
    if count == 1:
        return {"merged": "tab:red", "retrained": "tab:blue"}[stage]
    return f"C{number}"


def _annotate(axes: Axes, rows: list[Row], flat: list[dict[str, Any]], names: list[str]) -> None:
    for index, row in enumerate(flat):
        if row["merged"] is not None:
            # At large r the FLOPs lie close together.
            above = 5 if index % 2 == 0 else -12
            place = (rows[index]["flops_ratio"], 100 * row["merged"])
            axes.annotate(names[index], place, textcoords="offset points", xytext=(4, above), fontsize=8)


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
    environment = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    batch, rounds = results.arguments["timing_batch_size"], results.arguments["timing_rounds"]
    others = [name for name in _metrics(rows) if name != metric]
    more = "".join(f"\n**{metric_name(name)}**\n\n{metric_table(rows, name)}\n" for name in others)
    report = f"""{markdown_table(rows, metric)}

{metric_name(metric)} times 100 with its standard error, on {results.evaluated_on:,} examples of the split
'{results.source.split}'; change: from the unmerged checkpoint, paired example by example. GFLOPs: for one input of
shape {tuple(results.input_shape[1:])}. Speed-up: median of the per-round ratios to the unmerged model, with quartiles,
at batch {batch} over {rounds} interleaved rounds.

![{metric_name(metric)} against r and FLOPs, and the speed-up](sweep.png)
{more}
Where the time of the sweep went: {_shares(results.seconds)}.

Made by

```
{command}
```

Measured on: {environment}.
"""
    write_text(output_dir / "sweep_report.md", f"# {title}\n\n{report}")
    return report


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
