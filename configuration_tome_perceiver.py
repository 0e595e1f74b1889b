# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Perceiver IO that merges its latents while it runs.

Holds the merging settings, checks them, and computes the merge schedule from them. Every other model file imports it;
it needs only transformers.

Letters: L self-attention layers (``num_blocks * num_self_attends_per_block``), N latents (``num_latents``).
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import accumulate, product
from operator import sub
from reprlib import Repr
from typing import Any

import transformers
from huggingface_hub import errors as hub_errors
from packaging.version import Version
from transformers import PerceiverConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

# The range of transformers on which the tests passed; docs/versions.md has the table. This is the one place for it: a
# test compares the range in pyproject.toml.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = "4.57", "5.24"

# A stock Perceiver checkpoint loads unchanged; any other model type is another architecture and is refused.
LOADABLE_MODEL_TYPES = ("perceiver", "tome_perceiver")

MERGE_METRICS = ("key", "value", "hidden")

# The fields that set how much merges, with the values of an unmerged model.
UNMERGED: dict[str, Any] = {"r": 0, "r_inflection": 0.0, "merge_groups": None, "latent_groups": None}
# The fields that a row of a frontier may set.
FRONTIER_SETTINGS = ("r", "merge_groups", "latent_groups", "merge_method", "merge_metric", "num_blocks")
# All fields that decide what merges.
MERGING_FIELDS = (*FRONTIER_SETTINGS, "r_inflection", "min_latents", "proportional_attention")

# A config may come from an untrusted checkpoint. These limits keep its checks within seconds and memory: each size and
# each number of latents (the published models have at most 2048), the self-attention layers (48), the rows of a
# frontier, and the weights of its fingerprint.
MAX_SIZE = 2**20
MAX_LAYERS = 1000
MAX_FRONTIER_ROWS = 100
MAX_FINGERPRINT_WEIGHTS = 64
# Numbers of a frontier's row, and the keys of its `who`.
FRONTIER_ROW_FIGURES = ("flops_ratio", "divergence", "changed", "changed_bound")
WHO_KEYS = {"samples", "groups", "worst_tenth"}

