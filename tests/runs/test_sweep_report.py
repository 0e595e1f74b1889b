# SPDX-License-Identifier: Apache-2.0
"""Tests of a sweep's report: best row, table, CSV file, picture and results file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging
from experiments.measurement import Quartiles
from experiments.runs.sweep_report import Row, draw_sweep, find_best, sweep_table, write_csv
from experiments.tasks.scores import Score

BIPARTITE = Merging.of(ToMePerceiverConfig())
FIELDS = asdict(BIPARTITE)
PLANNED = {
    "name": "r=4", "series": "r", "fields": FIELDS, "r": [4], "gflops": 0.25, "flops_ratio": 0.125, "latents_left": 1,
}  # fmt: skip
MEASURED = PLANNED | {
    "name": "r=2", "gflops": 0.5, "throughput": 812.34, "peak_memory_mb": 123.4,
    "merged": {
        "accuracy": 0.8123, "accuracy_stderr": 0.004, "accuracy_change": -0.01, "accuracy_change_stderr": 0.002,
    },
    "retrained": {"accuracy": 0.9, "accuracy_stderr": 0.003},
    "latency_ms": {"median": 3.0, "lower": 2.0, "upper": 4.0}, "speedup": {"median": 2.5, "lower": 2.25, "upper": 2.75},
}  # fmt: skip
ROWS = [Row.from_json(row) for row in (MEASURED, PLANNED)]


def row(name: str, flops_ratio: float, merged: float | None, speedup: float | None = None, **more: float) -> Row:
    """Build a row: the standard error of its score is one point, that of its change from 0.96 half a point."""
    scores = {
        stage: {"accuracy": Score(value, 0.01, value - 0.96, 0.005, compared=True)}
        for stage, value in ({"merged": merged} | more).items()
        if value is not None
    }
    at = None if speedup is None else Quartiles(speedup, speedup, speedup)
    series = name.partition(" ")[2] or "r"
    plan = {"gflops": 1.0, "latents_left": 1, "merging": BIPARTITE}
    return Row(name=name, series=series, flops_ratio=flops_ratio, scores=scores, speedup=at, **plan)


UNMERGED = row("r=0", 1.0, 0.96, 1.0)
SEARCHED = [row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.95, 1.4)]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.951, 1.4)],
         "1.40 times as fast at 0.50 of the FLOPs, 0.9 points of accuracy lost (96.0 -> 95.1 ± 1.0), nothing trained "
         "(flops=0.5 search)."),
        # The score has fallen by more than two standard errors of the change.
        ([row("flops=0.8 search", 0.79, 0.97, 1.1), row("flops=0.5 search", 0.5, 0.949, 1.4)],
         "1.10 times as fast at 0.79 of the FLOPs, 1.0 points of accuracy gained (96.0 -> 97.0 ± 1.0), nothing trained "
         "(flops=0.8 search)."),
        ([row("r=2", 0.8, 0.9, 1.1, retrained=0.958)],
         "1.10 times as fast at 0.80 of the FLOPs, 0.2 points of accuracy lost (96.0 -> 95.8 ± 1.0), retrained (r=2)."),
        # A faster row with a lower score comes before a slower row with the same score.
        ([row("r=2", 0.8, 0.96, 0.9), row("r=4", 0.7, 0.90, 1.1)],
         "1.10 times as fast at 0.70 of the FLOPs, 6.0 points of accuracy lost (96.0 -> 90.0 ± 1.0), nothing trained "
         "(r=4)."),
        ([row("r=2", 0.8, 0.96, 0.9)],
         "0.90 times as fast (slower than unmerged) at 0.80 of the FLOPs, 0.0 points of accuracy lost "
         "(96.0 -> 96.0 ± 1.0), nothing trained (r=2)."),
        ([row("r=2", 0.8, 0.96), row("r=4", 0.7, 0.955), row("r=8", 0.6, 0.5)],
         "0.70 of the FLOPs, 0.5 points of accuracy lost (96.0 -> 95.5 ± 1.0), nothing trained (r=4)."),
        ([row("r=4", 0.7, 0.8), row("r=8", 0.6, 0.5)],
         "0.70 of the FLOPs, 16.0 points of accuracy lost (96.0 -> 80.0 ± 1.0), nothing trained (r=4)."),
    ],
    ids=["fastest", "holds", "retrained", "faster first", "only slower", "not timed", "all lose"],
)  # fmt: skip
def test_the_result_is_that_of_the_best_row(rows, sentence):
    best = find_best([UNMERGED, *rows], "accuracy")
    assert best is not None and best.sentence == sentence and best.row.name in sentence


@pytest.mark.parametrize("rows", [[], [row("r=2", 0.8, None)], [row("latency=1 search", 1.0, 0.96)]])
def test_without_a_row_that_saves_anything_there_is_no_result(rows):
    assert find_best([UNMERGED, *rows], "accuracy") is None


def test_a_row_of_the_results_file_is_read_as_it_was_written():
    assert Row.from_json(MEASURED).to_json() == MEASURED


def test_table_has_a_line_for_each_row_and_no_empty_column():
    lines = sweep_table(ROWS, "accuracy").splitlines()
    assert lines[2] == (
        "| r=2 | 81.23 ± 0.40 | -1.00 ± 0.20 | 90.00 ± 0.30 | 0.5 | 0.125 | 1 | 812.3 "
        "| 2.50x (2.25 to 2.75) | 3 | 123 |"
    )  # fmt: skip
    assert lines[3] == "| r=4 |  |  |  | 0.25 | 0.125 | 1 |  |  |  |  |"
    header, _, line = sweep_table(ROWS[1:], "accuracy").splitlines()
    assert header == "|  | GFLOPs | of unmerged | latents left |" and line == "| r=4 | 0.25 | 0.125 | 1 |"


def test_csv_has_a_number_a_column(tmp_path):
    write_csv(ROWS, "accuracy", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        measured, planned = csv.DictReader(file)
    assert (measured["merged"], measured["retrained_stderr"], measured["speedup_upper"]) == ("0.8123", "0.003", "2.75")
    assert (measured["merged_change"], measured["retrained_change"]) == ("-0.01", "")
    assert (planned["merged"], planned["speedup"]) == ("", "")


def test_an_undefined_score_is_said_to_be(tmp_path):
    rows = [replace(each, scores={"merged": {"pearson": Score(None, compared=True)}}) for each in ROWS]
    assert find_best(rows, "pearson") is None
    assert sweep_table(rows, "pearson").splitlines()[3].startswith("| r=4 | undefined | undefined | 0.25 |")
    write_csv(rows, "pearson", tmp_path / "rows.csv")
    assert "undefined" not in (tmp_path / "rows.csv").read_text()


@pytest.fixture
def draw(monkeypatch, tmp_path) -> Iterator:
    """Return a function that draws rows and returns the open figure."""
    drawn: list[Figure] = []
    monkeypatch.setattr("experiments.publishing.picture_style.plt.close", drawn.append)

    def draw_rows(*rows: Row) -> Figure:
        draw_sweep(rows, "accuracy", "digits", tmp_path / "sweep.png")
        return drawn[-1]

    yield draw_rows
    monkeypatch.undo()
    plt.close("all")


def words(figure: Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.axes[0].texts]


def test_a_timed_sweep_is_drawn_over_speed(draw, tmp_path):
    figure = draw(UNMERGED, *SEARCHED)
    (axes,) = figure.axes
    assert "times as fast" in axes.get_xlabel() and axes.get_ylabel() == "Accuracy x 100"
    (points,) = (container.lines[0] for container in axes.containers)
    assert list(points.get_xdata()) == [1.1, 1.4] and list(points.get_ydata()) == [96, 95]
    assert words(figure) == ["unmerged 96.0", "searched (ours)"] and not figure.legends
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > picture.height > 400


def test_an_untimed_sweep_is_drawn_over_flops(draw):
    untimed = [replace(each, speedup=None) for each in (UNMERGED, *SEARCHED)]
    (axes,) = draw(*untimed).axes
    assert "FLOPs" in axes.get_xlabel() and axes.xaxis_inverted()
    assert list(axes.containers[0].lines[0].get_xdata()) == [0.79, 0.5]
    assert words(draw(untimed[0])) == ["unmerged 96.0"]


def test_the_axis_of_a_score_ends_at_100(draw):
    """Also if error bars are longer."""
    figure = draw(row("r=0", 1.0, 0.999, 1.0), row("r=2", 0.8, 1.0, 1.2), row("r=4", 0.5, 0.9, 1.3))
    top = figure.axes[0].get_ylim()[1]
    assert 100 < top < 101 and max(tick for tick in figure.axes[0].get_yticks() if tick <= top) <= 100


def test_every_line_has_its_name_and_colour(draw):
    """A constant r by ToMe's matching is named after the paper; retrained lines are dashed."""
    kinds = [row("r=2", 0.8, 0.9, 1.1, retrained=0.95), row("flops=0.5 search", 0.5, 0.9, 1.3, retrained=0.95)]
    kinds.append(row("flops=0.5 floor random", 0.5, 0.8, 1.3))
    figure = draw(UNMERGED, *kinds)
    names = ["constant r (paper)", "constant r, retrained (paper)", "searched (ours)", "searched, retrained (ours)"]
    assert sorted(words(figure)[1:]) == sorted([*names, "schedule floor, random"])
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({line.get_color() for line in lines}) == 3
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--", "-"]
    drawn = {text.get_text().strip(): text.get_color() for text in figure.axes[0].texts[1:]}
    assert [drawn[name] for name in names] == [line.get_color() for line in lines[:4]]
    given = replace(kinds[0], merging=replace(BIPARTITE, merge_method="ward"))
    assert "given r" in words(draw(UNMERGED, given))


def test_names_of_lines_that_end_together_do_not_overlap(draw):
    figure = draw(UNMERGED, *(row(f"flops=0.5 {name}", 0.5, 0.9, 1.3) for name in ("search", "floor", "ceiling")))
    low, high = figure.axes[0].get_ylim()
    heights = sorted(text.xyann[1] for text in figure.axes[0].texts[1:])
    assert all(upper - lower > 0.05 * (high - low) for lower, upper in pairwise(heights))


def test_a_row_that_is_slower_than_unmerged_is_marked_as_such(draw):
    assert "slower than unmerged" in words(draw(UNMERGED, row("r=2", 0.8, 0.96, 0.9), row("r=8", 0.5, 0.95, 1.3)))
    assert "slower than unmerged" not in words(draw(UNMERGED, *SEARCHED))
