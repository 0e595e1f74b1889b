# SPDX-License-Identifier: Apache-2.0
"""A share of the FLOPs or of the time becomes explicit fields of a config, or one clear line."""

from __future__ import annotations

import re

import pytest
import torch

from experiments.errors import BadInput
from experiments.measurement import Quartiles, Timing
from experiments.merging import budget
from experiments.merging.budget import Budget, check_schedule, flops_ratios, latency_ratios
from experiments.merging.schedules import UNMERGED, unmerged_fields
from experiments.merging.search import SEARCH, ScheduleSearch
from tests.support.tiny_models import tiny_config, tiny_model

HEAD = "ForSequenceClassification"
BATCH = {"input_ids": torch.full((2, 9), 7)}


@pytest.fixture
def clock(monkeypatch):
    """A machine on which a forward pass takes as long as its latents: what is measured, and how often."""
    asked = []

    def timed(run, variants, baseline, rounds, desc):
        asked.append(variants[0]["r"])
        for fields in (baseline, *variants):
            run(fields)
        left = [12 - sum(variants[0]["r"][: end + 1]) for end in range(len(variants[0]["r"]))]
        speedup = 72 / sum(left)
        return [Timing(Quartiles(1, 1, 1), Quartiles(speedup, speedup, speedup))]

    monkeypatch.setattr(budget, "time_interleaved", timed)
    return asked


def test_a_share_of_the_time_is_kept(clock):
    """By the weakest member that the machine does in time; each is measured once."""
    model = tiny_model(HEAD)
    fields = Budget("latency_ratio", 0.7, latency_ratios(model, BATCH)).fields("floor", model.config, None)
    assert fields["r"] == [4, 0, 0, 0, 0, 0]  # 8 of 12 latents in each layer
    assert len(clock) == len({tuple(r) for r in clock}) > 1


def test_measuring_leaves_the_model_as_it_was(clock):
    model = tiny_model(HEAD, r=2).train()
    latency_ratios(model, BATCH)(unmerged_fields(model.config) | {"r": [3, 0, 0, 0, 0, 0]})
    assert model.r == 2 and model.training


def test_the_unmerged_model_needs_no_clock(clock):
    model = tiny_model(HEAD)
    assert latency_ratios(model, BATCH)(UNMERGED | {"r": [0] * 6, "num_blocks": 2}) == 1 and not clock


def test_a_real_clock_gives_a_ratio():
    model = tiny_model(HEAD)
    assert latency_ratios(model, BATCH)(UNMERGED | {"r": [6, 3, 0, 0, 0, 0], "num_blocks": 2}) > 0


def test_several_processes_do_not_measure(monkeypatch):
    model = tiny_model(HEAD)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="--latency_ratio: allowed in one process"):
        latency_ratios(model, BATCH)(UNMERGED | {"r": [6, 3, 0, 0, 0, 0], "num_blocks": 2})


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.01, 0.001])
@pytest.mark.parametrize("argument", ["flops_ratio", "latency_ratio"])
def test_what_cannot_be_met_is_named_with_what_can(argument, ratio):
    config = tiny_config()
    cost_ratio = flops_ratios(config, (1, 9), f"ToMePerceiver{HEAD}")
    with pytest.raises(BadInput, match=rf"--{argument} {ratio}: allowed are 0\.\d+, where schedule linear ends, to 1"):
        Budget(argument, ratio, cost_ratio).fields("linear", config, None)


def test_unknown_schedules_are_named():
    with pytest.raises(BadInput, match="--schedule steep: allowed are .*search.*skip_blocks"):
        check_schedule("steep")


def test_a_search_comes_down_as_far_as_it_says():
    """With fewer blocks than any other schedule."""
    model = tiny_model(HEAD)
    cost_ratio = flops_ratios(model.config, (1, 9), type(model).__name__)
    search = ScheduleSearch(model, [BATCH])
    with pytest.raises(BadInput, match="where schedule search ends") as error:
        Budget("flops_ratio", 0.01, cost_ratio).fields(SEARCH, model.config, search)
    least = float(re.findall(r"0\.\d+", str(error.value))[1])
    fields = Budget("flops_ratio", least + 0.001, cost_ratio).fields(SEARCH, model.config, search)
    assert fields["num_blocks"] == 1
