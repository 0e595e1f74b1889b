# SPDX-License-Identifier: Apache-2.0
"""What decides an outcome: arguments by their values, weights and data by their content, wherever they were read.

Two runs with the same identity end in the same figures; whatever a folder holds is kept by it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.tasks.base import PreparedTask, Task
from experiments.tasks.redrawn_examples import RedrawnExamples

# Secrets and the speed of reading: nothing of them is written down.
NOT_NOTED = ("token", "cache_dir", "overwrite_cache")
# Where things are read; what was read there counts, by its content.
PLACES = (
    "model_name_or_path", "model_revision", "config_name", "tokenizer_name", "image_processor_name",
    "trust_remote_code", "code_revision", "dataset_name", "train_file", "validation_file", "test_file", "train_dir",
    "validation_dir", "test_dir", "teacher_name_or_path",
)  # fmt: skip
# Of `TrainingArguments`, what does not change the weights or a figure. Whatever is not named here does.
MAY_DIFFER = frozenset({
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
    "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "debug",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object", "eval_do_concat_batches",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "torch_empty_cache_steps", "save_on_each_node", "enable_jit_checkpoint",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_find_unused_parameters", "ddp_backend",
    "ddp_timeout", "local_rank",
})  # fmt: skip
# When training saves: it matters only where an evaluation decides what is kept or how training goes on. When it
# evaluates always matters: that takes random numbers, which dropout then has not.
WHEN = frozenset({
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "metric_for_best_model", "greater_is_better",
})  # fmt: skip
# Of `TrainingArguments`, what a figure of an evaluation depends on.
EVALUATION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "label_smoothing_factor")
# Of a config, what merges, and nothing else.
MERGING = (
    "r", "r_inflection", "min_latents", "proportional_attention", "merge_method", "merge_metric", "merge_groups",
    "latent_groups",
)  # fmt: skip
# Of a config, what says where it was and who wrote it, and what could merge.
NO_SETTINGS = (
    "_name_or_path", "transformers_version", "architectures", "auto_map", "model_type", "dtype", "merge_frontier",
)  # fmt: skip
READ_AT_ONCE = 256
FIRST_INPUTS = 8

Noted = dict[str, Any]
"""Arguments by name, and under `CONTENT` what was read, each by its fingerprint."""
CONTENT = "content"
# Of the contents, those that may be there or not: what is trained on, and what is calibrated on.
TRAIN, CALIBRATION = "train", "calibration"


def noted_arguments(*groups: Any) -> Noted:
    """Dataclasses of arguments as one mapping, without secrets."""
    return {name: value for group in groups for name, value in asdict(group).items() if name not in NOT_NOTED}


def data_fields(data: Any) -> Noted:
    """Of arguments that say which data, those that say how they are read, where that is not the default."""
    defaults = {each.name: each.default for each in type(data).__dataclass_fields__.values()}
    return {
        name: value
        for name, value in noted_arguments(data).items()
        if name not in (*PLACES, "task_name", "dataset_config_name") and value != defaults[name]
    }


def training_fields(arguments: TrainingArguments) -> Noted:
    """What of the training arguments decides weights or figures, as it stands in JSON, and the number of processes."""
    by_evaluation = (
        arguments.load_best_model_at_end
        or arguments.save_strategy == SaveStrategy.BEST
        or _plain(arguments.lr_scheduler_type) == "reduce_lr_on_plateau"
    )
    left_out = MAY_DIFFER if by_evaluation else MAY_DIFFER | WHEN
    names = [name for name in type(arguments).__dataclass_fields__ if name not in left_out]
    fields = {name: _plain(getattr(arguments, name)) for name in names if not name.startswith("_")}
    return fields | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}


def evaluation_fields(arguments: TrainingArguments) -> Noted:
    """What of the training arguments decides the figures of an evaluation."""
    return {name: _plain(getattr(arguments, name)) for name in EVALUATION}


def content(task: Task, prepared: PreparedTask, *, train: bool, calibrates: bool) -> dict[str, str]:
    """What was read, by name: the examples, and the first inputs as the model gets them.

    Args:
        task: the data as they are.
        prepared: the same as a model sees them.
        train: whether training examples matter.
        calibrates: whether a frontier is measured, on training examples if there are no others.
    """

    def fingerprint(splits: Mapping[str, Any], desc: str) -> str:
        return data_fingerprint(splits, desc, task.labels)

    read = {"evaluation": fingerprint(prepared.evaluation, "evaluated examples")}
    if calibrates and prepared.calibration is not None:
        read[CALIBRATION] = fingerprint({"": prepared.calibration}, "samples to calibrate on")
    if train or calibrates and prepared.calibration is None:
        examples = prepared.train.examples if isinstance(prepared.train, RedrawnExamples) else prepared.train
        read[TRAIN] = fingerprint({"": examples}, "training examples")
        if prepared.trained_with is not None:
            read[TRAIN] = digest_of([read[TRAIN], prepared.trained_with])
    if prepared.prediction:
        read["prediction"] = fingerprint(prepared.prediction, "examples to predict")
    # A tokenizer or image processor counts by what it makes: its files also say how it was called last.
    return read | {"inputs": digest_of(prepared.batch(FIRST_INPUTS))}


def weights_fingerprint(weights: PreTrainedModel | Path) -> str:
    """Of a model's parameters and buffers, or of those in a safetensors file: names, shapes and values."""
    digest = hashlib.sha256()
    if isinstance(weights, Path):
        with safe_open(weights, framework="pt") as file:
            for name in sorted(file.keys()):
                _update_tensor(digest, name, file.get_tensor(name))
    else:
        for name, tensor in sorted(weights.state_dict().items()):
            _update_tensor(digest, name, tensor)
    return digest.hexdigest()


