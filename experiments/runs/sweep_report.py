# SPDX-License-Identifier: Apache-2.0
"""A sweep as people read it: tables, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import BadInput
from experiments.files import write_text
from experiments.measurement import environment_line
from experiments.publishing.card import METRIC_NAMES, metric_name, undefined_note
from experiments.publishing.tables import markdown_table, with_error
from experiments.runs.sweep_picture import FlatRow, draw_sweep
from experiments.runs.sweep_results import Row, SweepResults
from experiments.training.output_folder import SWEEP_FILE

STAGES = ("merged", "retrained")
PICTURE = "sweep.png"
# A metric holds if it has fallen by no more than so many standard errors.
HOLDS = 2
BEST_IS = """The best row: of those that are faster than unmerged, if any is, the fastest whose metric is not lower by
more than two standard errors of the paired change; untimed, the one with the fewest FLOPs; if none is so, the one that
lost least. It was picked on these examples."""
CSV_COLUMNS = (
    "name", "gflops", "flops_ratio", "latents_left", "throughput", "speedup", "speedup_lower", "speedup_upper",
    "latency_ms", "peak_memory_mb", "merged", "merged_stderr", "merged_change", "merged_change_stderr",
    "retrained", "retrained_stderr", "retrained_change", "retrained_change_stderr",
)  # fmt: skip


def flat_row(row: Row, metric: str) -> FlatRow:
    """A row of `sweep_results.json` with one number for each of `CSV_COLUMNS`, its `series`, and under `undefined` the
    names of the figures that are not defined."""
    undefined: list[str] = []
    flat = {column: row.get(column) for column in CSV_COLUMNS}
    flat |= {"series": row.get("series", "r"), "undefined": undefined}
    for stage in STAGES:
        measured = row.get(stage, {})
        for ending in ("", "_stderr", "_change", "_change_stderr"):
            flat[f"{stage}{ending}"] = measured.get(f"{metric}{ending}")
            if f"{metric}{ending}" in measured and flat[f"{stage}{ending}"] is None:
                undefined.append(f"{stage}{ending}")
    speedup = row.get("speedup", {})
    flat |= {"speedup": speedup.get("median"), "latency_ms": row.get("latency_ms", {}).get("median")}
    return flat | {f"speedup_{end}": speedup.get(end) for end in ("lower", "upper")}


@dataclass(frozen=True)
class Best:
    """What a sweep came to.

    Attributes:
        index: of its best row.
        stage: that it is best in, of `STAGES`.
        sentence: its result in figures.
    """

    index: int
    stage: str
    sentence: str


def best_of(rows: list[FlatRow], metric: str) -> Best | None:
    """The fastest row whose metric holds, that is, has not fallen by more than `HOLDS` standard errors of its change.

    Rows that are slower than unmerged are left out while there are others. Where nothing was timed, it is the row with
    the fewest FLOPs; where no row holds, the one that has lost least.

    Args:
        rows: the first one is the unmerged model.
        metric: its name.

    Returns:
        `None` if no row that saves anything was evaluated.
    """
    unmerged = rows[0]["merged"]
    cells = [
        (index, stage, row)
        for index, row in enumerate(rows)
        for stage in STAGES
        if row["flops_ratio"] < 1 and row[stage] is not None
    ]
    if unmerged is None or not cells:
        return None
    cells = [cell for cell in cells if (cell[2]["speedup"] or 0) >= 1] or cells
    timed = all(row["speedup"] is not None for _, _, row in cells)

    def holds(cell: tuple[int, str, FlatRow]) -> bool:
        _, stage, row = cell
        error = row[f"{stage}_change_stderr"] or row[f"{stage}_stderr"] or 0
        return bool(row[stage] - unmerged >= -HOLDS * error)

    def gain(cell: tuple[int, str, FlatRow]) -> tuple[float, float]:
        # Of one row, trained again or not, what is better.
        return cell[2]["speedup"] if timed else -cell[2]["flops_ratio"], cell[2][cell[1]]

    holding = [cell for cell in cells if holds(cell)]
    index, stage, row = max(holding, key=gain) if holding else max(cells, key=lambda cell: cell[2][cell[1]])
    return Best(index, stage, _result(row, stage, unmerged, metric))


def _result(row: FlatRow, stage: str, unmerged: float, metric: str) -> str:
    """What a row gains and costs, in a sentence."""
    speed = "not timed"
    if row["speedup"] is not None:
        slower = "" if row["speedup"] >= 1 else ", slower than unmerged"
        speed = f"{row['speedup']:.2f} times as fast{slower}"
    after = with_error(row[stage], row[f"{stage}_stderr"], ".1f", scale=100)
    trained = "trained again" if stage == "retrained" else "not trained again"
    named = METRIC_NAMES.get(metric, metric.replace("_", " "))
    return (
        f"{row['flops_ratio']:.2f} of the FLOPs, {speed}, {named} {100 * unmerged:.1f} -> {after} "
        f"({row['name']}, {trained})."
    )


def write_csv(rows: list[FlatRow], path: Path) -> None:
    """Write a sweep as CSV, one line a row."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def sweep_table(rows: list[FlatRow], metric: str) -> str:
    """All that was measured, the metric times 100; no column of what was not measured in any row."""
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

    lines = [cells(row) for row in rows]
    shown = [place for place in range(len(columns)) if any(line[place] is not None for line in lines)]
    return markdown_table([columns[place] for place in shown], [[line[place] for place in shown] for line in lines])


