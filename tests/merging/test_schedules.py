# SPDX-License-Identifier: Apache-2.0
"""A budget becomes the weakest member of a schedule that keeps to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.merging.budget import Budget, flops_ratios
from experiments.merging.cost import forward_cost
from experiments.merging.schedules import SCHEDULES, SKIP_BLOCKS, apply_merging, unmerged_fields, whole_schedule
from tests.support.tiny_models import tiny_config

TEXT = "ToMePerceiverForSequenceClassification"
# The published language model's shapes, at which the source paper counts.
PUBLISHED = ToMePerceiverConfig(qk_channels=256, v_channels=1280)
SHAPE = (1, 128)

names = pytest.mark.parametrize("name", sorted(SCHEDULES))


def flops(config: ToMePerceiverConfig, r: list[int] | int) -> int:
    changed = type(config).from_dict(config.to_dict() | {"r": r})
    return forward_cost(changed, SHAPE, TEXT).total_with_matching


def schedule_for_flops(config, ratio, name, shape=SHAPE):
    """The list of r that keeps to a share of the FLOPs."""
    return Budget("flops_ratio", ratio, flops_ratios(config, shape, TEXT)).fields(name, config, None)["r"]


@names
@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.59, 0.36])
def test_a_budget_is_kept_and_used(name, ratio):
    """At the published sizes a budget is missed by less than what one latent costs in all layers."""
    r = schedule_for_flops(PUBLISHED, ratio, name)
    spent = flops(PUBLISHED, r) / flops(PUBLISHED, 0)
    assert ratio - 0.01 < spent <= ratio
    config = type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"r": r})
    assert config.merge_schedule == r  # no cap has cut it


@names
def test_no_budget_merges_nothing(name):
    assert schedule_for_flops(PUBLISHED, 1.0, name) == [0] * 26


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    latents=st.integers(1, 300),
    layers=st.integers(1, 30),
    strengths=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_stronger_member_leaves_no_more(name, latents, layers, strengths):
    weak, strong = (whole_schedule(latents, SCHEDULES[name](latents, layers, each)) for each in sorted(strengths))
    for removed in (weak, strong):
        left = latents
        for entry in removed:
            assert 0 <= entry <= left // 2
            left -= entry
        assert left >= 1
    # Rounding, and halves that no layer may merge more than, move single latents from layer to layer.
    assert all(sum(weak[:end]) <= sum(strong[:end]) + 1 for end in range(1, layers + 1))


def test_the_shapes_are_what_their_names_say():
    """Of the published model at a third of the FLOPs."""
    r = {name: schedule_for_flops(PUBLISHED, 0.36, name) for name in SCHEDULES}
    assert max(r["constant"][:10]) - min(r["constant"][:10]) <= 1
    assert r["linear"][0] > r["linear"][5] > r["linear"][12] > 0
    merging = [entry > 0 for entry in r["floor"]]
    assert merging == sorted(merging, reverse=True) and 1 <= sum(merging) <= 3
    left = [256, *type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"r": r["geometric"]}).latents_per_layer]
    shares = [after / before for before, after in list(pairwise(left))[:8]]
    assert max(shares) - min(shares) < 0.03
    assert sum(entry > 0 for entry in r["staged"]) == 3


def test_the_papers_r_is_a_constant_schedule():
    """At what r = 8 costs, eight go in each layer, but for the rounding of the budget."""
    ratio = flops(PUBLISHED, 8) / flops(PUBLISHED, 0)
    assert schedule_for_flops(PUBLISHED, ratio + 1e-6, "constant") == [8] * 26


def test_the_checkpoints_own_merging_does_not_count():
    merging = type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"r": 16})
    assert schedule_for_flops(merging, 0.5, "floor") == schedule_for_flops(PUBLISHED, 0.5, "floor")


@pytest.mark.parametrize(
    ("ratio", "name", "says"),
    [
        (0.0, "floor", "--flops_ratio 0.0: allowed are 0\\.[0-9]+, where schedule floor ends, to 1"),
        (-1.0, "floor", "--flops_ratio -1.0"),
        (1.01, "floor", "--flops_ratio 1.01"),
        (0.2, "staged", "--flops_ratio 0.2.*staged"),
        (0.1, SKIP_BLOCKS, "--flops_ratio 0.1.*skip_blocks"),
    ],
)
def test_what_cannot_be_kept_to_is_named(ratio, name, says):
    with pytest.raises(BadInput, match=says):
        schedule_for_flops(PUBLISHED, ratio, name)


@names
def test_tiny_models_have_schedules_too(name):
    config = tiny_config()
    r = schedule_for_flops(config, 0.9, name, (1, 9))
    assert len(r) == config.num_self_attention_layers and sum(r) > 0


def test_min_latents_are_always_left():
    config = type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"min_latents": 100})
    r = schedule_for_flops(config, 0.6, "geometric")
    assert 256 - sum(r) == 100


def test_skipping_blocks_merges_nothing_and_runs_fewer():
    """Of four weight-shared blocks, as many as the budget allows; afterwards all of them can run again."""
    config = tiny_config(num_blocks=4, num_self_attends_per_block=2)
    cost_ratio = flops_ratios(config, (1, 9), TEXT)
    fields = Budget("flops_ratio", 0.8, cost_ratio).fields(SKIP_BLOCKS, config, None)
    assert 1 <= fields["num_blocks"] < 4 and fields["r"] == [0] * (2 * fields["num_blocks"])
    assert cost_ratio(fields) <= 0.8 < cost_ratio(fields | {"num_blocks": fields["num_blocks"] + 1, "r": 0})
    before = unmerged_fields(config)
    apply_merging(config, fields)
    assert config.num_self_attention_layers == 2 * fields["num_blocks"]
    apply_merging(config, before)
    assert config.num_blocks == 4 and config.merge_schedule == [0] * 8
