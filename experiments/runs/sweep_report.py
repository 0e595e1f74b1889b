# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep: rows, the results file, and the table, CSV file, picture and report made from it."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from cost_tome_perceiver import Merging, forward_cost
from experiments.errors import BadInput
from experiments.files import read_json, write_json, write_text
from experiments.measurement import Quartiles, environment_line
from experiments.merging.arguments import MATCHING_FIELDS
from experiments.publishing.card import METRIC_NAMES, metric_name, undefined_note
from experiments.publishing.picture_style import (
    POINT_STYLE,
    UNMERGED,
    Color,
    LineEnd,
    name_lines,
    save_picture,
    series_colors,
    series_label,
)
from experiments.publishing.tables import escape_markdown, markdown_table, with_error
from experiments.tasks.base import Source
from experiments.tasks.scores import Score, Scores, flatten_scores, parse_scores
from experiments.training.output_folder import SWEEP_FILE, another_run_error, list_result_files
from experiments.training.run_record import RunRecord
from frontier_tome_perceiver import GROUPS
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

PICTURE = "sweep.png"
# Stages of a row: the checkpoint merged as it is, and retrained with merging.
STAGES = ("merged", "retrained")
# A row counts as keeping the unmerged model's score if it drops by at most this many standard errors of the change.
MAX_DROP = 2
BEST_ROW_RULE = """The best row is the fastest one whose score is at most two standard errors of the paired change lower
than unmerged; rows slower than unmerged count only if all are. Without timing, it is the row with the fewest FLOPs; if
every score is lower than that, the row with the best score. It was chosen on the same examples, which favours it."""
# Arguments that may change when a sweep is resumed: it can be timed later, or again with more rounds.
NOT_COMPARED = ("timing_rounds",)


@dataclass(kw_only=True)
class Row:
    """A row of a sweep: merging settings, their cost and the measurements so far.

    Attributes:
        name: name of the row, such as "flops=0.6 search".
        series: name of the line that joins this row to others in the picture, such as "search".
        merging: merging settings.
        shown: further settings and costs, for readers of the results file.
        gflops, flops_ratio: FLOPs of one input in billions, and as a share of the unmerged model's.
        latents_left: number of latents after the last layer.
        scores: scores by stage.
        latency_ms: time of a batch.
        speedup: time of the unmerged model in the same round, divided by the row's.
        throughput: inputs per second.
        peak_memory_mb: peak memory of a forward pass.
    """

    name: str
    series: str
    merging: Merging
    shown: dict[str, Any] = field(default_factory=dict)
    gflops: float
    flops_ratio: float
    latents_left: int
    scores: dict[str, Scores] = field(default_factory=dict)
    latency_ms: Quartiles | None = None
    speedup: Quartiles | None = None
    throughput: float | None = None
    peak_memory_mb: float | None = None

    @classmethod
    def plan(
        cls, model: ToMePerceiverPreTrainedModel, input_shape: tuple[int, ...], name: str, series: str, merging: Merging
    ) -> Row:
        """Return a row without measurements; its FLOPs are those of one input, (1, S) or (1, 3, height, width)."""
        config, unmerged_config = (each.asked_of(model.config) for each in (merging, model.unmerged))
        cost, unmerged = (forward_cost(each, input_shape, type(model).__name__) for each in (config, unmerged_config))
        own, whole = (sum(each.self_attention) + sum(each.matching) for each in (cost, unmerged))
        # Fixed groups merge in the layers, or merge only the learned latents: no method matches latents in either case.
        only_groups = config.merge_groups or (config.latent_groups and not any(config.merge_schedule))
        shown = {"r": config.merge_schedule, "num_blocks": config.num_blocks}
        shown |= {way: getattr(config, way) for way in MATCHING_FIELDS} | (
            {"merge_method": GROUPS} if only_groups else {}
        )
        return cls(
            name=name,
            series=series,
            merging=merging,
            shown=shown | {"self_attention_gflops": own / 1e9, "self_attention_flops_ratio": own / whole},
            gflops=cost.total_with_matching / 1e9,
            flops_ratio=cost.total_with_matching / unmerged.total_with_matching,
            latents_left=config.latents_per_layer[-1],
        )

    @property
    def is_constant_r(self) -> bool:
        """Whether the row merges as the paper does: r latents in every layer, by ToMe's matching of keys."""
        merging = self.merging
        return isinstance(merging.r, int) and (merging.merge_method, merging.merge_metric) == ("bipartite", "key")

    @property
    def branch(self) -> str:
        """Branch of the Hub repository, and folder below `retrained/`, of the retrained checkpoint."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name.replace("=", ""))

    def value_and_error(self, stage: str, name: str) -> tuple[float, float] | None:
        """Return a score, and the standard error of its change (if not compared, of the score); `None` if undefined."""
        score = self.scores.get(stage, {}).get(name, Score(None))
        error = score.change_stderr if score.compared else score.stderr
        return None if score.value is None else (score.value, error or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the row for the results file, without missing measurements."""
        plain = {name: value for name, value in asdict(self).items() if value is not None}
        fields, shown, scores = (plain.pop(name, {}) for name in ("merging", "shown", "scores"))
        stages = {stage: flatten_scores(self.scores[stage]) for stage in scores}
        return {"name": plain.pop("name"), "series": plain.pop("series"), "fields": fields} | shown | plain | stages

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Row:
        """Read a row of the results file."""
        given: dict[str, Any] = {name: saved[name] for name in cls.__dataclass_fields__ if name in saved}
        given |= {name: Quartiles(**saved[name]) for name in ("latency_ms", "speedup") if name in saved}
        return cls(
            merging=Merging(**saved["fields"]),
            shown={name: saved[name] for name in saved if name not in {*given, "fields", *STAGES}},
            scores={stage: parse_scores(saved[stage]) for stage in STAGES if stage in saved},
            **given,
        )


