# SPDX-License-Identifier: Apache-2.0
"""Read datasets and files of examples: never from a stale cache, and only the files that the user named.

Wraps `datasets`, whose cache and type inference can silently return other data; the loaders of all tasks call it.
"""

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

# Separators to try, by file extension; Excel writes semicolons in countries with a decimal comma.
_SEPARATORS = {"csv": (",", ";", "\t"), "tsv": ("\t",)}
TABLE_FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
"""Extensions of files with columns."""
TEXT_FORMATS = (*TABLE_FORMATS, "txt")
"""Extensions of files with columns or with a sentence in each line."""
_NO_EXAMPLES = "has no example; add one or more, in a table below a line with the names of its columns"
# Column in which pandas stores the index of a data frame.
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
# File and folder names of held-out splits. `datasets` recognizes them in lower case only, and reads all other files as
# the training split.
_HELD_OUT_NAME = re.compile(
    r"(?i)(.*[-._ 0-9/])?(val|valid|validation|dev|eval|evaluation|test|testing)([-._ 0-9/].*)?"
)
# Names of columns that hold text, as `column_key` returns them.
_TEXT_NAMES = (
    "sentence", "sentences", "sentence1", "text", "texts", "content", "body", "review", "reviewtext", "reviewbody",
    "tweet", "tweettext", "comment", "commenttext", "message", "post", "utterance", "document", "article",
)  # fmt: skip


def column_key(name: str) -> str:
    """Return the name of a column normalized for comparison: "sentence1" for "Sentence 1" and "sentence_1"."""
    return re.sub(r"[-_\s]", "", name).casefold()


def means_text(name: str) -> bool:
    """Whether a column's name suggests that it holds text, such as "sentence" or "review"."""
    return column_key(name) in _TEXT_NAMES


def file_extension(path: str) -> str:
    """Return the extension of a file in lower case, without the dot: "csv"."""
    return Path(path).suffix.removeprefix(".").lower()


def read_dataset(
    argument: str, dataset: str, config: str | None, overwrite_cache: bool, **download: Any
) -> DatasetDict:
    """Return the splits of a dataset on the Hub or in a local folder.

    Args:
        argument: the argument that chose the dataset, with its value.
        dataset, config: name and configuration, as for `datasets.load_dataset`.
        overwrite_cache: whether to download and read again, instead of using the cache.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: if `datasets` cannot read the data.
    """
    options = dict(download)
    is_local = Path(dataset).is_dir()
    if is_local:
        if any(character in str(Path(dataset).resolve()) for character in "*?["):
            raise BadInput(
                f"{argument}: must be a folder without *, ? or [ in its path, which are read as patterns; rename it"
            )
        options["config_id"] = f"{config or 'default'}-{_fingerprint(Path(dataset))}"
    with naming(argument, Exception):
        builder = load_dataset_builder(dataset, config, **download)
        files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
        local = [path for paths in files.values() for path in paths] if is_local else []
        if local and list(files) == ["train"] and "data_files" not in download:
            _check_split_names(argument, Path(dataset), local, builder.name == "imagefolder")
        if local and builder.name in ("csv", "json"):
            return _read_tables(argument, files, builder.info.features, overwrite_cache, **download)
        if builder.name == "csv":
            # By default pandas would also read a sentence "null" or a class "None" as missing.
            options |= {"keep_default_na": False, "na_values": [""]}
        if overwrite_cache:
            options |= {"download_mode": DownloadMode.FORCE_REDOWNLOAD, "verification_mode": VerificationMode.NO_CHECKS}
        splits = load_dataset(dataset, config, **options)
        _check_stored_names(local)
    if not isinstance(splits, DatasetDict):
        raise BadInput(f"{argument}: must be a dataset with splits")
    return DatasetDict({name: _without_index(split) for name, split in splits.items()})


def _read_tables(
    argument: str, files: dict[str, list[str]], features: Features | None, overwrite_cache: bool, **download: Any
) -> DatasetDict:
    """Read the tables of a local folder in the same way as single files."""
    endings = {file_extension(path) for paths in files.values() for path in paths}
    if not endings <= set(TABLE_FORMATS):
        raise BadInput(f"{argument}: holds {', '.join(sorted(endings))} files; unpack them to .csv or .tsv files")
    splits = DatasetDict()
    for split, paths in files.items():
        tables = [read_file(f"{argument}: {Path(path).name}", path, overwrite_cache, **download) for path in paths]
        joined = concatenate_datasets(tables)
        splits[split] = joined if features is None else joined.cast(features)
    return splits


