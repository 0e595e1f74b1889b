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

CSV_COLUMNS = (
    "name", "gflops", "flops_ratio", "latents_left", "throughput", "speedup", "speedup_lower", "speedup_upper",
    "latency_ms", "peak_memory_mb", "merged", "merged_stderr", "retrained", "retrained_stderr",
)  # fmt: skip


def flat_row(row: Row, metric: str) -> dict[str, Any]:
    """A row of `sweep_results.json` with one number for each of `CSV_COLUMNS`; `None` for what was not measured."""
    flat = {column: row.get(column) for column in CSV_COLUMNS}
    for stage in ("merged", "retrained"):
        measured = row.get(stage) or {}
        flat[stage], flat[f"{stage}_stderr"] = measured.get(metric), measured.get(f"{metric}_stderr")
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
        f"| | {metric_name(metric)}, merged | retrained | GFLOPs | of unmerged | latents left | items/s | speed-up "
        "| latency, ms | peak MB |",
        f"{'|---' * 10}|",
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
            _percent(flat["retrained"], flat["retrained_stderr"]),
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
    names = [row["name"].removeprefix("r=") for row in rows]
    figure, (by_r, by_flops, speed) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    figure.suptitle(title)
    for stage, color in (("merged", "tab:red"), ("retrained", "tab:blue")):
        places = [i for i, row in enumerate(flat) if row[stage] is not None]
        if not places:
            continue
        values = [100 * flat[i][stage] for i in places]
        errors = [100 * (flat[i][f"{stage}_stderr"] or 0) for i in places]
        label = {"merged": "merged, no retraining", "retrained": "retrained with merging on"}[stage]
        # Side by side, so that the standard errors of both can be seen.
        beside = [place + (0.12 if stage == "retrained" else 0.0) for place in places]
        by_r.errorbar(beside, values, errors, fmt="o-", capsize=3, color=color, label=label)
        flops = [rows[i]["flops_ratio"] for i in places]
        by_flops.errorbar(flops, values, errors, fmt="o-", capsize=3, color=color, label=label)
        if stage == "merged":
            for i, x, y in zip(places, flops, values, strict=True):
                # At large r the FLOPs lie close together.
                above = 5 if i % 2 == 0 else -12
                by_flops.annotate(names[i], (x, y), textcoords="offset points", xytext=(4, above), fontsize=8)
    by_r.set(xlabel="r, latents merged in each layer", ylabel=f"{metric_name(metric)} x 100")
    by_r.set_xticks(range(len(names)), names)
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
    speed.set(xlabel="r, latents merged in each layer", ylabel="speed-up over unmerged")
    speed.set_xticks(range(len(names)), names)
    for axes in (by_r, by_flops, speed):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


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
'{results.source.split}'. GFLOPs: for one input of shape {tuple(results.input_shape[1:])}. Speed-up: median of the
per-round ratios to the unmerged model, with quartiles, at batch {batch} over {rounds} interleaved rounds.

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
    return [name for name in rows[0].get("merged", {}) if not name.endswith("_stderr")]


def _shares(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    parts = [f"{name} {value:,.0f} s ({value / total:.0%})" for name, value in seconds.items()]
    return ", ".join(parts) + f", together {total:,.0f} s"


def _percent(value: float | None, stderr: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} ± {100 * (stderr or 0):.2f}"
