# SPDX-License-Identifier: Apache-2.0
"""The arguments that say which model and how it merges, and the model that they mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor, PerceiverImageProcessorPil

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput, naming
from merging_tome_perceiver import MERGE_METHODS, check_merge_method


@dataclass
class ModelArguments:
    """Which model: a checkpoint, or a small one from scratch."""

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
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not that of --model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Token for gated or private repositories."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start a head of another size anew, for a checkpoint finetuned on other labels."},
    )


@dataclass
class MergeArguments:
    """How latents merge; each also a field of the config that is saved. What is not given stays as it is there."""

    r: str | None = field(
        default=None,
        metadata={"help": "Latents merged in each layer: an integer, or a comma-separated list, one entry a layer."},
    )
    r_inflection: float | None = field(
        default=None, metadata={"help": "-1: merge early (2r falling to 0), 0: constant, 1: merge late."}
    )
    min_latents: int | None = field(default=None, metadata={"help": "Never merge below this many latents."})
    merge_method: str | None = field(
        default=None, metadata={"help": f"What merges with what: {', '.join(sorted(MERGE_METHODS))}."}
    )

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


def load_image_model(
    arguments: ModelArguments, merging: dict[str, Any], labels: list[str]
) -> modeling.ToMePerceiverPreTrainedModel:
    """The image classifier that the arguments mean, with its labels and merging set.

    Args:
        arguments: a checkpoint, or a config for a model from scratch.
        merging: fields of the config, as `MergeArguments.config_fields` gives them.
        labels: names of the classes; a checkpoint for another number of them needs `--ignore_mismatched_sizes`.

    Raises:
        BadInput: for a checkpoint that is not there, of another architecture or with another head, or merging that
            its config cannot mean.
    """
    config = load_config(arguments)
    from_checkpoint = arguments.model_name_or_path is not None
    if from_checkpoint and config.num_labels != len(labels) and not arguments.ignore_mismatched_sizes:
        raise BadInput(
            f"--model_name_or_path {arguments.model_name_or_path}: its head has {config.num_labels} labels and the "
            f"data {len(labels)}; --ignore_mismatched_sizes starts the head anew"
        )
    config.label2id, config.id2label = {name: i for i, name in enumerate(labels)}, dict(enumerate(labels))
    apply_merging(config, merging)
    model_class = _image_model_class(config)
    if not from_checkpoint:
        return model_class(config)
    with naming(f"--model_name_or_path {arguments.model_name_or_path}", OSError, RuntimeError):
        return model_class.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
            **_download_options(arguments),
        )


def load_config(arguments: ModelArguments) -> ToMePerceiverConfig:
    """The config of the checkpoint, or of the model from scratch.

    Raises:
        BadInput: for a checkpoint or file that is not there, of another architecture or not a config.
    """
    if arguments.model_name_or_path is not None:
        for name in ("config_name", "config_overrides"):
            if getattr(arguments, name) is not None:
                raise BadInput(
                    f"--{name} {getattr(arguments, name)}: only for a model from scratch, without --model_name_or_path"
                )
        return _read_config("model_name_or_path", arguments.model_name_or_path, arguments)
    if arguments.config_name is not None:
        config = _read_config("config_name", arguments.config_name, arguments)
    else:
        config = ToMePerceiverConfig()
    if arguments.config_overrides is not None:
        with naming(f"--config_overrides {arguments.config_overrides}", ValueError, KeyError):
            config.update_from_string(arguments.config_overrides)
    return config


def load_image_processor(arguments: ModelArguments, config: ToMePerceiverConfig) -> BaseImageProcessor:
    """The checkpoint's image processor; for a model from scratch one that resizes to `config.image_size`.

    Raises:
        BadInput: for a processor that is not there.
    """
    name = arguments.image_processor_name or arguments.model_name_or_path
    if name is None:
        side = config.image_size
        return PerceiverImageProcessorPil(
            do_center_crop=False,
            size={"height": side, "width": side},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        )
    with naming(f"--image_processor_name {name}", OSError, ValueError):
        return AutoImageProcessor.from_pretrained(name, **_download_options(arguments))


def _read_config(argument: str, name: str, arguments: ModelArguments) -> ToMePerceiverConfig:
    with naming(f"--{argument} {name}", OSError, ValueError):
        if name.endswith(".json"):
            return ToMePerceiverConfig.from_dict(json.loads(Path(name).read_text()))
        return ToMePerceiverConfig.from_pretrained(name, **_download_options(arguments))


def _download_options(arguments: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": arguments.cache_dir, "revision": arguments.model_revision, "token": arguments.token}


def _image_model_class(config: ToMePerceiverConfig) -> type[modeling.ToMePerceiverPreTrainedModel]:
    """The class that the checkpoint was saved from, ours for a stock one; for none, convolution first."""
    name = (config.architectures or ["PerceiverForImageClassificationConvProcessing"])[0]
    name = name if name.startswith("ToMe") else f"ToMe{name}"
    if "ForImageClassification" not in name or not hasattr(modeling, name):
        allowed = [known for known in dir(modeling) if known.startswith("ToMePerceiverForImageClassification")]
        raise BadInput(
            f"architectures = {config.architectures}: allowed for images are {', '.join(allowed)} and the stock "
            "classes they come from"
        )
    return getattr(modeling, name)
