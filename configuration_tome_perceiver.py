# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Perceiver IO that merges its latents as it runs.

Letters: L self-attention layers (``num_blocks * num_self_attends_per_block``), N latents (``num_latents``).
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import accumulate, product
from operator import sub
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PerceiverConfig
from transformers.activations import ACT2FN

# A stock checkpoint loads as it is; any other model type is another architecture.
LOADABLE_MODEL_TYPES = ("perceiver", "tome_perceiver")

MERGE_METRICS = ("key", "value", "hidden")

# The fields that say how much merges, with the values at which nothing does.
UNMERGED: dict[str, Any] = {"r": 0, "r_inflection": 0.0, "merge_groups": None, "latent_groups": None}
# Fields that a row of a frontier may set; then all fields that decide what merges.
FRONTIER_SETTINGS = ("r", "merge_groups", "latent_groups", "merge_method", "merge_metric", "num_blocks")
MERGING_FIELDS = (*FRONTIER_SETTINGS, "r_inflection", "min_latents", "proportional_attention")

# What a frontier must hold, since a config is read from the internet: at most this many rows, and these fields.
MOST_ROWS = 100
FRONTIER_CONTENTS = {"num_blocks": int, "input_shape": list, "searched": int, "held_out": int, "weights": list}
FRONTIER_WHO = {"samples", "groups", "worst_tenth"}
FRONTIER_FIGURES = ("flops_ratio", "divergence", "changed", "changed_bound")

# Upstream's fields that give a Perceiver its shape; the last two may be unset.
SHAPE_FIELDS = (
    "num_latents",
    "d_latents",
    "d_model",
    "num_blocks",
    "num_self_attends_per_block",
    "num_self_attention_heads",
    "num_cross_attention_heads",
    "self_attention_widening_factor",
    "cross_attention_widening_factor",
    "vocab_size",
    "max_position_embeddings",
    "qk_channels",
    "v_channels",
)
POSITIVE = "an integer of 1 or more"


