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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DownloadMode,
    Features,
    Json,
    List,
    Value,
    VerificationMode,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)

from experiments.errors import BadInput, naming, one_line

logger = logging.getLogger(__name__)

# Only an empty cell is missing: a sentence "null" and a class "None" are not.
_ONLY_EMPTY_IS_MISSING: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
_READERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
# Excel writes semicolons where the decimal mark is a comma.
_SEPARATORS = {"csv": (",", ";", "\t"), "tsv": ("\t",)}
TABLE_FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
"""Endings of files with columns."""
TEXT_FORMATS = (*TABLE_FORMATS, "txt")
"""The same, and of files whose lines are sentences."""
# The index of a data frame, which pandas stores as a column.
_INDEX = re.compile(r"__index_level_\d+__")
_UNNAMED = "__unnamed_{}__"
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


def read_dataset(
    argument: str, dataset: str, config: str | None, anew: bool, texts: Collection[str] = (), **download: Any
) -> DatasetDict:
    """The splits of a dataset on the Hub or in a local folder.

    Args:
        argument: that chose the dataset, with its value, for error messages.
        dataset, config: as `datasets.load_dataset` takes them.
        anew: whether to read again what is cached, also what was downloaded.
        texts: names of columns that hold text, beside those that mean it; their numbers and dates keep their spelling.
        download: `cache_dir` and `token`.

    Raises:
        BadInput: for whatever keeps `datasets` from reading it.
    """
    options = dict(download)
    if is_local := Path(dataset).is_dir():
        if any(character in str(Path(dataset).resolve()) for character in "*?["):
            raise BadInput(f"{argument}: must be a folder without *, ? and [ in its path, which stand for others")
        options["config_id"] = f"{config or 'default'}-{_state(_files_below(Path(dataset)))}"
    with naming(argument, Exception):
        builder = load_dataset_builder(dataset, config, **download)
        files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
        endings = {ending(file) for paths in files.values() for file in paths}
        of_images = builder.name == "imagefolder"
        if is_local and list(files) == ["train"] and "data_files" not in download:
            _check_split_names(argument, Path(dataset), files["train"], of_images)
        for file in (file for paths in files.values() for file in paths if is_local and of_images):
            if Path(file).name == "metadata.csv":
                _check_metadata(f"{argument}: metadata.csv", file)
        if is_local and builder.name in ("csv", "json") and endings <= {"csv", "tsv", "json", "jsonl"}:
            return _read_files(argument, files, builder.info.features, anew, texts, **download)
        if is_local and builder.name == "csv":
            raise BadInput(f"{argument}: holds {', '.join(sorted(endings))} files; unpack them to .csv or .tsv files")
        if builder.name == "csv":
            options |= _ONLY_EMPTY_IS_MISSING
        if anew:
            options |= {"download_mode": DownloadMode.FORCE_REDOWNLOAD, "verification_mode": VerificationMode.NO_CHECKS}
        splits = load_dataset(dataset, config, **options)
        if is_local:
            _check_stored_names([file for paths in files.values() for file in paths])
    if not isinstance(splits, DatasetDict):
        raise BadInput(f"{argument}: must be a dataset with splits")
    return DatasetDict({name: _without_index(split) for name, split in splits.items()})


def _read_files(
    argument: str,
    files: dict[str, list[str]],
    features: Features | None,
    anew: bool,
    texts: Collection[str],
    **download: Any,
) -> DatasetDict:
    """Read the tables of a local folder as if each were named by an argument."""
    splits = DatasetDict()
    for split, paths in files.items():
        tables = [read_file(f"{argument}: {Path(path).name}", path, anew, texts, **download) for path in paths]
        joined = concatenate_datasets(tables)
        splits[split] = joined if features is None else joined.cast(features)
    return splits


def read_file(argument: str, path: str, anew: bool, texts: Collection[str] = (), **download: Any) -> Dataset:
    """The examples of one file.

    Every column of a .csv or .tsv file is text, spelled as it is there, and only an empty cell is missing.

    Args:
        argument: that names the file, with its value, for error messages.
        path: of a file that ends in one of `TEXT_FORMATS`.
        anew, texts, download: as for `read_dataset`.

    Raises:
        BadInput: for a file that is cut, empty, or of another shape than its name says.
    """
    kind, options = _READERS[ending(path)], dict(download)
    table = _check_table(argument, path) if kind == "csv" else None
    if kind in ("json", "text"):
        with naming(argument, OSError):
            _check_text(argument, path)
    if table is not None:
        columns = Features({name: Value("string") for name in table.names})
        options |= _ONLY_EMPTY_IS_MISSING
        options |= {"sep": table.separator, "names": table.names, "header": 0, "features": columns}
    if anew:
        options["download_mode"] = DownloadMode.FORCE_REDOWNLOAD
    absolute = Path(path).resolve()
    if "::" in str(absolute):
        raise BadInput(f"{argument}: must be a path without '::', which `datasets` takes for an archive")
    with naming(argument, Exception):
        # A file that was changed, or replaced by one with the time of the old one, is another.
        config_id = f"default-{_state([absolute])}"
        # Whatever is in a single file, `datasets` calls it "train".
        dataset = load_dataset(
            kind, data_files=glob.escape(str(absolute)), split="train", config_id=config_id, **options
        )
    if kind == "json":
        dataset = _with_spellings(dataset, path, texts)
    if table is not None:
        if len(dataset) != table.rows:
            raise BadInput(
                f"{argument}: has {table.rows} rows below its header and {len(dataset)} examples, because of a "
                "quotation mark; put fields with one in quotation marks, and double it"
            )
        if table.empty:
            logger.warning("%s: %d empty rows at its end are left out", argument, table.empty)
            dataset = dataset.select(range(table.rows - table.empty))
    return _without_index(dataset)