@dataclass(kw_only=True)
class SweepResults:
    """Content of `sweep_results.json`, which is rewritten after every evaluation.

    Attributes:
        arguments: arguments that the results depend on.
        content: fingerprints of the weights and data that the results depend on.
        environment: machine and versions at the start of the sweep.
        source: origin of the data.
        evaluated_on: number of evaluated examples.
        input_shape: shape of one input, for which `gflops` are counted.
        metric: name of the score in the table and picture; each row has all scores of the task.
        rows: rows of the sweep, the unmerged model first.
        seconds: time spent, by activity, over all runs of this sweep.
        timing: rounds, batch size and, if it differs, environment of the timing; `None` without timing.
        frontier: `merge_frontier` of the checkpoint's config, if it has one.
    """

    arguments: dict[str, Any]
    content: dict[str, str]
    environment: dict[str, Any]
    source: Source
    evaluated_on: int
    input_shape: tuple[int, ...]
    metric: str
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    timing: dict[str, Any] | None = None
    frontier: dict[str, Any] | None = None

    @property
    def record(self) -> RunRecord:
        """Run record: the arguments and data that the results depend on."""
        return RunRecord(self.arguments, self.content)

    def save(self, output_dir: Path) -> None:
        """Write the results file, whole or not at all."""
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / SWEEP_FILE, asdict(self) | {"rows": [row.to_json() for row in self.rows]})

    def take_over(self, output_dir: Path) -> bool:
        """Take over the rows and times of an earlier run of the same sweep, and return whether there was one.

        Raises:
            BadInput: if the folder holds another run, or a results file that is incomplete.
        """
        path = output_dir / SWEEP_FILE
        if not path.exists():
            if found := list_result_files(output_dir):
                raise another_run_error(output_dir, ", ".join(found))
            return False
        earlier = read_json(path)
        if not isinstance(earlier, dict) or not {"arguments", "content", "environment", "rows", "seconds"} <= set(
            earlier
        ):
            raise BadInput(
                f"--output_dir {output_dir}: its {SWEEP_FILE} does not say what was measured; use another folder, or "
                "the file as a sweep wrote it"
            )
        record = RunRecord(earlier["arguments"], earlier["content"])
        if (different := record.difference(self.record, NOT_COMPARED)) is not None:
            raise another_run_error(output_dir, different)
        try:
            self.rows = [Row.from_json(row) for row in earlier["rows"]]
        except (KeyError, TypeError) as error:
            raise BadInput(
                f"--output_dir {output_dir}: the rows in its {SWEEP_FILE} lack {error}; use another folder, or the "
                "version of this project that wrote it"
            ) from error
        self.environment, self.seconds = earlier["environment"], earlier["seconds"]
        self.timing, self.frontier = earlier.get("timing"), earlier.get("frontier")
        return True

    @contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Add the duration of the block to an activity's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start