def read_file(argument: str, path: str, overwrite_cache: bool, **download: Any) -> Dataset:
    """Return the examples of one file.

    All values of .csv, .tsv, .json and .jsonl files are read as text, spelled as in the file; an empty cell is missing.

    Args:
        argument: the argument that names the file, with its value.
        path: path of a file with one of the extensions `TEXT_FORMATS`.
        overwrite_cache, download: as for `read_dataset`.

    Raises:
        BadInput: for a file that is truncated, empty or not of the format that its extension says.
    """
    kind, absolute = file_extension(path), str(Path(path).resolve())
    fingerprint = _fingerprint(Path(absolute))
    with naming(argument, Exception):
        if kind in ("parquet", "txt"):
            if kind == "txt":
                _check_lines(path)
            options = {"config_id": f"default-{fingerprint}", "data_files": glob.escape(absolute), **download}
            if overwrite_cache:
                options["download_mode"] = DownloadMode.FORCE_REDOWNLOAD
            # `datasets` calls the only split "train".
            return _without_index(load_dataset("text" if kind == "txt" else kind, split="train", **options))
        if kind in _SEPARATORS:
            features = Features({name: Value("string") for name in _csv_header(path)[1] if name})
        else:
            features = _json_columns(path)
        if not features:
            raise ValueError(_NO_EXAMPLES)
        try:
            dataset = Dataset.from_generator(
                _rows,
                features=features,
                cache_dir=download.get("cache_dir"),
                gen_kwargs={
                    "path": absolute,
                    "names": tuple(features),
                    "fingerprint": f"{fingerprint}{time_ns() if overwrite_cache else ''}",
                },
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    count = len(dataset)
    while count and not any(dataset[count - 1].values()):
        count -= 1
    if count == 0:
        raise BadInput(f"{argument}: {_NO_EXAMPLES}")
    if count < len(dataset):
        logger.warning("%s: %d empty rows at its end are left out", argument, len(dataset) - count)
    return _without_index(dataset.select(range(count)))


def _rows(path: str, names: tuple[str, ...], fingerprint: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table; `datasets` caches them by these arguments, so `fingerprint` renews the cache."""
    for row in (_csv_rows if file_extension(path) in _SEPARATORS else _json_rows)(path):
        yield {name: row.get(name) for name in names}


def with_column(dataset: Dataset, column: str, values: Iterable[Any], feature: Any) -> Dataset:
    """Return the examples with the values of a column replaced."""
    added = dataset.add_column(f"{column} ", list(values), feature=feature)
    return added.remove_columns(column).rename_column(f"{column} ", column).select_columns(dataset.column_names)


def type_name(feature: Any) -> str:
    """Return the type of a column: a dtype such as "string" or "int64", or a class of feature such as "List"."""
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def is_string(feature: Any) -> bool:
    """Whether a column of this feature holds strings."""
    return type_name(feature) in ("string", "large_string")


def _without_index(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([name for name in dataset.column_names if _PANDAS_INDEX.fullmatch(name)])


def _csv_header(path: str) -> tuple[str, list[str]]:
    """Return the separator and the column names of a .csv or .tsv file; an unnamed column is ""."""
    with _open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        separator = max(_SEPARATORS[file_extension(path)], key=partial(_rate_separator, first))
        file.seek(0)
        names = [name.strip() for name in next(filter(None, csv.reader(file, delimiter=separator, strict=True)), [])]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"has the column '{min(twice)}' twice; give each column a name of its own")
    return separator, names


def _rate_separator(header: str, separator: str) -> tuple[int, bool]:
    """Rate a separator by the header it gives: number of known column names, then whether it splits at all."""
    names = next(csv.reader([header], delimiter=separator), [])
    return sum(means_text(name) or column_key(name) == "label" for name in names), len(names) > 1


def _csv_rows(path: str) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a .csv or .tsv file; refuse malformed rows, where pandas shifts columns or joins lines."""
    separator, names = _csv_header(path)
    csv.field_size_limit(2**31 - 1)
    with _open_text(path) as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            next(filter(None, lines), None)
            blank = 0
            for fields in lines:
                if not fields:
                    blank = lines.line_num
                    continue
                if blank and len(names) == 1:
                    raise ValueError(f"line {blank} is empty; remove it or fill it in")
                _check_fields(f"line {lines.line_num}", fields, len(names), separator)
                yield {name: field or None for name, field in zip(names, fields, strict=True) if name}
        except csv.Error as error:
            raise ValueError(
                f"line {lines.line_num}: {error}; quote fields that contain a quotation mark, and double the quotation "
                "marks inside"
            ) from None


def _check_fields(where: str, fields: list[str], count: int, separator: str) -> None:
    if len(fields) != count:
        more = "more" if len(fields) > count else "fewer"
        raise ValueError(
            f"{where}: has {more} fields than the header ({len(fields)}, not {count}); put fields that contain "
            f"{separator!r} in quotation marks"
        )
    if separator == "\t" and any("\n" in field or "\r" in field for field in fields):
        raise ValueError(
            f"{where}: ends a quoted field that began in an earlier line; quote fields that contain a quotation mark, "
            "and double the quotation marks inside"
        )


def _json_columns(path: str) -> Features:
    features = Features()
    for row in _json_rows(path):
        for name, value in row.items():
            nested = isinstance(value, (dict, list)) or isinstance(features.get(name), Json)
            features[name] = Json() if nested else Value("string")
    return features


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list, or of JSON lines, with numbers spelled as in the file."""
    with _open_text(path) as file:
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
    """Check that a file is UTF-8 and not empty; pyarrow would fail only later, when the text is used."""
    with _open_text(path) as file:
        if not sum(bool(part.strip()) for part in iter(partial(file.read, 2**20), "")):
            raise ValueError(_NO_EXAMPLES)


@contextmanager
def _open_text(path: str) -> Iterator[TextIO]:
    """Open a UTF-8 text file; for another encoding raise a `ValueError` that says what to do."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; save it as UTF-8 (in Excel: CSV UTF-8)") from None


def _check_split_names(argument: str, folder: Path, files: Iterable[str], of_images: bool) -> None:
    """Refuse training files whose names say that they are held out, such as Test.csv or Testing/cat/1.png.

    For images, the folder directly above an image is its class, so its name is not checked.
    """
    for file in sorted(files):
        relative = Path(os.path.relpath(file, folder.absolute()))
        if _HELD_OUT_NAME.fullmatch(str(relative.parent.parent if of_images else relative.with_suffix(""))):
            raise BadInput(
                f"{argument}: {relative} would be read as a part of split 'train'; name files and folders in lower "
                "case by their splits, train, validation and test"
            )


def _check_stored_names(files: list[str]) -> None:
    """Check that all Parquet files list their classes in one order: `datasets` uses the first file's order for all."""
    first: dict[str, tuple[str, list[str]]] = {}
    for file in files:
        if file_extension(file) != "parquet":
            continue
        stored = (pq.read_schema(file).metadata or {}).get(b"huggingface")
        features = Features.from_dict(json.loads(stored)["info"]["features"]) if stored else {}
        for column, feature in features.items():
            if isinstance(feature, ClassLabel):
                other, names = first.setdefault(column, (file, feature.names))
                if names != feature.names:
                    raise ValueError(
                        f"the classes of column '{column}' are {feature.names} in {Path(file).name} and {names} in "
                        f"{Path(other).name}; they must be the same names in the same order"
                    )


def _fingerprint(place: Path) -> str:
    """Return a digest of the current state of a file, or of all files below a folder.

    The cache of `datasets` identifies a folder that has a dataset card by its name only, and a file by its modification
    time, which a copy of another file may share. The digest includes the change time (ctime), which is never copied.
    """
    digest = hashlib.sha256()
    below = [Path(parent) / name for parent, _, names in os.walk(place, followlinks=True) for name in names]
    for path in sorted(below) or [place]:
        if path.exists():
            status = path.stat()
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            digest.update(os.fsencode(f"{path.resolve()}\0{status.st_size} {status.st_ino} {times}\n"))
    return digest.hexdigest()[:16]
