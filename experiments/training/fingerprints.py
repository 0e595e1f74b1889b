# SPDX-License-Identifier: Apache-2.0
"""Fingerprints (SHA-256) of weights, configs and data: equal content has equal fingerprints, wherever it is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from configuration_tome_perceiver import MERGING_FIELDS, ToMePerceiverConfig

# Config fields that set only how the model merges. num_blocks is left out because it also sets which layers run.
MERGING_SETTINGS = tuple(name for name in MERGING_FIELDS if name != "num_blocks")
# Config fields that do not change outputs: where the config comes from, what wrote it, and the frontier.
WITHOUT_EFFECT = (
    "_name_or_path", "transformers_version", "architectures", "auto_map", "model_type", "dtype", "merge_frontier",
)  # fmt: skip
# Number of rows read from a dataset at once.
ROWS_PER_READ = 256


def weights_fingerprint(weights: PreTrainedModel | Path) -> str:
    """Return the fingerprint of a model's parameters and buffers, or of those in a safetensors file."""
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
    """Return the fingerprint of a config's fields, with or without its merging settings."""
    left_out = WITHOUT_EFFECT if merging else (*WITHOUT_EFFECT, *MERGING_SETTINGS)
    return digest_of(sorted((name, repr(value)) for name, value in config.to_dict().items() if name not in left_out))


def data_fingerprint(splits: Mapping[str, Any], desc: str, labels: Iterable[str]) -> str:
    """Return the fingerprint of examples in their order: values of all columns, and bytes of image files.

    Args:
        splits: splits by suffix, each a `datasets.Dataset` (read without its transforms) or a list of dictionaries.
        desc: name of the examples in the progress bar.
        labels: names of the classes.
    """
    digest = hashlib.sha256(repr(list(labels)).encode())
    for suffix, split in splits.items():
        _update(digest, suffix)
        for row in tqdm(_rows(split), f"fingerprint of {desc}", len(split), unit="example", delay=2):
            _update(digest, row)
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return the fingerprint of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Return the fingerprint of a value made of JSON types and tensors, whatever the order of keys in dictionaries."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _rows(split: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(split, Dataset):
        yield from (split[index] for index in range(len(split)))
        return
    # Read rows as stored, neither decoded nor transformed.
    for table in split.with_format("arrow").iter(ROWS_PER_READ):
        yield from table.to_pylist()


def _update(digest: Any, value: Any) -> None:
    """Add a value to a digest; its type and length come first, so that different values add different bytes."""
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
