# SPDX-License-Identifier: Apache-2.0
"""The paper's GLUE tables with sweeps of another checkpoint beside them: one table, one picture.

The paper merges a constant number r of latents in every layer of a model of 256 latents and 26 layers. What r means
depends on both, so rows stand side by side by r x layers / latents: at 1 the latents run out. FLOPs are shares of the
unmerged model's whole forward pass. Several sweeps of a task are several seeds: their means are shown.

    python benchmarks/paper_table.py mrpc=outputs/mrpc_sweep rte=outputs/rte_sweep --output_dir docs/results/language
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib import pyplot as plt

from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text
from experiments.publishing.card import metric_name
from experiments.publishing.picture_style import (
    CONTROL,
    MARKERS,
    MERGED,
    POINTS,
    TRAINED,
    UNMERGED,
    add_legend,
    save_picture,
    series_words,
    shades,
)
from experiments.publishing.tables import markdown_table, with_error
from experiments.training.output_folder import SWEEP_FILE

PAPER = json.loads(Path(__file__).with_name("paper_figures.json").read_text())
STAGES = ("merged", "retrained")
WAYS = ("merge_method", "merge_metric", "proportional_attention")


@dataclass(frozen=True)
class Row:
    """A row of a task's sweeps, one for each seed.

    Attributes:
        name: of the row, "r=4" or "flops=0.6 search".
        series: what it is part of: "r", or a schedule.
        strength: r x layers / latents of a constant r; `None` of a budget.
        flops_ratio: share of the unmerged model's FLOPs, the mean over the seeds.
        score: x 100, the mean over the seeds, of each stage that was measured.
        change: of the score from the unmerged one, and its standard error over the examples, for each stage.
        over_seeds: the least and the largest change of a seed, for each stage.
        speedup: times as fast as unmerged, the mean over the seeds; `None` if it was not measured.
    """

    name: str
    series: str
    strength: float | None
    flops_ratio: float
    score: dict[str, float]
    change: dict[str, tuple[float, float]]
    over_seeds: dict[str, tuple[float, float]]
    speedup: float | None


@dataclass(frozen=True)
class Task:
    """What was measured on a task.

    Attributes:
        name: as the paper's figures have it.
        metric, examples: what was measured on how many examples.
        seeds: how many sweeps.
        rows: the unmerged model first.
    """

    name: str
    metric: str
    examples: int
    seeds: int
    rows: list[Row]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n    python")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="example:\n    python" + epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = ", ".join(PAPER["tasks"])
    parser.add_argument("sweeps", nargs="+", help=f"folders of eval_sweep.py, each as TASK=FOLDER; tasks are {tasks}")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper_table"), help="(%(default)s)")
    return parser.parse_args(arguments)


def read_tasks(sweeps: Sequence[str]) -> list[Task]:
    """The sweeps of each task, in the order in which tasks are named first.

    Raises:
        BadInput: for what is no task of the paper or no sweep, and for seeds that differ in their rows.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for sweep in sweeps:
        name, _, folder = sweep.partition("=")
        path = Path(folder) / SWEEP_FILE
        if name not in PAPER["tasks"]:
            raise BadInput(f"sweeps {sweep}: allowed is TASK=FOLDER, with a task of {', '.join(PAPER['tasks'])}")
        if not path.is_file():
            raise BadInput(f"sweeps {sweep}: allowed is a folder with {SWEEP_FILE}, as eval_sweep.py writes it")
        results.setdefault(name, []).append(json.loads(path.read_text()))
    return [_task(name, seeds) for name, seeds in results.items()]


def _task(name: str, seeds: Sequence[dict[str, Any]]) -> Task:
    asked = [[_asked(row) for row in seed["rows"]] for seed in seeds]
    if any(other != asked[0] for other in asked):
        raise BadInput(f"sweeps {name}: allowed are seeds with the same rows, merged in the same way")
    if len({(seed["metric"], seed["evaluated_on"]) for seed in seeds}) > 1:
        raise BadInput(f"sweeps {name}: allowed are seeds with one metric, measured on the same examples")
    metric = seeds[0]["metric"]
    latents = seeds[0]["rows"][0]["latents_left"]
    rows = [_row([seed["rows"][place] for seed in seeds], metric, latents) for place in range(len(asked[0]))]
    return Task(name, metric, seeds[0]["evaluated_on"], len(seeds), rows)


