# SPDX-License-Identifier: Apache-2.0
"""The arguments that say which model and how it merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput, naming
from experiments.schedule import DEFAULT_SCHEDULE, SCHEDULES, UNMERGED, schedule_for_flops
from merging_tome_perceiver import MERGE_METHODS, check_merge_method


@dataclass
class ModelArguments:
    """Which model: a checkpoint, or a small one from scratch."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of a checkpoint, stock Perceiver or ours. Without it: from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "For a model from scratch: a JSON file with its config, or a checkpoint to take it from."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the config of a model from scratch: num_latents=64,d_latents=128,..."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not that of --model_name_or_path."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not that of --model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(
        default=None,
        metadata={"help": "Token for gated or private repositories; by default the one of `hf auth login`."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run a tokenizer's or image processor's own code. The model's is always this repository's."},
    )
    code_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of that code, if it is in a repository of its own."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start a head of another size anew, for a checkpoint finetuned on other labels."},
    )

    def download_options(self) -> dict[str, Any]:
        """What every `from_pretrained` takes."""
        return {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}

    def dataset_options(self) -> dict[str, Any]:
        """What `datasets.load_dataset` takes."""
        return {"cache_dir": self.cache_dir, "token": self.token}


@dataclass
class MergeArguments:
    """How latents merge; each also a field of the config that is saved. What is not given stays as it is there."""

    _argument_group_name: ClassVar[str] = "merging"

    r: str | None = field(
        default=None,
        metadata={"help": "Latents merged in each layer: an integer, or a comma-separated list, one entry a layer."},
    )
    flops_ratio: float | None = field(
        default=None,
        metadata={"help": "Instead of --r: a share of the unmerged model's FLOPs, which a --schedule keeps to."},
    )
    schedule: str = field(
        default=DEFAULT_SCHEDULE,
        metadata={"help": f"How that is spread over the layers: {', '.join(sorted(SCHEDULES))}."},
    )
    r_inflection: float | None = field(
        default=None, metadata={"help": "-1: merge early (2r falling to 0), 0: constant, 1: merge late."}
    )
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    merge_method: str | None = field(
        default=None, metadata={"help": f"What merges with what: {', '.join(sorted(MERGE_METHODS))}."}
    )

    def __post_init__(self) -> None:
        if self.r is not None:
            self.r = spelled_r(self.r)
        if self.flops_ratio is not None and self.r is not None:
            raise BadInput(f"--flops_ratio {self.flops_ratio}: allowed is it or --r, and --r {self.r} is given")

    @property
    def merges(self) -> bool:
        """Whether any merging is asked for."""
        return self.flops_ratio is not None or bool(self.config_fields().get("r"))

    def apply_budget(self, config: ToMePerceiverConfig, input_shape: Sequence[int], architecture: str) -> None:
        """With `--flops_ratio`, set the list of r that keeps to it, in place of whatever merged.

        Args:
            config: of the model.
            input_shape: of one input, that the FLOPs are for.
            architecture: name of the model class.

        Raises:
            BadInput: if the schedule cannot keep to it.
        """
        if self.flops_ratio is not None:
            r = schedule_for_flops(config, self.flops_ratio, self.schedule, input_shape, architecture)
            apply_merging(config, UNMERGED | {"r": r})

    def config_fields(self) -> dict[str, Any]:
        """The fields that were given, as the config takes them."""
        given: dict[str, Any] = {
            "r_inflection": self.r_inflection,
            "min_latents": self.min_latents,
            "merge_method": self.merge_method,
        }
        if self.r is not None:
            given["r"] = parse_r(self.r)
        return {name: value for name, value in given.items() if value is not None}


def spelled_r(r: object) -> str:
    """`r` as on a command line, also if it is a number or a list because it comes from a JSON or YAML file."""
    return ",".join(map(str, r)) if isinstance(r, list) else str(r)


def parse_r(text: str) -> int | list[int]:
    """`r` from a command line: `"8"` -> 8, `"26,26,0"` -> [26, 26, 0].

    Raises:
        BadInput: for anything else.
    """
    try:
        entries = [int(entry) for entry in text.split(",")]
    except ValueError:
        raise BadInput(
            f"--r {text}: allowed is an integer of 0 or more, or a comma-separated list of them, one a layer"
        ) from None
    return entries if "," in text else entries[0]


def apply_merging(config: ToMePerceiverConfig, fields: dict[str, Any]) -> None:
    """Set merging fields on a config and check what they mean together.

    Raises:
        BadInput: naming the field, the value and what is allowed.
    """
    for name, value in fields.items():
        setattr(config, name, value)
    with naming("merging", ValueError):
        config.check_merging()
        check_merge_method(config.merge_method)