class Best(NamedTuple):
    """The best row of a sweep, its better stage, and a one-sentence summary of it."""

    row: Row
    stage: str
    sentence: str


def find_best(rows: Sequence[Row], score: str) -> Best | None:
    """Return the fastest row whose score drops by at most `MAX_DROP` standard errors of the change.

    Rows slower than the unmerged model count only if all are slower. Without timing, the row with the fewest FLOPs
    counts as the fastest. If every score drops by more, return the row with the best score.

    Args:
        rows: rows of a sweep, the unmerged model first.
        score: name of the score.

    Returns:
        `None` if the score of the unmerged model is undefined, or no row with fewer FLOPs was evaluated.
    """
    unmerged = rows[0].value_and_error("merged", score)
    cells = [
        (row, stage, *measured)
        for row in rows
        for stage in STAGES
        if row.flops_ratio < 1 and (measured := row.value_and_error(stage, score)) is not None
    ]
    if unmerged is None or not cells:
        return None
    cells = [cell for cell in cells if cell[0].speedup is not None and cell[0].speedup.median >= 1] or cells
    timed = all(row.speedup is not None for row, *_ in cells)

    def gain_and_score(cell: tuple[Row, str, float, float]) -> tuple[float, float]:
        # Both stages of a row take the same time, so the score decides between them.
        row, _, value, _ = cell
        return row.speedup.median if timed and row.speedup is not None else -row.flops_ratio, value

    kept = [cell for cell in cells if cell[2] - unmerged[0] >= -MAX_DROP * cell[3]]
    row, stage, value, _ = max(kept, key=gain_and_score) if kept else max(cells, key=lambda cell: cell[2])
    cost = f"{row.flops_ratio:.2f} of the FLOPs"
    if row.speedup is not None:
        slower = "" if row.speedup.median >= 1 else " (slower than unmerged)"
        cost = f"{row.speedup.median:.2f} times as fast{slower} at {cost}"
    change = 100 * (value - unmerged[0])
    after = with_error(value, row.scores[stage][score].stderr, ".1f", scale=100)
    sentence = (
        f"{cost}, {abs(change):.1f} points of {METRIC_NAMES.get(score, score.replace('_', ' '))} "
        f"{'gained' if change > 0 else 'lost'} ({100 * unmerged[0]:.1f} -> {after}), "
        f"{'retrained' if stage == 'retrained' else 'nothing trained'} ({row.name})."
    )
    return Best(row, stage, sentence)


def write_csv(rows: Sequence[Row], score: str, path: Path) -> None:
    """Write a CSV file with a line for each row; missing and undefined values are empty."""
    lines = []
    for row in rows:
        speed, latency = row.speedup, row.latency_ms
        line = {name: getattr(row, name) for name in ("name", "gflops", "flops_ratio", "latents_left", "throughput")}
        line |= {"speedup": speed and speed.median, "speedup_lower": speed and speed.lower}
        line |= {"speedup_upper": speed and speed.upper, "latency_ms": latency and latency.median}
        line["peak_memory_mb"] = row.peak_memory_mb
        for stage in STAGES:
            found = row.scores.get(stage, {}).get(score, Score(None))
            line |= {stage: found.value, f"{stage}_stderr": found.stderr}
            line |= {f"{stage}_change": found.change, f"{stage}_change_stderr": found.change_stderr}
        lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def sweep_table(rows: Sequence[Row], score: str) -> str:
    """Return a Markdown table of all measurements, scores times 100, without columns that are empty in every row."""
    columns = ["", f"{metric_name(score)}, merged", "change", "retrained", "change", "GFLOPs", "of unmerged"]
    columns += ["latents left", "items/s", "speed-up", "latency, ms", "peak MB"]

    def cells(row: Row) -> list[object]:
        speed, memory = row.speedup, row.peak_memory_mb
        return [
            row.name,
            *(cell for stage in STAGES for cell in _score_cells(row, stage, score)),
            f"{row.gflops:.4g}",
            f"{row.flops_ratio:.3f}",
            row.latents_left,
            None if row.throughput is None else f"{row.throughput:.4g}",
            None if speed is None else f"{speed.median:.2f}x ({speed.lower:.2f} to {speed.upper:.2f})",
            None if row.latency_ms is None else f"{row.latency_ms.median:.4g}",
            None if memory is None else f"{memory:.0f}",
        ]

    lines = [cells(row) for row in rows]
    shown = [place for place in range(len(columns)) if any(line[place] is not None for line in lines)]
    return markdown_table([columns[place] for place in shown], [[line[place] for place in shown] for line in lines])


