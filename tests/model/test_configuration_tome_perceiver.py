# SPDX-License-Identifier: Apache-2.0
"""What the merging settings mean for each layer, which are refused, and that they survive JSON."""

import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PerceiverConfig

from configuration_tome_perceiver import SHAPE_FIELDS, ToMePerceiverConfig

NO_CAP = 10**6  # latents enough that neither cap ever binds
MERGING_FIELDS = [
    "r",
    "r_inflection",
    "min_latents",
    "proportional_attention",
    "merge_method",
    "merge_metric",
    "merge_groups",
    "latent_groups",
    "merge_frontier",
]


def config(num_latents=12, num_blocks=2, num_self_attends_per_block=3, **merging):
    return ToMePerceiverConfig(
        num_latents=num_latents,
        num_blocks=num_blocks,
        num_self_attends_per_block=num_self_attends_per_block,
        **merging,
    )


def plain_schedule(num_latents, requested, min_latents):
    """Half of what is left, at most, and never below `min_latents`."""
    removed = []
    for r in requested:
        left = num_latents - sum(removed)
        while r > 0 and (2 * r > left or left - r < min_latents):
            r -= 1
        removed.append(r)
    return removed


def test_defaults_merge_nothing():
    merging = ToMePerceiverConfig()
    assert merging.model_type == "tome_perceiver"
    assert (merging.r, merging.r_inflection, merging.min_latents) == (0, 0.0, 1)
    assert (merging.proportional_attention, merging.merge_groups) == (True, None)
    assert (merging.merge_method, merging.merge_metric) == ("bipartite", "key")
    assert merging.merge_schedule == [0] * 26
    assert merging.latents_per_layer == [256] * 26


def test_every_stock_field_keeps_its_default():
    stock, ours = PerceiverConfig().to_dict(), ToMePerceiverConfig().to_dict()
    assert set(ours) - set(stock) == set(MERGING_FIELDS)
    stock.pop("model_type")
    assert {name: ours[name] for name in stock} == stock


