# SPDX-License-Identifier: Apache-2.0
"""Reading datasets and files of examples: as they are now, and only what was named."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadMode,
    Features,
    VerificationMode,
    load_dataset,
    load_dataset_builder,
)

from experiments.errors import BadInput, naming

# What only an empty cell is: a sentence "null" and a class "None" are not missing.
_ONLY_EMPTY_IS_MISSING: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", _ONLY_EMPTY_IS_MISSING),
    "tsv": ("csv", _ONLY_EMPTY_IS_MISSING | {"sep": "\t"}),
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
    "txt": ("text", {}),
}
TABLE_FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
"""Endings of files with columns."""
TEXT_FORMATS = (*TABLE_FORMATS, "txt")
"""The same, and of files whose lines are sentences."""
# What pandas calls the first fields of lines that have more of them than the header.
_SHIFTED = "__index_level_0__"


def ending(path: str) -> str:
    """What a file's name ends in, in lower case: "csv"."""
    return Path(path).suffix.removeprefix(".").lower()


def read_dataset(argument: str, dataset: str, config: str | None, anew: bool, **download: Any) -> DatasetDict:
    """The splits of a dataset on the Hub or in a local folder.

    Args:
        argument: that chose the dataset, with its value, for error messages.
        dataset, config: as `datasets.load_dataset` takes them.
        anew: whether to read again what is cached, also what was downloaded.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: for whatever keeps `datasets` from reading it.
    """
    options = dict(download)
    if anew:
        options |= {"download_mode": DownloadMode.FORCE_REDOWNLOAD, "verification_mode": VerificationMode.NO_CHECKS}
    if Path(dataset).is_dir():
        if any(character in str(Path(dataset).resolve()) for character in "*?["):
            raise BadInput(f"{argument}: allowed are folders without *, ? and [ in their path, which stand for others")
        options["config_id"] = f"{config or 'default'}-{_state(_files_below(Path(dataset)))}"
    with naming(argument, Exception):
        splits = load_dataset(dataset, config, **options)
        if "config_id" in options:
            builder = load_dataset_builder(dataset, config, cache_dir=download.get("cache_dir"))
            _check_stored_names([file for files in (builder.config.data_files or {}).values() for file in files])
    if not isinstance(splits, DatasetDict):
        raise BadInput(f"{argument}: allowed is a dataset with splits")
    return splits


def read_file(argument: str, path: str, anew: bool, **download: Any) -> Dataset:
    """The examples of one file.

    Args:
        argument: that names the file, with its value, for error messages.
        path: of a file that ends in one of `TEXT_FORMATS`.
        anew, download: as for `read_dataset`.

    Raises:
        BadInput: for a file that is cut, empty, or of another shape than its name says.
    """
    builder, options = _READERS[ending(path)]
    _check_header(argument, path)
    if anew:
        download = download | {"download_mode": DownloadMode.FORCE_REDOWNLOAD}
    absolute = Path(path).resolve()
    if "::" in str(absolute):
        raise BadInput(f"{argument}: allowed are paths without '::', which `datasets` takes for an archive")
    with naming(argument, Exception):
        # A file that was changed, or replaced by one with the time of the old one, is another.
        config_id = f"default-{_state([absolute])}"
        # Whatever is in a single file, `datasets` calls it "train".
        dataset = load_dataset(
            builder, data_files=glob.escape(str(absolute)), split="train", config_id=config_id, **options, **download
        )
    if _SHIFTED in dataset.column_names:
        raise BadInput(f"{argument}: its lines have more fields than its header; allowed are as many")
    if ending(path) == "tsv" and (lines := _lines(path) - 1) != len(dataset):
        raise BadInput(
            f"{argument}: has {lines} lines below its header and {len(dataset)} examples, because of a quotation mark "
            "at the beginning of a field; allowed is an example in each line"
        )
    return dataset


def _check_stored_names(files: list[str]) -> None:
    """`datasets` takes the names of classes from the first file for all of them, whatever order the others have."""
    first: dict[str, tuple[str, list[str]]] = {}
    for file in files:
        if ending(file) != "parquet":
            continue
        stored = (pq.read_schema(file).metadata or {}).get(b"huggingface")
        features = Features.from_dict(json.loads(stored)["info"]["features"]) if stored else {}
        for column, feature in features.items():
            if isinstance(feature, ClassLabel):
                other, names = first.setdefault(column, (file, feature.names))
                if names != feature.names:
                    raise ValueError(
                        f"the classes of column '{column}' are {feature.names} in {Path(file).name} and {names} in "
                        f"{Path(other).name}; allowed is one order of the same names"
                    )


def _check_header(argument: str, path: str) -> None:
    """Two columns of one name would become two sentences, the second under a name of its own."""
    separator = {"csv": ",", "tsv": "\t"}.get(ending(path))
    if separator is None:
        return
    with naming(argument, OSError, ValueError, csv.Error), Path(path).open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise BadInput(f"{argument}: has the column '{min(twice)}' twice; allowed are columns of different names")


def _lines(path: str) -> int:
    with Path(path).open("rb") as file:
        return sum(1 for line in file if line.strip(b"\r\n"))


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent) / name for name in names)


def _state(files: Iterable[Path]) -> str:
    """Of files as they are now. `datasets` knows a folder with a card by its name, and a file by its time, which a copy
    of another may have too; the time of the last change of the file itself cannot be set."""
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.exists():
            status = path.stat()
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            digest.update(os.fsencode(f"{path.resolve()}\0{status.st_size} {status.st_ino} {times}\n"))
    return digest.hexdigest()[:16]