class ToMePerceiverConfig(PerceiverConfig):
    r"""Upstream's `PerceiverConfig` with the merging settings of Bolya et al. (2023), "Token Merging".

    Modifications: nine fields, their validation and that of the shape, and what they mean for each layer. Every field
    of [`~transformers.PerceiverConfig`] keeps its name and its default.

    Args:
        r (`int` or `list[int]`, *optional*, defaults to 0):
            Latents merged away in each self-attention layer. A list has one entry for each of the L layers. What a
            layer cannot do is capped: at most half of its latents, and never below `min_latents`.
        r_inflection (`float`, *optional*, defaults to 0.0):
            Shape of the schedule in [-1, 1] for an integer `r`: -1 falls linearly from 2r to 0, 0 is constant, +1
            rises from 0 to 2r. The sum over the layers is `r * L` before the caps.
        min_latents (`int`, *optional*, defaults to 1):
            Merging never leaves fewer latents than this; from 1 to `num_latents`.
        proportional_attention (`bool`, *optional*, defaults to `True`):
            Add the log of a merged latent's size to its attention scores wherever latents are keys: in
            self-attention and in the decoder's cross-attention.
        merge_method (`str`, *optional*, defaults to `"bipartite"`):
            How latents are matched: a name in `MERGE_METHODS` of `merging_tome_perceiver.py`. A model checks it when
            it is built.
        merge_metric (`str`, *optional*, defaults to `"key"`):
            What the matching compares: `"key"` or `"value"`, a latent's key or value in self-attention as the mean
            over heads, or `"hidden"`, the latent after attention, which is what merges.
        merge_groups (`list[list[int] | None]`, *optional*):
            Fixed groups instead of matching, one entry for each layer: `None` where nothing merges, otherwise the
            group (0, 1, ..., M - 1) that each latent left there joins. Not together with `r`.
        latent_groups (`list[int]`, *optional*):
            The group (0, 1, ..., M - 1) that each of the N learned latents joins before they read the inputs, so that
            M latents reach the first layer. The parameters stay N. Together with `r` or `merge_groups`, which merge
            what is left.
        merge_frontier (`dict`, *optional*):
            The frontier that `model.calibrate` measured: `rows` from mild to strong, each with its `merging` settings
            and figures, and what they were measured on. `model.merge_to` chooses among them.

    Raises:
        ValueError: for a value out of its range, in one line naming the field, the value and what it must be.
    """

    model_type = "tome_perceiver"

    r: int | list[int] = 0
    r_inflection: float = 0.0
    min_latents: int = 1
    proportional_attention: bool = True
    merge_method: str = "bipartite"
    merge_metric: str = "key"
    merge_groups: list[list[int] | None] | None = None
    latent_groups: list[int] | None = None
    merge_frontier: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misspelt(kwargs)
        super().__post_init__(**kwargs)
        self.check_merging()

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except StrictDataclassFieldValidationError:
            # Upstream's own check takes two lines and is no ValueError.
            kind = type(self).__dataclass_fields__[name].type
            must = POSITIVE if name in SHAPE_FIELDS else f"of type {getattr(kind, '__name__', kind)}"
            raise _refusal(name, value, must) from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Upstream's, with this class's `model_type` in place of a stock Perceiver's, which upstream would warn of."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _check_as_written(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Upstream's, with a check of the checkpoint's architecture and of the fields that `kwargs` change.

        Raises:
            ValueError: for another architecture, a field out of its range, or a misspelt merging field in `kwargs`.
        """
        _refuse_misspelt(kwargs)
        loaded = super().from_dict(_check_as_written(config_dict), **kwargs)
        # Upstream sets the fields in `kwargs` after construction; with `return_unused_kwargs` it returns a pair.
        (loaded[0] if isinstance(loaded, tuple) else loaded).check_merging()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Upstream's, after a check of fields that were set one by one; nothing is written if one is out of range."""
        self.check_merging()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_self_attention_layers(self) -> int:
        """L: layers in the order in which they run, weight-shared blocks counted each time."""
        return self.num_blocks * self.num_self_attends_per_block

    @property
    def latents_at_start(self) -> int:
        """Number of latents that read the inputs: N, or the number of `latent_groups`."""
        return self.num_latents if self.latent_groups is None else max(self.latent_groups) + 1

    @property
    def merge_schedule(self) -> list[int]:
        """Latents removed in each of the L layers, after the caps.

        Raises:
            ValueError: for a merging field that was set to a value out of its range.
        """
        # Groups of another length would merge other latents.
        self.check_settings()
        left = self.latents_at_start
        if self.merge_groups is None:
            return self.schedule_of(self.r, self.r_inflection, left)
        removed = []
        for groups in self.merge_groups:
            removed.append(0 if groups is None else left - max(groups) - 1)
            left -= removed[-1]
        return removed

    def schedule_of(self, r: int | list[int], inflection: float = 0.0, latents: int | None = None) -> list[int]:
        """Return the `merge_schedule` of an `r` in place of this config's merging, by default from all N latents.

        Raises:
            ValueError: in one line naming the value and what it must be.
        """
        _check_r(r, inflection, self.num_self_attention_layers)
        left, removed = self.num_latents if latents is None else latents, []
        for requested in _spread_r(r, inflection, self.num_self_attention_layers):
            removed.append(max(0, min(requested, left // 2, left - self.min_latents)))
            left -= removed[-1]
        return removed

    @property
    def latents_per_layer(self) -> list[int]:
        """Latents left after each of the L layers; the last entry is M, what the decoder reads."""
        return list(accumulate(self.merge_schedule, sub, initial=self.latents_at_start))[1:]

    def merged_as(self, row: dict[str, Any]) -> ToMePerceiverConfig:
        """Return a copy of this config that merges as a row of its frontier does, and has no frontier."""
        merged = copy.copy(self)
        for name, value in (UNMERGED | {"merge_frontier": None} | row["merging"]).items():
            setattr(merged, name, value)
        return merged

    def frontier_row(self, flops_ratio: float) -> dict[str, Any]:
        """Return the row of the frontier that changes the outputs least within a share of the FLOPs.

        Raises:
            ValueError: for a share that is no number above 0 up to 1 or below the frontier's least, or no frontier.
        """
        check_share("flops_ratio", flops_ratio)
        if self.merge_frontier is None:
            raise ValueError(
                f"flops_ratio={flops_ratio}: the model has no frontier; call model.calibrate(samples) first"
            )
        rows = self.merge_frontier["rows"]
        within = [row for row in rows if row["flops_ratio"] <= flops_ratio]
        if not within:
            least = min(row["flops_ratio"] for row in rows)
            raise ValueError(f"flops_ratio={flops_ratio} is out of reach: the frontier reaches {least:.3f} at best")
        return min(within, key=lambda row: (row["divergence"] or 0.0, -row["flops_ratio"]))

    def check_merging(self) -> None:
        """Check the shape, the merging fields and the frontier.

        Raises:
            ValueError: in one line naming the field, the value and what it must be.
        """
        _check_shape(self)
        self.check_settings()
        if self.merge_frontier is not None:
            _check_frontier(self)

    def check_settings(self) -> None:
        """Check the merging fields, against each other and against the layers; raises as `check_merging` does."""
        if not _is_integer(self.min_latents, 1, self.num_latents):
            raise _refusal("min_latents", self.min_latents, f"an integer from 1 to num_latents={self.num_latents}")
        if not isinstance(self.proportional_attention, bool):
            raise _refusal("proportional_attention", self.proportional_attention, "true or false")
        if not isinstance(self.merge_method, str):
            raise _refusal("merge_method", self.merge_method, "the name of a merging method")
        if self.merge_metric not in MERGE_METRICS:
            raise ValueError(f"merge_metric={self.merge_metric!r}: choose from {', '.join(MERGE_METRICS)}")
        layers, left = self.num_self_attention_layers, self.num_latents
        _check_r(self.r, self.r_inflection, layers)
        if self.latent_groups is not None:
            left = _check_groups("latent_groups", self.latent_groups, left, self.min_latents)
        if self.merge_groups is None:
            return
        if self.r != 0:
            raise ValueError(f"merge_groups: r must be 0, not {self.r!r}; to merge by r, set merge_groups to None")
        if not isinstance(self.merge_groups, (list, tuple)) or len(self.merge_groups) != layers:
            raise ValueError(
                f"merge_groups: {_summary(self.merge_groups)}; must be a list of {layers} entries, one a layer"
            )
        for layer, groups in enumerate(self.merge_groups):
            if groups is not None:
                left = _check_groups(f"merge_groups[{layer}]", groups, left, self.min_latents)

    def check_labels(self) -> None:
        """Check that `label2id` and `id2label` say the same of a classifier's outputs.

        One of them may be left at upstream's LABEL_0, LABEL_1, ..., and two outputs may have the same name (as two of
        ImageNet's do).

        Raises:
            ValueError: in one line naming the field, the label and what it must be.
        """
        names, last = self.id2label or {}, self.num_labels - 1
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label: names the outputs {sorted(names)}; must name 0 to {last}")
        named: dict[int, str] = {}
        for name, index in (self.label2id or {}).items():
            number = int(index) if isinstance(index, str) and index.isdecimal() else index
            if not _is_integer(number, 0, last):
                raise _refusal(f"label2id[{name!r}]", index, f"an output of the model, 0 to {last}")
            if number in named:
                raise ValueError(f"label2id: output {number} is {named[number]!r} and {name!r}; must have one name")
            named[number] = name
        if any(all(name == f"LABEL_{index}" for index, name in labels.items()) for labels in (names, named)):
            return
        for index, name in names.items():
            other = named.get(index)
            if other != name and (other is not None or name not in named.values()):
                has = "no such label" if other is None else repr(other)
                raise _refusal(f"id2label[{index}]", name, f"as in label2id, which has {has}")


def _spread_r(r: int | list[int], inflection: float, layers: int) -> list[int]:
    """Return `r` as one entry for each layer, before the caps."""
    if isinstance(r, (list, tuple)):
        return list(r)
    # ToMe's linear ramp from r (1 - inflection) to r (1 + inflection), rounded so that opposite layers still sum to 2r:
    # the inflection moves merging about and leaves its total alone.
    ramp = [r] * layers
    for i in range(layers // 2):
        distance_from_middle = 1 - 2 * i / (layers - 1)
        ramp[i] = int(r * (1 - inflection * distance_from_middle) + 0.5)
        ramp[-1 - i] = 2 * r - ramp[i]
    return ramp


def _check_shape(config: ToMePerceiverConfig) -> None:
    for name in SHAPE_FIELDS:
        value = getattr(config, name)
        if not _is_integer(value, 1) and (value is not None or name not in ("qk_channels", "v_channels")):
            raise _refusal(name, value, POSITIVE)
    if not _is_number(config.attention_probs_dropout_prob, 0, 1):
        raise _refusal("attention_probs_dropout_prob", config.attention_probs_dropout_prob, "a number from 0 to 1")
    if isinstance(config.hidden_act, str) and config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r}: choose from {', '.join(sorted(ACT2FN))}")
    for heads, channels in product(
        ("num_self_attention_heads", "num_cross_attention_heads"), ("d_latents", "qk_channels", "v_channels")
    ):
        if (getattr(config, channels) or 0) % getattr(config, heads):
            raise _refusal(channels, getattr(config, channels), f"a multiple of {heads}={getattr(config, heads)}")


def _check_r(r: Any, inflection: Any, layers: int) -> None:
    is_list = isinstance(r, (list, tuple))
    if not all(_is_integer(entry, 0) for entry in (r if is_list else [r])) or (is_list and len(r) != layers):
        raise _refusal("r", r, f"an integer of 0 or more, or a list of {layers} of them, one a layer")
    if not _is_number(inflection, -1, 1):
        raise _refusal("r_inflection", inflection, "a number from -1 to 1")
    if inflection and is_list:
        raise _refusal("r_inflection", inflection, "0 with a list as r, which says what each layer does")


def _check_groups(name: str, groups: Any, reaching: int, min_latents: int) -> int:
    """Check that each of the latents that reach a place has a group, and return the number of groups."""
    if not isinstance(groups, (list, tuple)) or len(groups) != reaching or not all(map(_is_integer, groups)):
        raise ValueError(f"{name}: {_summary(groups)}; must be null or {reaching} integers, one for each latent")
    numbers = sorted(set(groups))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{name}: has groups {numbers}; must be numbered 0, 1, ... with none left out")
    if len(numbers) < min_latents:
        raise ValueError(f"{name}: leaves {len(numbers)} latents; must be min_latents={min_latents} or more")
    return len(numbers)


def _check_frontier(config: ToMePerceiverConfig) -> None:
    frontier = config.merge_frontier if isinstance(config.merge_frontier, dict) else {}
    rows = frontier.get("rows")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_ROWS:
        raise ValueError(f"merge_frontier: must be a dict with 1 to {MOST_ROWS} rows, as model.calibrate leaves it")
    for number, row in enumerate(rows):
        try:
            _check_row(config, row if isinstance(row, dict) else {})
        except ValueError as error:
            raise ValueError(f"merge_frontier: row {number}: {error}") from error
    for name, kind in FRONTIER_CONTENTS.items():
        if not isinstance(frontier.get(name), kind):
            raise ValueError(f"merge_frontier: {name} must be of type {kind.__name__}, as model.calibrate leaves it")


def _check_row(config: ToMePerceiverConfig, row: dict[str, Any]) -> None:
    merging, who = row.get("merging"), row.get("who", {})
    if not isinstance(merging, dict) or not set(merging) <= set(FRONTIER_SETTINGS):
        raise ValueError("must have merging settings of this config")
    figures = [row.get(name) for name in FRONTIER_FIGURES]
    if figures[0] is None or not all(figure is None or _is_number(figure, 0) for figure in figures):
        raise ValueError(f"must have a number for {', '.join(FRONTIER_FIGURES)}")
    if not isinstance(who, dict) or (row.get("changed") is not None and set(who) != FRONTIER_WHO):
        raise ValueError(f"must have who, with {', '.join(sorted(FRONTIER_WHO))}")
    config.merged_as(row).check_merging()


def _check_as_written(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a written config as one of this class, after a check of what upstream would mend or trip over."""
    model_type = config_dict.get("model_type", "tome_perceiver")
    if model_type not in LOADABLE_MODEL_TYPES:
        raise ValueError(
            f"model_type={model_type!r}: is another architecture; choose from {', '.join(LOADABLE_MODEL_TYPES)}"
        )
    for name, kind in (("id2label", dict), ("label2id", dict), ("architectures", list)):
        value = config_dict.get(name)
        if value is not None and not isinstance(value, kind):
            raise _refusal(name, value, f"a {kind.__name__}")
    if not all(isinstance(name, str) for name in config_dict.get("architectures") or []):
        raise _refusal("architectures", config_dict["architectures"], "a list of class names")
    indices = list(map(str, (config_dict.get("label2id") or {}).values()))
    if len(set(indices)) < len(indices):
        raise _refusal("label2id", config_dict["label2id"], "one name for each output")
    return {**config_dict, "model_type": "tome_perceiver"}


def check_share(name: str, value: object) -> None:
    """Check that an argument is a number above 0, up to 1.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not _is_number(value, 0, 1) or value == 0:
        raise _refusal(name, value, "a number above 0, up to 1")


def _refusal(name: str, value: object, must: str) -> ValueError:
    return ValueError(f"{name}={value!r}: must be {must}")


def _is_integer(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object, least: float, most: float = sys.float_info.max) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Refuse what is nearly a merging field: any name may be a field of a config, so it would have no effect."""
    known = (*MERGING_FIELDS, "merge_frontier")
    for name in names:
        near = get_close_matches(name, known, n=1, cutoff=0.8)
        if near and name not in known:
            raise ValueError(f"{name}: is no field of the config; did you mean {near[0]}?")


def _summary(value: object) -> str:
    return f"is a {type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else f"is {value!r}"


ToMePerceiverConfig.register_for_auto_class()