@pytest.mark.parametrize(
    "r, num_latents, min_latents, schedule",
    [
        (2, 12, 1, [2, 2, 2, 2, 2, 1]),
        (4, 12, 1, [4, 4, 2, 1, 0, 0]),  # half of 12, 8, 4, 2 caps it, then 1 latent is left
        (4, 12, 5, [4, 3, 0, 0, 0, 0]),
        (100, 9, 1, [4, 2, 1, 1, 0, 0]),  # half of an odd number is rounded down
        ([0, 5, 0, 0, 1, 0], 12, 1, [0, 5, 0, 0, 1, 0]),
        ([9, 0, 9, 0, 9, 0], 12, 2, [6, 0, 3, 0, 1, 0]),
        (0, 12, 12, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_schedule_by_hand(r, num_latents, min_latents, schedule):
    merging = config(num_latents, r=r, min_latents=min_latents)
    assert merging.merge_schedule == schedule
    assert merging.latents_per_layer == [num_latents - sum(schedule[: i + 1]) for i in range(6)]


@pytest.mark.parametrize(
    "inflection, schedule",
    [(-1.0, [8, 6, 5, 3, 2, 0]), (0.0, [4] * 6), (1.0, [0, 2, 3, 5, 6, 8]), (0.5, [2, 3, 4, 4, 5, 6])],
)
def test_inflection_by_hand(inflection, schedule):
    """-1 falls linearly from 2r to 0, +1 rises from 0 to 2r."""
    assert config(NO_CAP, r=4, r_inflection=inflection).merge_schedule == schedule


def test_groups_give_the_schedule():
    groups = [None, [0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 5, 6], None, None, [0, 1, 0, 1, 2, 2, 0], None]
    merging = config(merge_groups=groups)
    assert merging.merge_schedule == [0, 5, 0, 0, 4, 0]
    assert merging.latents_per_layer == [12, 7, 7, 7, 3, 3]


def test_groups_at_the_start_leave_fewer_for_the_layers():
    """With r, with groups in layers, and alone; a call's own r merges all latents anew."""
    at_start = [0, 1, 2, 3, 4, 1, 5, 6, 7, 8, 0, 1]
    merging = config(latent_groups=at_start, r=2)
    assert (merging.latents_at_start, merging.merge_schedule) == (9, [2, 2, 2, 1, 1, 0])
    assert merging.latents_per_layer == [7, 5, 3, 2, 1, 1]
    assert merging.schedule_of(2) == [2, 2, 2, 2, 2, 1]
    groups = [None, [0, 1, 0, 1, 2, 2, 0, 2, 3], *[None] * 4]
    assert config(latent_groups=at_start, merge_groups=groups).latents_per_layer == [9, 4, 4, 4, 4, 4]
    assert config(latent_groups=at_start).latents_per_layer == [9] * 6
    assert config().latents_at_start == 12


def test_groups_at_the_start_set_afterwards_that_do_not_fit_give_no_schedule():
    merging = config()
    merging.latent_groups = [0, 1, 1]
    with pytest.raises(ValueError, match=r"^latent_groups: allowed is null or a list of 12 integers[^\n]*$"):
        _ = merging.merge_schedule


BAD = [
    (dict(r=-1), "r", "-1"),
    (dict(r="abc"), "r", "'abc'"),
    (dict(r=2.5), "r", "2.5"),
    (dict(r=2.0), "r", "2.0"),
    (dict(r=True), "r", "True"),
    (dict(r=None), "r", "None"),
    (dict(r=[1, 2]), "r", "[1, 2]"),
    (dict(r=[1] * 7), "r", str([1] * 7)),
    (dict(r=[]), "r", "[]"),
    (dict(r=[1, 1, True, 1, 1, 1]), "r", "[1, 1, True, 1, 1, 1]"),
    (dict(r=[1, 1, -2, 1, 1, 1]), "r", "[1, 1, -2, 1, 1, 1]"),
    (dict(r=[1, 1, 1.5, 1, 1, 1]), "r", "[1, 1, 1.5, 1, 1, 1]"),
    (dict(r=[1, 1, "1", 1, 1, 1]), "r", "[1, 1, '1', 1, 1, 1]"),
    (dict(r=2, r_inflection=1.01), "r_inflection", "1.01"),
    (dict(r=2, r_inflection=-2), "r_inflection", "-2"),
    (dict(r=2, r_inflection=float("nan")), "r_inflection", "nan"),
    (dict(r=2, r_inflection=True), "r_inflection", "True"),
    (dict(r=2, r_inflection="steep"), "r_inflection", "'steep'"),
    (dict(r=2, r_inflection=None), "r_inflection", "None"),
    (dict(r=[1] * 6, r_inflection=0.5), "r_inflection", "0.5"),
    (dict(min_latents=0), "min_latents", "0"),
    (dict(min_latents=-3), "min_latents", "-3"),
    (dict(min_latents=13), "min_latents", "13"),
    (dict(min_latents=True), "min_latents", "True"),
    (dict(min_latents=1.5), "min_latents", "1.5"),
    (dict(min_latents=None), "min_latents", "None"),
    (dict(proportional_attention=1), "proportional_attention", "1"),
    (dict(proportional_attention="no"), "proportional_attention", "'no'"),
    (dict(merge_method=3), "merge_method", "3"),
    (dict(merge_method=None), "merge_method", "None"),
    (dict(merge_metric="keys"), "merge_metric", "'keys'"),
    (dict(merge_metric=["key"]), "merge_metric", "['key']"),
    (dict(merge_metric=None), "merge_metric", "None"),
    (dict(merge_groups=[None] * 6, r=2), "merge_groups", "2"),
    (dict(merge_groups=[None] * 6, r=[1] * 6), "merge_groups", str([1] * 6)),
    (dict(merge_groups=[None] * 5), "merge_groups", "length 5"),
    (dict(merge_groups=3), "merge_groups", "3"),
    (dict(merge_groups="none"), "merge_groups", "str"),
    (dict(merge_groups=[[0] * 11, *[None] * 5]), "merge_groups[0]", "length 11"),
    (dict(merge_groups=[None, [0] * 6 + [1] * 6, [0] * 12, *[None] * 3]), "merge_groups[2]", "length 12"),
    (dict(merge_groups=[[0, True] + [0] * 10, *[None] * 5]), "merge_groups[0]", "list"),
    (dict(merge_groups=[[0, 1.0] + [0] * 10, *[None] * 5]), "merge_groups[0]", "list"),
    (dict(merge_groups=[7, *[None] * 5]), "merge_groups[0]", "7"),
    (dict(merge_groups=[None, [0, 2] + [0] * 10, *[None] * 4]), "merge_groups[1]", "[0, 2]"),
    (dict(merge_groups=[None, [1, 2] + [1] * 10, *[None] * 4]), "merge_groups[1]", "[1, 2]"),
    (dict(merge_groups=[None, [0, -1] + [0] * 10, *[None] * 4]), "merge_groups[1]", "[-1, 0]"),
    (dict(merge_groups=[[0, 1, 2] * 4, *[None] * 5], min_latents=4), "merge_groups[0]", "3"),
    (dict(latent_groups=[0] * 11), "latent_groups", "length 11"),
    (dict(latent_groups=3), "latent_groups", "3"),
    (dict(latent_groups=[0, True] * 6), "latent_groups", "list"),
    (dict(latent_groups=[0, 2] * 6), "latent_groups", "[0, 2]"),
    (dict(latent_groups=[0, 1, 2] * 4, min_latents=4), "latent_groups", "3"),
    (dict(latent_groups=[0, 1, 2] * 4, merge_groups=[[0] * 12, *[None] * 5]), "merge_groups[0]", "length 12"),
]


@pytest.mark.parametrize("merging, field, value", BAD, ids=[str(merging) for merging, _, _ in BAD])
def test_bad_value_is_one_line_naming_field_value_and_what_is_allowed(merging, field, value):
    with pytest.raises(ValueError) as error:
        config(**merging)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(field)
    # What is allowed is said in words, after the field and apart from the value.
    assert any(word in message for word in ("allowed", "must be", "needs", "fewer than", "numbered"))
    assert value in message.removeprefix(field)


def test_bad_value_over_a_folder_is_refused(tmp_path):
    config(r=2).save_pretrained(tmp_path)
    assert ToMePerceiverConfig.from_pretrained(tmp_path, r=1).r == 1
    with pytest.raises(ValueError, match=r"^r = -3: [^\n]*$"):
        ToMePerceiverConfig.from_pretrained(tmp_path, r=-3)


def test_bad_value_in_a_folder_is_refused(tmp_path):
    config(r=2).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "r": "abc"}))
    with pytest.raises(ValueError, match=r"^r = 'abc': [^\n]*$"):
        ToMePerceiverConfig.from_pretrained(tmp_path)


