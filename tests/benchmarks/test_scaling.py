# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/scaling.py on tiny models: the cost, the fitted line, and what runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from benchmarks import scaling
from benchmarks.published_models import PUBLISHED_MODELS
from benchmarks.scaling import STOCK, Line, ScalingArguments, flops_line
from experiments.measurement import Quartiles
from modeling_tome_perceiver import ToMePerceiverModel
from tests.support.script_run import bad_input_line, call_script

SCRIPT = "benchmarks.scaling.py"
ROUNDS = 2
# Lengths repeat and are unsorted: neither may matter.
TINY = ("--length", 40, 9, 9, "--r", 0, 2, "--rounds", ROUNDS, "--batch_size", 3)
LENGTHS, NAMES = [9, 40], [STOCK, "r = 0", "r = 2"]


@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
@pytest.mark.parametrize("r", [0, 8, 32])
def test_the_flops_are_linear_in_the_length_and_merging_lowers_the_constant_alone(small, r):
    published = ScalingArguments(small=small).model
    line = flops_line(published, {"r": r}, 2)
    unmerged = flops_line(published, {}, 2)
    for length in (1, 128, 4097, 65536):
        assert line.at(length) == published.cost((2, length), r=r).total_with_matching
    assert line.slope == unmerged.slope and line.slope > 0
    assert (line.constant < unmerged.constant) == (r > 0) and line.constant > 0


def test_the_fit_weighs_every_value_alike_and_reports_its_largest_deviation():
    line = Line.fit([128, 65536], [100 + 0.01 * length for length in (128, 65536)])
    assert (line.constant, line.slope) == (pytest.approx(100), pytest.approx(0.01))
    lengths, values = [10, 20, 30], [110.0, 120.0, 143.0]
    assert Line(100, 1).largest_deviation(lengths, values) == pytest.approx(1 - 130 / 143)
    # Relative residuals: an error of a tenth counts as much at the shortest length as at the longest.
    line = Line.fit([1, 1, 1000, 1000], [0.9, 1.1, 900.0, 1100.0])
    assert line.at(1) / 1 == pytest.approx(line.at(1000) / 1000, rel=1e-3)
    # Minimum of sum((x / value - 1)^2) over two values.
    least = (1 / 0.9 + 1 / 1.1) / (1 / 0.9**2 + 1 / 1.1**2)
    assert line.at(1) == pytest.approx(least) and line.at(1000) == pytest.approx(1000 * least)


def test_every_variant_runs_as_it_is_called_at_every_length(tiny_published, tmp_path):
    ran = Counter()

    def note(module, arguments, keywords, output):
        # Ours, or the class of stock.
        if hasattr(module, "embeddings") and hasattr(module, "decoder"):
            name = f"r = {module.config.r}" if isinstance(module, ToMePerceiverModel) else STOCK
            texts = keywords["inputs"] if "inputs" in keywords else arguments[0]
            ran[name, tuple(texts.shape), output.last_hidden_state.shape[1]] += 1

    with register_module_forward_hook(note, with_kwargs=True):
        call_script(SCRIPT, *TINY, "--output_dir", tmp_path)
    assert set(ran) == {(name, (3, length), 1 if name == "r = 2" else 12) for name in NAMES for length in LENGTHS}
    # One more round for warm-up.
    assert min(ran.values()) > ROUNDS


def test_the_report_has_every_variant_at_every_length_and_its_line(tiny_published, tmp_path, capsys):
    call_script(SCRIPT, *TINY, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "scaling.json").read_text())
    rows, growth = report["rows"], report["growth"]
    assert [(row["length"], row["name"]) for row in rows] == [(length, name) for length in LENGTHS for name in NAMES]
    assert [each["name"] for each in growth] == NAMES
    assert report["settings"]["positions"] == 40 and report["environment"]["torch"] == torch.__version__
    published = ScalingArguments(length=LENGTHS, r=[0, 2]).model
    for row in rows:
        fields = {"r": 2 if row["name"] == "r = 2" else 0}
        flops = published.cost((3, row["length"]), **fields).total_with_matching
        (stock,) = (each for each in rows if each["length"] == row["length"] and each["name"] == STOCK)
        assert row["gflops"] == flops / 1e9
        assert row["implied_speedup"] == pytest.approx(stock["gflops"] / row["gflops"])
        assert row["predicted_milliseconds"] == pytest.approx(1e3 * row["gflops"] / report["gflops_per_second"])
        assert row["latents_left"] == (1 if row["name"] == "r = 2" else 12)
        assert row["peak_memory_mb"] > 0
        for quartiles in (row["milliseconds"], row["speedup"]):
            assert 0 < quartiles["lower"] <= quartiles["median"] <= quartiles["upper"]
        if row["name"] == STOCK:
            assert row["speedup"] == asdict(Quartiles(1.0, 1.0, 1.0))
    # All predictions use the rate of stock on the shortest texts.
    assert rows[0]["predicted_milliseconds"] == pytest.approx(rows[0]["milliseconds"]["median"])
    for each in growth:
        own = [row for row in rows if row["name"] == each["name"]]
        fitted, predicted = Line(**each["milliseconds"]), Line(**each["predicted_milliseconds"])
        for row in own:
            # A line through two points passes through them.
            assert fitted.at(row["length"]) == pytest.approx(row["milliseconds"]["median"])
            assert predicted.at(row["length"]) == pytest.approx(row["predicted_milliseconds"])
            assert Line(**each["flops"]).at(row["length"]) == pytest.approx(1e9 * row["gflops"])
        assert each["largest_deviation"] < 1e-6
    printed = capsys.readouterr().out
    assert (tmp_path / "scaling.md").read_text() in printed and f"written to {tmp_path}: scaling.json" in printed
    with Image.open(tmp_path / "scaling.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
def test_positions_are_as_many_as_the_longest_text_has_bytes(small):
    usual = ScalingArguments(small=small)
    assert usual.model.config().max_position_embeddings == max(usual.length) == (8192 if small else 65536)
    model = ScalingArguments(small=small, length=[5000, 7]).model
    published = PUBLISHED_MODELS["language"].small() if small else PUBLISHED_MODELS["language"]
    assert dict(model.fields) == dict(published.fields) | {"max_position_embeddings": 5000}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--length", 9, 0), "--length 0: must be 1 to 9"),
        (("--length", 9, 9), "--length 9: must be two or more"),
        (("--dtype", "float32", "bfloat16"), "--dtype float32 bfloat16: must be one value"),
        (("--batch_size", 1, 2), "--batch_size 1 2: must be one value"),
        (("--flops_ratio", 0.5), "--flops_ratio: "),
        (("--shapes", "vision"), "--shapes: "),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tiny_published, tmp_path, capsys, arguments, says):
    line = bad_input_line(capsys, SCRIPT, *TINY, *arguments, "--output_dir", tmp_path / "out")
    assert line.startswith(f"error: {says}") and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_found_before_the_rounds(tiny_published, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "measure", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "out").write_text("a file")
    line = bad_input_line(capsys, SCRIPT, *TINY, "--output_dir", tmp_path / "out")
    assert line.startswith(f"error: --output_dir {tmp_path / 'out'}: ")
