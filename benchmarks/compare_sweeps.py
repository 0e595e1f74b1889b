# SPDX-License-Identifier: Apache-2.0
"""Several sweeps in one table and one picture: what each way of merging costs, and what it loses.

A loss is the change of the metric from a sweep's own unmerged checkpoint, paired example by example, so that sweeps of
several seeds, methods or trainings can stand side by side. FLOPs are given as a share of the whole forward pass and of
the self-attention layers alone. The table has every row. What is drawn are all lines or those of --lines, each by its
name in the first column.

    python benchmarks/compare_sweeps.py outputs/schedules --output_dir docs/results/comparison
    python benchmarks/compare_sweeps.py outputs/a elastic=outputs/b --trained elastic --stages merged \\
        --lines floor "elastic floor"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.colors import Colormap

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
    is_control,
    save_picture,
    series_words,
    shades,
)
from experiments.publishing.tables import markdown_table, with_error
from experiments.training.output_folder import SWEEP_FILE

STAGES = ("merged", "retrained")
SHARES = {"all": "flops_ratio", "self_attention": "self_attention_flops_ratio"}


@dataclass(frozen=True)
class Point:
    """A cell of a sweep.

    Attributes:
        line: what points of one line share: the sweep's label, the row's series and, if there are two, the stage.
        label, series, stage: these three.
        row: name of the row.
        flops_ratio, self_attention_flops_ratio: shares of the unmerged model's.
        change, stderr: of the metric from the unmerged checkpoint, in points, with the standard error.
    """

    line: str
    label: str
    series: str
    stage: str
    row: str
    flops_ratio: float
    self_attention_flops_ratio: float
    change: float
    stderr: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n    python")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n    python" + epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweeps", nargs="+", help="folders of eval_sweep.py, each also as LABEL=FOLDER")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which cells (%(default)s)")
    parser.add_argument("--x", choices=sorted(SHARES), default="all", help="the FLOPs that are drawn (%(default)s)")
    parser.add_argument("--lines", nargs="+", default=[], help="the lines that are drawn (all)")
    parser.add_argument(
        "--trained", nargs="+", default=[], help="labels of checkpoints that were trained with merging on"
    )
    parser.add_argument("--lowest", type=float, help="the picture ends at this change, in points")
    parser.add_argument("--title", default="", help="of the picture")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"), help="(%(default)s)")
    return parser.parse_args(arguments)


def read_sweep(spelled: str) -> tuple[str, dict[str, Any]]:
    """A label, empty if none is given, and what `sweep_results.json` holds.

    Raises:
        BadInput: if there is none.
    """
    label, _, folder = spelled.rpartition("=")
    path = Path(folder) / SWEEP_FILE
    if not path.is_file():
        raise BadInput(f"sweeps {spelled}: allowed is a folder with {SWEEP_FILE}, as eval_sweep.py writes it")
    return label, json.loads(path.read_text())


def points_of(label: str, results: dict[str, Any], stages: Sequence[str]) -> list[Point]:
    """The cells of a sweep that are compared with its unmerged checkpoint."""
    change = f"{results['metric']}_change"
    return [
        Point(
            line=" ".join(part for part in (label, row.get("series", "r"), stage if len(stages) > 1 else "") if part),
            label=label,
            series=row.get("series", "r"),
            stage=stage,
            row=row["name"],
            flops_ratio=row["flops_ratio"],
            self_attention_flops_ratio=row["self_attention_flops_ratio"],
            change=100 * row[stage][change],
            stderr=100 * (row[stage][f"{change}_stderr"] or 0),
        )
        for stage in stages
        for row in results["rows"]
        if row.get(stage, {}).get(change) is not None
    ]


def as_markdown(points: Sequence[Point], metric: str) -> str:
    """A table with a line for each point, in the order of the sweeps."""
    rows = [
        (
            point.line,
            point.row,
            f"{point.flops_ratio:.3f}",
            f"{point.self_attention_flops_ratio:.3f}",
            with_error(point.change, point.stderr, "+.2f"),
        )
        for point in points
    ]
    return markdown_table(["", "row", "FLOPs", "of self-attention", f"{metric}, change"], rows) + "\n"


def check_names(argument: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    """Check that names are among those that there are.

    Raises:
        BadInput: naming the first one that is not.
    """
    for name in names:
        if name not in allowed:
            raise BadInput(f"--{argument} {name}: allowed are {', '.join(filter(None, allowed)) or 'none here'}")


def draw(points: Sequence[Point], metric: str, options: argparse.Namespace, path: Path) -> None:
    """The change against the FLOPs, a line for each of `Point.line` that is drawn."""
    figure, axes = plt.subplots(figsize=(8, 5.8), constrained_layout=True)
    lines: dict[str, list[Point]] = {}
    for point in points:
        if point.line in (options.lines or [point.line]):
            lines.setdefault(point.line, []).append(point)
    kinds = {name: kind_of(members[0], options.trained) for name, members in lines.items()}
    axes.axhline(0, color=UNMERGED, linewidth=1, linestyle="--", label="unmerged")
    for index, (name, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda point: getattr(point, SHARES[options.x]))
        alike = [each for each in lines if kinds[each] is kinds[name]]
        axes.errorbar(
            [getattr(point, SHARES[options.x]) for point in members],
            [point.change for point in members],
            [point.stderr for point in members],
            color=shades(kinds[name], len(alike))[alike.index(name)],
            marker=MARKERS[index % len(MARKERS)],
            label=in_words(members[0], options.trained),
            **POINTS,
        )
    of = "the whole model" if options.x == "all" else "self-attention"
    axes.set(xlabel=f"FLOPs of {of}, share of unmerged", ylabel=f"{metric}, change in points", title=options.title)
    axes.set_ylim(bottom=options.lowest)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    add_legend(figure, [axes], 2, "Change from unmerged, paired example by example; bars: its standard error")
    save_picture(figure, path)


def kind_of(point: Point, trained: Sequence[str]) -> Colormap:
    """What the line of a point is, by its colour."""
    if is_control(point.series):
        return CONTROL
    return TRAINED if point.stage == "retrained" or point.label in trained else MERGED


def in_words(point: Point, trained: Sequence[str]) -> str:
    """The line of a point as the legend explains it."""
    words = [point.label] if point.label else []
    words += ["control"] if is_control(point.series) else []
    words += ["trained with merging"] if point.stage == "retrained" or point.label in trained else []
    return f"{', '.join(words)}: {series_words(point.series)}" if words else series_words(point.series)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sweeps = [read_sweep(spelled) for spelled in options.sweeps]
    metrics = {results["metric"] for _, results in sweeps}
    if len(metrics) > 1:
        raise BadInput(f"sweeps: allowed are sweeps of one metric, and these have {', '.join(sorted(metrics))}")
    points = [point for label, results in sweeps for point in points_of(label, results, options.stages)]
    if not points:
        raise BadInput("sweeps: none has a row that merges beside one that does not; eval_sweep.py with --r 0 makes it")
    check_names("trained", options.trained, [label for label, _ in sweeps])
    check_names("lines", options.lines, list(dict.fromkeys(point.line for point in points)))
    metric = metric_name(metrics.pop())
    options.output_dir.mkdir(parents=True, exist_ok=True)
    table = as_markdown(points, metric)
    write_text(options.output_dir / "comparison.md", table)
    draw(points, metric, options, options.output_dir / "comparison.png")
    print(table)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