def test_bad_value_set_afterwards_gives_no_schedule():
    merging = config(r=2)
    merging.r = [1, 2]
    with pytest.raises(ValueError, match=r"^r = \[1, 2\]: [^\n]*$"):
        _ = merging.merge_schedule


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(ValueError, match=r"^model_type = 'bert': [^\n]*allowed[^\n]*'perceiver'[^\n]*$"):
        ToMePerceiverConfig.from_pretrained(tmp_path)


def test_a_stock_folder_is_a_config_that_merges_as_told(tmp_path):
    PerceiverConfig(num_latents=12, num_blocks=2, num_self_attends_per_block=3).save_pretrained(tmp_path)
    assert ToMePerceiverConfig.from_pretrained(tmp_path).merge_schedule == [0] * 6
    assert ToMePerceiverConfig.from_pretrained(tmp_path, r=2, min_latents=9).merge_schedule == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "merging",
    [
        dict(r=4, r_inflection=-0.5, min_latents=3, merge_method="random", proportional_attention=False),
        dict(r=[0, 5, 0, 0, 1, 0], merge_metric="hidden"),
        dict(r=(3, 2, 1, 0, 0, 0)),
        dict(merge_groups=[None, [0, 1, 2] * 4, None, [0, 0, 1], None, None]),
        dict(latent_groups=[0, 1, 2, 3] * 3, r=[1, 0, 0, 0, 0, 0]),
    ],
    ids=["integer", "list", "tuple", "groups", "groups at the start"],
)
def test_json_keeps_every_setting(merging, tmp_path):
    first = config(**merging)
    first.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "tome_perceiver"
    again = ToMePerceiverConfig.from_pretrained(tmp_path)
    for name in MERGING_FIELDS:
        expected = getattr(first, name)
        assert getattr(again, name) == (list(expected) if isinstance(expected, tuple) else expected)
    assert sum(first.merge_schedule) > 0
    assert again.merge_schedule == first.merge_schedule
    assert ToMePerceiverConfig(**json.loads(first.to_json_string(use_diff=False))).merge_schedule == (
        first.merge_schedule
    )