def _score_cells(row: Row, stage: str, name: str) -> list[str | None]:
    """Return a score times 100 and its change, each with its standard error; `None` if not measured."""
    score = row.scores.get(stage, {}).get(name)
    if score is None:
        return [None, None]
    change = with_error(score.change, score.change_stderr, "+.2f", scale=100) if score.compared else None
    return [with_error(score.value, score.stderr, scale=100), change]


def write_report(results: SweepResults, command: str, output_dir: Path) -> tuple[str, Best | None]:
    """Write `sweep_results.csv`, `sweep.png` and `sweep_report.md` beside `sweep_results.json`.

    Args:
        results: results of the sweep.
        command: command line of the sweep, to quote in the report.
        output_dir: folder of the files.

    Returns:
        The report as Markdown that begins with the table, without heading and environment; and the best row.
    """
    rows, score, name = results.rows, results.metric, metric_name(results.metric)
    title = f"{results.source.name}: {results.evaluated_on:,} examples"
    write_csv(rows, score, output_dir / "sweep_results.csv")
    best = find_best(rows, score)
    draw_sweep(rows, score, title if best is None else f"{title}\n{best.sentence}", output_dir / PICTURE)
    found = "" if best is None else f"{best.sentence} {BEST_ROW_RULE}\n\n"
    if rows[0].value_and_error("merged", score) is None:
        found = f"{name} is undefined for the unmerged model on these examples, so there is no best row.\n\n"
    others = ""
    for other in rows[0].scores.get("merged", {}):
        if other != score:
            lines = [(row.name, *(_score_cells(row, stage, other)[0] for stage in STAGES)) for row in rows]
            others += f"**{metric_name(other)}**\n\n{markdown_table(['', *STAGES], lines)}\n\n"
    timing, timing_note = results.timing, "Nothing was timed."
    if timing is not None:
        where = f" ({environment_line(timing['environment'])})" if "environment" in timing else ""
        timing_note = (
            "Speed-up: median of the per-round ratios to the unmerged model, with quartiles, at batch "
            f"{timing['batch_size']} over {timing['rounds']} interleaved rounds{where}."
        )
    total = sum(results.seconds.values())
    spent = [f"{activity} {value:,.0f} s ({value / total:.0%})" for activity, value in results.seconds.items()]
    table = sweep_table(rows, score)
    report = f"""{table}

{name} times 100 with its standard error, on {results.evaluated_on:,} examples of the split '{results.source.split}';
change: from the unmerged checkpoint, paired by example.{undefined_note(table)} GFLOPs: of one input of shape
{tuple(results.input_shape[1:])}, including matching. {timing_note}

{found}![{name} against the speed-up or, if not timed, the share of FLOPs]({PICTURE})

Vertical bars: standard error, of the paired change from unmerged where there is one. Horizontal bars: quartiles of the
timed rounds. Grey band: standard error of the unmerged model.

{others}Time of the sweep: {", ".join(spent)}; {total:,.0f} s in total.

Command:

```
{command}
```"""
    measured_on = f"Measured on: {environment_line(results.environment)}."
    write_text(output_dir / "sweep_report.md", f"# {escape_markdown(title)}\n\n{report}\n\n{measured_on}\n")
    return report, best


