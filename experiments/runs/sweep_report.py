# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep: its rows, the file that holds them, and the table, CSV file, picture and report made of them."""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from cost_tome_perceiver import Merging, forward_cost
from experiments.errors import BadInput
from experiments.files import read_json, write_json, write_text
from experiments.measurement import Quartiles, environment_line
from experiments.merging.arguments import WAYS
from experiments.publishing.card import METRIC_NAMES, metric_name, undefined_note
from experiments.publishing.picture_style import (
    CONTROL,
    MARKERS,
    MERGED,
    POINTS,
    TRAINED,
    UNMERGED,
    add_legend,
    is_control,
    save_picture,
    series_words,
    shades,
)
from experiments.publishing.tables import markdown_table, with_error
from experiments.tasks.base import Source
from experiments.tasks.scores import Score, Scores, flatten_scores, parse_scores
from experiments.training.output_folder import SWEEP_FILE, another_run, run_files
from experiments.training.run_record import RunRecord
from frontier_tome_perceiver import GROUPS
from modeling_tome_perceiver import ToMePerceiverPreTrainedModel

PICTURE = "sweep.png"
# Stages in which a row is evaluated, and what each is called in the picture.
STAGES = {"merged": "merged", "retrained": "merged and trained again"}
CONTROL_STAGES = {"merged": "control", "retrained": "control, trained again"}
# A score holds if it has fallen by at most this many standard errors.
HOLDS = 2
BEST_IS = """The best row: of those that are faster than unmerged, if any is, the fastest whose metric is not lower by
more than two standard errors of the paired change; untimed, the one with the fewest FLOPs; if none is so, the one that
lost least. It was picked on these examples."""
# Timing may be left out at first, or be repeated with more rounds.
NOT_COMPARED = ("timing_rounds",)
# Largest number of lines in a picture that can be told apart.
MOST_SERIES = 8
# Width of a letter of a point's name, as a share of its panel.
LETTER = 0.017


