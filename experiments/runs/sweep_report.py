# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep: rows, the results file, and the table, CSV file, picture and report made from it."""

from __future__ import annotations

import csv
import io
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
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
    CONTROL,
    MARKERS,
    MERGED,
    POINT_STYLE,
    TRAINED,
    UNMERGED,
    add_legend,
    is_control,
    save_picture,
    series_label,
    shades,
)
from experiments.publishing.tables import markdown_table, with_error
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
    speed = "not timed"
    if row.speedup is not None:
        slower = "" if row.speedup.median >= 1 else ", slower than unmerged"
        speed = f"{row.speedup.median:.2f} times as fast{slower}"
    trained = "retrained" if stage == "retrained" else "not retrained"
    sentence = (
        f"{row.flops_ratio:.2f} of the FLOPs, {speed}, {METRIC_NAMES.get(score, score.replace('_', ' '))} "
        f"{100 * unmerged[0]:.1f} -> {with_error(value, row.scores[stage][score].stderr, '.1f', scale=100)} "
        f"({row.name}, {trained})."
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

{found}![{name} against the share of FLOPs and, if timed, the speed-up]({PICTURE})

{others}Time of the sweep: {", ".join(spent)}; {total:,.0f} s in total.

Command:

```
{command}
```"""
    measured_on = f"Measured on: {environment_line(results.environment)}."
    write_text(output_dir / "sweep_report.md", f"# {title}\n\n{report}\n\n{measured_on}\n")
    return report, best


def draw_sweep(rows: Sequence[Row], score: str, title: str, path: Path) -> None:
    """Draw a score against the share of FLOPs and, if the rows were timed, against the speed-up.

    Args:
        rows: rows of a sweep, the unmerged model first.
        score: name of the score.
        title: title of the picture.
        path: path of the PNG file.
    """
    speeds = [row.speedup.median for row in rows[1:] if row.speedup is not None]
    timed = bool(speeds)
    figure, panels = plt.subplots(
        1, 1 + timed, figsize=(8 + 4 * timed, 5.4), sharey=True, squeeze=False, constrained_layout=True
    )
    by_flops, *by_speed = panels[0]
    by_flops.invert_xaxis()
    by_flops.set(xlabel="share of the unmerged model's FLOPs", ylabel=f"{metric_name(score)} x 100")
    _draw_panel(by_flops, rows, score, lambda row: Quartiles(*[row.flops_ratio] * 3))
    for axes in by_speed:
        axes.set(xlabel="times as fast as unmerged, measured")
        _draw_panel(axes, rows, score, lambda row: row.speedup)
        if min(speeds) < 1:
            left = axes.get_xlim()[0]
            axes.axvspan(left, 1, hatch="//", facecolor="none", edgecolor="lightgray", label="slower than unmerged")
            axes.set_xlim(left=left)
    low, high = by_flops.get_ylim()
    by_flops.set_ylim(low, min(high, 100 + 0.03 * (100 - low)))  # room for the marker of a score of 100
    bars = "Vertical bars: standard error, of the paired change from unmerged where there is one"
    add_legend(figure, panels[0], 2 + timed, f"{bars}{'; horizontal bars: quartiles of the timed rounds' * timed}")
    figure.suptitle("\n".join(textwrap.fill(line, 130 if timed else 88) for line in title.splitlines()), fontsize=11)
    save_picture(figure, path)


def _draw_panel(axes: Axes, rows: Sequence[Row], score: str, place: Callable[[Row], Quartiles | None]) -> None:
    """Draw the unmerged model with its standard error, and a line for each series and stage.

    Args:
        axes: axes of the panel.
        rows: rows of a sweep, the unmerged model first.
        score: name of the score.
        place: returns the horizontal position of a row, or `None` if it was not measured.
    """
    unmerged, *others = rows
    for stage, marker, model in (("merged", "o", "unmerged"), ("retrained", "s", "unmerged, retrained")):
        if (measured := unmerged.value_and_error(stage, score)) is not None:
            value, error = 100 * measured[0], 100 * (unmerged.scores[stage][score].stderr or 0)
            label = f"{model}: {with_error(value, error, '.1f')}"
            if stage == "merged":
                # A band of one standard error shows which differences are within the noise.
                axes.axhspan(value - error, value + error, color=UNMERGED, alpha=0.15, linewidth=0)
                axes.axhline(value, color=UNMERGED, linewidth=1, linestyle="--")
                label += " (band)"
            axes.plot(1, value, marker, color=UNMERGED, markersize=8, label=label, zorder=3)
    axes.grid(alpha=0.3)
    axes.margins(x=0.15, y=0.1)  # room for names beside the points
    # Skip rows that merge nothing and were not retrained: they are the unmerged model.
    drawn = [row for row in others if row.flops_ratio != 1 or row.value_and_error("retrained", score)]
    series = list(dict.fromkeys(row.series for row in drawn))
    for name, stage in product(series, STAGES):
        points = [
            (at, 100 * measured[0], 100 * measured[1], row.name)
            for row in sorted(drawn, key=lambda row: row.flops_ratio, reverse=True)
            if row.series == name and (at := place(row)) is not None and (measured := row.value_and_error(stage, score))
        ]
        if points:
            places, values, errors, names = zip(*points, strict=True)
            sides = [[at.median - at.lower for at in places], [at.upper - at.median for at in places]]
            middles = [at.median for at in places]
            axes.errorbar(
                middles,
                values,
                yerr=errors,
                xerr=sides if any(map(any, sides)) else None,
                **_style(stage, name, series),
            )
            for point in zip(names, middles, values, strict=True) if len(series) == 1 and stage == "merged" else ():
                text = point[0].removesuffix(f" {name}")
                axes.annotate(text, point[1:], xytext=(3, 5), textcoords="offset points", fontsize=8, rotation=45)


def _style(stage: str, name: str, series: list[str]) -> dict[str, Any]:
    """Return the style of a line; several series of one colour differ in shade and marker."""
    control, retrained = is_control(name), stage == "retrained"
    same_colour = [other for other in series if is_control(other) == control]
    kind = CONTROL if control else TRAINED if retrained else MERGED
    words = f"{'control' if control else 'merged'}{', retrained' if retrained else ''}"
    return POINT_STYLE | {
        "color": shades(kind, len(same_colour))[same_colour.index(name)],
        "marker": MARKERS[series.index(name) % len(MARKERS)],
        "linestyle": "--" if control and retrained else "-",
        "label": words if series == ["r"] else f"{words}, {series_label(name)}",
    }
