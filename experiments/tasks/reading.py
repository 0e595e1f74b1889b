# SPDX-License-Identifier: Apache-2.0
"""Reading datasets and files of examples: as they are now, and only what was named."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import time_ns
from typing import Any, TextIO

import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadMode,
    Features,
    Json,
    Value,
    VerificationMode,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError

from experiments.errors import BadInput, naming

logger = logging.getLogger(__name__)

# Excel writes semicolons where the decimal mark is a comma.
_SEPARATORS = {"csv": (",", ";", "\t"), "tsv": ("\t",)}
TABLE_FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
"""Endings of files with columns."""
TEXT_FORMATS = (*TABLE_FORMATS, "txt")
"""The same, and of files whose lines are sentences."""
_EMPTY = "has no example; there must be one or more, in a table below a line with the names of its columns"
# The index of a data frame, which pandas stores as a column.
_INDEX = re.compile(r"__index_level_\d+__")
# Names of splits that `datasets` knows in lower case only; files of any other name are its training split.
_HELD_OUT = re.compile(r"(?i)(.*[-._ 0-9/])?(val|valid|validation|dev|eval|evaluation|test|testing)([-._ 0-9/].*)?")
_TEXT_NAMES = (
    "sentence", "sentences", "sentence1", "text", "texts", "content", "body", "review", "reviewtext", "reviewbody",
    "tweet", "tweettext", "comment", "commenttext", "message", "post", "utterance", "document", "article",
)  # fmt: skip


def column_key(name: str) -> str:
    """Return the name of a column as it is compared: "Sentence 1" and "sentence_1" are "sentence1"."""
    return re.sub(r"[-_\s]", "", name).casefold()


def means_text(name: str) -> bool:
    """Whether a column's name says that it holds the text."""
    return column_key(name) in _TEXT_NAMES


def ending(path: str) -> str:
    """What a file's name ends in, in lower case: "csv"."""
    return Path(path).suffix.removeprefix(".").lower()


def read_dataset(argument: str, dataset: str, config: str | None, anew: bool, **download: Any) -> DatasetDict:
    """Return the splits of a dataset on the Hub or in a local folder.

    Args:
        argument: that chose the dataset, with its value.
        dataset, config: as `datasets.load_dataset` takes them.
        anew: whether to read again what is cached, also what was downloaded.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: for whatever keeps `datasets` from reading it.
    """
    options = dict(download)
    is_local = Path(dataset).is_dir()
    if is_local:
        if any(character in str(Path(dataset).resolve()) for character in "*?["):
            raise BadInput(f"{argument}: must be a folder without *, ? and [ in its path, which are patterns")
        options["config_id"] = f"{config or 'default'}-{_state(Path(dataset))}"
    with naming(argument, Exception):
        builder = load_dataset_builder(dataset, config, **download)
        files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
        local = [path for paths in files.values() for path in paths] if is_local else []
        if local and list(files) == ["train"] and "data_files" not in download:
            _check_split_names(argument, Path(dataset), local, builder.name == "imagefolder")
        if local and builder.name in ("csv", "json"):
            return _read_tables(argument, files, builder.info.features, anew, **download)
        if builder.name == "csv":
            # Only an empty cell is missing: a sentence "null" and a class "None" are not.
            options |= {"keep_default_na": False, "na_values": [""]}
        if anew:
            options |= {"download_mode": DownloadMode.FORCE_REDOWNLOAD, "verification_mode": VerificationMode.NO_CHECKS}
        splits = load_dataset(dataset, config, **options)
        _check_stored_names(local)
    if not isinstance(splits, DatasetDict):
        raise BadInput(f"{argument}: must be a dataset with splits")
    return DatasetDict({name: _without_index(split) for name, split in splits.items()})


