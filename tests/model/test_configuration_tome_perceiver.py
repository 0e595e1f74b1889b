# SPDX-License-Identifier: Apache-2.0
"""Tests of the config: schedules of merging settings, refused values, and saving to JSON."""

import json
import logging
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PerceiverConfig

from configuration_tome_perceiver import (
    MERGING_FIELDS,
    NEWEST_TRANSFORMERS,
    OLDEST_TRANSFORMERS,
    SHAPE_FIELDS,
    ToMePerceiverConfig,
    check_transformers,
)
from tests.support.script_run import ROOT

NO_CAP = 10**6  # latents enough that neither cap ever binds


def config(num_latents=12, num_blocks=2, num_self_attends_per_block=3, **merging):
    return ToMePerceiverConfig(
        num_latents=num_latents,
        num_blocks=num_blocks,
        num_self_attends_per_block=num_self_attends_per_block,
        **merging,
    )


def plain_schedule(num_latents, requested, min_latents):
    """Return the latents left after each layer: a layer merges at most half, and leaves `min_latents` or more."""
    removed = []
    for r in requested:
        left = num_latents - sum(removed)
        while r > 0 and (2 * r > left or left - r < min_latents):
            r -= 1
        removed.append(r)
    return removed


def test_defaults_merge_nothing_and_every_stock_field_keeps_its_own():
    merging = ToMePerceiverConfig()
    assert (merging.merge_schedule, merging.latents_per_layer) == ([0] * 26, [256] * 26)
    stock, ours = PerceiverConfig().to_dict(), ToMePerceiverConfig().to_dict()
    assert set(ours) - set(stock) == {*MERGING_FIELDS, "merge_frontier"} - {"num_blocks"}
    stock.pop("model_type")
    assert {name: ours[name] for name in stock} == stock


def test_groups_give_the_schedule():
    groups = [None, [0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 5, 6], None, None, [0, 1, 0, 1, 2, 2, 0], None]
    merging = config(merge_groups=groups)
    assert merging.merge_schedule == [0, 5, 0, 0, 4, 0]
    assert merging.latents_per_layer == [12, 7, 7, 7, 3, 3]


def test_groups_at_the_start_leave_fewer_for_the_layers():
    """Groups at the start work with r, with groups in layers, and alone; the r of a call starts from all latents."""
    at_start = [0, 1, 2, 3, 4, 1, 5, 6, 7, 8, 0, 1]
    merging = config(latent_groups=at_start, r=2)
    assert (merging.latents_at_start, merging.merge_schedule) == (9, [2, 2, 2, 1, 1, 0])
    assert merging.latents_per_layer == [7, 5, 3, 2, 1, 1]
    assert merging.schedule_of(2) == [2, 2, 2, 2, 2, 1]
    groups = [None, [0, 1, 0, 1, 2, 2, 0, 2, 3], *[None] * 4]
    assert config(latent_groups=at_start, merge_groups=groups).latents_per_layer == [9, 4, 4, 4, 4, 4]
    assert config(latent_groups=at_start).latents_per_layer == [9] * 6
    assert config().latents_at_start == 12


BAD = {
    "r": [-1, "abc", 2.5, 2.0, True, None, [1, 2], [], [1] * 7, *([1] * 5 + [bad] for bad in (True, -2, 1.5, "1"))],
    "r_inflection": [1.01, -2, float("nan"), True, "steep", None],
    "min_latents": [0, -3, 13, True, 1.5, None],
    "proportional_attention": [1, "no"],
    "merge_method": [3, None],
    "merge_metric": ["keys", ["key"], None],
    "hidden_act": ["swosh"],
    "attention_probs_dropout_prob": [-0.1, 1.5],
}


@pytest.mark.parametrize("field, bad", [(field, bad) for field, values in BAD.items() for bad in values], ids=str)
def test_a_bad_value_is_one_line_naming_field_value_and_what_it_must_be(field, bad, tmp_path):
    """In the constructor, a call, a file, and an attribute that is set later."""
    line = rf"^{field}={re.escape(repr(bad))}: (must be|choose from) [^\n]*$"
    with pytest.raises(ValueError, match=line):
        config(**{field: bad})
    merging = config(r=2)
    merging.save_pretrained(tmp_path / "good")
    with pytest.raises(ValueError, match=line):
        ToMePerceiverConfig.from_pretrained(tmp_path / "good", **{field: bad})
    written = json.loads((tmp_path / "good" / "config.json").read_text())
    (tmp_path / "good" / "config.json").write_text(json.dumps({**written, field: bad}))
    with pytest.raises(ValueError, match=line):
        ToMePerceiverConfig.from_pretrained(tmp_path / "good")
    with pytest.raises(ValueError, match=line):
        setattr(merging, field, bad)
        merging.save_pretrained(tmp_path / "later")
    assert not (tmp_path / "later").exists()


