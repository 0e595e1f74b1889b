# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/runtimes.py, on a tiny model."""

from __future__ import annotations

import csv
import json

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from tests.support.script_run import bad_input_line, call_script

SCRIPT = "benchmarks.runtimes.py"
RUN = ("--small", "--runtime", "eager", "onnx", "--dtype", "float32", "int8", "--batch_size", 1, "--length", 8)


def test_each_runtime_has_a_row_for_each_setting_beside_its_unmerged_model(tmp_path, tiny_published):
    call_script(SCRIPT, *RUN, "--r", 0, "--flops_ratio", 0.95, "--rounds", 2, "--output_dir", tmp_path)
    cells = json.loads((tmp_path / "runtimes.json").read_text())["cells"]
    settings = ["r = 0", "floor 0.95"]
    for cell, runtimes in zip(cells, (["eager", "onnx"], ["onnx"]), strict=True):
        rows = {(row["runtime"], row["setting"]): row for row in cell["rows"]}
        assert list(rows) == [("stock", "r = 0"), *((runtime, name) for name in settings for runtime in runtimes)]
        for (runtime, setting), row in rows.items():
            assert row["milliseconds"]["median"] > 0
            assert (row["implied"] > 1) == (setting != "r = 0")
            assert row["share_of_implied"] == pytest.approx(row["times_unmerged"]["median"] / row["implied"])
            assert runtime == "stock" or row["difference"] < (1e-5 if cell["cell"].startswith("float32") else 1)
    with (tmp_path / "runtimes.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["setting"] for line in lines] == [row["setting"] for cell in cells for row in cell["rows"]]
    assert float(lines[0]["milliseconds_median"]) == cells[0]["rows"][0]["milliseconds"]["median"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runtimes.csv", "runtimes.json", "runtimes.md"]


@pytest.mark.parametrize(
    "given, message",
    [
        (("--runtime", "tensorrt"), "--runtime tensorrt: choose from"),
        (("--runtime", "eager", "--dtype", "int8"), "--dtype int8: is in none of --runtime eager"),
        (("--dtype", "float16"), "--dtype float16: choose from"),
    ],
)
def test_bad_input_is_one_line(capsys, given, message):
    assert message in bad_input_line(capsys, SCRIPT, *given)