def config_fingerprint(config: ToMePerceiverConfig, *, merging: bool = True) -> str:
    """Of the settings of a config.

    Args:
        config: of a model.
        merging: whether what merges counts.
    """
    left_out = NO_SETTINGS if merging else (*NO_SETTINGS, *MERGING)
    return digest_of(sorted((name, repr(value)) for name, value in config.to_dict().items() if name not in left_out))


def data_fingerprint(splits: Mapping[str, Any], desc: str, labels: Iterable[str]) -> str:
    """Of examples in their order: the values of every column, and of an image that is a file, its bytes.

    Args:
        splits: by suffix a `datasets.Dataset`, of which transforms are not applied, or a list of dictionaries.
        desc: what the progress bar says.
        labels: the names that labels stand for.
    """
    digest = hashlib.sha256(repr(list(labels)).encode())
    for suffix, split in splits.items():
        _update(digest, suffix)
        with tqdm(total=len(split), desc=f"fingerprint of {desc}", unit="example", delay=2) as bar:
            for rows in _batches(split):
                for row in rows:
                    _update(digest, row)
                bar.update(len(rows))
    return digest.hexdigest()


def _batches(split: Any) -> Iterable[list[dict[str, Any]]]:
    if isinstance(split, Dataset):
        # As they are stored: neither decoded nor transformed.
        yield from (table.to_pylist() for table in split.with_format("arrow").iter(READ_AT_ONCE))
    else:
        yield from ([split[index]] for index in range(len(split)))


def _update(digest: Any, value: Any) -> None:
    """Add a value to a digest, so that no two differ in silence: each is led by its type and its length."""
    if isinstance(value, Tensor):
        _update_tensor(digest, "", value)
    elif isinstance(value, dict) and set(value) == {"bytes", "path"}:
        data = value["bytes"]
        _update(digest, Path(value["path"]).read_bytes() if data is None and value["path"] is not None else data)
    elif isinstance(value, dict):
        digest.update(f"d{len(value)}:".encode())
        for name in sorted(value):
            _update(digest, name)
            _update(digest, value[name])
    elif isinstance(value, (list, tuple)) and not (value and isinstance(value[0], (int, float))):
        digest.update(f"l{len(value)}:".encode())
        for entry in value:
            _update(digest, entry)
    else:
        spelled = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{type(value).__name__[0]}{len(spelled)}:".encode())
        digest.update(spelled)


def _update_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}:".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(np.ascontiguousarray(data.view(torch.uint8).numpy()).data)


def file_fingerprint(path: Path) -> str:
    """Of the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the fingerprint of JSON's types and tensors; the order of a dictionary's keys does not count."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    value = getattr(value, "value", value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
