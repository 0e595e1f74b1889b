# SPDX-License-Identifier: Apache-2.0
"""Tests of a sweep's report: best row, table, CSV file, picture and results file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging
from experiments.measurement import Quartiles
from experiments.runs.sweep_report import Row, draw_sweep, find_best, sweep_table, write_csv
from experiments.tasks.scores import Score

FIELDS = asdict(Merging.of(ToMePerceiverConfig()))
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
    plan = {"gflops": 1.0, "latents_left": 1, "merging": None}
    return Row(name=name, series=series, flops_ratio=flops_ratio, scores=scores, speedup=at, **plan)


UNMERGED = row("r=0", 1.0, 0.96, 1.0)
SEARCHED = [row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.95, 1.4)]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.951, 1.4)],
         "0.50 of the FLOPs, 1.40 times as fast, accuracy 96.0 -> 95.1 ± 1.0 (flops=0.5 search, not retrained)."),
        # The score has fallen by more than two standard errors of the change.
        ([row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.949, 1.4)],
         "0.79 of the FLOPs, 1.10 times as fast, accuracy 96.0 -> 96.0 ± 1.0 (flops=0.8 search, not retrained)."),
        ([row("r=2", 0.8, 0.9, 1.1, retrained=0.958)],
         "0.80 of the FLOPs, 1.10 times as fast, accuracy 96.0 -> 95.8 ± 1.0 (r=2, retrained)."),
        # A faster row with a lower score comes before a slower row with the same score.
        ([row("r=2", 0.8, 0.96, 0.9), row("r=4", 0.7, 0.90, 1.1)],
         "0.70 of the FLOPs, 1.10 times as fast, accuracy 96.0 -> 90.0 ± 1.0 (r=4, not retrained)."),
        ([row("r=2", 0.8, 0.96, 0.9)],
         "0.80 of the FLOPs, 0.90 times as fast, slower than unmerged, accuracy 96.0 -> 96.0 ± 1.0 "
         "(r=2, not retrained)."),
        ([row("r=2", 0.8, 0.96), row("r=4", 0.7, 0.955), row("r=8", 0.6, 0.5)],
         "0.70 of the FLOPs, not timed, accuracy 96.0 -> 95.5 ± 1.0 (r=4, not retrained)."),
        ([row("r=4", 0.7, 0.8), row("r=8", 0.6, 0.5)],
         "0.70 of the FLOPs, not timed, accuracy 96.0 -> 80.0 ± 1.0 (r=4, not retrained)."),
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


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_score_over_flops_and_over_speed(draw, tmp_path):
    figure = draw(UNMERGED, *SEARCHED)
    by_flops, by_speed = figure.axes
    assert "FLOPs" in by_flops.get_xlabel() and "times as fast" in by_speed.get_xlabel()
    assert by_flops.get_ylabel() == "Accuracy x 100" and by_flops.xaxis_inverted()
    assert legend(figure) == ["unmerged: 96.0 ± 1.0 (band)", "merged, searched schedule"]
    for axes, places in ((by_flops, [0.79, 0.5]), (by_speed, [1.1, 1.4])):
        (points,) = (container.lines[0] for container in axes.containers)
        assert list(points.get_xdata()) == places and list(points.get_ydata()) == [96, 95]
        assert [text.get_text() for text in axes.texts if text.get_text()] == ["flops=0.8", "flops=0.5"]
    assert "paired" in figure.legends[0].get_title().get_text()
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > picture.height > 500


def test_the_axis_of_a_score_ends_at_100(draw):
    """Also if error bars are longer."""
    figure = draw(row("r=0", 1.0, 0.999, 1.0), row("r=2", 0.8, 1.0, 1.2), row("r=4", 0.5, 0.9, 1.3))
    top = figure.axes[0].get_ylim()[1]
    assert 100 < top < 101 and max(tick for tick in figure.axes[0].get_yticks() if tick <= top) <= 100


def test_colours_say_what_is_drawn(draw):
    """Unmerged is grey, merged blue, retrained green, controls orange and labelled as such."""
    kinds = [row("r=2", 0.8, 0.9, 1.1, retrained=0.95), row("flops=0.5 search", 0.5, 0.9, 1.3, retrained=0.95)]
    by_flops = draw(UNMERGED, *kinds).axes[0]
    assert len(by_flops.containers) == 4
    for points in by_flops.containers:
        red, green, blue = to_rgb(points.lines[0].get_color())
        assert max(red, green, blue) == (green if "retrained" in points.get_label() else blue)
    (unmerged,) = (line for line in by_flops.lines if line.get_label().startswith("unmerged"))
    assert len(set(to_rgb(unmerged.get_color()))) == 1
    assert len({container.lines[0].get_marker() for container in by_flops.containers}) == 2  # one for each series
    controls = [row(f"flops=0.5 {name}", 0.5, 0.8, 1.3) for name in ("floor", "floor random", "skip_blocks")]
    figure = draw(UNMERGED, *controls)
    names = ["control, schedule floor, random", "control, schedule skip_blocks"]
    assert legend(figure)[1:4] == ["merged, schedule floor", *names]
    for points in figure.axes[0].containers[1:]:
        red, green, blue = to_rgb(points.lines[0].get_color())
        assert red > green > blue


def test_a_row_that_is_slower_than_unmerged_is_marked_as_such(draw):
    assert "slower than unmerged" in legend(draw(UNMERGED, row("r=2", 0.8, 0.96, 0.9), row("r=8", 0.5, 0.95, 1.3)))
    assert "slower than unmerged" not in legend(draw(UNMERGED, *SEARCHED))


def test_untimed_there_is_no_panel_of_speed(draw):
    untimed = [replace(each, speedup=None) for each in (UNMERGED, *SEARCHED)]
    assert len(draw(*untimed).axes) == 1
    assert legend(draw(untimed[0])) == ["unmerged: 96.0 ± 1.0 (band)"]
