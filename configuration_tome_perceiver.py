# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Perceiver IO that merges its latents as it runs.

Letters: L self-attention layers (``num_blocks * num_self_attends_per_block``), N latents (``num_latents``).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PerceiverConfig
from transformers.activations import ACT2FN

# A stock checkpoint is loaded as it is; anything else is another architecture.
LOADABLE_MODEL_TYPES = ("perceiver", "tome_perceiver")

# What the layers can compare latents by.
MERGE_METRICS = ("key", "value", "hidden")

# The fields of merging whose names are long enough to be misspelt.
MERGING_FIELDS = (
    "r_inflection",
    "min_latents",
    "proportional_attention",
    "merge_method",
    "merge_metric",
    "merge_groups",
    "latent_groups",
    "merge_frontier",
)

# Fields that a row of a frontier may set, and how many rows it may have: a config is read from the internet.
FRONTIER_SETTINGS = {"r", "merge_method", "merge_metric", "merge_groups", "latent_groups", "num_blocks"}
MOST_ROWS = 100
FRONTIER_CONTENTS = {"num_blocks": int, "input_shape": list, "searched": int, "held_out": int, "weights": list}
FRONTIER_WHO = {"samples", "groups", "worst_tenth"}
# What every row of a frontier has beside its merging settings.
FRONTIER_FIGURES = ("flops_ratio", "divergence", "changed", "changed_bound")

