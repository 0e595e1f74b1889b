# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/throughput.py on tiny models: variants, FLOPs and the report."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed_rows
from benchmarks.breakdown import BreakdownArguments
from benchmarks.latency import LatencyArguments
from benchmarks.published_models import PUBLISHED_MODELS, check_outputs
from benchmarks.speed_rows import consecutive_groups
from benchmarks.throughput import STOCK, ThroughputArguments, build_variants, time_first_calls
from cost_tome_perceiver import forward_cost
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_models import tiny_config, tiny_inputs, tiny_model

SCRIPT = "benchmarks.throughput.py"
TINY = ("--batch_size", 2, "--r", 0, 2, "--flops_ratio", 0.95, "--rounds", 2)
FIXED = "floor 0.95, fixed groups"
REALLY_PUBLISHED = dict(PUBLISHED_MODELS)

pytestmark = pytest.mark.usefixtures("tiny_published")


def measure(folder, *arguments):
    call_script(SCRIPT, *TINY, *arguments, "--output_dir", folder)
    return json.loads((folder / "throughput.json").read_text())


def rows_of(cell):
    return {row["name"]: row for row in cell["rows"]}


def test_every_combination_is_a_cell_and_every_variant_a_row(tmp_path, capsys):
    arguments = ThroughputArguments(dtype=["float32", "bfloat16"], batch_size=[1, 3], length=[9, 20], flops_ratio=[1.0])
    names = [f"{d}, inputs {b} x {s}" for d in ("float32", "bfloat16") for b in (1, 3) for s in (9, 20)]
    assert [cell.name for cell in arguments.cells()] == names
    report = measure(tmp_path, "--length", 9, "--batch_size", 1, 3)
    assert [cell["cell"] for cell in report["cells"]] == ["float32, inputs 1 x 9", "float32, inputs 3 x 9"]
    for cell in report["cells"]:
        rows = rows_of(cell)
        assert list(rows) == [STOCK, "r = 0", "r = 2", "floor 0.95", FIXED]
        assert rows["r = 2"]["latents_per_layer"] == [10, 8, 6, 4, 2, 1]
        for row in rows.values():
            assert row["implied_speedup"] == pytest.approx(rows[STOCK]["gflops"] / row["gflops"])
            assert row["speedup"]["lower"] <= row["speedup"]["median"] <= row["speedup"]["upper"]
            assert row["share_of_implied"] == pytest.approx(row["speedup"]["median"] / row["implied_speedup"])
            seconds = row["milliseconds"]["median"] / 1e3
            assert row["gflops_per_second"] == pytest.approx(row["gflops"] / seconds)
            share = row["gflops_per_second"] / cell["product_gflops_per_second"]
            assert row["share_of_product_rate"] == pytest.approx(share)
            assert row["peak_memory_mb"] > 0 and row["first_call_seconds"] is None
        assert rows["r = 0"]["implied_speedup"] == 1 == rows[STOCK]["implied_speedup"]
        assert rows["floor 0.95"]["implied_speedup"] >= 1 / 0.95
        assert cell["product_shape"] == [12 * int(cell["cell"].split()[2]), 16]
    assert report["environment"]["torch"] == torch.__version__
    assert (tmp_path / "throughput.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "throughput.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("r", [0, 4, [3, 0, 2, 1, 0, 0]])
def test_fixed_groups_leave_the_same_latents_and_match_nothing(r):
    config = tiny_config(r=r)
    grouped = tiny_config(**consecutive_groups(config))
    costs = [forward_cost(one, (2, 9), "PerceiverForSequenceClassification") for one in (config, grouped)]
    assert grouped.latents_per_layer == config.latents_per_layer
    assert costs[0].total == costs[1].total and sum(costs[1].matching) == 0


def test_images_with_fewer_layers(tmp_path):
    report = measure(tmp_path, "--shapes", "vision", "--small", "--dtype", "bfloat16", "--r", 6)
    (cell,) = report["cells"]
    assert cell["cell"] == "bfloat16, inputs 2 x 3 x 8 x 8" and 0 < cell["outputs_difference"] < 0.1
    assert rows_of(cell)["r = 6"]["latents_per_layer"] == [6, 3]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_training_steps_are_timed_with_checkpointing_and_without(tmp_path):
    rows = rows_of(measure(tmp_path, "--training", "--length", 9, "--r", 2)["cells"][0])
    settings = ["r = 2", "floor 0.95", FIXED]
    assert list(rows) == [STOCK, *settings, *(f"{name}, checkpointed" for name in settings)]
    for name in settings:
        once, twice = rows[name], rows[f"{name}, checkpointed"]
        # With checkpointing, the layers, which are nearly the whole cost, run a fourth time.
        assert once["gflops"] < twice["gflops"] < 4 / 3 * once["gflops"] * 1.01
        assert once["latents_per_layer"] == twice["latents_per_layer"]


@pytest.mark.parametrize("r", [0, 3])
def test_flops_of_a_training_step_are_those_that_are_counted(r):
    model = tiny_model("ForSequenceClassification", r=r, attn_implementation="eager").train()
    inputs = tiny_inputs("ForSequenceClassification", batch=1)["input_ids"]
    arguments = ThroughputArguments(training=True)
    with FlopCounterMode(display=False) as counter:
        arguments.take_turn(model, inputs)
    assert counter.get_total_flops() == arguments.turn_flops({"r": r}, tuple(inputs.shape))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_variants_stand_beside_the_others(monkeypatch):
    monkeypatch.setattr(speed_rows, "COMPILE_BACKEND", "eager")
    arguments = ThroughputArguments(small=True, compile=["layers", "model"], flops_ratio=[1.0])
    published = arguments.model
    stock = published.build_stock(torch.float32, "cpu")
    variants = build_variants(arguments, stock, {"r = 2": {"r": 2}})
    names = [f"{name}, {how} compiled" for how in ("layers", "model") for name in ("stock", "r = 2")]
    assert [variant.name for variant in variants] == [STOCK, "r = 2", *names]
    inputs = published.draw_inputs((2, 9), torch.float32, "cpu")
    seconds = time_first_calls(variants, lambda model: arguments.take_turn(model, inputs))
    assert list(seconds) == names and min(seconds.values()) > 0
    with torch.inference_mode():
        logits = [variant.model(inputs=inputs).logits for variant in variants]
    for again in (logits[2], logits[4]):
        torch.testing.assert_close(again, logits[0])
    for again in (logits[3], logits[5]):
        torch.testing.assert_close(again, logits[1])


def test_a_model_that_does_something_else_is_not_timed():
    published = PUBLISHED_MODELS["language"]
    stock = published.build_stock(torch.float32, "cpu")
    inputs = published.draw_inputs((2, 9), torch.float32, "cpu")
    assert check_outputs(stock, published.build_merging(stock), inputs) < 1e-5
    other = published.build_merging(published.build_stock(torch.float32, "cpu", seed=1))
    with pytest.raises(AssertionError, match="outputs differ"):
        check_outputs(stock, other, inputs)


def test_small_means_fewer_of_what_is_not_given():
    full, small = ThroughputArguments(), ThroughputArguments(small=True, r=[5])
    assert small.model.config().num_self_attention_layers == 2 < full.model.config().num_self_attention_layers
    assert small.r == [5] and small.rounds < full.rounds and max(small.batch_size) < max(full.batch_size)
    assert small.model.config().d_latents == full.model.config().d_latents


@pytest.mark.parametrize("shapes", PUBLISHED_MODELS)
@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
@pytest.mark.parametrize("script_arguments", [ThroughputArguments, BreakdownArguments, LatencyArguments])
def test_the_published_shapes_reach_their_budgets(monkeypatch, script_arguments, shapes, small):
    monkeypatch.setitem(PUBLISHED_MODELS, shapes, REALLY_PUBLISHED[shapes])
    arguments = script_arguments(shapes=shapes, small=small)
    config = arguments.model.config()
    layers = {
        "digits": (9, 9),
        "language": (26, 6),
        "vision": (48, 6),
        "small_language": (12, 12),
        "small_vision": (8, 8),
    }[shapes]
    assert config.num_self_attention_layers == layers[small]
    for cell in arguments.cells():
        assert len(cell.settings) > 1
        unmerged = arguments.model.cost(cell.input_shape).total_with_matching
        for ratio in arguments.flops_ratio:
            cost = arguments.model.cost(cell.input_shape, **cell.settings[f"floor {ratio}"])
            assert 0.9 * ratio < cost.total_with_matching / unmerged <= ratio


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shapes", "audio"), "--shapes audio: choose from digits, language, small_language, small_vision, vision"),
        (("--dtype", "float32", "int8"), "--dtype int8: choose from bfloat16, float16, float32"),
        (("--batch_size", 1, 0), "--batch_size 0: must be 1 or more"),
        (("--length", 129), "--length 129: must be 1 to 128"),
        (("--shapes", "vision", "--length", 9), "--length 9: --shapes vision"),
        (("--r", -1), "--r -1: must be 0 or more"),
        (("--rounds", 0), "--rounds 0: must be 1 or more"),
        (("--schedule", "search"), "--schedule search: choose from constant"),
        (("--flops_ratio", 0.01), "--flops_ratio 0.01 is out of reach"),
        (("--device", "abacus"), "--device abacus: "),
        (("--compile", "layers", "blocks"), "--compile blocks: choose from layers, model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, arguments, says):
    line = bad_input_line(capsys, SCRIPT, *TINY, *arguments, "--output_dir", tmp_path / "out")
    assert line.startswith(f"error: {says}") and not (tmp_path / "out").exists()
