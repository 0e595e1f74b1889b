# SPDX-License-Identifier: Apache-2.0
"""The picture of a sweep: a panel for each thing that was measured, and a legend that explains all that is drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from experiments.runs import sweep_picture
from experiments.runs.sweep_picture import draw_sweep
from tests.runs.test_sweep_report import UNMERGED, row

SEARCHED = [row("flops=0.8 search", 0.79, 0.96, 1.1), row("flops=0.5 search", 0.5, 0.95, 1.4)]


@pytest.fixture
def figure(monkeypatch) -> Iterator[list[Figure]]:
    """The figure that was drawn, still open."""
    drawn: list[Figure] = []
    monkeypatch.setattr(sweep_picture.plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plt.close("all")


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_metric_over_flops_and_over_speed(figure, tmp_path):
    draw_sweep([UNMERGED, *SEARCHED], "accuracy", "digits", tmp_path / "sweep.png")
    by_flops, by_speed = figure[0].axes
    assert "FLOPs" in by_flops.get_xlabel() and "times as fast" in by_speed.get_xlabel()
    assert by_flops.get_ylabel() == "Accuracy x 100" and by_flops.xaxis_inverted()
    assert legend(figure[0]) == ["unmerged: 96.0 ± 1.0, the band", "merged, as a search found it"]
    for axes, places in ((by_flops, [0.79, 0.5]), (by_speed, [1.1, 1.4])):
        (points,) = (container.lines[0] for container in axes.containers)
        assert list(points.get_xdata()) == places and list(points.get_ydata()) == [96, 95]
        assert [text.get_text() for text in axes.texts if text.get_text()] == ["flops=0.8", "flops=0.5"]
    assert "paired" in figure[0].legends[0].get_title().get_text()
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > picture.height > 500


def test_unmerged_is_grey_merged_blue_and_trained_again_green(figure, tmp_path):
    rows = [UNMERGED, row("r=2", 0.8, 0.9, 1.1, retrained=0.95), row("flops=0.5 search", 0.5, 0.9, 1.3, retrained=0.95)]
    draw_sweep(rows, "accuracy", "digits", tmp_path / "sweep.png")
    by_flops = figure[0].axes[0]
    assert len(by_flops.containers) == 4
    for points in by_flops.containers:
        red, green, blue = to_rgb(points.lines[0].get_color())
        assert max(red, green, blue) == (green if "trained again" in points.get_label() else blue)
    (unmerged,) = (line for line in by_flops.lines if line.get_label().startswith("unmerged"))
    assert len(set(to_rgb(unmerged.get_color()))) == 1
    marks = {container.lines[0].get_marker() for container in by_flops.containers}
    assert len(marks) == 2  # one for each series


def test_a_control_is_orange_and_called_one(figure, tmp_path):
    rows = [UNMERGED, row("flops=0.5 floor", 0.5, 0.9, 1.3), row("flops=0.5 floor random", 0.5, 0.8, 1.3)]
    rows.append(row("flops=0.5 skip_blocks", 0.5, 0.8, 1.3))
    draw_sweep(rows, "accuracy", "digits", tmp_path / "sweep.png")
    controls = ["control, schedule floor, random", "control, schedule skip_blocks"]
    assert legend(figure[0])[1:4] == ["merged, schedule floor", *controls]
    for points in figure[0].axes[0].containers[1:]:
        red, green, blue = to_rgb(points.lines[0].get_color())
        assert red > green > blue


def test_of_many_series_those_are_drawn_that_lose_least(figure, tmp_path):
    """A series that merges nothing is none of them."""
    many = [row(f"flops=0.5 floor {name}", 0.5, 0.9 - index / 100, 1.3) for index, name in enumerate("abcdefghij")]
    draw_sweep([UNMERGED, row("r=0 a", 1.0, 0.96, 1.0), *many], "accuracy", "digits", tmp_path / "sweep.png")
    drawn = [text.removeprefix("merged, schedule floor, ") for text in legend(figure[0])[1:]]
    assert drawn == list("abcdefgh")
    assert "Not drawn: 2 series" in figure[0].legends[0].get_title().get_text()


def test_names_of_points_do_not_meet(figure, tmp_path):
    """Where there is no room above a point and above that, it has no name."""
    shares = [0.5 + index / 1000 for index in range(5)] + [0.9]
    rows = [row(f"flops={share} search", share, 0.95, 1.4) for share in shares]
    draw_sweep([UNMERGED, *rows], "accuracy", "digits", tmp_path / "sweep.png")
    names = [text.get_text() for text in figure[0].axes[0].texts if text.get_text()]
    assert names == ["flops=0.9", "flops=0.504", "flops=0.503"]


def test_what_is_slower_than_unmerged_is_marked_as_such(figure, tmp_path):
    draw_sweep([UNMERGED, row("r=2", 0.8, 0.96, 0.9), row("r=8", 0.5, 0.95, 1.3)], "accuracy", "", tmp_path / "a.png")
    draw_sweep([UNMERGED, *SEARCHED], "accuracy", "", tmp_path / "b.png")
    assert "slower than unmerged" in legend(figure[0]) and "slower than unmerged" not in legend(figure[1])


def test_nothing_is_empty(figure, tmp_path):
    """Untimed there is no panel of speed; with the unmerged model alone, its point is there."""
    untimed = [dict(each, speedup=None, speedup_lower=None, speedup_upper=None) for each in (UNMERGED, *SEARCHED)]
    draw_sweep(untimed, "accuracy", "", tmp_path / "a.png")
    draw_sweep(untimed[:1], "accuracy", "", tmp_path / "b.png")
    assert [len(each.axes) for each in figure] == [1, 1]
    assert legend(figure[1]) == ["unmerged: 96.0 ± 1.0, the band"]