@dataclass(kw_only=True)
class Row:
    """A row of a sweep: merging settings, their cost, and the measurements so far.

    Attributes:
        name: of the row, such as "flops=0.6 search".
        series: rows of one series are joined by a line in the picture.
        merging: the settings; missing from files of old versions.
        shown: further settings and costs, for readers of the results file.
        gflops, flops_ratio: FLOPs of one input, and as a share of the unmerged model's.
        latents_left: number of latents after the last layer.
        scores: by stage.
        latency_ms, speedup: time of a batch; the unmerged model's time in the same round, divided by it.
        throughput: inputs a second.
        peak_memory_mb: most memory held at once.
    """

    name: str
    series: str = "r"
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
        cls,
        model: ToMePerceiverPreTrainedModel,
        input_shape: tuple[int, ...],
        merging: Merging,
        baseline: Merging,
        **named: Any,
    ) -> Row:
        """Return a row of which nothing is measured yet.

        Args:
            model: its config and class decide the cost.
            input_shape: of one input, (1, S) or (1, 3, height, width).
            merging: settings of the row.
            baseline: settings of the unmerged model.
            named: name and series.
        """
        config = merging.asked_of(model.config)
        cost, unmerged = (
            forward_cost(each.asked_of(model.config), input_shape, type(model).__name__) for each in (merging, baseline)
        )
        own, whole = (sum(each.self_attention) + sum(each.matching) for each in (cost, unmerged))
        # Groups in the layers, or of the learned latents with nothing matched after them.
        only_groups = config.merge_groups or (config.latent_groups and not any(config.merge_schedule))
        shown = {"r": config.merge_schedule, "num_blocks": config.num_blocks}
        shown |= {way: getattr(config, way) for way in WAYS} | ({"merge_method": GROUPS} if only_groups else {})
        return cls(
            merging=merging,
            shown=shown | {"self_attention_gflops": own / 1e9, "self_attention_flops_ratio": own / whole},
            gflops=cost.total_with_matching / 1e9,
            flops_ratio=cost.total_with_matching / unmerged.total_with_matching,
            latents_left=config.latents_per_layer[-1],
            **named,
        )

    @property
    def branch(self) -> str:
        """Branch of the Hub repository, and folder below `retrained/`, of the retrained checkpoint."""
        return re.sub(r"[^A-Za-z0-9.]+", "_", self.name.replace("=", ""))

    def judged(self, stage: str, name: str) -> tuple[float, float] | None:
        """Return the value of a score and the standard error by which it is judged, or `None` if it has no value.

        That is the error of its change, if it was compared.
        """
        score = self.scores.get(stage, {}).get(name, Score(None))
        error = score.change_stderr if score.compared else score.stderr
        return None if score.value is None else (score.value, error or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the row as the results file has it: measurements that are missing are left out."""
        plain = {name: value for name, value in asdict(self).items() if value is not None}
        fields, shown, scores = (plain.pop(name, {}) for name in ("merging", "shown", "scores"))
        stages = {stage: flatten_scores(self.scores[stage]) for stage in scores}
        return {"name": plain.pop("name"), "series": plain.pop("series"), "fields": fields} | shown | plain | stages

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Row:
        """Read a row of the results file, also of an older version, which lacks some settings."""
        known = {each for each in cls.__dataclass_fields__ if each in saved}
        given = {name: saved[name] for name in known}
        given |= {name: Quartiles(**saved[name]) for name in ("latency_ms", "speedup") if name in saved}
        fields = {"latent_groups": None} | saved.get("fields", {})
        return cls(
            merging=Merging(**fields) if "fields" in saved else None,  # type: ignore[arg-type]
            shown={name: saved[name] for name in saved if name not in {*known, "fields", *STAGES}},
            scores={stage: parse_scores(saved[stage]) for stage in STAGES if stage in saved},
            **given,
        )


@dataclass(kw_only=True)
class SweepResults:
    """Content of `sweep_results.json`, which is written whole after every cell.

    Attributes:
        arguments: that decide a cell's value.
        content: fingerprints of the weights and the data, which decide it too.
        environment: that the sweep was begun in.
        source: of the data.
        evaluated_on: number of examples.
        input_shape: of one input of the timed batch, which `gflops` are for.
        metric: name of the score that tables and pictures show; `merged` and `retrained` hold all of the task's.
        rows: the unmerged model first.
        seconds: time spent, by activity, of every run that filled cells.
        timing: how the rows were timed, and where if in another environment; `None` if they were not.
        frontier: of the checkpoint, as its config holds it; `None` if it has none.
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
        """Record of what decides every cell."""
        return RunRecord(self.arguments, self.content)

    @property
    def title(self) -> str:
        return f"{self.source.name}: {self.evaluated_on:,} examples"

    def save(self, output_dir: Path) -> None:
        """Write the file, whole or not at all."""
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / SWEEP_FILE, asdict(self) | {"rows": [row.to_json() for row in self.rows]})

    def take_over(self, output_dir: Path) -> bool:
        """Take over the cells of an earlier run of the same sweep, and return whether there was one.

        Raises:
            BadInput: if the folder holds another run, or a file of a version that did not say what made it.
        """
        path = output_dir / SWEEP_FILE
        if not path.exists():
            if found := run_files(output_dir):
                raise another_run(output_dir, ", ".join(found))
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
            raise another_run(output_dir, different)
        self.rows = [Row.from_json(row) for row in earlier["rows"]]
        self.environment, self.seconds = earlier["environment"], earlier["seconds"]
        self.timing, self.frontier = earlier.get("timing"), earlier.get("frontier")
        return True

    @contextmanager
    def spending(self, activity: str) -> Iterator[None]:
        """Add the time of the block to an activity."""
        start = time.perf_counter()
        yield
        self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Best:
    """The best row of a sweep, the stage that it is best in, and its result in a sentence."""

    row: Row
    stage: str
    sentence: str


