# SPDX-License-Identifier: Apache-2.0
"""Several sweeps in one table and one picture: what each way of merging costs, and what it loses.

A loss is the change of the metric from a sweep's own unmerged checkpoint, paired example by example, so that sweeps of
several seeds, methods or trainings can stand side by side. FLOPs are given as a share of the whole forward pass and of
the self-attention layers alone.

    python benchmarks/compare_sweeps.py outputs/schedules --output_dir docs/results/comparison
    python benchmarks/compare_sweeps.py merged=outputs/a "one checkpoint=outputs/b" --stages merged --x self_attention
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

# A script's own folder is on the path, the repository's root, where the modules are, is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.errors import BadInput, exit_on_bad_input
from experiments.files import write_text, write_whole
from experiments.publishing.card import metric_name
from experiments.publishing.tables import markdown_table, with_error
from experiments.training.output_folder import SWEEP_FILE

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt

STAGES = ("merged", "retrained")
SHARES = {"all": "flops_ratio", "self_attention": "self_attention_flops_ratio"}
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Point:
    """A cell of a sweep.

    Attributes:
        line: what points of one line share: the sweep's label, the row's series and, if there are two, the stage.
        row: name of the row.
        flops_ratio, self_attention_flops_ratio: shares of the unmerged model's.
        change, stderr: of the metric from the unmerged checkpoint, in points, with the standard error.
    """

    line: str
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
            row=row["name"],
            flops_ratio=row["flops_ratio"],
            self_attention_flops_ratio=row["self_attention_flops_ratio"],
            change=100 * row[stage][change],
            stderr=100 * row[stage][f"{change}_stderr"],
        )
        for stage in stages
        for row in results["rows"]
        if change in row.get(stage, {})
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


def draw(points: Sequence[Point], metric: str, options: argparse.Namespace, path: Path) -> None:
    """The change against the FLOPs, a line for each of `Point.line`."""
    figure, axes = plt.subplots(figsize=(10, 5.5), constrained_layout=True)
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.line, []).append(point)
    for index, (name, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda point: getattr(point, SHARES[options.x]))
        shares = [getattr(point, SHARES[options.x]) for point in members]
        # Ten colours, then ten again with another marker.
        axes.errorbar(
            shares, [point.change for point in members], [point.stderr for point in members], label=name,
            color=f"C{index % 10}", marker=MARKERS[index // 10 % len(MARKERS)], capsize=3, markersize=4,
        )  # fmt: skip
    axes.axhline(0, color="gray", linewidth=0.8)
    of = "the whole model" if options.x == "all" else "self-attention"
    axes.set(xlabel=f"FLOPs of {of}, share of unmerged", ylabel=f"{metric}, change in points", title=options.title)
    axes.set_ylim(bottom=options.lowest)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sweeps = [read_sweep(spelled) for spelled in options.sweeps]
    metrics = {results["metric"] for _, results in sweeps}
    if len(metrics) > 1:
        raise BadInput(f"sweeps: allowed are sweeps of one metric, and these have {', '.join(sorted(metrics))}")
    points = [point for label, results in sweeps for point in points_of(label, results, options.stages)]
    if not points:
        raise BadInput("sweeps: none has a row that merges beside one that does not; eval_sweep.py with --r 0 makes it")
    metric = metric_name(metrics.pop())
    options.output_dir.mkdir(parents=True, exist_ok=True)
    table = as_markdown(points, metric)
    write_text(options.output_dir / "comparison.md", table)
    draw(points, metric, options, options.output_dir / "comparison.png")
    print(table)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