# Upstream's fields that set the model's shapes. The last two may be None.
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
# Upstream's fields that set the sizes of inputs and outputs; the last three are lists, and the first of these may be.
INPUT_SIZE_FIELDS = (
    "num_frames",
    "audio_samples_per_frame",
    "samples_per_patch",
    "output_num_channels",
    "_label_trainable_num_channels",
    "image_size",
    "train_size",
    "output_shape",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
POSITIVE_INTEGER = f"an integer from 1 to {MAX_SIZE}"
# Types of upstream's fields that its own checks leave out.
UPSTREAM_FIELD_TYPES = {
    "id2label": dict,
    "label2id": dict,
    "architectures": list,
    "auto_map": dict,
    "quantization_config": dict,
}
# Messages show at most this much of a value, which an untrusted config may make as long as it likes.
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 12, 12, 4
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 80, 80, 40


def check_transformers(installed: str = transformers.__version__) -> None:
    """Refuse a version of transformers that is too old, and warn once about one that is newer than those tested.

    Args:
        installed: version to check.

    Raises:
        ImportError: if it is older than `OLDEST_TRANSFORMERS`.
    """
    version = Version(installed)
    if version < Version(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers {installed} is installed; ToMe Perceiver needs {OLDEST_TRANSFORMERS} or newer")
    if version.release[:2] > Version(NEWEST_TRANSFORMERS).release:
        logging.get_logger().warning_once(
            f"transformers {installed} is installed; ToMe Perceiver was tested up to {NEWEST_TRANSFORMERS}, so check "
            "its outputs"
        )


# First, so that an old version gives this error and not one from the depths of an import.
check_transformers()


class ToMePerceiverConfig(PerceiverConfig):
    r"""`PerceiverConfig` with settings for merging latents, after Bolya et al. (2023), "Token Merging".

    Modifications: nine fields, checks of these and of the model's shapes, and the merge schedule that follows from
    them. Every field of [`~transformers.PerceiverConfig`] keeps its name and its default.

    Args:
        r (`int` or `list[int]`, *optional*, defaults to 0):
            Latents merged away in each self-attention layer: one number for all L layers, or a list of L numbers. Each
            layer merges away at most half of its latents and leaves at least `min_latents`; a larger `r` is capped.
        r_inflection (`float`, *optional*, defaults to 0.0):
            Slope of the schedule for an integer `r`, from -1 to 1: at -1 the latents merged per layer fall linearly
            from 2r to 0, at 0 they are constant, at +1 they rise from 0 to 2r. Before the caps they sum to `r * L`.
        min_latents (`int`, *optional*, defaults to 1):
            Smallest number of latents that merging may leave, from 1 to `num_latents`.
        proportional_attention (`bool`, *optional*, defaults to `True`):
            Weight latents by their size in attention: add the log of each latent's size to the attention scores
            wherever latents are keys, in self-attention and in the decoder's cross-attention.
        merge_method (`str`, *optional*, defaults to `"bipartite"`):
            Matching method: a name in `MERGE_METHODS` of `merging_tome_perceiver.py`. It is checked when the model is
            built, not here, because methods can be registered at any time.
        merge_metric (`str`, *optional*, defaults to `"key"`):
            Vectors that matching compares: `"key"` or `"value"`, each latent's key or value in self-attention,
            averaged over heads, or `"hidden"`, the latents after attention, which are the vectors that are merged.
        merge_groups (`list[list[int] | None]`, *optional*):
            Fixed groups instead of matching, one entry for each layer: `None` if the layer merges nothing, otherwise
            the group (0, 1, ..., M - 1) of each latent that reaches the layer. Requires `r` = 0.
        latent_groups (`list[int]`, *optional*):
            The group (0, 1, ..., M - 1) of each of the N learned latents. Each group merges before the encoder's
            cross-attention reads the inputs, so M latents reach the first layer; the model keeps all N as parameters.
            `r` or `merge_groups` can merge the M latents further.
        merge_frontier (`dict`, *optional*):
            The cost-quality frontier that `model.calibrate` measured: `rows` from the mildest to the strongest
            merging, each with its `merging` settings, its cost and its change of the outputs, and a record of the
            samples used. `model.merge_to` chooses one of the rows.

    Raises:
        ValueError: if a value is out of range; the message is one line: the field, the value and what it must be.
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
        _check_field_names(type(self), kwargs)
        super().__post_init__(**kwargs)
        self.check_merging()

    # Before transformers 5.4, configs are not dataclasses, which would call `__post_init__`.
    if not is_dataclass(PerceiverConfig):

        def __init__(self, **kwargs: Any) -> None:
            _check_field_names(type(self), kwargs)
            # Upstream sets the arguments that it does not know as fields.
            defaults = {name: getattr(ToMePerceiverConfig, name) for name in ToMePerceiverConfig.__annotations__}
            super().__init__(**defaults | kwargs)
            self.check_merging()

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except hub_errors.StrictDataclassFieldValidationError:
            # Upstream's error is not a ValueError and takes two lines.
            expected = type(self).__dataclass_fields__[name].type
            type_name = getattr(expected, "__name__", expected)
            requirement = POSITIVE_INTEGER if name in SHAPE_FIELDS else f"of type {type_name}"
            raise _value_error(name, value, requirement) from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config as upstream does, and set `model_type` to this class's.

        Upstream would otherwise warn about a stock Perceiver's model type.
        """
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except RecursionError:
            raise ValueError("config.json: is nested too deeply; must be a config of a Perceiver") from None
        return _check_config_dict(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Build a config as upstream does, after checking the architecture and the fields that `kwargs` change.

        Raises:
            ValueError: for another architecture, a field out of range, or a misspelt merging field in `kwargs`.
        """
        _check_field_names(cls, kwargs)
        try:
            loaded = super().from_dict(_check_config_dict(config_dict), **kwargs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, hub_errors.StrictDataclassError) as error:
            # Upstream's code for fields of its own that the checks here do not know.
            raise ValueError(f"config: transformers cannot read it ({_shorten(error)})") from error
        # Upstream sets the fields in `kwargs` after construction; with `return_unused_kwargs` it returns a pair.
        (loaded[0] if isinstance(loaded, tuple) else loaded).check_merging()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as upstream does, after checking all fields; write nothing if one is out of range."""
        self.check_merging()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_self_attention_layers(self) -> int:
        """L, the number of self-attention layers that run; a layer that blocks share counts once for each block."""
        return self.num_blocks * self.num_self_attends_per_block

    @property
    def latents_at_start(self) -> int:
        """Number of latents that read the inputs: N, or the number of groups in `latent_groups`."""
        return self.num_latents if self.latent_groups is None else max(self.latent_groups) + 1

    @property
    def merge_schedule(self) -> list[int]:
        """Number of latents merged away in each of the L layers, after the caps.

        Raises:
            ValueError: if a merging field is out of range.
        """
        # Check again: fields can be set at any time, and groups of the wrong length would merge the wrong latents.
        self.check_merging_fields()
        left = self.latents_at_start
        if self.merge_groups is None:
            return self.schedule_of(self.r, self.r_inflection, left)
        removed = []
        for groups in self.merge_groups:
            removed.append(0 if groups is None else left - max(groups) - 1)
            left -= removed[-1]
        return removed

    def schedule_of(self, r: int | list[int], inflection: float = 0.0, latents: int | None = None) -> list[int]:
        """Return the `merge_schedule` for a given `r`, in place of this config's merging settings.

        Args:
            r, inflection: as `r` and `r_inflection` of the config.
            latents: number of latents that reach the first layer; `None` for all N.

        Raises:
            ValueError: if `r` or `inflection` is out of range.
        """
        _check_r(r, inflection, self.num_self_attention_layers)
        left, removed = self.num_latents if latents is None else latents, []
        for requested in _spread_r(r, inflection, self.num_self_attention_layers):
            removed.append(max(0, min(requested, left // 2, left - self.min_latents)))
            left -= removed[-1]
        return removed

    @property
    def latents_per_layer(self) -> list[int]:
        """Number of latents left after each of the L layers; the last entry is M, the number that the decoder reads."""
        return list(accumulate(self.merge_schedule, sub, initial=self.latents_at_start))[1:]

    def merged_as(self, row: dict[str, Any]) -> ToMePerceiverConfig:
        """Return a copy of this config with the merging settings of a row of its frontier, and without a frontier."""
        merged = copy.copy(self)
        for name, value in (UNMERGED | {"merge_frontier": None} | row["merging"]).items():
            setattr(merged, name, value)
        return merged

    def frontier_row(self, flops_ratio: float) -> dict[str, Any]:
        """Return the row of the frontier that changes the outputs least within a FLOPs budget.

        Args:
            flops_ratio: budget, as a share of the unmerged model's FLOPs.

        Raises:
            ValueError: if the share is not above 0 and at most 1, if no row is within it, or if there is no frontier.
        """
        check_share("flops_ratio", flops_ratio)
        if self.merge_frontier is None:
            raise ValueError(
                f"flops_ratio={flops_ratio}: the model has no frontier; call model.calibrate(samples) first"
            )
        rows = self.merge_frontier["rows"]
        affordable = [row for row in rows if row["flops_ratio"] <= flops_ratio]
        if not affordable:
            least = min(row["flops_ratio"] for row in rows)
            raise ValueError(f"flops_ratio={flops_ratio} is out of reach: the frontier reaches {least:.3f} at best")
        return min(affordable, key=lambda row: (row["divergence"] or 0.0, -row["flops_ratio"]))

    def check_merging(self) -> None:
        """Check the model's shapes, the merging fields and the frontier.

        Raises:
            ValueError: if a value is out of range; the message is one line: the field, the value and what it must be.
        """
        _check_shape(self)
        self.check_merging_fields()
        if self.merge_frontier is not None:
            _check_frontier(self)

    def check_merging_fields(self) -> None:
        """Check the merging fields against each other and against the number of layers and latents.

        Raises:
            ValueError: as `check_merging`.
        """
        if not _is_integer(self.min_latents, 1, self.num_latents):
            raise _value_error("min_latents", self.min_latents, f"an integer from 1 to num_latents={self.num_latents}")
        if not isinstance(self.proportional_attention, bool):
            raise _value_error("proportional_attention", self.proportional_attention, "true or false")
        if not isinstance(self.merge_method, str):
            raise _value_error("merge_method", self.merge_method, "the name of a matching method")
        if self.merge_metric not in MERGE_METRICS:
            raise ValueError(f"merge_metric={_shorten(self.merge_metric)}: choose from {', '.join(MERGE_METRICS)}")
        layers, left = self.num_self_attention_layers, self.num_latents
        _check_r(self.r, self.r_inflection, layers)
        if self.latent_groups is not None:
            left = _check_groups("latent_groups", self.latent_groups, left, self.min_latents)
        if self.merge_groups is None:
            return
        if self.r != 0:
            raise ValueError(
                f"merge_groups: r must be 0, not {_shorten(self.r)}; to merge by r, set merge_groups to None"
            )
        if not isinstance(self.merge_groups, (list, tuple)) or len(self.merge_groups) != layers:
            raise ValueError(
                f"merge_groups: {_describe_value(self.merge_groups)}; must be a list of {layers} entries, one per layer"
            )
        for layer, groups in enumerate(self.merge_groups):
            if groups is not None:
                left = _check_groups(f"merge_groups[{layer}]", groups, left, self.min_latents)

    def check_labels(self) -> None:
        """Check that `label2id` and `id2label` give the outputs of a classifier the same names.

        One of them may still have upstream's default names LABEL_0, LABEL_1, ..., and two outputs may share a name
        (two of ImageNet's classes do).

        Raises:
            ValueError: if they differ; the message is one line: the field, the label and what it must be.
        """
        names, last = self.id2label or {}, self.num_labels - 1
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label: names the outputs {_shorten(sorted(names))}; must name 0 to {last}")
        names_by_label2id: dict[int, str] = {}
        for name, index in (self.label2id or {}).items():
            number = int(index) if isinstance(index, str) and index.isdecimal() else index
            if not _is_integer(number, 0, last):
                raise _value_error(f"label2id[{_shorten(name)}]", index, f"an output of the model, 0 to {last}")
            if number in names_by_label2id:
                first = names_by_label2id[number]
                raise ValueError(
                    f"label2id: output {number} is {_shorten(first)} and {_shorten(name)}; must have one name"
                )
            names_by_label2id[number] = name
        for labels in (names, names_by_label2id):
            if all(name == f"LABEL_{index}" for index, name in labels.items()):
                return
        for index, name in names.items():
            other = names_by_label2id.get(index)
            if other != name and (other is not None or name not in names_by_label2id.values()):
                found = "no such label" if other is None else _shorten(other)
                raise _value_error(f"id2label[{index}]", name, f"as in label2id, which has {found}")


def _spread_r(r: int | list[int], inflection: float, layers: int) -> list[int]:
    """Return the number of latents to merge away in each layer, before the caps."""
    if isinstance(r, (list, tuple)):
        return list(r)
    # ToMe's linear ramp from r (1 - inflection) to r (1 + inflection). After rounding, the i-th layer from the start
    # and the i-th from the end still sum to 2r: the inflection changes where latents merge, but not how many in total.
    ramp = [r] * layers
    for i in range(layers // 2):
        distance_from_middle = 1 - 2 * i / (layers - 1)
        ramp[i] = int(r * (1 - inflection * distance_from_middle) + 0.5)
        ramp[-1 - i] = 2 * r - ramp[i]
    return ramp


def _check_shape(config: ToMePerceiverConfig) -> None:
    for name in SHAPE_FIELDS:
        value = getattr(config, name)
        if not _is_integer(value, 1, MAX_SIZE) and (value is not None or name not in ("qk_channels", "v_channels")):
            raise _value_error(name, value, POSITIVE_INTEGER)
    for name in INPUT_SIZE_FIELDS:
        value = getattr(config, name)
        if not all(_is_integer(size, 1, MAX_SIZE) for size in (value if isinstance(value, (list, tuple)) else [value])):
            raise _value_error(name, value, POSITIVE_INTEGER)
    if config.num_self_attention_layers > MAX_LAYERS:
        layers = f"num_self_attends_per_block={config.num_self_attends_per_block}, more than {MAX_LAYERS} layers"
        raise _value_error("num_blocks", config.num_blocks, f"smaller: with {layers}")
    for name in ("initializer_range", "layer_norm_eps"):
        if not _is_number(getattr(config, name), 0):
            raise _value_error(name, getattr(config, name), "a number of 0 or more")
    if not _is_number(config.attention_probs_dropout_prob, 0, 1):
        raise _value_error("attention_probs_dropout_prob", config.attention_probs_dropout_prob, "a number from 0 to 1")
    if isinstance(config.hidden_act, str) and config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={_shorten(config.hidden_act)}: choose from {', '.join(sorted(ACT2FN))}")
    for heads, channels in product(
        ("num_self_attention_heads", "num_cross_attention_heads"), ("d_latents", "qk_channels", "v_channels")
    ):
        if (getattr(config, channels) or 0) % getattr(config, heads):
            raise _value_error(channels, getattr(config, channels), f"a multiple of {heads}={getattr(config, heads)}")


def _check_r(r: Any, inflection: Any, layers: int) -> None:
    is_list = isinstance(r, (list, tuple))
    if not all(_is_integer(entry, 0, MAX_SIZE) for entry in (r if is_list else [r])) or (is_list and len(r) != layers):
        raise _value_error("r", r, f"an integer from 0 to {MAX_SIZE}, or a list of {layers} of them, one per layer")
    if not _is_number(inflection, -1, 1):
        raise _value_error("r_inflection", inflection, "a number from -1 to 1")
    if inflection and is_list:
        raise _value_error("r_inflection", inflection, "0 with a list as r, which sets every layer")


def _check_groups(name: str, groups: Any, num_latents: int, min_latents: int) -> int:
    """Check that `groups` assigns a group to each of `num_latents` latents, and return the number of groups."""
    if not isinstance(groups, (list, tuple)) or len(groups) != num_latents or not all(map(_is_integer, groups)):
        raise ValueError(
            f"{name}: {_describe_value(groups)}; must be null or {num_latents} integers, one for each latent"
        )
    numbers = sorted(set(groups))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{name}: has groups {_shorten(numbers)}; must be numbered 0, 1, ... with none left out")
    if len(numbers) < min_latents:
        raise ValueError(f"{name}: leaves {len(numbers)} latents; must be min_latents={min_latents} or more")
    return len(numbers)


def _check_frontier(config: ToMePerceiverConfig) -> None:
    frontier = config.merge_frontier if isinstance(config.merge_frontier, dict) else {}
    rows = frontier.get("rows")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_FRONTIER_ROWS:
        raise ValueError(
            f"merge_frontier: must be a dict with 1 to {MAX_FRONTIER_ROWS} rows, as model.calibrate makes it"
        )
    for number, row in enumerate(rows):
        try:
            _check_row(config, row if isinstance(row, dict) else {})
        except ValueError as error:
            raise ValueError(f"merge_frontier: row {number}: {error}") from error
    input_shape: Any = frontier.get("input_shape")
    weights: Any = frontier.get("weights")
    is_valid = {
        "num_blocks": _is_integer(frontier.get("num_blocks"), 1, MAX_LAYERS // config.num_self_attends_per_block),
        "input_shape": _is_list(input_shape, 8) and all(_is_integer(size, 1, MAX_SIZE) for size in input_shape),
        "searched": _is_integer(frontier.get("searched"), 0),
        "held_out": _is_integer(frontier.get("held_out"), 0),
        "weights": _is_list(weights, MAX_FINGERPRINT_WEIGHTS) and all(map(_is_number, weights)),
    }
    if wrong := [name for name, valid in is_valid.items() if not valid]:
        raise _value_error(f"merge_frontier: {wrong[0]}", frontier.get(wrong[0]), "as model.calibrate makes it")


def _check_row(config: ToMePerceiverConfig, row: dict[str, Any]) -> None:
    merging, who = row.get("merging"), row.get("who", {})
    if not isinstance(merging, dict) or not set(merging) <= set(FRONTIER_SETTINGS):
        raise ValueError(f"must have merging settings, a dict with keys among {', '.join(FRONTIER_SETTINGS)}")
    figures = [row.get(name) for name in FRONTIER_ROW_FIGURES]
    if figures[0] is None or not all(figure is None or _is_number(figure, 0) for figure in figures):
        required, *others = FRONTIER_ROW_FIGURES
        raise ValueError(f"must have a number for {required}, and a number or null for {', '.join(others)}")
    if not isinstance(who, dict) or ((who or row.get("changed") is not None) and not _is_who(who)):
        raise ValueError(f"must have who, a dict with keys {', '.join(sorted(WHO_KEYS))}, as model.calibrate makes it")
    config.merged_as(row).check_merging()


def _is_who(who: dict[str, Any]) -> bool:
    """Return whether `who` of a frontier's row holds what `_summarize_changes` of the frontier returns."""
    return (
        set(who) == WHO_KEYS
        and _is_integer(who["samples"], 0)
        and _is_number(who["worst_tenth"], 0, 2)
        and isinstance(who["groups"], dict)
        and all(
            isinstance(name, str) and _is_list(figures, 2) and len(figures) == 2 and all(map(_is_number, figures))
            for name, figures in who["groups"].items()
        )
    )


def _check_config_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Check the fields of a config file that upstream would repair or crash on, and return it with our `model_type`."""
    if not isinstance(config_dict, dict):
        raise ValueError(f"config: {_describe_value(config_dict)}; must be a mapping of a config's fields")
    model_type = config_dict.get("model_type", "tome_perceiver")
    if model_type not in LOADABLE_MODEL_TYPES:
        raise ValueError(
            f"model_type={_shorten(model_type)} is another architecture; choose from {', '.join(LOADABLE_MODEL_TYPES)}"
        )
    for name, expected in UPSTREAM_FIELD_TYPES.items():
        value = config_dict.get(name)
        if value is not None and not isinstance(value, expected):
            raise _value_error(name, value, f"a {expected.__name__}")
    if not all(isinstance(name, str) for name in config_dict.get("architectures") or []):
        raise _value_error("architectures", config_dict["architectures"], "a list of class names")
    _check_written_labels(config_dict)
    # Another name can be that of a Hub repository, whose code transformers would then run.
    for name in ("attn_implementation", "_attn_implementation"):
        if config_dict.get(name) not in (None, "eager", "sdpa"):
            raise _value_error(name, config_dict[name], "eager or sdpa; pass others to from_pretrained")
    for name in ("dtype", "torch_dtype"):
        value = config_dict.get(name)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise _value_error(name, value, f"one of {', '.join(DTYPES)}")
    return {**config_dict, "model_type": "tome_perceiver"}


def _check_written_labels(config_dict: dict[str, Any]) -> None:
    """Check the labels of a config file: their number, the keys and names of `id2label`, the outputs of `label2id`."""
    number, names = config_dict.get("num_labels"), config_dict.get("id2label") or {}
    if number is not None and not _is_integer(number, 0, MAX_SIZE):
        raise _value_error("num_labels", number, f"an integer from 0 to {MAX_SIZE}")
    for index, name in names.items():
        if not (str(index).isdecimal() and len(str(index)) < 10 and isinstance(name, str)):
            raise _value_error(f"id2label[{_shorten(index)}]", name, "a name, with the number of an output as its key")
    indices = list(map(str, (config_dict.get("label2id") or {}).values()))
    if len(set(indices)) < len(indices):
        raise _value_error("label2id", config_dict["label2id"], "one name for each output")


def check_share(name: str, value: object) -> None:
    """Check that an argument is a number above 0, up to 1.

    Raises:
        ValueError: if it is not; the message has the argument and its value.
    """
    if not _is_number(value, 0, 1) or value == 0:
        raise _value_error(name, value, "a number above 0, up to 1")


def _value_error(name: str, value: object, requirement: str) -> ValueError:
    return ValueError(f"{name}={_shorten(value)}: must be {requirement}")


def _is_integer(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _check_field_names(config_class: type, names: Iterable[str]) -> None:
    """Refuse names that upstream would store as new fields: of methods and properties, and like those of merging.

    A field `check_merging` in a config file would replace the method, and a field `merge_grops` would have no effect.
    """
    # Before transformers 5.4 configs are not dataclasses, and of their fields only those of this file are attributes of
    # the class.
    known = (
        {field.name for field in fields(config_class)}
        if is_dataclass(config_class)
        else {*ToMePerceiverConfig.__annotations__}
    )
    merging = (*MERGING_FIELDS, "merge_frontier")
    for name in names:
        attribute, shown = getattr(config_class, name, None), _shorten(name)[1:-1]
        is_settable = isinstance(attribute, property) and attribute.fset is not None
        if name.startswith("__") or (
            hasattr(config_class, name) and name not in known and name != "model_type" and not is_settable
        ):
            raise ValueError(f"{shown}: is not a field of the config, but an attribute of its class; remove it")
        closest = get_close_matches(name, merging, n=1, cutoff=0.8)
        if closest and name not in (*merging, *SHAPE_FIELDS):
            raise ValueError(f"{shown}: is not a field of the config; did you mean {closest[0]}?")


def _is_list(value: object, most: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= most


def _shorten(value: object) -> str:
    """Return a value on one line of limited length, without control characters; exceptions by their message."""
    return _SHORT.repr(str(value) if isinstance(value, Exception) else value)


def _describe_value(value: object) -> str:
    return (
        f"is a {type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else f"is {_shorten(value)}"
    )


ToMePerceiverConfig.register_for_auto_class()
