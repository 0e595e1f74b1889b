# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compare_sweeps.py puts what sweeps have measured side by side, and nothing else."""

from __future__ import annotations

import json

import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from benchmarks import compare_sweeps
from experiments.errors import BadInput
from tests.support.script_run import run_script


def write_sweep(folder, metric: str = "accuracy", changes: tuple[float, ...] = (-0.01, -0.2)) -> str:
    def row(name: str, share: float, **measured: float):
        return {"name": name, "series": "floor", "flops_ratio": share, "self_attention_flops_ratio": share / 2,
                "merged": {metric: 0.9, **measured}}  # fmt: skip

    rows = [row("r=0", 1.0)]
    rows += [
        row(f"flops={share}", share, **{f"{metric}_change": change, f"{metric}_change_stderr": 0.002})
        for share, change in zip((0.6, 0.4), changes, strict=False)
    ]
    folder.mkdir(parents=True)
    (folder / "sweep_results.json").write_text(json.dumps({"metric": metric, "rows": rows}))
    return str(folder)


def test_every_measured_change_is_in_the_table(tmp_path):
    one, two = write_sweep(tmp_path / "one"), write_sweep(tmp_path / "two", changes=(0.005,))
    out = tmp_path / "out"
    result = run_script("benchmarks/compare_sweeps.py", one, f"seed 1={two}", "--output_dir", out)
    assert result.returncode == 0, result.stderr
    assert (out / "comparison.md").read_text().splitlines()[2:] == [
        "| floor merged | flops=0.6 | 0.600 | 0.300 | -1.00 ± 0.20 |",
        "| floor merged | flops=0.4 | 0.400 | 0.200 | -20.00 ± 0.20 |",
        "| seed 1 floor merged | flops=0.6 | 0.600 | 0.300 | +0.50 ± 0.20 |",
    ]
    assert (out / "comparison.md").read_text() in result.stdout
    with Image.open(out / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(("stages", "says"), [(("merged",), "not/there"), (("retrained",), "none has a row")])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, stages, says):
    sweep = write_sweep(tmp_path / "one") if "none" in says else "not/there"
    result = run_script(
        "benchmarks/compare_sweeps.py", sweep, "--stages", *stages, "--output_dir", tmp_path / "out"
    )  # fmt: skip
    assert result.returncode == 2 and says in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_sweeps_of_two_metrics_are_not_compared(tmp_path):
    one, two = write_sweep(tmp_path / "one"), write_sweep(tmp_path / "two", "pearson")
    result = run_script("benchmarks/compare_sweeps.py", one, two, "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and "accuracy, pearson" in result.stderr


def test_a_single_stage_needs_no_name(tmp_path):
    result = run_script(
        "benchmarks/compare_sweeps.py", write_sweep(tmp_path / "one"), "--stages", "merged", "--output_dir", tmp_path
    )
    assert "| floor | flops=0.6 |" in result.stdout


def test_what_is_drawn_has_the_colours_of_all_pictures_and_is_explained(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare_sweeps, "save_picture", lambda figure, path: drawn.append(figure))
    one, two = write_sweep(tmp_path / "one"), write_sweep(tmp_path / "two")
    given = [one, f"elastic={two}", "--stages", "merged", "--output_dir", str(tmp_path)]
    compare_sweeps.main([*given, "--trained", "elastic"])
    axes, texts = drawn[0].axes[0], drawn[0].legends[0].get_texts()
    assert [text.get_text() for text in texts] == [
        "unmerged", "schedule floor", "elastic, trained with merging: schedule floor"
    ]  # fmt: skip
    blue, green = (to_rgb(points.lines[0].get_color()) for points in axes.containers)
    assert max(blue) == blue[2] and max(green) == green[1]
    compare_sweeps.main([*given, "--lines", "elastic floor"])
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["unmerged", "elastic: schedule floor"]
    assert "| floor | flops=0.6 |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("argument", "says"),
    [("--lines", "--lines x: allowed are floor"), ("--trained", "--trained x: allowed are none here")],
)
def test_a_name_that_is_not_there_is_one_line(tmp_path, argument, says):
    one = write_sweep(tmp_path / "one")
    with pytest.raises(BadInput, match=f"^{says}"):
        compare_sweeps.main([one, "--stages", "merged", argument, "x", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
