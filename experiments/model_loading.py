# SPDX-License-Identifier: Apache-2.0
"""From arguments to a model and what makes its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.bad_input import BadInput, naming
from experiments.model_arguments import ModelArguments, apply_merging
from experiments.task import PreparedTask, Task


def load_model_and_task(
    arguments: ModelArguments, merging: dict[str, Any], task: Task, training: TrainingArguments
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
    return load_model(arguments, config, task), prepared


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

    Raises:
        BadInput: for weights that are not there or do not fit.
    """
    model_class = getattr(modeling, task.model_class_name(config))
    if arguments.model_name_or_path is None:
        return model_class(config)
    with naming(f"--model_name_or_path {arguments.model_name_or_path}", OSError, RuntimeError):
        return model_class.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
            **arguments.download_options(),
        )


def load_config(arguments: ModelArguments, merging: dict[str, Any], task: Task) -> ToMePerceiverConfig:
    """The config of the checkpoint, or of the model from scratch, with the task's labels and merging set.

    Args:
        arguments: a checkpoint, or a config for a model from scratch.
        merging: fields of the config, as `MergeArguments.config_fields` gives them.
        task: whose labels the model is to tell apart; a classifier of another number of labels needs
            `--ignore_mismatched_sizes`.

    Raises:
        BadInput: for a checkpoint or file that is not there, is no config, is for another task, or cannot mean that
            merging.
    """
    config = requested_config(arguments)
    task.model_class_name(config)
    if task.classifies:
        _take_labels(config, arguments, task)
    apply_merging(config, merging)
    return config


def _take_labels(config: ToMePerceiverConfig, arguments: ModelArguments, task: Task) -> None:
    is_classifier = arguments.model_name_or_path is not None and "Classification" in str(config.architectures)
    num_labels = len(task.labels) or 1
    if is_classifier and config.num_labels != num_labels and not arguments.ignore_mismatched_sizes:
        raise BadInput(
            f"--model_name_or_path {arguments.model_name_or_path}: its head has {config.num_labels} labels and the "
            f"data {num_labels}; --ignore_mismatched_sizes starts the head anew"
        )
    if not task.labels:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.problem_type = "single_label_classification"
        # A classifier's own order of the same labels stays.
        if set(config.label2id) != set(task.labels):
            config.label2id = {name: index for index, name in enumerate(task.labels)}
            config.id2label = dict(enumerate(task.labels))


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
        with naming(f"--config_overrides {arguments.config_overrides}", ValueError, KeyError):
            config.update_from_string(arguments.config_overrides)
    return config


def _read_config(argument: str, name: str, arguments: ModelArguments) -> ToMePerceiverConfig:
    with naming(f"--{argument} {name}", OSError, ValueError):
        if name.endswith(".json"):
            return ToMePerceiverConfig.from_dict(json.loads(Path(name).read_text()))
        return ToMePerceiverConfig.from_pretrained(name, **arguments.download_options())
