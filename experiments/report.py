# SPDX-License-Identifier: Apache-2.0
"""A sweep as people read it: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib

from experiments.sweep import Row, SweepResults
from experiments.whole_file import write_whole

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt

CSV_COLUMNS = (
    "name", "gflops", "flops_ratio", "latents_left", "throughput", "speedup", "speedup_lower", "speedup_upper",
    "latency_ms", "merged", "merged_stderr", "retrained", "retrained_stderr",
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
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(flat_row(row, metric) for row in rows)


def markdown_table(rows: list[Row], metric: str) -> str:
    """The sweep as a Markdown table, metrics in percent with their standard error."""
    lines = [
        f"| | {metric}, merged | {metric}, retrained | GFLOPs | of unmerged | latents left | items/s | speed-up |",
        "|---|---|---|---|---|---|---|---|",
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
        by_r.errorbar(places, values, errors, fmt="o-", capsize=3, color=color, label=label)
        flops = [rows[i]["flops_ratio"] for i in places]
        by_flops.errorbar(flops, values, errors, fmt="o-", capsize=3, color=color, label=label)
        if stage == "merged":
            for i, x, y in zip(places, flops, values, strict=True):
                by_flops.annotate(names[i], (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    by_r.set(xlabel="r, latents merged in each layer", ylabel=f"{metric}, %")
    by_r.set_xticks(range(len(names)), names)
    by_flops.set(xlabel="FLOPs, share of the unmerged model", ylabel=f"{metric}, %")
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
        The table.
    """
    rows, metric = results.rows, results.metric
    title = f"{results.dataset}: {results.evaluated_on:,} examples"
    table = markdown_table(rows, metric)
    write_csv(rows, metric, output_dir / "sweep_results.csv")
    draw_sweep(rows, metric, title, output_dir / "sweep.png")
    environment = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    batch, rounds = results.arguments["timing_batch_size"], results.arguments["timing_rounds"]
    report = f"""# {title}

{table}

{metric.capitalize()} in percent with its standard error. Speed-up: median of the per-round ratios to the unmerged
model, with quartiles, at batch {batch} over {rounds} interleaved rounds.

![{metric} against r and FLOPs, and the speed-up](sweep.png)

Made by

```
{command}
```

Measured on: {environment}.
"""
    write_whole(output_dir / "sweep_report.md", lambda partial: partial.write_text(report))
    return table


def _percent(value: float | None, stderr: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} ± {100 * (stderr or 0):.2f}"