def with_column(dataset: Dataset, column: str, values: Sequence[Any], feature: Any) -> Dataset:
    """The same examples with other values in a column."""
    added = dataset.add_column(f"{column} ", values, feature=feature)
    return added.remove_columns(column).rename_column(f"{column} ", column).select_columns(dataset.column_names)


def _without_index(dataset: Dataset) -> Dataset:
    unnamed = re.compile(_UNNAMED.format(r"\d+"))
    return dataset.remove_columns(
        [name for name in dataset.column_names if _INDEX.fullmatch(name) or unnamed.fullmatch(name)]
    )


@dataclass(frozen=True)
class _Table:
    """Shape of a .csv or .tsv file: how many rows are below its header, and how many of them, at its end, are empty."""

    separator: str
    names: list[str]
    rows: int
    empty: int


def _check_table(argument: str, path: str) -> _Table:
    """Read through a .csv or .tsv file; pandas shifts columns and joins lines where it should stop.

    Raises:
        BadInput: for names that are there twice, or lines that have more or fewer fields than the header.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            separator = max(_SEPARATORS[ending(path)], key=partial(_known_names, first))
            file.seek(0)
            lines = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(filter(None, lines), [])]
            if twice := {name for name in header if name and header.count(name) > 1}:
                raise BadInput(f"{argument}: has the column '{min(twice)}' twice; give each column a name of its own")
            rows = empty = blank = 0
            for fields in lines:
                if not fields:
                    blank = lines.line_num
                    continue
                if blank and len(header) == 1:
                    raise BadInput(f"{argument}: line {blank} is empty; remove it, or write a text there")
                rows += 1
                empty = 0 if any(fields) else empty + 1
                _check_fields(f"{argument}: line {lines.line_num}", fields, len(header), separator)
    except OSError as error:
        raise BadInput(f"{argument}: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(argument, error) from error
    except csv.Error as error:
        raise BadInput(
            f"{argument}: line {lines.line_num}: {error}; put a field with a quotation mark in quotation marks, and "
            "double those inside"
        ) from error
    if rows == empty:
        raise BadInput(f"{argument}: has no example below its header; there must be one or more")
    names = [name or _UNNAMED.format(place) for place, name in enumerate(header)]
    return _Table(separator, names, rows, empty)


def _check_text(argument: str, path: str) -> None:
    """Check that a file is UTF-8 and not empty; pyarrow reads other text and fails where it is used."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            if not sum(bool(part.strip()) for part in iter(partial(file.read, 2**20), "")):
                raise BadInput(f"{argument}: is empty; there must be one example or more")
    except UnicodeDecodeError as error:
        raise _not_utf8(argument, error) from error


def _not_utf8(argument: str, error: UnicodeDecodeError) -> BadInput:
    return BadInput(f"{argument}: {error}; save it as UTF-8 (in Excel: CSV UTF-8)")


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


def _check_metadata(argument: str, path: str) -> None:
    """Check that a metadata.csv is one that `datasets` can read."""
    table = _check_table(argument, path)
    if table.separator != ",":
        raise BadInput(f"{argument}: has {table.separator!r} between its columns; it must be ','")
    if not any(re.fullmatch(r"(.*_)?file_names?", name) for name in table.names):
        raise BadInput(f"{argument}: has no column 'file_name', only {', '.join(map(repr, table.names))}; add it")


def _known_names(header: str, separator: str) -> tuple[int, bool]:
    """How much speaks for a separator: names of columns that are known, or any others."""
    names = next(csv.reader([header], delimiter=separator), [])
    return sum(means_text(name) or column_key(name) == "label" for name in names), len(names) > 1


def _check_fields(where: str, fields: list[str], count: int, separator: str) -> None:
    if len(fields) != count:
        more = "more" if len(fields) > count else "fewer"
        raise BadInput(
            f"{where}: has {more} fields than its header ({len(fields)}, not {count}); put a field with "
            f"{separator!r} in quotation marks"
        )
    if separator == "\t" and any("\n" in field or "\r" in field for field in fields):
        raise BadInput(
            f"{where}: ends an example that began in a line before, at a quotation mark; put fields with one in "
            "quotation marks, and double it"
        )


def _with_spellings(dataset: Dataset, path: str, texts: Collection[str]) -> Dataset:
    """Give columns of text that a JSON reader took for dates, numbers or truth values the spelling of the file."""
    columns = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, Json)
        or str(getattr(feature, "dtype", "")).startswith(("timestamp", "date", "time"))
        or ((name in texts or means_text(name)) and not is_string(feature) and not isinstance(feature, (dict, List)))
    ]
    if not columns:
        return dataset
    content = Path(path).read_text(encoding="utf-8-sig")
    parts = [content] if content.lstrip().startswith("[") else filter(str.strip, content.split("\n"))
    read = [json.loads(part, parse_int=str, parse_float=str) for part in parts]
    rows = read[0] if isinstance(read[0], list) else read
    for name in columns:
        values = [row.get(name) for row in rows]
        if not any(isinstance(value, (dict, list)) for value in values):
            spelled = [json.dumps(value) if isinstance(value, bool) else value for value in values]
            dataset = with_column(dataset, name, spelled, Value("string"))
    return dataset


def is_string(feature: Any) -> bool:
    """Whether a column of this feature holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


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