def _read_tables(
    argument: str, files: dict[str, list[str]], features: Features | None, anew: bool, **download: Any
) -> DatasetDict:
    """Read the tables of a local folder as if each were named by an argument."""
    endings = {ending(path) for paths in files.values() for path in paths}
    if not endings <= set(TABLE_FORMATS):
        raise BadInput(f"{argument}: holds {', '.join(sorted(endings))} files; unpack them to .csv or .tsv files")
    splits = DatasetDict()
    for split, paths in files.items():
        tables = [read_file(f"{argument}: {Path(path).name}", path, anew, **download) for path in paths]
        joined = concatenate_datasets(tables)
        splits[split] = joined if features is None else joined.cast(features)
    return splits


def read_file(argument: str, path: str, anew: bool, **download: Any) -> Dataset:
    """Return the examples of one file.

    Every column of a .csv, .tsv, .json or .jsonl file is text, spelled as it is there; an empty cell is missing.

    Args:
        argument: that names the file, with its value.
        path: of a file that ends in one of `TEXT_FORMATS`.
        anew, download: as for `read_dataset`.

    Raises:
        BadInput: for a file that is cut, empty, or of another shape than its name says.
    """
    kind, absolute = ending(path), str(Path(path).resolve())
    state = _state(Path(absolute))
    with naming(argument, Exception):
        if kind in ("parquet", "txt"):
            if kind == "txt":
                _check_lines(path)
            options = {"config_id": f"default-{state}", "data_files": glob.escape(absolute), **download}
            if anew:
                options["download_mode"] = DownloadMode.FORCE_REDOWNLOAD
            # Whatever is in a single file, `datasets` calls it "train".
            return _without_index(load_dataset("text" if kind == "txt" else kind, split="train", **options))
        if kind in _SEPARATORS:
            features = Features({name: Value("string") for name in _csv_header(path)[1] if name})
        else:
            features = _json_columns(path)
        if not features:
            raise ValueError(_EMPTY)
        try:
            dataset = Dataset.from_generator(
                _rows,
                features=features,
                cache_dir=download.get("cache_dir"),
                gen_kwargs={"path": absolute, "names": tuple(features), "state": f"{state}{time_ns() if anew else ''}"},
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    count = len(dataset)
    while count and not any(dataset[count - 1].values()):
        count -= 1
    if count == 0:
        raise BadInput(f"{argument}: {_EMPTY}")
    if count < len(dataset):
        logger.warning("%s: %d empty rows at its end are left out", argument, len(dataset) - count)
    return _without_index(dataset.select(range(count)))


def _rows(path: str, names: tuple[str, ...], state: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table; `datasets` keeps them by these arguments, of which `state` is of the file."""
    for row in (_csv_rows if ending(path) in _SEPARATORS else _json_rows)(path):
        yield {name: row.get(name) for name in names}


def with_column(dataset: Dataset, column: str, values: Iterable[Any], feature: Any) -> Dataset:
    """Return the examples with other values in a column."""
    added = dataset.add_column(f"{column} ", list(values), feature=feature)
    return added.remove_columns(column).rename_column(f"{column} ", column).select_columns(dataset.column_names)


def kind_of(feature: Any) -> str:
    """Return what a column holds: a type such as "string" or "int64", or a kind of feature such as "List"."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def is_string(feature: Any) -> bool:
    """Whether a column of this feature holds strings."""
    return kind_of(feature) in ("string", "large_string")


def _without_index(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in dataset.column_names if _INDEX.fullmatch(name)])


def _csv_header(path: str) -> tuple[str, list[str]]:
    """Return the separator of a .csv or .tsv file and the names in its first line, "" for a column without one."""
    with _opened(path) as file:
        first = next((line for line in file if line.strip()), "")
        separator = max(_SEPARATORS[ending(path)], key=partial(_known_names, first))
        file.seek(0)
        names = [name.strip() for name in next(filter(None, csv.reader(file, delimiter=separator, strict=True)), [])]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"has the column '{min(twice)}' twice; give each column a name of its own")
    return separator, names


def _known_names(header: str, separator: str) -> tuple[int, bool]:
    """Return how much speaks for a separator: names of columns that are known, or any others."""
    names = next(csv.reader([header], delimiter=separator), [])
    return sum(means_text(name) or column_key(name) == "label" for name in names), len(names) > 1


