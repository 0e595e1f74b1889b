# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/latency.py on tiny models: settings of requests, and the queue."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import latency, speed_rows
from benchmarks.latency import CHANGING, STOCK, LatencyArguments, build_variants, draw_requests, queued_seconds
from tests.support.script_run import bad_input_line, call_script

SCRIPT = "benchmarks.latency.py"
TINY = ("--length", 9, 20, "--r", 0, 2, "--flops_ratio", 0.95, "--requests", 12)
SETTINGS = ["r = 0", "r = 2", "floor 0.95"]

pytestmark = pytest.mark.usefixtures("tiny_published")


def tiny_arguments(**changed):
    return LatencyArguments(**{"length": [9, 20], "r": [0, 2], "flops_ratio": [0.95], "requests": 12} | changed)


def test_every_variant_is_a_row_of_every_stream(tmp_path, capsys):
    call_script(SCRIPT, *TINY, "--dtype", "float32", "bfloat16", "--output_dir", tmp_path)
    report = json.loads((tmp_path / "latency.json").read_text())
    assert [table["stream"] for table in report["streams"]] == ["float32, batch 1", "bfloat16, batch 1"]
    for table in report["streams"]:
        assert [row["name"] for row in table["rows"]] == [STOCK, *SETTINGS, CHANGING]
        for row in table["rows"]:
            (usual, rare), (queued_usual, queued_rare) = row["milliseconds"], row["queued_milliseconds"]
            assert 0 < usual <= rare <= queued_rare and usual <= queued_usual
        assert table["rows"][0]["speedup"] == {"median": 1, "lower": 1, "upper": 1}
        assert table["rows"][0]["busy"] == pytest.approx(0.7, rel=0.7) and set(table["change"]) == {CHANGING}
        assert set(table["warm_up_seconds"]) == {STOCK, CHANGING}
    assert (tmp_path / "latency.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "latency.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_requests_mix_lengths_and_settings_and_are_drawn_alike_again():
    arguments = tiny_arguments(requests=60)
    torch.manual_seed(0)
    requests = draw_requests(arguments, arguments.cells())
    every = {(length, name) for length in (9, 20) for name in SETTINGS}
    # Each length and setting once for warm-up, and again in the stream.
    for part in (requests[:6], requests[6:]):
        assert {(request.inputs.shape[1], request.asks) for request in part} == every
    assert len(requests) == 66 and all(request.inputs.shape[0] == 1 for request in requests)
    torch.manual_seed(0)
    again = draw_requests(arguments, arguments.cells())
    assert [request.asks for request in again] == [request.asks for request in requests]
    for request in requests:
        assert request.settings.keys() == set(SETTINGS) and sum(request.settings["floor 0.95"]) > 0


def test_each_request_is_merged_as_its_variant_says(monkeypatch):
    """Each variant is called once for each request, with the right r."""
    arguments = tiny_arguments()
    (cells,) = arguments.streams()
    stock = arguments.model.build_stock(torch.float32, "cpu")
    requests = draw_requests(arguments, cells)
    variants = build_variants(arguments, stock, SETTINGS)
    assert [variant.name for variant in variants] == [STOCK, *SETTINGS, CHANGING]
    said = []
    for model_class in {type(variant.model) for variant in variants}:
        monkeypatch.setattr(model_class, "__call__", lambda self, inputs, **named: said.append(named))
    for request in requests:
        said.clear()
        for variant in variants:
            variant.answer(request)
        merges = [request.settings[name] for name in [*SETTINGS, request.asks]]
        assert said == [{}, *({"r": r} for r in merges)]


def test_compiled_layers_answer_too(monkeypatch):
    monkeypatch.setattr(speed_rows, "COMPILE_BACKEND", "eager")
    arguments = tiny_arguments(compile=True, requests=3)
    (cells,) = arguments.streams()
    table, milliseconds = latency.measure(arguments, cells)
    compiled = [f"{name}, layers compiled" for name in [*SETTINGS, CHANGING]]
    assert [row.name for row in table.rows] == [STOCK, *SETTINGS, CHANGING, *compiled] == list(milliseconds)
    assert set(table.change) == {CHANGING, f"{CHANGING}, layers compiled"}
    # All compilation happens before the stream.
    first = table.warm_up_seconds[f"{CHANGING}, layers compiled"]
    assert 1e3 * first > np.median(milliseconds[f"{CHANGING}, layers compiled"])


def test_a_request_waits_until_those_before_it_are_done():
    service, gaps = np.array([3.0, 1.0, 1.0, 5.0, 1.0]), np.array([9.0, 1.0, 1.0, 4.0, 1.0])
    # Requests arrive at 0, 1, 2, 6 and 7, and are done at 3, 4, 5, 11 and 12.
    assert queued_seconds(service, gaps).tolist() == [3, 3, 3, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--requests", 0), "--requests 0: must be 1 or more"),
        (("--rounds", 5), "--rounds 5: "),
        (("--length", 129), "--length 129: must be 1 to 128"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, says):
    line = bad_input_line(capsys, SCRIPT, *TINY, *arguments, "--output_dir", tmp_path / "out")
    assert line.startswith(f"error: {says}") and not (tmp_path / "out").exists()