# Upstream's fields that the shape of a Perceiver is made of.
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
)


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
        ValueError: for a value out of its range, in one line naming the field, the value and what is allowed.
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
            # Upstream's own check, which takes two lines and is no ValueError.
            kind = type(self).__dataclass_fields__[name].type
            allowed = "an integer of 1 or more" if name in SHAPE_FIELDS else getattr(kind, "__name__", kind)
            raise ValueError(f"{name} = {value!r}: allowed is {allowed}") from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Upstream's, with this class's `model_type` in place of a stock Perceiver's, which upstream would warn of.

        Raises:
            ValueError: if `model_type` is another architecture's.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls._as_own_type(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Upstream's, with a check that the checkpoint is a Perceiver's and of what `kwargs` change.

        Raises:
            ValueError: if `model_type` is another architecture's, for a field out of its range, or for a name in
                `kwargs` that is nearly one of the merging fields'.
        """
        _refuse_misspelt(kwargs)
        loaded = super().from_dict(cls._as_own_type(config_dict), **kwargs)
        # Upstream sets the fields in `kwargs` after construction; with `return_unused_kwargs` it returns a pair.
        (loaded[0] if isinstance(loaded, tuple) else loaded).check_merging()
        return loaded

    @classmethod
    def _as_own_type(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in LOADABLE_MODEL_TYPES:
            raise ValueError(
                f"model_type = {model_type!r}: this checkpoint is of another architecture; "
                f"allowed are {' and '.join(map(repr, LOADABLE_MODEL_TYPES))}"
            )
        _check_as_written(config_dict)
        return {**config_dict, "model_type": cls.model_type}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Upstream's, after a check of fields that were set one by one since.

        Raises:
            ValueError: for a merging field out of its range; nothing is written.
        """
        self.check_merging()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_self_attention_layers(self) -> int:
        """L: layers in the order in which they run, weight-shared blocks counted each time."""
        return self.num_blocks * self.num_self_attends_per_block

    @property
    def latents_at_start(self) -> int:
        """How many latents read the inputs: N, or as many as `latent_groups` makes of them."""
        if self.latent_groups is None:
            return self.num_latents
        # What would leave out latents in silence, if it was set after all was checked.
        if len(self.latent_groups) != self.num_latents:
            self._check_groups("latent_groups", self.latent_groups, self.num_latents)
        return max(self.latent_groups) + 1

    @property
    def merge_schedule(self) -> list[int]:
        """Latents removed in each of the L layers, after the caps.

        Raises:
            ValueError: if `r` or `merge_groups` does not fit the layers.
        """
        if self.merge_groups is None:
            self._check_r(self.r)
            self._check_r_inflection()
            return self._capped(self._requested_r(), self.latents_at_start)
        removed, left = [], self.latents_at_start
        if self.r != 0 or len(self.merge_groups) != self.num_self_attention_layers:
            self._check_merge_groups()
        for groups in self.merge_groups:
            # Of all that was checked before, what would merge other latents in silence.
            if groups is not None and len(groups) != left:
                self._check_merge_groups()
            removed.append(0 if groups is None else left - max(groups) - 1)
            left -= removed[-1]
        return removed

    def schedule_of(self, r: int | list[int]) -> list[int]:
        """`merge_schedule` with `r` in the place of all that this config says of r and of groups.

        Raises:
            ValueError: in one line naming the value and what is allowed.
        """
        self._check_r(r)
        requested = list(r) if isinstance(r, (list, tuple)) else [r] * self.num_self_attention_layers
        return self._capped(requested, self.num_latents)

    def _capped(self, requested: list[int], left: int) -> list[int]:
        removed = []
        for r in requested:
            removed.append(max(0, min(r, left // 2, left - self.min_latents)))
            left -= removed[-1]
        return removed

    @property
    def latents_per_layer(self) -> list[int]:
        """Latents left after each of the L layers; the last entry is M, what the decoder reads."""
        left, remaining = [], self.latents_at_start
        for removed in self.merge_schedule:
            remaining -= removed
            left.append(remaining)
        return left

    def _requested_r(self) -> list[int]:
        """`r` as one entry for each layer, before the caps."""
        if isinstance(self.r, (list, tuple)):
            return list(self.r)
        # ToMe's linear ramp from r (1 - inflection) to r (1 + inflection), rounded so that opposite layers still sum
        # to 2r: the inflection moves merging about and leaves its total alone.
        layers = self.num_self_attention_layers
        ramp = [self.r] * layers
        for i in range(layers // 2):
            distance_from_middle = 1 - 2 * i / (layers - 1)
            ramp[i] = int(self.r * (1 - self.r_inflection * distance_from_middle) + 0.5)
            ramp[layers - 1 - i] = 2 * self.r - ramp[i]
        return ramp

    def check_merging(self) -> None:
        """Check the shape, and the merging fields against each other and against the layers.

        Raises:
            ValueError: in one line naming the field, the value and what is allowed.
        """
        self._check_shape()
        self.check_settings()
        self._check_r(self.r)
        self._check_r_inflection()
        if self.latent_groups is not None:
            self._check_groups("latent_groups", self.latent_groups, self.num_latents)
        if self.merge_groups is not None:
            self._check_merge_groups()
        if self.merge_frontier is not None:
            self._check_frontier()

    def _check_frontier(self) -> None:
        frontier = self.merge_frontier if isinstance(self.merge_frontier, dict) else {}
        rows = frontier.get("rows")
        if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_ROWS:
            raise ValueError(f"merge_frontier: must be a dict with 1 to {MOST_ROWS} rows, as model.calibrate leaves it")
        for number, row in enumerate(rows):
            merging = row.get("merging") if isinstance(row, dict) else None
            if not isinstance(merging, dict) or not set(merging) <= FRONTIER_SETTINGS:
                raise ValueError(f"merge_frontier: row {number} must have merging settings of this config")
            if not all(_is_figure(row.get(name)) for name in FRONTIER_FIGURES) or row.get("flops_ratio") is None:
                raise ValueError(f"merge_frontier: row {number} must have a number for {', '.join(FRONTIER_FIGURES)}")
            who = row.get("who", {})
            if not isinstance(who, dict) or (row.get("changed") is not None and set(who) != FRONTIER_WHO):
                raise ValueError(f"merge_frontier: row {number} must have who, with {', '.join(sorted(FRONTIER_WHO))}")
            try:
                self.merged_as(row).check_merging()
            except ValueError as error:
                raise ValueError(f"merge_frontier: row {number}: {error}") from error
        for name, kind in FRONTIER_CONTENTS.items():
            if not isinstance(frontier.get(name), kind):
                raise ValueError(
                    f"merge_frontier: {name} must be of type {kind.__name__}, as model.calibrate leaves it"
                )

    def merged_as(self, row: dict[str, Any]) -> ToMePerceiverConfig:
        """Return a copy of this config that merges as a row of its frontier does, and has no frontier."""
        asked = copy.copy(self)
        unset = {"r": 0, "r_inflection": 0.0, "merge_groups": None, "latent_groups": None, "merge_frontier": None}
        for name, value in (unset | row["merging"]).items():
            setattr(asked, name, value)
        return asked

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

    def check_settings(self) -> None:
        """Check the merging fields that every layer follows, whatever its r.

        Raises:
            ValueError: in one line naming the field, the value and what is allowed.
        """
        if not _is_integer(self.min_latents) or not 1 <= self.min_latents <= self.num_latents:
            raise ValueError(
                f"min_latents = {self.min_latents!r}: allowed is an integer from 1 to num_latents = {self.num_latents}"
            )
        if not isinstance(self.proportional_attention, bool):
            raise ValueError(f"proportional_attention = {self.proportional_attention!r}: allowed are true and false")
        if not isinstance(self.merge_method, str):
            raise ValueError(f"merge_method = {self.merge_method!r}: allowed is the name of a merging method")
        if self.merge_metric not in MERGE_METRICS:
            raise ValueError(f"merge_metric = {self.merge_metric!r}: allowed are {', '.join(map(repr, MERGE_METRICS))}")

    def check_labels(self) -> None:
        """Check that `label2id` and `id2label` say the same of a classifier's outputs.

        One of them may be left at upstream's LABEL_0, LABEL_1, ..., and two outputs may have the same name (as two of
        ImageNet's do).

        Raises:
            ValueError: in one line naming the field, the label and what is allowed.
        """
        names, last = self.id2label or {}, self.num_labels - 1
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label: of the outputs {sorted(names)}; allowed are 0 to {last} with none left out")
        named: dict[int, str] = {}
        for name, index in (self.label2id or {}).items():
            number = int(index) if isinstance(index, str) and index.isdecimal() else index
            if not _is_integer(number) or not 0 <= number <= last:
                raise ValueError(f"label2id[{name!r}] = {index!r}: allowed is an output of the model, 0 to {last}")
            if number in named:
                raise ValueError(
                    f"label2id: {named[number]!r} and {name!r} are both output {number}; allowed is one name for each"
                )
            named[number] = name
        if _are_default(names) or _are_default(named):
            return
        for index, name in names.items():
            other = named.get(index)
            if other != name and (other is not None or name not in named.values()):
                raise ValueError(
                    f"id2label[{index}] = {name!r}: label2id has {'no such label' if other is None else repr(other)}; "
                    "allowed is the same in both"
                )

    def _check_shape(self) -> None:
        for name in (
            *SHAPE_FIELDS,
            *(name for name in ("qk_channels", "v_channels") if getattr(self, name) is not None),
        ):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} = {value!r}: allowed is an integer of 1 or more")
        dropout = self.attention_probs_dropout_prob
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"attention_probs_dropout_prob = {dropout!r}: allowed is a number from 0 to 1")
        if isinstance(self.hidden_act, str) and self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act = {self.hidden_act!r}: allowed are {', '.join(sorted(ACT2FN))}")
        for heads in ("num_self_attention_heads", "num_cross_attention_heads"):
            for channels in ("d_latents", "qk_channels", "v_channels"):
                if (getattr(self, channels) or 0) % getattr(self, heads):
                    raise ValueError(
                        f"{channels} = {getattr(self, channels)}: allowed is a multiple of {heads} = "
                        f"{getattr(self, heads)}"
                    )

    def _check_r(self, r: Any) -> None:
        layers = self.num_self_attention_layers
        if isinstance(r, (list, tuple)):
            if len(r) != layers:
                raise ValueError(
                    f"r = {r!r}: a list needs one entry for each of the {layers} self-attention layers, not {len(r)}"
                )
            if not all(_is_integer(entry) and entry >= 0 for entry in r):
                raise ValueError(f"r = {r!r}: every entry of a list must be an integer of 0 or more")
        elif not _is_integer(r) or r < 0:
            raise ValueError(
                f"r = {r!r}: allowed is an integer of 0 or more, or a list of {layers} of them, one a layer"
            )

    def _check_r_inflection(self) -> None:
        inflection = self.r_inflection
        if isinstance(inflection, bool) or not isinstance(inflection, (int, float)) or not -1 <= inflection <= 1:
            raise ValueError(f"r_inflection = {inflection!r}: allowed is a number from -1 to 1")
        if inflection and isinstance(self.r, (list, tuple)):
            raise ValueError(
                f"r_inflection = {inflection!r}: allowed only with an integer r; a list says what each layer does"
            )

    def _check_merge_groups(self) -> None:
        layers, left = self.num_self_attention_layers, self.latents_at_start
        if self.r != 0:
            raise ValueError(
                f"merge_groups: fixed groups take the place of r, so r must be 0, not {self.r!r}; "
                "to merge by r, set merge_groups to None"
            )
        if not isinstance(self.merge_groups, (list, tuple)) or len(self.merge_groups) != layers:
            raise ValueError(
                f"merge_groups: allowed is a list with one entry for each of the {layers} self-attention layers, "
                f"not {_summary(self.merge_groups)}"
            )
        for layer, groups in enumerate(self.merge_groups):
            if groups is not None:
                left = self._check_groups(f"merge_groups[{layer}]", groups, left)

    def _check_groups(self, name: str, groups: Any, reaching: int) -> int:
        """Check that each of the latents that reach a place has a group, and say how many groups there are."""
        if not isinstance(groups, (list, tuple)) or len(groups) != reaching or not all(map(_is_integer, groups)):
            raise ValueError(
                f"{name}: allowed is null or a list of {reaching} integers, one for each latent that gets there, not "
                f"{_summary(groups)}"
            )
        numbers = sorted(set(groups))
        count = len(numbers)
        if numbers != list(range(count)):
            raise ValueError(f"{name}: groups must be numbered 0, 1, ... with none left out, not {numbers}")
        if count < self.min_latents:
            raise ValueError(f"{name}: leaves {count} latents, fewer than min_latents = {self.min_latents}")
        return count


def _check_as_written(config_dict: dict[str, Any]) -> None:
    """Check what upstream would mend or trip over as it reads a config, before anybody has seen it."""
    for name, kind, what in (
        ("id2label", dict, "outputs to names"),
        ("label2id", dict, "names to outputs"),
        ("architectures", list, "class names"),
    ):
        value = config_dict.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} = {value!r}: allowed is a {kind.__name__} of {what}")
    if not all(isinstance(name, str) for name in config_dict.get("architectures") or []):
        raise ValueError(f"architectures = {config_dict['architectures']!r}: allowed is a list of class names")
    indices = list(map(str, (config_dict.get("label2id") or {}).values()))
    if twice := {index for index in indices if indices.count(index) > 1}:
        raise ValueError(f"label2id: has two names for the output {min(twice)}; allowed is one name for each")


def check_share(name: str, value: object) -> None:
    """Check that an argument is a number above 0, up to 1.

    Raises:
        ValueError: naming the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r}: must be a number above 0, up to 1")


def _is_figure(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_default(names: dict[int, str]) -> bool:
    """Whether labels are upstream's for a number of outputs; no labels are."""
    return all(name == f"LABEL_{index}" for index, name in names.items())


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Any name may be a field of a config, so what is nearly a merging field's would change nothing in silence."""
    for name in names:
        near = get_close_matches(name, MERGING_FIELDS, n=1, cutoff=0.8)
        if near and name not in MERGING_FIELDS:
            raise ValueError(f"{name}: no field of the config; allowed are {near[0]!r}, which it resembles, and others")


def _summary(value: object) -> str:
    return f"a {type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else repr(value)


ToMePerceiverConfig.register_for_auto_class()