def _csv_rows(path: str) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a .csv or .tsv file; pandas shifts columns and joins lines where it should stop."""
    separator, names = _csv_header(path)
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            next(filter(None, lines), None)
            blank = 0
            for fields in lines:
                if not fields:
                    blank = lines.line_num
                    continue
                if blank and len(names) == 1:
                    raise ValueError(f"line {blank} is empty; remove it, or write a text there")
                _check_fields(f"line {lines.line_num}", fields, len(names), separator)
                yield {name: field or None for name, field in zip(names, fields, strict=True) if name}
        except csv.Error as error:
            raise ValueError(
                f"line {lines.line_num}: {error}; put a field with a quotation mark in quotation marks, and double "
                "those inside"
            ) from None


def _check_fields(where: str, fields: list[str], count: int, separator: str) -> None:
    if len(fields) != count:
        more = "more" if len(fields) > count else "fewer"
        raise ValueError(
            f"{where}: has {more} fields than its header ({len(fields)}, not {count}); put a field with "
            f"{separator!r} in quotation marks"
        )
    if separator == "\t" and any("\n" in field or "\r" in field for field in fields):
        raise ValueError(
            f"{where}: ends an example that began in a line before, at a quotation mark; put fields with one in "
            "quotation marks, and double it"
        )


def _json_columns(path: str) -> Features:
    features = Features()
    for row in _json_rows(path):
        for name, value in row.items():
            nested = isinstance(value, (dict, list)) or isinstance(features.get(name), Json)
            features[name] = Json() if nested else Value("string")
    return features


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list, or of one in each line, with values spelled as in the file."""
    with _opened(path) as file:
        is_list = next(filter(str.strip, file), "").lstrip().startswith("[")
        file.seek(0)
        for part in [file.read()] if is_list else filter(str.strip, file):
            read = json.loads(part, parse_int=str, parse_float=str, object_pairs_hook=_json_object)
            for row in read if is_list else [read]:
                if not isinstance(row, dict):
                    raise ValueError(f"holds {str(row)[:40]!r}; must hold an object with a value for each column")
                yield {name: json.dumps(value) if isinstance(value, bool) else value for name, value in row.items()}


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"has a column twice, among {', '.join(repr(name) for name, _ in pairs)}")
    return dict(pairs)


def _check_lines(path: str) -> None:
    """Check that a file is UTF-8 and not empty; pyarrow reads other text and fails where it is used."""
    with _opened(path) as file:
        if not sum(bool(part.strip()) for part in iter(partial(file.read, 2**20), "")):
            raise ValueError(_EMPTY)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    """Open a text file; an encoding that is none of UTF-8 is a `ValueError` that says what to do."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; save it as UTF-8 (in Excel: CSV UTF-8)") from None


def _check_split_names(argument: str, folder: Path, files: Iterable[str], of_images: bool) -> None:
    """Refuse files that would be trained on, and whose names say that they are held out: Test.csv, Testing/cat/1.png.

    Above an image is the folder of its class, whatever that is called.
    """
    for file in sorted(files):
        relative = Path(os.path.relpath(file, folder.absolute()))
        if _HELD_OUT.fullmatch(str(relative.parent.parent if of_images else relative.with_suffix(""))):
            raise BadInput(
                f"{argument}: {relative} would be read as a part of split 'train'; name files and folders in lower "
                "case by their splits, train, validation and test"
            )


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
                        f"{Path(other).name}; they must be the same names in one order"
                    )


def _state(place: Path) -> str:
    """Return a digest of a file, or of all files below a folder, as they are now.

    `datasets` knows a folder with a card by its name, and a file by its time, which a copy of another may have too; the
    time of the last change of the file itself cannot be set.
    """
    digest = hashlib.sha256()
    below = [Path(parent) / name for parent, _, names in os.walk(place, followlinks=True) for name in names]
    for path in sorted(below) or [place]:
        if path.exists():
            status = path.stat()
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            digest.update(os.fsencode(f"{path.resolve()}\0{status.st_size} {status.st_ino} {times}\n"))
    return digest.hexdigest()[:16]
