# SPDX-License-Identifier: Apache-2.0
"""A config of an untrusted checkpoint is read, or refused in one line, in seconds and without much memory."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from frontier_tome_perceiver import Frontier
from tests.fuzzing.configs import BASE, CONFIGS, FRONTIER, GROUPS, LABELS, VALID, config_bytes, frontier_row, nested
from tests.fuzzing.limits import check, limited


def use(fields: dict[str, Any]) -> ToMePerceiverConfig:
    """Read a config, compute what follows from it, save it, and build its model without memory for the weights."""
    config = ToMePerceiverConfig.from_dict(copy.deepcopy(fields))
    assert len(config.merge_schedule) == len(config.latents_per_layer) == config.num_self_attention_layers
    config.to_json_string()
    if config.merge_frontier is not None:
        assert str(Frontier.of(config))
        config.frontier_row(1.0)
    with torch.device("meta"):
        modeling.ToMePerceiverForSequenceClassification(config)
    return config


@given(CONFIGS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_any_config_is_used_or_refused(fields):
    check(lambda: use(fields), ValueError)


@given(config_bytes())
def test_any_config_file_is_read_or_refused(content):
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(content)
        # transformers raises OSError for a file that is not JSON.
        check(lambda: ToMePerceiverConfig.from_pretrained(folder), ValueError, OSError)


@pytest.mark.parametrize("fields", VALID)
def test_what_is_mutated_is_valid(fields):
    use(fields)


NAN = float("nan")
# Fields that replace those of a valid config, and what the message must contain. Most once gave a traceback, a hang, a
# message of thousands of characters, or a config that failed later.
FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "a frontier of a million rows": ({"merge_frontier": FRONTIER | {"rows": [frontier_row(r=1)] * 10**6}}, "1 to 100"),
    "groups of absent latents": ({"merge_groups": [[99] * 12, *[None] * 5]}, "merge_groups[0]: has groups [99]"),
    "groups for a million layers": ({"merge_groups": [None] * 10**6}, "merge_groups: is a list of length 1000000"),
    "a million groups": ({"latent_groups": list(range(10**6))}, "latent_groups: is a list of length 1000000"),
    "r of a million entries": ({"r": [1] * 10**6}, "r=[1, 1"),
    "r of a billion": ({"r": 10**9}, "r=1000000000: must be an integer from 0 to 1048576"),
    "r that is no float": ({"r": 10**400, "r_inflection": 0.5}, "r=1000"),
    "r as text": ({"r": "8"}, "r='8'"),
    "r that is not a number": ({"r": NAN}, "r=nan"),
    "a long text": ({"merge_method": ["x" * 10**6]}, "merge_method=["),
    "a control sequence": ({"merge_metric": "\x1b[2J\n"}, r"merge_metric='\x1b[2J\n'"),
    "a billion blocks": ({"num_blocks": 10**9}, "num_blocks=1000000000: must be an integer from 1 to 1048576"),
    "a million layers": ({"num_blocks": 10**6}, "num_blocks=1000000: must be smaller"),
    "a billion labels": ({"num_labels": 10**9, "id2label": None, "label2id": None}, "num_labels=1000000000"),
    "labels that are numbers": ({"id2label": {"0": 5}}, "id2label['0']=5"),
    "labels of no output": ({"id2label": {"first": "a"}}, "id2label['first']='a'"),
    "a size of no image": ({"image_size": -5}, "image_size=-5"),
    "a dtype that is a function": ({"dtype": "save"}, "dtype='save'"),
    "a list of dtypes": ({"dtype": []}, "dtype=[]"),
    "code of a kernel repository": ({"attn_implementation": "someone/kernel"}, "attn_implementation='someone/kernel'"),
    "the same under its inner name": ({"_attn_implementation": "someone/kernel"}, "_attn_implementation='someone"),
    "layers of their own": ({"per_layer_config": {"0": {}}}, "num_hidden_layers"),
    "a quantization that is a list": ({"quantization_config": [1]}, "quantization_config=[1]"),
    "a method": ({"check_merging": 1}, "check_merging: is not a field of the config"),
    "a property": ({"merge_schedule": [0] * 6}, "merge_schedule: is not a field of the config"),
    "all attributes": ({"__dict__": {}}, "__dict__: is not a field of the config"),
    "names of attributes": ({"attribute_map": {"r": "num_latents"}}, "attribute_map: is not a field of the config"),
    "a frontier of too many blocks": ({"merge_frontier": FRONTIER | {"num_blocks": 10**6}}, "num_blocks=1000000"),
    "a frontier without blocks": ({"merge_frontier": FRONTIER | {"num_blocks": False}}, "num_blocks=False"),
    "weights that are text": ({"merge_frontier": FRONTIER | {"weights": ["a"]}}, "weights=['a']"),
    "a shape of texts": ({"merge_frontier": FRONTIER | {"input_shape": ["1"]}}, "input_shape=['1']"),
    "figures that are not numbers": (
        {"merge_frontier": FRONTIER | {"rows": [frontier_row(r=1) | {"flops_ratio": NAN}]}}, "row 0: must have a number"
    ),
    "changes that are text": (
        {"merge_frontier": FRONTIER | {"rows": [frontier_row(r=1) | {"who": {"groups": 1}}]}}, "row 0: must have who"
    ),
    "a row with a bad r": ({"merge_frontier": FRONTIER | {"rows": [frontier_row(r=[1])]}}, "row 0: r=[1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_malformed_config_ends_in_one_line(name):
    fields, expected = FOUND[name]
    config = BASE | {"r": 0} | fields
    started = time.monotonic()
    with pytest.raises(ValueError) as refused, limited():
        ToMePerceiverConfig.from_dict(config)
    message = str(refused.value)
    assert expected in message and "\n" not in message and len(message) < 1000
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("content", [nested(100_000), '{"r": ' + "9" * 10**6 + "}"], ids=["nested", "long number"])
def test_a_config_file_that_python_cannot_read_ends_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$"), limited():
        ToMePerceiverConfig.from_pretrained(tmp_path)


def test_a_refused_config_is_one_line_for_every_auto_class(tmp_path):
    """As when a downloaded checkpoint is loaded by its own code, which `AutoConfig` does."""
    from transformers import AutoConfig

    from configuration_tome_perceiver import ToMePerceiverConfig

    ToMePerceiverConfig(**LABELS, num_latents=12).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_groups": [*GROUPS[:-1], 99]}))
    with pytest.raises(ValueError, match=r"^latent_groups: has groups \[[^\n]*$"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