@st.composite
def shapes(draw):
    num_latents = draw(st.integers(1, 300))
    blocks, layers = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    min_latents = draw(st.integers(1, num_latents))
    return dict(num_latents=num_latents, num_blocks=blocks, num_self_attends_per_block=layers, min_latents=min_latents)


@given(shape=shapes(), data=st.data())
def test_schedule_keeps_the_caps_and_takes_all_that_they_allow(shape, data):
    """At most half of a layer's latents, never below `min_latents`, and otherwise what `r` asks for."""
    layers = shape["num_blocks"] * shape["num_self_attends_per_block"]
    entries = st.integers(0, 200)
    r = data.draw(entries | st.lists(entries, min_size=layers, max_size=layers))
    merging = ToMePerceiverConfig(**shape, r=r)
    requested = r if isinstance(r, list) else [r] * layers
    schedule, left = merging.merge_schedule, merging.latents_per_layer
    assert schedule == plain_schedule(shape["num_latents"], requested, shape["min_latents"])
    assert len(schedule) == len(left) == layers
    entering = [shape["num_latents"], *left]
    for i in range(layers):
        assert 0 <= schedule[i] <= min(requested[i], entering[i] // 2)
        assert left[i] == entering[i] - schedule[i] >= shape["min_latents"]


@given(
    blocks=st.integers(1, 4),
    per_block=st.integers(1, 9),
    r=st.integers(0, 60),
    inflection=st.floats(-1, 1, allow_nan=False),
)
def test_inflection_moves_merging_about_and_leaves_its_total_alone(blocks, per_block, r, inflection):
    """Before the caps: monotone, from 0 to 2r, opposite layers sum to 2r, so that all layers sum to r L."""
    layers = blocks * per_block
    merging = config(NO_CAP, blocks, per_block, r=r, r_inflection=inflection)
    schedule = merging.merge_schedule
    assert sum(schedule) == r * layers
    assert all(0 <= entry <= 2 * r for entry in schedule)
    assert all(schedule[i] + schedule[-1 - i] == 2 * r for i in range(layers))
    assert schedule == sorted(schedule, reverse=inflection < 0)
    # Linear but for the rounding to whole latents.
    for i, entry in enumerate(schedule):
        middle = 1 - 2 * i / (layers - 1) if layers > 1 else 0
        assert abs(entry - r * (1 - inflection * middle)) <= 0.5 + 1e-9


@given(shape=shapes(), r=st.integers(0, 40), inflection=st.floats(-1, 1, allow_nan=False))
def test_inflected_schedule_is_capped_like_a_list(shape, r, inflection):
    layers = shape["num_blocks"] * shape["num_self_attends_per_block"]
    uncapped = ToMePerceiverConfig(
        **{**shape, "num_latents": NO_CAP, "min_latents": 1}, r=r, r_inflection=inflection
    ).merge_schedule
    assert len(uncapped) == layers
    by_number = ToMePerceiverConfig(**shape, r=r, r_inflection=inflection).merge_schedule
    assert by_number == ToMePerceiverConfig(**shape, r=uncapped).merge_schedule


def test_bad_value_set_later_is_not_written(tmp_path):
    changed = config(r=2)
    changed.r = -5
    with pytest.raises(ValueError, match=r"^r = -5: [^\n]*$"):
        changed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "3", None], ids=repr)
@pytest.mark.parametrize("name", SHAPE_FIELDS)
def test_a_shape_of_anything_but_positive_integers_is_one_line(name, bad):
    """When built, and when set and saved."""
    with pytest.raises(ValueError, match=rf"^{name} = {re.escape(repr(bad))}: allowed is an integer of 1 or more$"):
        ToMePerceiverConfig(**{name: bad})
    merging = config()
    with pytest.raises(ValueError, match=rf"^{name} = [^\n]*$"):
        setattr(merging, name, bad)
        merging.check_merging()


