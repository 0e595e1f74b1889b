# SPDX-License-Identifier: Apache-2.0
"""Load the model that the arguments choose, from a checkpoint or from scratch, and prepare the task for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.merging.arguments import apply_fields
from experiments.tasks.base import PreparedTask, Task
from experiments.tasks.labels import checkpoint_labels, listed, match_labels, warn_of_order
from experiments.training.model_arguments import ModelArguments
from experiments.training.saved_files import find_changed_file

logger = logging.getLogger(__name__)

# Prefixes of the names of a head's weights.
HEAD_PREFIXES = ("perceiver.decoder.", "embedding_decoder.")
# Suffix of the names of a BatchNorm buffer that old checkpoints lack.
BATCH_COUNT_SUFFIX = "num_batches_tracked"
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def load_model_and_task(
    arguments: ModelArguments,
    merging: dict[str, Any],
    task: Task,
    training: TrainingArguments,
) -> tuple[modeling.ToMePerceiverPreTrainedModel, PreparedTask]:
    """Load the model, and prepare the task with the model's tokenizer or image processor.

    Args:
        merging: merging fields of the config, as for `load_config`.
        training: training arguments, for the seed and for preparing the data in one process before the others.

    Raises:
        BadInput: for a file that is missing or does not fit, before the weights are read.
    """
    config = load_config(arguments, merging, task)
    named = arguments.tokenizer_name if task.input_name == "input_ids" else arguments.image_processor_name
    processing_class = task.processing_class(
        config,
        named or arguments.model_name_or_path,
        **arguments.download_options(),
        trust_remote_code=arguments.trust_remote_code,
        **({} if arguments.code_revision is None else {"code_revision": arguments.code_revision}),
    )
    if arguments.model_name_or_path is None:
        task.fit_config(config, processing_class)
    with training.main_process_first(desc="preparing the data"):
        prepared = task.prepare(config, processing_class, training.seed)
    model = load_model(arguments, config, task)
    if task.input_name == "input_ids":
        if task.classifies:
            _keep_positions(model, processing_class.model_max_length)
        # Trainer sets these only when it trains; here models that are not trained get the same config.
        for name in SPECIAL_TOKENS:
            if getattr(processing_class, name) is not None:
                setattr(model.config, name, getattr(processing_class, name))
    return model, prepared


@torch.no_grad()
def _keep_positions(model: modeling.ToMePerceiverPreTrainedModel, count: int) -> None:
    """Cut the position embeddings of a text classifier to the longest input of the run.

    Pipelines do not truncate by default. With fewer positions the model refuses longer inputs, instead of answering
    inputs unlike those it was trained and evaluated on.
    """
    inputs = model.base_model.input_preprocessor
    if count < model.config.max_position_embeddings:
        model.config.max_position_embeddings = inputs.config.max_position_embeddings = count
        positions = torch.nn.Embedding.from_pretrained(inputs.position_embeddings.weight[:count].clone(), freeze=False)
        inputs.position_embeddings = positions


def load_model(
    arguments: ModelArguments, config: ToMePerceiverConfig, task: Task
) -> modeling.ToMePerceiverPreTrainedModel:
    """Load a checkpoint, or create a model from scratch, with a config from `load_config`.

    Returns:
        The model. Loaded from a checkpoint, it has `head_is_new`: whether its head was initialised at random.

    Raises:
        BadInput: for weights that are missing or do not fit.
    """
    model_class = getattr(modeling, task.model_class_name(config))
    if arguments.model_name_or_path is None:
        # PyTorch's modules may refuse values of the config.
        with naming(f"--config_name {arguments.config_name}", ValueError, TypeError, KeyError):
            return model_class(config)
    with naming(f"--model_name_or_path {arguments.model_name_or_path}", Exception):
        model, loaded = model_class.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            # Mismatches are left to `_check_loaded`, whose message names the weight.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments.download_options(),
        )
        folder = Path(arguments.model_name_or_path)
        if folder.is_dir() and (changed := find_changed_file(folder, to_load=True)) is not None:
            logger.warning("warning: --model_name_or_path %s: its %s has changed since its training", folder, changed)
    checkpoint_config = requested_config(arguments)
    same_head = model_class.__name__.removeprefix("ToMe") in str(checkpoint_config.architectures)
    may_be_new = arguments.ignore_mismatched_sizes or not same_head
    model.head_is_new = _check_loaded(arguments, loaded, may_be_new)
    if task.classifies and _is_classifier(checkpoint_config) and _describe_misfit(checkpoint_config, task) is not None:
        # Initialise the head at random, as transformers does if the number of classes differs.
        layer = model.base_model.decoder.decoder.final_layer
        with torch.no_grad():
            layer.weight.normal_(0.0, config.initializer_range)
            layer.bias.zero_()
        model.head_is_new = True
    return model


def used_weights(names: Iterable[str]) -> list[str]:
    """Return the sorted names of weights without the counts of batches, which old checkpoints lack and nothing uses."""
    return sorted(name for name in names if not name.endswith(BATCH_COUNT_SUFFIX))


def _check_loaded(arguments: ModelArguments, loaded: dict[str, Any], may_be_new: bool) -> bool:
    """Refuse weights that are missing, unexpected or of another shape; transformers would only warn.

    Args:
        loaded: loading information of `from_pretrained`.
        may_be_new: whether weights of a head may be missing or unexpected.

    Returns:
        Whether the head is initialised at random.
    """
    mismatched = [entry[0] for entry in loaded["mismatched_keys"]]
    for problem, names, allowed_in_head in (
        ("lack", loaded["missing_keys"], may_be_new),
        ("have, without a place in the config,", loaded["unexpected_keys"], may_be_new),
        ("have in another shape than the config's", mismatched, arguments.ignore_mismatched_sizes),
    ):
        wrong = [name for name in used_weights(names) if not (allowed_in_head and name.startswith(HEAD_PREFIXES))]
        if wrong:
            raise BadInput(
                f"--model_name_or_path {arguments.model_name_or_path}: its weights {problem} {wrong[0]}"
                + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
                + "; use a checkpoint with complete weights that fit its config"
            )
    return any(name.startswith(HEAD_PREFIXES) for name in (*loaded["missing_keys"], *mismatched))


def _is_classifier(config: ToMePerceiverConfig) -> bool:
    return "Classification" in str(config.architectures)


def load_config(arguments: ModelArguments, merging: dict[str, Any], task: Task) -> ToMePerceiverConfig:
    """Read the config of a checkpoint or a model from scratch, and set the task's labels and the merging.

    A classifier with other labels than the task's needs `--ignore_mismatched_sizes`, and gets a new head.

    Args:
        merging: merging fields of the config, from `MergeArguments.config_fields`.

    Raises:
        BadInput: for a checkpoint or file that is missing, is no config or is for another task, or if merging fails.
    """
    config = requested_config(arguments)
    task.model_class_name(config)
    if task.classifies:
        _set_labels(config, arguments, task)
    apply_fields(config, merging)
    return config


def _set_labels(config: ToMePerceiverConfig, arguments: ModelArguments, task: Task) -> None:
    """Set the task's labels in a config; a classifier with the same labels keeps its names and order."""
    named = f"--model_name_or_path {arguments.model_name_or_path}"
    is_trained_classifier = arguments.model_name_or_path is not None and _is_classifier(config)
    misfit = _describe_misfit(config, task) if is_trained_classifier else None
    if misfit is not None:
        if not arguments.ignore_mismatched_sizes:
            raise BadInput(f"{named}: {misfit}; use --ignore_mismatched_sizes for a new head")
        logger.warning("%s: %s, so it gets a new head (--ignore_mismatched_sizes)", named, misfit)
    if not task.labels:
        config.num_labels, config.problem_type = 1, "regression"
        return
    names = task.labels
    if is_trained_classifier and misfit is None:
        names = checkpoint_labels(config)
        warn_of_order(task.labels, names, named)
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def _describe_misfit(config: ToMePerceiverConfig, task: Task) -> str | None:
    """Describe how a classifier's head differs from the data; `None` if it fits."""
    num_labels = len(task.labels) or 1
    if config.num_labels != num_labels:
        return f"its head has {config.num_labels} labels and the data {num_labels}"
    wanted = "a class" if task.labels else "a number"
    if (predicted := _predicted_kind(config)) != wanted:
        return f"its head predicts {predicted} for an input, problem_type={config.problem_type}, the data have {wanted}"
    if task.labels and match_labels(task.labels, labels := checkpoint_labels(config)) is None:
        return (
            f"its head has the labels {listed(labels, ordered=True)} and the data {listed(task.labels, ordered=True)}"
        )
    return None


