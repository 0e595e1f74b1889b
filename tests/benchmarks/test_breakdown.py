# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/breakdown.py on tiny models: time is charged to the right part."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

import layers_tome_perceiver
import modeling_tome_perceiver
from benchmarks import breakdown
from benchmarks.breakdown import (
    ATTENTION,
    MATCHING,
    MERGING,
    MLP,
    PARTS,
    REST,
    PartClock,
    charge_parts,
    list_module_parts,
)
from tests.support.script_run import call_script
from tests.support.tiny_models import HEADS, tiny_inputs, tiny_model

SCRIPT = "benchmarks.breakdown.py"
TINY = ("--batch_size", 2, "--r", 0, 2, "--flops_ratio", 0.95, "--rounds", 2)
WITH_DECODER = [head for head in HEADS if head != "Model"]


class Ticks:
    """Fake clock that the test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(breakdown.time, "perf_counter", lambda: self.now)


def test_time_is_charged_to_the_innermost_part_and_all_of_it(monkeypatch):
    ticks, waited = Ticks(monkeypatch), []
    clock = PartClock(lambda: waited.append(ticks.now))

    def wait(seconds: float) -> None:
        ticks.now += seconds

    wait(1)
    clock.enter(ATTENTION)
    wait(2)
    clock.charge_calls(MATCHING, wait)(4)
    wait(8)
    clock.leave()
    wait(16)
    clock.charge()
    assert clock.seconds == dict.fromkeys(PARTS, 0.0) | {REST: 17, ATTENTION: 10, MATCHING: 4}
    assert sum(clock.seconds.values()) == ticks.now
    # The clock synchronises with the device whenever a part begins or ends.
    assert waited == [0, 1, 3, 7, 15, 31]


@pytest.mark.parametrize("head", WITH_DECODER)
def test_a_pass_with_the_clock_is_the_same_and_leaves_nothing_behind(head):
    model, inputs = tiny_model(head, r=2), tiny_inputs(head)
    watched = (layers_tome_perceiver, modeling_tome_perceiver)
    before = [dict(vars(module)) for module in watched]
    with torch.no_grad():
        expected = model(**inputs)
        clock = PartClock(lambda: None)
        with charge_parts(model, clock):
            given = model(**inputs)
            clock.charge()
    torch.testing.assert_close(given.logits, expected.logits, rtol=0, atol=0)
    assert all(clock.seconds[part] > 0 for part in PARTS)
    assert [dict(vars(module)) for module in watched] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_linear_layer_and_norm_is_within_a_part():
    model = tiny_model("ForSequenceClassification")
    covered = {id(inner) for module, _ in list_module_parts(model) for inner in module.modules()}
    leaves = [
        module for module in model.base_model.modules() if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d))
    ]
    assert leaves and all(id(module) in covered for module in leaves)


@pytest.mark.parametrize(("name", "part"), [("merge_latents", MERGING), ("layer_matchers", MATCHING)])
def test_what_is_slow_shows_in_its_part(monkeypatch, name, part):
    """Two layers merge, and the slowed function takes 20 ms longer in each."""
    model, inputs = (
        tiny_model("ForSequenceClassification", r=[4, 2, 0, 0, 0, 0]),
        tiny_inputs("ForSequenceClassification"),
    )

    def slow(function):
        def call(*arguments):
            time.sleep(0.02)
            return function(*arguments)

        return call

    original = getattr(layers_tome_perceiver, name)
    if name == "layer_matchers":
        replaced = lambda *given: [None if each is None else slow(each) for each in original(*given)]  # noqa: E731
    else:
        replaced = slow(original)
    monkeypatch.setattr(layers_tome_perceiver, name, replaced)
    clock = PartClock(lambda: None)
    with torch.no_grad(), charge_parts(model, clock):
        model(**inputs)
        clock.charge()
    assert clock.seconds[part] > 0.04 > clock.seconds[MLP]


def test_shares_sum_to_one_and_only_what_merges_matches(tiny_published, tmp_path, capsys):
    call_script(SCRIPT, *TINY, "--length", 9, "--output_dir", tmp_path)
    report = json.loads((tmp_path / "breakdown.json").read_text())
    (cell,) = report["cells"]
    rows = {row["name"]: row for row in cell["rows"]}
    fixed = "floor 0.95, fixed groups"
    assert cell["cell"] == "float32, inputs 2 x 9" and list(rows) == ["r = 0", "r = 2", "floor 0.95", fixed]
    for row in rows.values():
        assert list(row["part_shares"]) == list(PARTS)
        assert sum(row["part_shares"].values()) == pytest.approx(1)
        assert all(row["part_milliseconds"][part] > 0 for part in PARTS if part not in (MATCHING, MERGING))
        share = row["matching_and_merging_share"]
        assert 0 <= share["lower"] <= share["median"] <= share["upper"] < 1
        assert row["milliseconds"]["median"] > 0
    assert rows["r = 0"]["part_shares"][MATCHING] == 0 == rows["r = 0"]["matching_flops_share"]
    assert rows["r = 2"]["part_shares"][MATCHING] > 0 < rows["r = 2"]["part_shares"][MERGING]
    assert rows["r = 2"]["latents_per_layer"] == [10, 8, 6, 4, 2, 1]
    # Fixed groups are still looked up, but nothing is compared.
    assert rows["floor 0.95"]["matching_flops_share"] > 0 == rows[fixed]["matching_flops_share"]
    assert (tmp_path / "breakdown.md").read_text() in capsys.readouterr().out
