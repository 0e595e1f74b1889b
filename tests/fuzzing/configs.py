# SPDX-License-Identifier: Apache-2.0
"""Config files to try: random JSON, and valid configs with some of their values replaced."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from tests.support.tiny_models import SIZES

LAYERS, LATENTS = 6, 12
GROUPS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]


def frontier_row(**merging: Any) -> dict[str, Any]:
    """Return a row of a frontier."""
    who = {"samples": 40, "groups": {"class a": [0.1, 20]}, "worst_tenth": 0.3}
    return {
        "merging": merging, "flops_ratio": 0.5, "divergence": 0.01, "changed": 0.1, "changed_bound": 0.2, "who": who,
    }  # fmt: skip


FRONTIER = {
    "rows": [frontier_row(r=[1] * LAYERS), frontier_row(merge_groups=[GROUPS, *[None] * (LAYERS - 1)])],
    "num_blocks": 2, "input_shape": [1, 9], "searched": 12, "held_out": 40, "weights": [0.5, -0.25],
}  # fmt: skip
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
BASE = {name: value for name, value in SIZES.items() if name != "num_labels"} | {
    "architectures": ["ToMePerceiverForSequenceClassification"],
    "model_type": "tome_perceiver",
    "dtype": "float32",
    **LABELS,
}
VALID: tuple[dict[str, Any], ...] = (
    BASE | {"r": 2, "r_inflection": 0.5},
    BASE | {"r": [3, 0, 2, 1, 0, 1], "merge_method": "leader", "merge_frontier": FRONTIER},
    BASE | {"r": 0, "merge_groups": [None, GROUPS, *[None] * (LAYERS - 2)]},
    BASE | {"r": 1, "latent_groups": GROUPS, "merge_metric": "hidden"},
)
# Values that parsers and checks get wrong: other types, limits of floats and integers, text that looks like code.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "3", "nan", "r", "\x1b[31mred\n\r", "../../etc/passwd", "${HOME}", "{{ 7 * 7 }}", "$x^$",
    "x" * 3000, "\ud800", [], {}, [[]], [0], [None], ["1"], [0] * 1000, list(range(1000)), {"a": 1}, {"": {}},
    [float("nan")], [1.0], [True], [[0, 1]] * 6, [10**30] * 6, {"0": 0}, {"rows": []}, {"rows": [{}] * 200},
)  # fmt: skip
JSON = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=20) | st.booleans(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=12,
)
NAMES = st.sampled_from(
    (*BASE, "r", "r_inflection", "min_latents", "proportional_attention", "merge_method", "merge_metric",
     "merge_groups", "latent_groups", "merge_frontier", "num_labels", "problem_type", "auto_map", "torch_dtype",
     "return_dict", "tie_word_embeddings", "is_decoder", "pad_token_id", "per_layer_config", "quantization_config",
     "merge_schedule", "latents_per_layer", "check_merging", "to_dict", "__class__", "__dict__", "name_or_path",
     "attn_implementation", "merge_grops", "chunk_size_feed_forward", "output_attentions", "transformers_version")
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a valid config, and replace, add or remove one to three values anywhere in it."""
    config = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = config
        key: Any = draw(NAMES | st.text(max_size=10))
        while key in place if isinstance(place, dict) else True:
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.booleans()):
                break
            place = inner
            key = draw(st.sampled_from(sorted(place))) if isinstance(place, dict) else draw(_index(place))
        if draw(st.integers(0, 9)) == 0 and (isinstance(place, list) or key in place):
            del place[key]
        else:
            place[key] = copy.deepcopy(draw(JSON))
    return config


def _index(entries: list[Any]) -> st.SearchStrategy[int]:
    return st.integers(0, len(entries) - 1)


CONFIGS = mutated() | st.dictionaries(NAMES | st.text(max_size=10), JSON, max_size=6)


def nested(depth: int, field: str = "merge_groups") -> str:
    """Return a config file with a list in a list, many times."""
    return f'{{"model_type": "tome_perceiver", "{field}": {"[" * depth}{"]" * depth}}}'


@st.composite
def config_bytes(draw: st.DrawFn) -> bytes:
    """Draw a config file: a mutated config, or one whose bytes were changed, cut or repeated."""
    text = json.dumps(draw(CONFIGS)).encode()
    if draw(st.booleans()):
        return text
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 20)))
    middle = draw(st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b"9" * 5000, b"\x00", b"", b"NaN", b"1e999"]))
    return text[:start] + middle + text[end:]