def _asked(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is the result of: a search finds r and the way to merge by itself, for each seed its own."""
    if row.get("series") == "search":
        return (row["name"],)
    return row["name"], row["r"], *(row.get(way) for way in WAYS)


def _row(seeds: Sequence[dict[str, Any]], metric: str, latents: int) -> Row:
    first, change = seeds[0], f"{metric}_change"
    # Its last layers may have nothing left to merge.
    r, constant = first["r"], first.get("series", "r") == "r"
    stages = [stage for stage in STAGES if all(stage in seed for seed in seeds)]
    changed = [stage for stage in stages if change in first[stage]]
    speedups = [seed["speedup"]["median"] for seed in seeds if seed.get("speedup")]
    return Row(
        name=first["name"],
        series=first.get("series", "r"),
        strength=r[0] * len(r) / latents if constant else None,
        flops_ratio=fmean(seed["flops_ratio"] for seed in seeds),
        score={stage: 100 * fmean(seed[stage][metric] for seed in seeds) for stage in stages},
        change={
            stage: (
                100 * fmean(seed[stage][change] for seed in seeds),
                # All seeds are evaluated on the same examples, so more seeds do not make it smaller.
                100 * math.sqrt(fmean(seed[stage][f"{change}_stderr"] ** 2 for seed in seeds)),
            )
            for stage in changed
        },
        over_seeds={
            stage: (min(each), max(each))
            for stage in changed
            for each in [[100 * seed[stage][change] for seed in seeds]]
        },
        speedup=fmean(speedups) if len(speedups) == len(seeds) else None,
    )


def as_markdown(task: Task) -> str:
    """The paper's rows of a task, ours of a constant r beside the nearest of them, and then our budgets."""
    paper, metric = PAPER["tasks"][task.name], metric_name(task.metric)
    beside = _beside([row for row in task.rows if row.strength is not None])
    rows = []
    for place, r in enumerate(PAPER["r"]):
        ours = beside.get(place)
        rows.append(
            [
                r,
                f"{_paper_strength(r):.2f}",
                f"{PAPER['gflops'][place] / PAPER['gflops'][0]:.3f}",
                *(f"{paper[stage][place]:.2f}" for stage in STAGES),
                f"{paper['speedup'][place]:.2f}",
                *(_cells(ours) if ours else [None] * 6),
            ]
        )
    head = ["r", "r x layers / latents", "FLOPs", "merged", "retrained", "times as fast"]
    ours_head = ["ours", "r x layers / latents", "FLOPs", f"{metric}, merged", "retrained", "times as fast"]
    parts = [f"## {task.name}", "", _about(task), "", markdown_table([*head, *ours_head], rows)]
    others = [_cells(row) for row in task.rows if row not in beside.values()]
    if others:
        parts += [
            "",
            "At a budget, and what has no row of the paper's beside it:",
            "",
            markdown_table(ours_head, others),
        ]
    return "\n".join(parts) + "\n"


def _about(task: Task) -> str:
    seeds = f"means of {task.seeds} seeds, with the least and the largest change; " if task.seeds > 1 else ""
    return (
        f"Left the paper's {PAPER['model']}, {metric_name(task.metric)} x 100; right ours on {task.examples:,} "
        f"examples: {seeds}in brackets the change from unmerged, paired example by example, with its standard error."
    )


def _paper_strength(r: int) -> float:
    return r * PAPER["num_layers"] / PAPER["num_latents"]


def _beside(rows: Sequence[Row]) -> dict[int, Row]:
    """Beside which of the paper's rows ours stand: in pairs, those first that are nearest in r x layers / latents, and
    none that is farther away than half of what the paper's rows are apart."""
    apart = [
        (abs(_paper_strength(r) - row.strength), place, row)
        for row in rows
        for place, r in enumerate(PAPER["r"])
        if row.strength is not None
    ]
    most = _paper_strength(PAPER["r"][1]) / 2 + 0.01
    beside: dict[int, Row] = {}
    for distance, place, row in sorted(apart, key=lambda each: each[0]):
        if distance <= most and place not in beside and row not in beside.values():
            beside[place] = row
    return beside


def _cells(row: Row) -> list[str | None]:
    return [
        row.name,
        None if row.strength is None else f"{row.strength:.2f}",
        f"{row.flops_ratio:.3f}",
        *(_score(row, stage) for stage in STAGES),
        None if row.speedup is None else f"{row.speedup:.2f}",
    ]


def _score(row: Row, stage: str) -> str | None:
    if stage not in row.score:
        return None
    score = f"{row.score[stage]:.2f}"
    if stage in row.change:
        least, largest = row.over_seeds[stage]
        spread = "" if least == largest else f"; {least:+.2f} to {largest:+.2f}"
        score += f" ({with_error(*row.change[stage], form='+.2f')}{spread})"
    return score


def draw(tasks: Sequence[Task], path: Path) -> None:
    """The change of each task's score over the share of the FLOPs: the paper's, and ours, by r and by budget."""
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks) + 1, 5.6), squeeze=False, constrained_layout=True
    )
    shares = [gflops / PAPER["gflops"][0] for gflops in PAPER["gflops"]]
    series = ["r", *dict.fromkeys(row.series for task in tasks for row in task.rows if row.strength is None)]
    colors = dict(zip(series, shades(MERGED, len(series)), strict=True))
    for axes, task in zip(panels[0], tasks, strict=True):
        for stage, style in zip(STAGES, ("-", ":"), strict=True):
            scores = PAPER["tasks"][task.name][stage]
            axes.plot(
                shares, [score - scores[0] for score in scores], style, marker=".", color=CONTROL(0.75),
                label=f"the paper, constant r, {stage}",
            )  # fmt: skip
        for index, (name, color) in enumerate(colors.items()):
            for stage in STAGES:
                rows = [row for row in task.rows if row.series == name and stage in row.change]
                rows.sort(key=lambda row: row.flops_ratio)
                if rows:
                    words = "constant r" if name == "r" else series_words(name)
                    axes.errorbar(
                        [row.flops_ratio for row in rows], [row.change[stage][0] for row in rows],
                        [row.change[stage][1] for row in rows], label=f"ours, {words}, {stage}",
                        color=color if stage == "merged" else shades(TRAINED, len(colors))[index],
                        marker=MARKERS[index % len(MARKERS)], **POINTS,
                    )  # fmt: skip
        axes.axhline(0, color=UNMERGED, linewidth=0.8)
        axes.set(
            title=task.name,
            xlabel="share of the unmerged model's FLOPs",
            ylabel=f"{metric_name(task.metric)} x 100, change",
        )
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    bars = "Bars: standard error of the change from unmerged, paired example by example"
    add_legend(figure, panels[0], min(3, 1 + len(tasks)), bars)
    save_picture(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    tasks = read_tasks(options.sweeps)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    table = "\n".join(as_markdown(task) for task in tasks)
    write_text(options.output_dir / "paper_table.md", table)
    draw(tasks, options.output_dir / "paper_table.png")
    print(table)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
