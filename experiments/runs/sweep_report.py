# SPDX-License-Identifier: Apache-2.0
"""A sweep as people read it: tables, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from experiments.files import write_text
from experiments.measurement import environment_line
from experiments.publishing.card import metric_name
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.sweep_picture import FlatRow, draw_sweep
from experiments.runs.sweep_results import Row, SweepResults

STAGES = ("merged", "retrained")
CSV_COLUMNS = (
    "name", "gflops", "flops_ratio", "latents_left", "throughput", "speedup", "speedup_lower", "speedup_upper",
    "latency_ms", "peak_memory_mb", "merged", "merged_stderr", "merged_change", "merged_change_stderr",
    "retrained", "retrained_stderr", "retrained_change", "retrained_change_stderr",
)  # fmt: skip


def flat_row(row: Row, metric: str) -> FlatRow:
    """A row of `sweep_results.json` with one number for each of `CSV_COLUMNS`, and its `series`."""
    flat = {column: row.get(column) for column in CSV_COLUMNS} | {"series": row.get("series", "r")}
    for stage in STAGES:
        measured = row.get(stage, {})
        for ending in ("", "_stderr", "_change", "_change_stderr"):
            flat[f"{stage}{ending}"] = measured.get(f"{metric}{ending}")
    speedup = row.get("speedup", {})
    flat |= {"speedup": speedup.get("median"), "latency_ms": row.get("latency_ms", {}).get("median")}
    return flat | {f"speedup_{end}": speedup.get(end) for end in ("lower", "upper")}


def write_csv(rows: list[FlatRow], path: Path) -> None:
    """Write a sweep as CSV, one line a row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def sweep_table(rows: list[FlatRow], metric: str) -> str:
    """All that was measured, the metric times 100."""
    columns = ["", f"{metric_name(metric)}, merged", "change", "retrained", "change", "GFLOPs", "of unmerged"]
    columns += ["latents left", "items/s", "speed-up", "latency, ms", "peak MB"]

    def cells(row: FlatRow) -> list[object]:
        return [
            row["name"],
            *(_percent(row, figure) for stage in STAGES for figure in (stage, f"{stage}_change")),
            f"{row['gflops']:.4g}",
            f"{row['flops_ratio']:.3f}",
            row["latents_left"],
            _shown(row, "throughput", "{throughput:.4g}"),
            _shown(row, "speedup", "{speedup:.2f}x ({speedup_lower:.2f} to {speedup_upper:.2f})"),
            _shown(row, "latency_ms", "{latency_ms:.4g}"),
            _shown(row, "peak_memory_mb", "{peak_memory_mb:.0f}"),
        ]

    return markdown_table(columns, map(cells, rows))


def metric_table(rows: list[FlatRow]) -> str:
    """The metric alone, merged and retrained, times 100."""
    return markdown_table(["", *STAGES], [(row["name"], *(_percent(row, stage) for stage in STAGES)) for row in rows])


def write_report(results: SweepResults, command: str, output_dir: Path) -> str:
    """Write `sweep_results.csv`, `sweep.png` and `sweep_report.md` beside `sweep_results.json`.

    Args:
        results: what was measured.
        command: what made them.
        output_dir: where they go.

    Returns:
        The report without its heading and the environment, Markdown that begins with the table.
    """
    metric, name = results.metric, metric_name(results.metric)
    title = f"{results.source.name}: {results.evaluated_on:,} examples"
    measured = results.rows[0].get("merged", {})
    metrics = [metric, *(each for each in measured if not each.endswith(("_stderr", "_change")) and each != metric)]
    rows, *others = ([flat_row(row, each) for row in results.rows] for each in metrics)
    write_csv(rows, output_dir / "sweep_results.csv")
    draw_sweep(rows, metric, title, output_dir / "sweep.png")
    more = [f"**{metric_name(each)}**\n\n{metric_table(of)}\n\n" for each, of in zip(metrics[1:], others, strict=True)]
    report = f"""{sweep_table(rows, metric)}

{name} times 100 with its standard error, on {results.evaluated_on:,} examples of the split '{results.source.split}';
change: from the unmerged checkpoint, paired example by example. GFLOPs: for one input of shape
{tuple(results.input_shape[1:])}, with their matching. {_timing_line(results.timing)}

![{name} against r and FLOPs, and the speed-up](sweep.png)

{"".join(more)}Where the time of the sweep went: {_shares(results.seconds)}.

Made by

```
{command}
```"""
    measured_on = f"Measured on: {environment_line(results.environment)}."
    write_text(output_dir / "sweep_report.md", f"# {title}\n\n{report}\n\n{measured_on}\n")
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


def _shares(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    parts = [f"{name} {value:,.0f} s ({value / total:.0%})" for name, value in seconds.items()]
    return ", ".join(parts) + f", together {total:,.0f} s"


def _percent(row: FlatRow, figure: str) -> str | None:
    """A figure times 100 with its standard error; a change with its sign."""
    if row[figure] is None:
        return None
    error = 100 * (row[f"{figure}_stderr"] or 0)
    return with_error(100 * row[figure], error, "+.2f" if figure.endswith("_change") else ".2f")


def _shown(row: FlatRow, figure: str, form: str) -> str | None:
    """A row in a format, if the figure was measured."""
    return None if row[figure] is None else form.format_map(row)