def metric_table(rows: list[FlatRow]) -> str:
    """The metric alone, merged and retrained, times 100."""
    return markdown_table(["", *STAGES], [(row["name"], *(_percent(row, stage) for stage in STAGES)) for row in rows])


def write_report(results: SweepResults, command: str, output_dir: Path) -> tuple[str, Best | None]:
    """Write `sweep_results.csv`, `sweep.png` and `sweep_report.md` beside `sweep_results.json`.

    Args:
        results: what was measured.
        command: what made them.
        output_dir: where they go.

    Returns:
        The report without its heading and the environment, Markdown that begins with the table; and what it came to.
    """
    metric, name = results.metric, metric_name(results.metric)
    title = f"{results.source.name}: {results.evaluated_on:,} examples"
    measured = results.rows[0].get("merged", {})
    metrics = [metric, *(each for each in measured if not each.endswith(("_stderr", "_change")) and each != metric)]
    rows, *others = ([flat_row(row, each) for row in results.rows] for each in metrics)
    write_csv(rows, output_dir / "sweep_results.csv")
    best = best_of(rows, metric)
    found = "" if best is None else f"{best.sentence} {BEST_IS}\n\n"
    if "merged" in rows[0]["undefined"]:
        found = f"{name} is not defined for the unmerged model on these examples, so no row is called the best.\n\n"
    _draw(rows, metric, title, best, output_dir)
    more = [f"**{metric_name(each)}**\n\n{metric_table(of)}\n\n" for each, of in zip(metrics[1:], others, strict=True)]
    table = sweep_table(rows, metric)
    report = f"""{table}

{name} times 100 with its standard error, on {results.evaluated_on:,} examples of the split '{results.source.split}';
change: from the unmerged checkpoint, paired example by example.{undefined_note(table)} GFLOPs: for one input of shape
{tuple(results.input_shape[1:])}, with their matching. {_timing_line(results.timing)}

{found}![{name} over the share of the FLOPs, and over the speed if it was measured]({PICTURE})

{"".join(more)}Where the time of the sweep went: {_shares(results.seconds)}.

Made by

```
{command}
```"""
    measured_on = f"Measured on: {environment_line(results.environment)}."
    write_text(output_dir / "sweep_report.md", f"# {title}\n\n{report}\n\n{measured_on}\n")
    return report, best


def redraw(folder: Path) -> Path:
    """Draw the picture of a sweep anew from its `sweep_results.json`, also from one of an older version.

    Returns:
        Where it is.

    Raises:
        BadInput: if the first row merges, so that nothing is there to compare with.
    """
    results = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    if results["rows"][0]["flops_ratio"] != 1:
        raise BadInput(f"{folder}: the first row of its {SWEEP_FILE} merges; allowed are sweeps that begin unmerged")
    metric = results["metric"]
    rows = [flat_row(row, metric) for row in results["rows"]]
    source = results.get("source") or {"dataset": results["dataset"]}
    name = source.get("config") or source["dataset"].rpartition("/")[2]
    _draw(rows, metric, f"{name}: {results['evaluated_on']:,} examples", best_of(rows, metric), folder)
    return folder / PICTURE


def _draw(rows: list[FlatRow], metric: str, title: str, best: Best | None, folder: Path) -> None:
    draw_sweep(rows, metric, title if best is None else f"{title}\n{best.sentence}", folder / PICTURE)


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
    if row[figure] is None and figure not in row["undefined"]:
        return None
    return with_error(row[figure], row[f"{figure}_stderr"], "+.2f" if figure.endswith("_change") else ".2f", scale=100)


def _shown(row: FlatRow, figure: str, form: str) -> str | None:
    """A row in a format, if the figure was measured."""
    return None if row[figure] is None else form.format_map(row)
