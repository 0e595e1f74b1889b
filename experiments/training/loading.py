# SPDX-License-Identifier: Apache-2.0
"""From arguments to a model and what makes its inputs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput, naming
from experiments.merging.arguments import apply_fields
from experiments.tasks.base import PreparedTask, Task
from experiments.tasks.labels import checkpoint_labels, listed, matched, warn_of_order
from experiments.training.model_arguments import ModelArguments

logger = logging.getLogger(__name__)

# Names of weights that belong to a head, and what a checkpoint may lack: old ones have no count of batches.
HEADS = ("perceiver.decoder.", "embedding_decoder.")
UNIMPORTANT = "num_batches_tracked"
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def load_model_and_task(
    arguments: ModelArguments,
    merging: dict[str, Any],
    task: Task,
    training: TrainingArguments,
) -> tuple[modeling.ToMePerceiverPreTrainedModel, PreparedTask]:
    """The model that the arguments mean, and the task as it sees it.

    Args:
        arguments, merging, task: as for `load_config`.
        training: its seed, and which of several processes prepares the data for the others.

    Raises:
        BadInput: for whatever is not there or does not fit, before the weights are read.
    """
    config = load_config(arguments, merging, task)
    processing_class = load_processing_class(arguments, config, task)
    if arguments.model_name_or_path is None:
        task.fit_config(config, processing_class)
    with training.main_process_first(desc="preparing the data"):
        prepared = task.prepared(config, processing_class, training.seed)
    model = load_model(arguments, config, task)
    if task.input_name == "input_ids":
        if task.classifies:
            _keep_positions(model, processing_class.model_max_length)
        # Trainer does so when it trains; what is loaded and not trained is to have the same config.
        for name in SPECIAL_TOKENS:
            if getattr(processing_class, name) is not None:
                setattr(model.config, name, getattr(processing_class, name))
    return model, prepared


@torch.no_grad()
def _keep_positions(model: modeling.ToMePerceiverPreTrainedModel, count: int) -> None:
    """Keep the first positions of a text classifier, those that its inputs have.

    A pipeline cuts an input only where it is told to; an input that is longer than those of the run is then refused by
    the model instead of being answered otherwise than in the run.
    """
    inputs = model.base_model.input_preprocessor
    if count < model.config.max_position_embeddings:
        model.config.max_position_embeddings = inputs.config.max_position_embeddings = count
        positions = torch.nn.Embedding.from_pretrained(inputs.position_embeddings.weight[:count].clone(), freeze=False)
        inputs.position_embeddings = positions


def load_processing_class(arguments: ModelArguments, config: ToMePerceiverConfig, task: Task) -> Any:
    """The tokenizer or image processor: the one that is named, the checkpoint's, or one for a model from scratch.

    Raises:
        BadInput: if it is not there.
    """
    named = arguments.tokenizer_name if task.input_name == "input_ids" else arguments.image_processor_name
    return task.processing_class(
        config,
        named or arguments.model_name_or_path,
        **arguments.download_options(),
        trust_remote_code=arguments.trust_remote_code,
        **({} if arguments.code_revision is None else {"code_revision": arguments.code_revision}),
    )


def load_model(
    arguments: ModelArguments, config: ToMePerceiverConfig, task: Task
) -> modeling.ToMePerceiverPreTrainedModel:
    """The model that the arguments mean, for the task.

    Args:
        arguments: a checkpoint, or none for a model from scratch.
        config: from `load_config`.
        task: says which class.

    Returns:
        The model; `model.head_is_new` says of a checkpoint's whether its head began at random.

    Raises:
        BadInput: for weights that are not there or do not fit.
    """
    model_class = getattr(modeling, task.model_class_name(config))
    if arguments.model_name_or_path is None:
        # The config's values are the user's, and what they may be only PyTorch's modules say.
        with naming(f"--config_name {arguments.config_name}", ValueError, TypeError, KeyError):
            return model_class(config)
    with naming(f"--model_name_or_path {arguments.model_name_or_path}", Exception):
        model, loaded = model_class.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            # What may not be ignored is found below, where it gets its name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments.download_options(),
        )
    start = requested_config(arguments)
    same_head = model_class.__name__.removeprefix("ToMe") in str(start.architectures)
    may_be_new = arguments.ignore_mismatched_sizes or not same_head
    model.head_is_new = _check_loaded(arguments, loaded, may_be_new)
    if task.classifies and _is_classifier(start) and _misfit(start, task) is not None:
        _start_head_anew(model)
        model.head_is_new = True
    return model


def _check_loaded(arguments: ModelArguments, loaded: dict[str, Any], new_head: bool) -> bool:
    """Check that nothing but a head began at random, and that nothing else was left out: transformers only warns.

    Returns:
        Whether the head began at random.
    """
    mismatched = [entry[0] for entry in loaded["mismatched_keys"]]
    for what, names, new in (
        ("lack", loaded["missing_keys"], new_head),
        ("have, beyond what the config has room for,", loaded["unexpected_keys"], new_head),
        ("have of another shape than the config", mismatched, arguments.ignore_mismatched_sizes),
    ):
        counted = [name for name in names if not name.endswith(UNIMPORTANT)]
        wrong = sorted(name for name in counted if not (new and name.startswith(HEADS)))
        if wrong:
            raise BadInput(
                f"--model_name_or_path {arguments.model_name_or_path}: its weights {what} {wrong[0]}"
                + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
                + "; allowed are weights that are whole and those of its config"
            )
    return any(name.startswith(HEADS) for name in (*loaded["missing_keys"], *mismatched))


def _is_classifier(config: ToMePerceiverConfig) -> bool:
    return "Classification" in str(config.architectures)


@torch.no_grad()
def _start_head_anew(model: modeling.ToMePerceiverPreTrainedModel) -> None:
    """Draw what a class has of its own, as transformers does where the number of classes is another."""
    layer = model.base_model.decoder.decoder.final_layer
    layer.weight.normal_(0.0, model.config.initializer_range)
    layer.bias.zero_()


def load_config(arguments: ModelArguments, merging: dict[str, Any], task: Task) -> ToMePerceiverConfig:
    """The config of the checkpoint, or of the model from scratch, with the task's labels and merging set.

    Args:
        arguments: a checkpoint, or a config for a model from scratch.
        merging: fields of the config, as `MergeArguments.config_fields` gives them.
        task: whose labels the model is to tell apart; a classifier of other labels needs
            `--ignore_mismatched_sizes`, and starts with a new head.

    Raises:
        BadInput: for a checkpoint or file that is not there, is no config, is for another task, or cannot mean that
            merging.
    """
    config = requested_config(arguments)
    task.model_class_name(config)
    if task.classifies:
        _take_labels(config, arguments, task)
    apply_fields(config, merging)
    return config


def _take_labels(config: ToMePerceiverConfig, arguments: ModelArguments, task: Task) -> None:
    """Give the config the task's labels; a classifier's own names and order of the same labels stay."""
    named = f"--model_name_or_path {arguments.model_name_or_path}"
    is_trained = arguments.model_name_or_path is not None and _is_classifier(config)
    misfit = _misfit(config, task) if is_trained else None
    if misfit is not None:
        if not arguments.ignore_mismatched_sizes:
            raise BadInput(f"{named}: {misfit}; --ignore_mismatched_sizes starts the head anew")
        logger.warning("%s: %s, so its head starts anew, since --ignore_mismatched_sizes is given", named, misfit)
    if not task.labels:
        config.num_labels, config.problem_type = 1, "regression"
        return
    names = task.labels
    if is_trained and misfit is None:
        names = checkpoint_labels(config)
        warn_of_order(task.labels, names, named)
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def _misfit(config: ToMePerceiverConfig, task: Task) -> str | None:
    """What a classifier's head has otherwise than the data, if anything."""
    num_labels = len(task.labels) or 1
    if config.num_labels != num_labels:
        return f"its head has {config.num_labels} labels and the data {num_labels}"
    kind = "a number" if _is_regression(config) else "several labels" if _is_multi_label(config) else "a class"
    asked = "a class" if task.labels else "a number"
    if kind != asked:
        return f"its head predicts {kind} for an input, problem_type = {config.problem_type}, and the data have {asked}"
    if task.labels and matched(task.labels, checkpoint_labels(config)) is None:
        return (
            f"its head has the labels {listed(checkpoint_labels(config), ordered=True)} and the data "
            f"{listed(task.labels, ordered=True)}"
        )
    return None