TWELVE, NONE = [0, 1] * 6, [None] * 5


@pytest.mark.parametrize(
    "merging, line",
    [
        (dict(r=[1] * 6, r_inflection=0.5), "r_inflection=0.5: must be 0 with a list"),
        (dict(merge_groups=[None] * 6, r=2), "merge_groups: r must be 0, not 2"),
        (dict(merge_groups=[None] * 5), "merge_groups: is a list of length 5; must be a list of 6"),
        (dict(merge_groups=3), "merge_groups: is 3; "),
        (dict(merge_groups="none"), "merge_groups: is a str"),
        (dict(merge_groups=[[0] * 11, *NONE]), "merge_groups[0]: is a list of length 11; must be null or 12 integers"),
        (dict(merge_groups=[None, TWELVE, [0] * 12, *NONE[:3]]), "merge_groups[2]: is a list of length 12"),
        (dict(merge_groups=[[0, True] + [0] * 10, *NONE]), "merge_groups[0]: is a list"),
        (dict(merge_groups=[7, *NONE]), "merge_groups[0]: is 7"),
        (dict(merge_groups=[[0, 2] * 6, *NONE]), "merge_groups[0]: has groups [0, 2]"),
        (dict(merge_groups=[[0, -1] * 6, *NONE]), "merge_groups[0]: has groups [-1, 0]"),
        (dict(merge_groups=[TWELVE, *NONE], min_latents=4), "merge_groups[0]: leaves 2 latents"),
        (dict(latent_groups=[0] * 11), "latent_groups: is a list of length 11"),
        (dict(latent_groups=[0, 2] * 6), "latent_groups: has groups [0, 2]"),
        (dict(latent_groups=TWELVE, min_latents=4), "latent_groups: leaves 2 latents"),
        (dict(latent_groups=TWELVE, merge_groups=[[0] * 12, *NONE]), "merge_groups[0]: is a list of length 12"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_line(merging, line):
    with pytest.raises(ValueError, match=rf"^{re.escape(line)}[^\n]*$"):
        config(**merging)


@pytest.mark.parametrize(
    "later",
    [
        dict(r=[1, 2]),
        dict(latent_groups=[0, 1, 1]),
        dict(merge_groups=[[0] * 11, *NONE]),
        dict(merge_groups=[None] * 5),
        dict(merge_groups=[None] * 6, r=2),
    ],
    ids=str,
)
def test_what_is_set_later_and_does_not_fit_gives_no_schedule(later):
    merging = config()
    for name, value in later.items():
        setattr(merging, name, value)
    with pytest.raises(ValueError, match=rf"^{next(iter(later))}[^\n]*$"):
        _ = merging.merge_schedule


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(ValueError, match=r"^model_type='bert' [^\n]*perceiver[^\n]*$"):
        ToMePerceiverConfig.from_pretrained(tmp_path)


def test_a_stock_folder_is_a_config_that_merges_as_told(tmp_path):
    PerceiverConfig(num_latents=12, num_blocks=2, num_self_attends_per_block=3).save_pretrained(tmp_path)
    assert ToMePerceiverConfig.from_pretrained(tmp_path).merge_schedule == [0] * 6
    assert ToMePerceiverConfig.from_pretrained(tmp_path, r=2, min_latents=9).merge_schedule == [2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "merging",
    [
        dict(r=4, r_inflection=-0.5, min_latents=3, merge_method="leader", proportional_attention=False),
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
    layers = shape["num_blocks"] * shape["num_self_attends_per_block"]
    entries = st.integers(0, 200)
    r = data.draw(entries | st.lists(entries, min_size=layers, max_size=layers))
    merging = ToMePerceiverConfig(**shape, r=r)
    requested = r if isinstance(r, list) else [r] * layers
    schedule = merging.merge_schedule
    assert schedule == plain_schedule(shape["num_latents"], requested, shape["min_latents"])
    assert merging.latents_per_layer == [shape["num_latents"] - sum(schedule[: i + 1]) for i in range(layers)]


@given(
    blocks=st.integers(1, 4),
    per_block=st.integers(1, 9),
    r=st.integers(0, 60),
    inflection=st.floats(-1, 1, allow_nan=False),
)
def test_inflection_moves_merging_about_and_leaves_its_total_alone(blocks, per_block, r, inflection):
    """Without caps, r per layer is monotone from 0 to 2r, and opposite layers sum to 2r, so all layers sum to r L."""
    layers = blocks * per_block
    merging = config(NO_CAP, blocks, per_block, r=r, r_inflection=inflection)
    schedule = merging.merge_schedule
    assert sum(schedule) == r * layers
    assert all(0 <= entry <= 2 * r for entry in schedule)
    assert all(schedule[i] + schedule[-1 - i] == 2 * r for i in range(layers))
    assert schedule == sorted(schedule, reverse=inflection < 0)
    # Linear, except for rounding to whole latents.
    for i, entry in enumerate(schedule):
        middle = 1 - 2 * i / (layers - 1) if layers > 1 else 0
        assert abs(entry - r * (1 - inflection * middle)) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", SHAPE_FIELDS)
def test_a_shape_of_anything_but_positive_integers_is_one_line(name):
    """When a config is built, and when a field is set and saved. Attention channels may be unset."""
    for bad in (0, -1, True, 1.5, "3", 2**20 + 1) if name in ("qk_channels", "v_channels") else (0, True, None, 2**31):
        with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(bad))}: must be an integer from 1 to 1048576$"):
            ToMePerceiverConfig(**{name: bad})
        merging = config()
        with pytest.raises(ValueError, match=rf"^{name}=[^\n]*$"):
            setattr(merging, name, bad)
            merging.check_merging()


@pytest.mark.parametrize(
    "shape",
    [dict(d_latents=1281), dict(qk_channels=12), dict(v_channels=12), dict(num_cross_attention_heads=7)],
    ids=str,
)
def test_channels_that_the_heads_do_not_divide_are_one_line(shape):
    with pytest.raises(ValueError, match=r"^(d_latents|qk_channels|v_channels)=\d+: must be a multiple of [^\n]*$"):
        ToMePerceiverConfig(**shape)


@pytest.mark.parametrize(
    "shape",
    [
        dict(qk_channels=256, v_channels=1280),
        dict(num_latents=2048, d_latents=512, d_model=322, num_self_attention_heads=16, num_cross_attention_heads=1),
    ],
    ids=str,
)
def test_shapes_of_the_published_models_are_fine(shape, tmp_path, caplog):
    """They also load without upstream's warning about another model type."""
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
    line = r"^merge_metod: [^\n]*merge_method[^\n]*$"
    for call in (
        lambda: ToMePerceiverConfig(merge_metod="random"),
        lambda: ToMePerceiverConfig.from_pretrained(tmp_path, merge_metod="random"),
        lambda: ToMePerceiverConfig.from_pretrained(tmp_path, merge_metod="random", return_unused_kwargs=True),
    ):
        with pytest.raises(ValueError, match=line):
            call()
    assert ToMePerceiverConfig(something_of_mine=3).something_of_mine == 3
    # A field of upstream's, with a name much like `min_latents`.
    assert ToMePerceiverConfig.from_pretrained(tmp_path, num_latents=64).num_latents == 64


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
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 0}), r"label2id: output 0 is 'a' and 'b'"),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 2}), r"label2id\['b'\]=2: "),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": -1}), r"label2id\['b'\]=-1: "),
        (
            dict(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0}),
            r"id2label\[0\]='a': [^\n]*has 'b'",
        ),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 0}), r"id2label\[1\]='b': [^\n]* no such label"),
        (dict(id2label={0: "a", 2: "b"}, label2id={"a": 0, "b": 1}), r"id2label: names the outputs \[0, 2\]"),
    ],
    ids=str,
)
def test_labels_that_contradict_each_other_are_one_line(labels, line):
    with pytest.raises(ValueError, match=rf"^{line}[^\n]*$"):
        ToMePerceiverConfig(**labels).check_labels()


