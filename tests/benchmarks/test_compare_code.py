# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/compare_code.py on tiny models: it finds what is slower in the old code, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.script_run import ROOT, bad_input_line, call_script

SCRIPT = "benchmarks.compare_code.py"
TINY = ("--batch_size", 2, "--length", 9, "--r", 0, 2, "--flops_ratio", 0.95, "--rounds", 3)


def code_before(folder: Path, replaced: str = "", by: str = "") -> Path:
    """Copy the present model files, with one change in `merging_tome_perceiver.py`."""
    folder.mkdir()
    for path in ROOT.glob("*_tome_perceiver.py"):
        shutil.copy(path, folder)
    merging = folder / "merging_tome_perceiver.py"
    text = merging.read_text()
    assert replaced in text
    merging.write_text(text.replace(replaced, by, 1))
    return folder


def test_a_slower_merge_shows_where_latents_merge(tiny_published, tmp_path, capsys):
    line = "    batch, num_latents, channels = latents.shape\n"
    before = code_before(tmp_path / "before", line, f'{line}    __import__("time").sleep(0.05)\n')
    call_script(SCRIPT, *TINY, "--before", before, "--output_dir", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "compare_code.json").read_text())
    (cell,) = report["cells"]
    rows = {row["name"]: row for row in cell["rows"]}
    for name, row in rows.items():
        # Six layers merge where r = 2, none where r = 0.
        assert (row["before"]["latency_ms"]["median"] > 50) == (name != "r = 0"), name
        assert row["now"]["speedup"]["lower"] <= row["now"]["speedup"]["median"] <= row["now"]["speedup"]["upper"]
    assert rows["r = 2"]["now"]["speedup"]["median"] > 1.5
    assert "--before" in report["settings"]["command"]
    shown = capsys.readouterr().out
    assert shown.startswith((tmp_path / "out" / "compare_code.md").read_text()) and "| r = 2 |" in shown


def test_stock_takes_its_turn_in_training_too(tiny_published, tmp_path):
    before = code_before(tmp_path / "before")
    call_script(SCRIPT, *TINY, "--training", "--autocast", "--before", before, "--output_dir", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "compare_code.json").read_text())
    for row in report["cells"][0]["rows"]:
        stock = row["stock_ms"]
        assert 0 < stock["lower"] <= stock["median"] <= stock["upper"]
        assert min(row["before_times_stock"]["lower"], row["now_times_stock"]["lower"]) > 0
        assert (row["implied_speedup"] == 1) == (row["name"] == "r = 0")
    assert "backward" in report["settings"]["each turn"] and "autocast" in report["settings"]["each turn"]


def test_code_that_gives_something_else_is_not_timed(tiny_published, tmp_path):
    other = code_before(tmp_path / "before", "weight = merged_sizes", "weight = 2 * merged_sizes")
    with pytest.raises(AssertionError, match="differ"):
        call_script(SCRIPT, *TINY, "--before", other, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "import nothing_of_this_name\n", "def\n"])
def test_a_folder_without_the_code_is_one_line(tmp_path, capsys, content):
    before = tmp_path / "before"
    before.mkdir()
    if content is not None:
        (before / "modeling_tome_perceiver.py").write_text(content)
    line = bad_input_line(capsys, SCRIPT, "--small", "--before", before, "--output_dir", tmp_path / "out")
    assert line.startswith(f"error: --before {before}: ") and not (tmp_path / "out").exists()