def _is_multi_label(config: ToMePerceiverConfig) -> bool:
    return config.problem_type == "multi_label_classification"


def trained_classes(arguments: ModelArguments) -> list[str] | None:
    """Return the classes of a classifier's checkpoint, none for regression; `None` for any other start of a model.

    Raises:
        BadInput: for a checkpoint that is not there.
    """
    config = requested_config(arguments)
    if arguments.model_name_or_path is None or not _is_classifier(config) or arguments.ignore_mismatched_sizes:
        return None
    return [] if _is_regression(config) else checkpoint_labels(config)


def _is_regression(config: ToMePerceiverConfig) -> bool:
    return config.problem_type == "regression" or config.problem_type is None and config.num_labels == 1


def requested_config(arguments: ModelArguments) -> ToMePerceiverConfig:
    """The config of the checkpoint, or of the model from scratch, as it stands there.

    Raises:
        BadInput: if it is not there, or is no config.
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
        with naming(f"--config_overrides {arguments.config_overrides}", Exception):
            config.update_from_string(arguments.config_overrides)
            config.check_merging()
    return config


def _read_config(argument: str, name: str, arguments: ModelArguments) -> ToMePerceiverConfig:
    with naming(f"--{argument} {name}", Exception):
        if name.endswith(".json"):
            fields = json.loads(Path(name).read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"holds a {type(fields).__name__}; allowed is a mapping of a config's fields")
            config = ToMePerceiverConfig.from_dict(fields)
        elif Path(name).is_dir() and not (Path(name) / CONFIG_NAME).exists():
            # Of which transformers makes the default config.
            raise ValueError(f"has no {CONFIG_NAME}; allowed is a Hub id or a folder with a checkpoint")
        else:
            config = ToMePerceiverConfig.from_pretrained(name, **arguments.download_options())
        config.check_labels()
        return config
