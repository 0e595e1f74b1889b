# SPDX-License-Identifier: Apache-2.0
"""benchmarks/versus_stock.py, run on tiny shapes in place of the published ones."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from tests.script_run import ROOT
from tests.tiny_models import SIZES


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("versus_stock", ROOT / "benchmarks" / "versus_stock.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "versus_stock", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PUBLISHED_LANGUAGE_SHAPES", SIZES)
    return module


def test_every_variant_is_timed_and_written(benchmark, tmp_path, capsys):
    benchmark.main(["--r", "0", "1", "--rounds", "2", "--length", "9", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "versus_stock.json").read_text())
    assert [variant["name"] for variant in report["variants"]] == ["stock", "r = 0", "r = 1"]
    assert [variant["latents_left"] for variant in report["variants"]] == [12, 12, 6]
    # Stock against itself, in the same call.
    assert report["variants"][0]["speedup"] > 0
    assert report["variants"][2]["speedup_by_flops"] > 1 == report["variants"][1]["speedup_by_flops"]
    assert capsys.readouterr().out.startswith((tmp_path / "versus_stock.md").read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--r", "-1"], "r = -1"), (["--rounds", "0"], "--rounds 0"), (["--length", "9999"], "--length 9999")],
)
def test_bad_input_is_one_line_and_nothing_is_written(benchmark, tmp_path, capsys, arguments, says):
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