def _predicted_kind(config: ToMePerceiverConfig) -> str:
    if config.problem_type == "multi_label_classification":
        return "several labels"
    is_number = config.problem_type == "regression" or config.problem_type is None and config.num_labels == 1
    return "a number" if is_number else "a class"


def trained_classes(arguments: ModelArguments) -> list[str] | None:
    """Return the classes of a classifier's checkpoint, an empty list for regression, or `None` for any other model.

    Raises:
        BadInput: for a missing checkpoint.
    """
    config = requested_config(arguments)
    if arguments.model_name_or_path is None or not _is_classifier(config) or arguments.ignore_mismatched_sizes:
        return None
    return [] if _predicted_kind(config) == "a number" else checkpoint_labels(config)


def requested_config(arguments: ModelArguments) -> ToMePerceiverConfig:
    """Read the config of a checkpoint or a model from scratch, unchanged.

    Raises:
        BadInput: if it is missing or no config.
    """
    if arguments.model_name_or_path is not None:
        for name in ("config_name", "config_overrides"):
            if getattr(arguments, name) is not None:
                raise BadInput(
                    f"--{name} {getattr(arguments, name)}: must be left out with --model_name_or_path; it is for "
                    "models from scratch"
                )
        return _read_config("model_name_or_path", arguments.model_name_or_path, arguments)
    named = arguments.config_name
    config = ToMePerceiverConfig() if named is None else _read_config("config_name", named, arguments)
    if arguments.config_overrides is not None:
        with naming(f"--config_overrides {arguments.config_overrides}", Exception):
            config.update_from_string(arguments.config_overrides)
            config.check_merging()
    return config


def _read_config(argument: str, name: str, arguments: ModelArguments) -> ToMePerceiverConfig:
    with naming(f"--{argument} {name}", Exception):
        if name.endswith(".json"):
            fields = json.loads(Path(name).read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"holds a {type(fields).__name__}; must be a mapping of a config's fields")
            config = ToMePerceiverConfig.from_dict(fields)
        elif (Path(name) / ADAPTER_CONFIG_NAME).exists():
            # transformers would load the adapter's own base model.
            raise ValueError("holds a PEFT adapter; use a folder with the model that merge_and_unload() returns, saved")
        elif Path(name).is_dir() and not (Path(name) / CONFIG_NAME).exists():
            # transformers would silently use the default config.
            raise ValueError(f"has no {CONFIG_NAME}; use a Hub id or a folder with a checkpoint")
        else:
            config = ToMePerceiverConfig.from_pretrained(name, **arguments.download_options())
        config.check_labels()
        return config
