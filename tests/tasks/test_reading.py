# SPDX-License-Identifier: Apache-2.0
"""Tests of reading data: files and folders are read as they are now, or refused in one line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from experiments.errors import BadInput
from experiments.tasks.reading import read_dataset, read_file
from tests.support.tiny_texts import write_glue

ROWS = [{"text": "null", "label": "None"}, {"text": "NA", "label": "x"}]


def written(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def table(path: Path, rows: list[dict[str, str]] = ROWS) -> str:
    kind, separator = path.suffix.lower(), {".tsv": "\t"}.get(path.suffix.lower(), ",")
    if kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
        return str(path)
    if kind == ".json":
        return written(path, json.dumps(rows))
    if kind == ".jsonl":
        return written(path, "\n".join(map(json.dumps, rows)))
    return written(path, "\n".join([separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]) + "\n")


def read(path: str) -> Dataset:
    return read_file(f"--train_file {path}", path, overwrite_cache=False)


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.tsv", "a.json", "a.jsonl", "A.JsonL", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    """Also words that pandas reads as missing."""
    assert read(table(tmp_path / name)).to_list() == ROWS


@pytest.mark.parametrize("name", ["a[1].csv", "a b.csv", "{c},d#e%20.csv", "a*?.csv", ".hidden.csv", "x[!a]/y.csv"])
def test_a_path_is_a_path_and_no_pattern(tmp_path, name):
    table(tmp_path / "a1.csv", [{"text": "another", "label": "file"}])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    assert read(table(tmp_path / name)).to_list() == ROWS


def test_a_changed_file_is_read_again_whatever_its_time_says(tmp_path):
    """Path, size and time stay the same, as when an archive unpacks another version."""
    path = table(tmp_path / "a.csv")
    for letter in "xyz":
        written(Path(path), f"text,label\n{letter},1\n")
        os.utime(path, (1, 1))
        assert read(path)["text"] == [letter]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", "has no example"),
        ("a.csv", "text,label\na,b\nd,e,f\n", "line 3"),
        ("a.csv", "text,text,label\na,b,c\n", "'text' twice"),
        ("a.csv", "text,label\nä,b\n".encode("latin-1"), "utf-8"),
        ("a.csv", "text,label\na,b\nd\n", "(1, not 2)"),
        ("a.csv", 'text,label\n"Great" film,x\n', "line 2: "),
        ("a.csv", "text\na\n\nb\n", "line 3 is empty"),
        ("a.csv", "text,label\n,\n", "has no example"),
        ("a.csv", 'text,label\n"never closed,x\na,b\n', "unexpected end of data"),
        ("a.tsv", 'text\tlabel\n"a\tx\nb"\ty\n', "quotation mark"),
        ("a.json", "", "has no example"),
        ("a.txt", "", "has no example"),
        ("a.jsonl", '{"text": "ä"}'.encode("latin-1"), "save it as UTF-8"),
        ("a.txt", "ä".encode("latin-1"), "save it as UTF-8"),
        ("a.json", '[{"text": "a"', "a.json"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "twice"),
        ("a.parquet", b"", "0 bytes"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, content, says):
    with pytest.raises(BadInput) as error:
        read(written(tmp_path / name, content))
    assert "\n" not in str(error.value)
    assert f"--train_file {tmp_path / name}: " in str(error.value) and says in str(error.value), error.value


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "text,label\n007,01\n1.50,1\n", [["007", "01"], ["1.50", "1"]]),
        ("a.csv", "text,label\n2024-01-05,TRUE\n", [["2024-01-05", "TRUE"]]),
        ("a.csv", "text,label\nNone,NA\nnull,nan\n", [["None", "NA"], ["null", "nan"]]),
        ("a.csv", "text;label\na, b;2,5\n", [["a, b", "2,5"]]),
        ("a.csv", "text\tlabel\r\na;b\tx\r\n", [["a;b", "x"]]),
        ("a.csv", 'text , label,\r"a\nb",x,\r', [["a\nb", "x"]]),
        ("a.csv", "text,label\na,x\n\n,\n,\n", [["a", "x"]]),
        ("a.csv", ",text,label\n0,a,x\n", [["a", "x"]]),
        ("a.csv", "text,label\n99999999999999999999999,x\n", [["9" * 23, "x"]]),
        ("a.json", '[{"text": 1.50, "label": "x"}, {"text": true, "label": "y"}]', [["1.50", "x"], ["true", "y"]]),
        ("a.jsonl", '{"text": "2024-01-05", "label": "x"}\n', [["2024-01-05", "x"]]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 2, "label": "0"}\n', [["a", "1"], ["2", "0"]]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_folder", [False, True])
def test_text_is_as_it_is_spelled_in_a_file_and_in_a_folder(tmp_path, name, content, rows, as_folder):
    path = written(tmp_path / "train" / name, content)
    data = (
        read_dataset("--dataset_name x", str(tmp_path / "train"), None, overwrite_cache=False)["train"]
        if as_folder
        else read(path)
    )
    assert data.column_names == ["text", "label"]
    assert [list(row.values()) for row in data] == rows


def test_empty_rows_at_the_end_are_said_to_be_left_out(tmp_path, caplog):
    read(written(tmp_path / "a.csv", "text,label\na,x\n,\n,\n"))
    assert "2 empty rows at its end are left out" in caplog.text


def test_the_index_of_a_data_frame_is_no_column(tmp_path):
    frame = pd.DataFrame({"text": list("abc"), "label": list("xyx")}, index=[7, 3, 5])
    frame.to_parquet(tmp_path / "train.parquet")
    assert read(str(tmp_path / "train.parquet")).column_names == ["text", "label"]
    assert read_dataset("--dataset_name x", str(tmp_path), None, overwrite_cache=False)["train"].column_names == [
        "text",
        "label",
    ]


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(tmp_path):
    assert read(written(tmp_path / "a.csv", "\ufefftext,label\na,x\n")).column_names == ["text", "label"]
    assert read(written(tmp_path / "a.json", "\ufeff" + json.dumps(ROWS))).to_list() == ROWS


def test_classes_in_another_order_in_another_split_are_refused(tmp_path):
    for split, names in (("train", ["a", "b"]), ("validation", ["b", "a"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = {"text": ["x", "y"], "label": [0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(BadInput, match="classes of column 'label' are .*validation.parquet.*train.parquet"):
        read_dataset(f"--dataset_name {tmp_path}", str(tmp_path), None, overwrite_cache=False)


def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path):
    folder = write_glue(tmp_path / "glue[1]", "sst2")
    write_glue(tmp_path / "glue1", "sst2")
    with pytest.raises(BadInput, match=r"--dataset_name .*without \*"):
        read_dataset(f"--dataset_name {folder}", str(folder), "sst2", overwrite_cache=False)


def test_packed_files_in_a_folder_are_refused(tmp_path):
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"text,label\na,01\n"))
    with pytest.raises(BadInput, match="^--dataset_name x: holds gz files; unpack them"):
        read_dataset("--dataset_name x", str(tmp_path), None, overwrite_cache=False)


@pytest.mark.parametrize("names", [("Train.csv", "Test.csv"), ("reviews_train.csv", "reviews_Validation.csv")])
def test_held_out_files_are_not_trained_on_because_of_capitals(tmp_path, names):
    """`datasets` knows split names in lower case only, and would train on all other files."""
    for name in names:
        table(tmp_path / name)
    if "train" in names[0]:
        assert read_dataset("--dataset_name x", str(tmp_path), None, overwrite_cache=False)["train"].to_list() == ROWS
        return
    with pytest.raises(BadInput, match=r"^--dataset_name x: Test.csv would be read as a part of split 'train'; name"):
        read_dataset("--dataset_name x", str(tmp_path), None, overwrite_cache=False)
