# SPDX-License-Identifier: Apache-2.0
"""Tests of schedules: a FLOPs budget gives the weakest member of a schedule that keeps to it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import (
    SCHEDULES,
    SKIP_BLOCKS,
    FlopsShare,
    Merging,
    forward_cost,
    merging_at,
    round_schedule,
    undisturbed,
    weakest_within,
)
from tests.support.tiny_models import tiny_config, tiny_model

TEXT = "ToMePerceiverForSequenceClassification"
# The published language model's shapes, at which the source paper counts.
PUBLISHED = ToMePerceiverConfig(qk_channels=256, v_channels=1280)
SHAPE = (1, 128)

names = pytest.mark.parametrize("name", sorted(SCHEDULES))


def flops(config: ToMePerceiverConfig, r: list[int] | int) -> int:
    changed = type(config).from_dict(config.to_dict() | {"r": r})
    return forward_cost(changed, SHAPE, TEXT).total_with_matching


def schedule_for_flops(config, ratio, name, shape=SHAPE):
    """Return the list of r with which a schedule keeps to a share of the FLOPs."""
    member = weakest_within(partial(merging_at, config, name), ratio, FlopsShare(config, shape, TEXT))
    return None if member is None else member.r


@names
@pytest.mark.parametrize("ratio", [1.0, 0.59, 0.36])
def test_a_budget_is_kept_and_used(name, ratio):
    """At the published sizes, the unused part of a budget is less than the cost of one latent in all layers."""
    r = schedule_for_flops(PUBLISHED, ratio, name)
    spent = flops(PUBLISHED, r) / flops(PUBLISHED, 0)
    assert ratio - 0.01 < spent <= ratio
    config = type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"r": r})
    assert config.merge_schedule == r  # no cap has cut it


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    latents=st.integers(1, 300),
    layers=st.integers(1, 30),
    strengths=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_stronger_member_leaves_no_more(name, latents, layers, strengths):
    weak, strong = (round_schedule(latents, SCHEDULES[name](latents, layers, each)) for each in sorted(strengths))
    for removed in (weak, strong):
        left = latents
        for entry in removed:
            assert 0 <= entry <= left // 2
            left -= entry
        assert left >= 1
    # Rounding, and halves that no layer may merge more than, move single latents from layer to layer.
    assert all(sum(weak[:end]) <= sum(strong[:end]) + 1 for end in range(1, layers + 1))


def test_the_shapes_are_what_their_names_say():
    """Shapes for the published model at a third of the FLOPs."""
    r = {name: schedule_for_flops(PUBLISHED, 0.36, name) for name in SCHEDULES}
    assert max(r["constant"][:10]) - min(r["constant"][:10]) <= 1
    assert r["linear"][0] > r["linear"][5] > r["linear"][12] > 0
    merging = [entry > 0 for entry in r["floor"]]
    assert merging == sorted(merging, reverse=True) and 1 <= sum(merging) <= 3
    left = [256, *type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"r": r["geometric"]}).latents_per_layer]
    shares = [after / before for before, after in list(pairwise(left))[:8]]
    assert max(shares) - min(shares) < 0.03
    assert sum(entry > 0 for entry in r["staged"]) == 3


def test_the_checkpoints_own_merging_does_not_count():
    merging = type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"r": 16})
    assert schedule_for_flops(merging, 0.5, "floor") == schedule_for_flops(PUBLISHED, 0.5, "floor")


def test_min_latents_are_always_left():
    config = type(PUBLISHED).from_dict(PUBLISHED.to_dict() | {"min_latents": 100})
    r = schedule_for_flops(config, 0.6, "geometric")
    assert 256 - sum(r) == 100


def test_skipping_blocks_merges_nothing_and_runs_fewer():
    """As many of the four weight-shared blocks run as the budget allows; afterwards all can run again."""
    config = tiny_config(num_blocks=4, num_self_attends_per_block=2)
    cost_ratio = FlopsShare(config, (1, 9), TEXT)
    found = weakest_within(partial(merging_at, config, SKIP_BLOCKS), 0.8, cost_ratio)
    assert 1 <= found.num_blocks < 4 and found.r == [0] * (2 * found.num_blocks)
    assert cost_ratio(found) <= 0.8 < cost_ratio(found.by(0, num_blocks=found.num_blocks + 1))
    with found.applied(config):
        assert config.num_self_attention_layers == 2 * found.num_blocks
    assert config.num_blocks == 4 and config.merge_schedule == [0] * 8


@given(
    r=st.one_of(st.integers(0, 12), st.lists(st.integers(0, 6), min_size=6, max_size=6)),
    inflection=st.floats(-1, 1),
    method=st.sampled_from(["bipartite", "ward"]),
)
def test_what_a_config_says_comes_back(r, inflection, method):
    """To a config, from it, and through JSON; applying a copy does not change the config."""
    config = tiny_config(r=r, r_inflection=inflection if isinstance(r, int) else 0.0, merge_method=method)
    merging, other = Merging.of(config), tiny_config()
    assert merging.asked_of(other).merge_schedule == config.merge_schedule and other.r == 0
    merging.apply(other)
    assert Merging.of(other) == merging == Merging(**json.loads(merging.key))
    assert Merging.none(other).asked_of(other).merge_schedule == [0] * 6
    assert merging.merges(other) == any(config.merge_schedule)


def test_wrong_arguments_leave_the_config_unchanged():
    config = tiny_config(r=2)
    for changed in ({"r": [1]}, {"merge_method": "magic"}, {"min_latents": 99}, {"merge_groups": [[0]] * 6}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))}"):
            replace(Merging.of(config), **changed).apply(config)
        assert Merging.of(config) == Merging.of(tiny_config(r=2))


def test_groups_that_are_applied_are_a_copy():
    config, groups = tiny_config(), [[0, 1, 1, *range(2, 11)], *[None] * 5]
    Merging.none(config).by(0, merge_groups=groups).apply(config)
    groups[0][0] = 5
    assert config.merge_groups[0][0] == 0


def test_modes_and_merging_are_restored_also_after_an_error():
    model = tiny_model("ForSequenceClassification", r=2).train()
    model.base_model.decoder.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), undisturbed(model), Merging.none(model.config).applied(model.config):
        assert model.r == 0 and not model.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert model.r == 2 and [module.training for module in model.modules()] == modes