def best_of(rows: Sequence[Row], metric: str) -> Best | None:
    """Return the fastest row whose score holds: it has fallen by at most `HOLDS` standard errors of its change.

    Rows that are slower than unmerged are left out while there are others. Where nothing was timed, it is the row with
    the fewest FLOPs; where no row holds, the one that has lost least.

    Args:
        rows: the unmerged model first.
        metric: name of the score.

    Returns:
        `None` if no row that saves anything was evaluated.
    """
    unmerged = rows[0].judged("merged", metric)
    cells = [
        (row, stage, *judged)
        for row in rows
        for stage in STAGES
        if row.flops_ratio < 1 and (judged := row.judged(stage, metric)) is not None
    ]
    if unmerged is None or not cells:
        return None
    cells = [cell for cell in cells if cell[0].speedup is not None and cell[0].speedup.median >= 1] or cells
    timed = all(row.speedup is not None for row, *_ in cells)

    def gain(cell: tuple[Row, str, float, float]) -> tuple[float, float]:
        # Of one row, retrained or not, the better.
        row, _, value, _ = cell
        return row.speedup.median if timed and row.speedup is not None else -row.flops_ratio, value

    holding = [cell for cell in cells if cell[2] - unmerged[0] >= -HOLDS * cell[3]]
    row, stage, value, _ = max(holding, key=gain) if holding else max(cells, key=lambda cell: cell[2])
    speed = "not timed"
    if row.speedup is not None:
        slower = "" if row.speedup.median >= 1 else ", slower than unmerged"
        speed = f"{row.speedup.median:.2f} times as fast{slower}"
    trained = "trained again" if stage == "retrained" else "not trained again"
    sentence = (
        f"{row.flops_ratio:.2f} of the FLOPs, {speed}, {METRIC_NAMES.get(metric, metric.replace('_', ' '))} "
        f"{100 * unmerged[0]:.1f} -> {with_error(value, row.scores[stage][metric].stderr, '.1f', scale=100)} "
        f"({row.name}, {trained})."
    )
    return Best(row, stage, sentence)