def warnings_about(installed):
    """Return the warnings of two checks of this version, in a process that has given none yet."""
    logger, records = logging.getLogger("transformers"), []
    logger.warning_once.__func__.cache_clear()
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        check_transformers(installed)
        check_transformers(installed)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("installed", ["4.57.1", "5.0.0rc1", "5.0.0", f"{NEWEST_TRANSFORMERS}.7"])
def test_a_tested_version_of_transformers_is_not_mentioned(installed):
    assert warnings_about(installed) == []


@pytest.mark.parametrize("installed", ["5.99.0", "5.99.0.dev0", "6.0.0"])
def test_a_newer_version_of_transformers_is_one_warning(installed):
    (message,) = warnings_about(installed)
    assert message.startswith(f"transformers {installed} is installed;") and "\n" not in message
    assert f"tested up to {NEWEST_TRANSFORMERS}" in message


@pytest.mark.parametrize("installed", ["4.50.3", "4.56.2", "3.5.1"])
def test_an_older_version_of_transformers_is_one_line_with_the_version_to_install(installed):
    with pytest.raises(
        ImportError, match=rf"^transformers {installed} is installed; [^\n]*{OLDEST_TRANSFORMERS} or newer$"
    ):
        check_transformers(installed)


def test_pip_installs_no_version_of_transformers_that_is_refused():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [entry for entry in project["dependencies"] if entry.startswith("transformers")]
    assert bound == f"transformers>={OLDEST_TRANSFORMERS},<6"