@pytest.mark.parametrize(
    "shape",
    [dict(d_latents=1281), dict(qk_channels=12), dict(v_channels=12), dict(num_cross_attention_heads=7)],
    ids=str,
)
def test_channels_that_the_heads_do_not_divide_are_one_line(shape):
    with pytest.raises(
        ValueError, match=r"^(d_latents|qk_channels|v_channels) = \d+: allowed is a multiple of [^\n]*$"
    ):
        ToMePerceiverConfig(**shape)


PUBLISHED = [
    {},
    dict(
        num_latents=512,
        d_latents=512,
        d_model=261,
        num_blocks=8,
        num_self_attends_per_block=6,
        num_cross_attention_heads=1,
    ),
    dict(qk_channels=256, v_channels=1280),
    dict(
        num_latents=2048,
        d_latents=512,
        d_model=322,
        num_self_attends_per_block=24,
        num_self_attention_heads=16,
        num_cross_attention_heads=1,
    ),
    dict(num_latents=784, d_latents=512, d_model=704, num_self_attends_per_block=8, num_cross_attention_heads=1),
]


@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
def test_shapes_of_the_published_models_are_fine(shape, tmp_path, caplog):
    """And load as they are, without upstream's warning of another model type."""
    PerceiverConfig(**shape).save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            loaded = ToMePerceiverConfig.from_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records
    assert loaded.model_type == "tome_perceiver" and loaded.num_latents == PerceiverConfig(**shape).num_latents
    loaded.check_labels()


def test_a_misspelt_field_is_refused(tmp_path):
    PerceiverConfig().save_pretrained(tmp_path)
    line = r"^merge_metod: [^\n]*'merge_method'[^\n]*$"
    for call in (
        lambda: ToMePerceiverConfig(merge_metod="random"),
        lambda: ToMePerceiverConfig.from_pretrained(tmp_path, merge_metod="random"),
        lambda: ToMePerceiverConfig.from_pretrained(tmp_path, merge_metod="random", return_unused_kwargs=True),
    ):
        with pytest.raises(ValueError, match=line):
            call()
    assert ToMePerceiverConfig(something_of_mine=3).something_of_mine == 3


@pytest.mark.parametrize("groups", [[[0] * 11, *[None] * 5], [None] * 5])
def test_groups_set_afterwards_that_do_not_fit_give_no_schedule(groups):
    merging = config()
    merging.merge_groups = groups
    with pytest.raises(ValueError, match=r"^merge_groups[^\n]*$"):
        _ = merging.merge_schedule
    merging.merge_groups, merging.r = [None] * 6, 2
    with pytest.raises(ValueError, match=r"^merge_groups: [^\n]*r must be 0[^\n]*$"):
        _ = merging.merge_schedule


@pytest.mark.parametrize(
    "labels",
    [
        {},
        dict(num_labels=5),
        dict(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}),
        dict(id2label={0: "no", 1: "yes"}, label2id={"no": "0", "yes": "1"}),
        dict(id2label={0: "a", 1: "b", 2: "c"}, label2id={"LABEL_0": 0, "LABEL_1": 1}),
        dict(id2label={0: "crane", 1: "heron", 2: "crane"}, label2id={"heron": 1, "crane": 2}),
    ],
    ids=str,
)
def test_labels_that_say_the_same_are_fine(labels):
    ToMePerceiverConfig(**labels).check_labels()


@pytest.mark.parametrize(
    "labels, line",
    [
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 0}), r"label2id: 'a' and 'b' are both output 0"),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 2}), r"label2id\['b'\] = 2: "),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": -1}), r"label2id\['b'\] = -1: "),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0}), r"id2label\[0\] = 'a': label2id has 'b'"),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0}), r"id2label\[1\] = 'b': label2id has no such label"),
        (dict(id2label={0: "a", 2: "b"}, label2id={"a": 0, "b": 1}), r"id2label: of the outputs \[0, 2\]"),
    ],
    ids=str,
)
def test_labels_that_contradict_each_other_are_one_line(labels, line):
    with pytest.raises(ValueError, match=rf"^{line}[^\n]*allowed[^\n]*$"):
        ToMePerceiverConfig(**labels).check_labels()