def draw_sweep(rows: Sequence[Row], score: str, title: str, path: Path) -> None:
    """Draw a score against the measured speed or, if the rows were not timed, against the share of FLOPs.

    Every line is named at its end, so there is no legend. Lines of retrained rows are dashed.

    Args:
        rows: rows of a sweep, the unmerged model first.
        score: name of the score.
        title: title of the picture.
        path: path of the PNG file.
    """
    speeds = [row.speedup.median for row in rows[1:] if row.speedup is not None]
    figure, axes = plt.subplots(figsize=(8, 4.6), constrained_layout=True)
    axes.set(ylabel=f"{metric_name(score)} x 100", xlabel="times as fast as the unmerged model, measured")
    if not speeds:
        axes.set(xlabel="share of the unmerged model's FLOPs")
        axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.margins(x=0.06, y=0.1)
    _draw_unmerged(axes, rows[0], score)
    # Skip rows that merge nothing and were not retrained: they are the unmerged model.
    drawn = [row for row in rows[1:] if row.flops_ratio != 1 or row.value_and_error("retrained", score)]
    series = list(dict.fromkeys(row.series for row in drawn))
    ends = []
    for color, (name, stage) in zip(series_colors(series, len(STAGES)), product(series, STAGES), strict=True):
        line = [row for row in drawn if row.series == name and row.value_and_error(stage, score)]
        if not speeds or (line := [row for row in line if row.speedup is not None]):
            ends += _draw_line(axes, line, score, stage, color)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 100 + 0.03 * (100 - low)))  # room for the marker of a score of 100
    if speeds and min(speeds) < 1:
        left = axes.get_xlim()[0]
        axes.axvspan(left, 1, color="whitesmoke", zorder=0)
        axes.text(1, 0.02, "slower than unmerged ", ha="right", rotation=90, transform=axes.get_xaxis_transform())
        axes.set_xlim(left=left)
    name_lines(axes, ends)
    figure.suptitle(
        "\n".join(
            textwrap.fill(line.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"), 88)
            for line in title.splitlines()
        ),
        fontsize=11,
        parse_math=False,
    )
    save_picture(figure, path)


def _draw_unmerged(axes: Axes, row: Row, score: str) -> None:
    """Draw the unmerged model at 1, with a band of one standard error: differences within it are noise."""
    for stage, marker, name, above in (("merged", "o", "unmerged", 8), ("retrained", "s", "unmerged, retrained", -15)):
        if (measured := row.value_and_error(stage, score)) is not None:
            value, error = 100 * measured[0], 100 * (row.scores[stage][score].stderr or 0)
            if stage == "merged":
                axes.axhspan(value - error, value + error, color=UNMERGED, alpha=0.15, linewidth=0)
                axes.axhline(value, color=UNMERGED, linewidth=1, linestyle="--")
            axes.plot(1, value, marker, color=UNMERGED, markersize=8, zorder=3)
            axes.annotate(
                f"{name} {value:.1f}",
                (1, value),
                xytext=(0, above),
                textcoords="offset points",
                fontsize=10,
            )


def _draw_line(axes: Axes, rows: Sequence[Row], score: str, stage: str, color: Color) -> list[LineEnd]:
    """Draw the rows of one series and stage as a line with error bars, and return its end, if it has rows."""
    if not rows:
        return []
    rows = sorted(rows, key=lambda row: row.flops_ratio, reverse=True)
    measured = [row.value_and_error(stage, score) or (math.nan, 0.0) for row in rows]
    values, errors = ([100 * number for number in numbers] for numbers in zip(*measured, strict=True))
    places = [row.speedup or Quartiles(*[row.flops_ratio] * 3) for row in rows]
    sides = [[at.median - at.lower for at in places], [at.upper - at.median for at in places]]
    axes.errorbar(
        [at.median for at in places],
        values,
        yerr=errors,
        xerr=sides if any(map(any, sides)) else None,
        color=color,
        marker="os"[STAGES.index(stage)],
        linestyle=("-", "--")[STAGES.index(stage)],
        **POINT_STYLE,
    )
    label = series_label(rows[0].series, all(row.is_constant_r for row in rows), stage == "retrained")
    # More merging need not be faster, so the last row may not be the one furthest right.
    right = places[-1].upper if rows[0].speedup is None else max(at.upper for at in places)
    return [LineEnd(right, values[-1], label, color)]