def write_csv(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Write a sweep as CSV, one line a row; what was not measured or is undefined stays empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    figures = ("", "_stderr", "_change", "_change_stderr")
    plain = ("name", "gflops", "flops_ratio", "latents_left", "throughput")
    timed = ("speedup", "speedup_lower", "speedup_upper", "latency_ms", "peak_memory_mb")
    writer.writerow([*plain, *timed, *(f"{stage}{figure}" for stage in STAGES for figure in figures)])
    for row in rows:
        speedup = [row.speedup and getattr(row.speedup, end) for end in ("median", "lower", "upper")]
        cells = [getattr(row, name) for name in plain] + speedup
        cells += [row.latency_ms and row.latency_ms.median, row.peak_memory_mb]
        for stage in STAGES:
            score = row.scores.get(stage, {}).get(metric, Score(None))
            cells += [score.value, score.stderr, score.change, score.change_stderr]
        writer.writerow(cells)
    write_text(path, text.getvalue())


def sweep_table(rows: Sequence[Row], metric: str) -> str:
    """Return a table of all measurements, the score times 100, without columns that are empty in every row."""
    columns = ["", f"{metric_name(metric)}, merged", "change", "retrained", "change", "GFLOPs", "of unmerged"]
    columns += ["latents left", "items/s", "speed-up", "latency, ms", "peak MB"]

    def cells(row: Row) -> list[object]:
        speed, memory = row.speedup, row.peak_memory_mb
        return [
            row.name,
            *(cell for stage in STAGES for cell in _score_cells(row, stage, metric)),
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


def _score_cells(row: Row, stage: str, metric: str) -> list[str | None]:
    """Return a score times 100 and its change, each with its standard error; `None` for what was not measured."""
    score = row.scores.get(stage, {}).get(metric)
    if score is None:
        return [None, None]
    change = with_error(score.change, score.change_stderr, "+.2f", scale=100) if score.compared else None
    return [with_error(score.value, score.stderr, scale=100), change]


def write_report(results: SweepResults, command: str, output_dir: Path) -> tuple[str, Best | None]:
    """Write `sweep_results.csv`, `sweep.png` and `sweep_report.md` beside `sweep_results.json`.

    Args:
        results: the measurements.
        command: that made them.
        output_dir: where the files go.

    Returns:
        The report without its heading and the environment, Markdown that begins with the table; and the best row.
    """
    rows, metric, name = results.rows, results.metric, metric_name(results.metric)
    write_csv(rows, metric, output_dir / "sweep_results.csv")
    best = best_of(rows, metric)
    draw_sweep(
        rows, metric, results.title if best is None else f"{results.title}\n{best.sentence}", output_dir / PICTURE
    )
    found = "" if best is None else f"{best.sentence} {BEST_IS}\n\n"
    if rows[0].judged("merged", metric) is None:
        found = f"{name} is not defined for the unmerged model on these examples, so no row is called the best.\n\n"
    others = ""
    for other in rows[0].scores.get("merged", {}):
        if other != metric:
            lines = [(row.name, *(_score_cells(row, stage, other)[0] for stage in STAGES)) for row in rows]
            others += f"**{metric_name(other)}**\n\n{markdown_table(['', *STAGES], lines)}\n\n"
    timing, timed = results.timing, "Nothing was timed."
    if timing is not None:
        where = f" ({environment_line(timing['environment'])})" if "environment" in timing else ""
        timed = (
            "Speed-up: median of the per-round ratios to the unmerged model, with quartiles, at batch "
            f"{timing['batch_size']} over {timing['rounds']} interleaved rounds{where}."
        )
    total = sum(results.seconds.values())
    spent = [f"{activity} {value:,.0f} s ({value / total:.0%})" for activity, value in results.seconds.items()]
    table = sweep_table(rows, metric)
    report = f"""{table}

{name} times 100 with its standard error, on {results.evaluated_on:,} examples of the split '{results.source.split}';
change: from the unmerged checkpoint, paired example by example.{undefined_note(table)} GFLOPs: for one input of shape
{tuple(results.input_shape[1:])}, with their matching. {timed}

{found}![{name} over the share of the FLOPs, and over the speed if it was measured]({PICTURE})

{others}Where the time of the sweep went: {", ".join(spent)}, together {total:,.0f} s.

Made by

```
{command}
```"""
    measured_on = f"Measured on: {environment_line(results.environment)}."
    write_text(output_dir / "sweep_report.md", f"# {results.title}\n\n{report}\n\n{measured_on}\n")
    return report, best


def redraw(folder: Path) -> Path:
    """Draw the picture of a sweep again from its `sweep_results.json`, also of an older version, and return its path.

    Raises:
        BadInput: if the first row merges: there is no baseline.
    """
    results = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    rows, metric = [Row.from_json(row) for row in results["rows"]], results["metric"]
    if rows[0].flops_ratio != 1:
        raise BadInput(f"{folder}: the first row of its {SWEEP_FILE} merges; use a sweep that begins unmerged")
    source = results.get("source") or {"dataset": results["dataset"]}
    title = f"{source.get('config') or source['dataset'].rpartition('/')[2]}: {results['evaluated_on']:,} examples"
    best = best_of(rows, metric)
    draw_sweep(rows, metric, title if best is None else f"{title}\n{best.sentence}", folder / PICTURE)
    return folder / PICTURE


def draw_sweep(rows: Sequence[Row], metric: str, title: str, path: Path) -> None:
    """Draw a score over the share of the FLOPs and, if the rows were timed, over the measured speed-up.

    Args:
        rows: the unmerged model first.
        metric: name of the score.
        title: of the picture.
        path: of the PNG.
    """
    _, *others = rows
    timed = any(row.speedup is not None for row in others)
    figure, panels = plt.subplots(
        1, 1 + timed, figsize=(8 + 4 * timed, 5.4), sharey=True, squeeze=False, constrained_layout=True
    )
    by_flops, *by_speed = panels[0]
    series, left_out = _series_to_draw(others, metric)
    by_flops.invert_xaxis()
    by_flops.set(xlabel="share of the unmerged model's FLOPs", ylabel=f"{metric_name(metric)} x 100")
    _draw_panel(by_flops, rows, metric, series, lambda row: Quartiles(*[row.flops_ratio] * 3))
    for axes in by_speed:
        axes.set(xlabel="times as fast as unmerged, measured")
        _draw_panel(axes, rows, metric, series, lambda row: row.speedup)
        if min(row.speedup.median for row in others if row.speedup is not None) < 1:
            left = axes.get_xlim()[0]
            axes.axvspan(left, 1, hatch="//", facecolor="none", edgecolor="lightgray", label="slower than unmerged")
            axes.set_xlim(left=left)
    low, high = by_flops.get_ylim()
    by_flops.set_ylim(low, min(high, 100 + 0.03 * (100 - low)))  # room for the mark of a score of 100
    compared = any(score.compared for row in others for scores in row.scores.values() for score in scores.values())
    bars = "standard error of the change from unmerged, paired example by example" if compared else "standard error"
    below = f"Bars up and down: {bars}{'; to the sides: quartiles of the timed rounds' if timed else ''}"
    if left_out:
        below += f"\nNot drawn: {left_out} series that lose more, which are in the table"
    add_legend(figure, panels[0], 2 + timed, below)
    figure.suptitle("\n".join(textwrap.fill(line, 130 if timed else 88) for line in title.splitlines()), fontsize=11)
    save_picture(figure, path)


def _series_to_draw(rows: Sequence[Row], metric: str) -> tuple[list[str], int]:
    """Return the series that save anything, in their order, and the number of those left out.

    Of more than can be told apart, those are kept that lose least in the row in which they lose most.
    """
    worst: dict[str, float] = {}
    for row in rows:
        values = [judged[0] for stage in STAGES if (judged := row.judged(stage, metric)) is not None]
        # A row that merges nothing is the unmerged model again, unless it was retrained.
        if values and (row.flops_ratio != 1 or row.judged("retrained", metric)):
            worst[row.series] = min(worst.get(row.series, max(values)), max(values))
    kept = sorted(worst, key=lambda name: worst[name], reverse=True)[:MOST_SERIES]
    return [name for name in worst if name in kept], len(worst) - len(kept)


def _draw_panel(
    axes: Axes, rows: Sequence[Row], metric: str, series: list[str], place: Callable[[Row], Quartiles | None]
) -> None:
    """Draw the unmerged model with its standard error, and a line for each series and stage.

    Args:
        axes: of the panel.
        rows: the unmerged model first.
        metric: name of the score.
        series: to draw.
        place: where a row stands from left to right, if that was measured.
    """
    unmerged, *others = rows
    for stage, mark, what in (("merged", "o", "unmerged"), ("retrained", "s", "unmerged, trained again")):
        if (judged := unmerged.judged(stage, metric)) is not None:
            value, error = 100 * judged[0], 100 * (unmerged.scores[stage][metric].stderr or 0)
            label = f"{what}: {with_error(value, error, '.1f')}"
            if stage == "merged":
                # The band gives a scale to a sweep that loses nothing.
                axes.axhspan(value - error, value + error, color=UNMERGED, alpha=0.15, linewidth=0)
                axes.axhline(value, color=UNMERGED, linewidth=1, linestyle="--")
                label += ", the band"
            axes.plot(1, value, mark, color=UNMERGED, markersize=8, label=label, zorder=3)
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)  # room for names beside the points
    for name in series:
        for stage in STAGES:
            points = [
                (at, 100 * judged[0], 100 * judged[1], row)
                for row in others
                if row.series == name and (at := place(row)) is not None and (judged := row.judged(stage, metric))
            ]
            points.sort(key=lambda point: point[3].flops_ratio, reverse=True)
            if points:
                sides = [[at.median - at.lower for at, *_ in points], [at.upper - at.median for at, *_ in points]]
                axes.errorbar(
                    [at.median for at, *_ in points],
                    [value for _, value, *_ in points],
                    yerr=[error for *_, error, _ in points],
                    xerr=sides if any(map(any, sides)) else None,
                    **_style(stage, name, series),
                )
            if len(series) == 1 and stage == "merged":
                _name_points(axes, [(at.median, value, row) for at, value, _, row in points])


def _style(stage: str, name: str, series: list[str]) -> dict[str, Any]:
    """Return color, mark and label of a line: each of several series has a shade and a mark of its own."""
    control = is_control(name)
    alike = [each for each in series if is_control(each) == control]
    kind = CONTROL if control else MERGED if stage == "merged" else TRAINED
    words = CONTROL_STAGES[stage] if control else STAGES[stage]
    return POINTS | {
        "color": shades(kind, len(alike))[alike.index(name)],
        "marker": MARKERS[series.index(name) % len(MARKERS)],
        "linestyle": "--" if control and stage == "retrained" else "-",
        "label": words if series == ["r"] else f"{words}, {series_words(name)}",
    }


def _name_points(axes: Axes, points: Sequence[tuple[float, float, Row]]) -> None:
    """Write what merges above each point, at one of two heights; where neither has room, leave it out."""
    first, last = map(float, axes.get_xlim())
    taken = {6: 0.0, 17: 0.0}  # by height above the point, in points of print: where the last name ends
    for x, y, row in sorted(points, key=lambda point: point[0], reverse=first > last):
        name = row.name.removesuffix(f" {row.series}")
        width, at = LETTER * len(name), (x - first) / (last - first)
        start = min(at, 1 - width)
        height = next((height for height, end in taken.items() if end <= start), None)
        if height is not None:
            taken[height] = start + width
            side: dict[str, Any] = {
                "xytext": (5 if start == at else -5, height),
                "ha": "left" if start == at else "right",
            }
            axes.annotate(name, (x, y), textcoords="offset points", fontsize=8, **side)
