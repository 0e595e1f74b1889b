# SPDX-License-Identifier: Apache-2.0
"""Compare what runs leave in their folders, except for times, dates and paths; find broken files."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

from tests.support.script_run import ROOT

# Names of figures that depend on measured times, or are fingerprints of files that hold such figures.
TIMES = re.compile(
    r"_mem_|runtime|preparation_time|per_second|seconds|latency|speedup|throughput|peak_memory|environment|date"
    r"|jit_compilation|resumed|total_flos|saved_files"
)
# Lines with times; such lines, and whole tables with such a line, are not compared.
TIMED_LINES = re.compile(
    r"second|latency|speed|as fast|throughput|[0-9] s\b|MB|date 20|Times|round|inputs at once|output_dir"
    r"|--model_name_or_path|\bms\b"
)
# Files that hold times or hashes of such files: pickles, optimizer states, run records of checkpoints, pictures.
NOT_COMPARED = re.compile(
    r"(optimizer|scheduler|scaler|rng_state.*)\.(pt|pth|bin)$|training_args\.bin$|\.png$"
    r"|checkpoint-\d+/run_record\.json$"
)
# The best checkpoint of a sweep, whose choice depends on times.
FASTEST = "merged/"


def left(folder: Path) -> dict[str, Any]:
    """Return the content of a folder by path, without what may differ between two equal runs."""
    return dict(_files(folder))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return a line for each file that is missing, unexpected or different, with the first different figure."""
    wrong = []
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            wrong.append(f"{path} is missing")
        elif path not in expected:
            wrong.append(f"{path} should not be there")
        elif found[path] != expected[path]:
            wrong.append(f"{path} differs{where(found[path], expected[path])}")
    return wrong


def broken(folder: Path) -> list[str]:
    """Return a line for each broken file: invalid JSON, weights and pictures that do not open, modules that differ
    from this repository's, and leftover temporary files."""
    wrong = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and (message := _broken(path)):
            wrong.append(f"{name}: {message}")
    return wrong


def _broken(path: Path) -> str:
    if path.name.endswith((".partial", ".tmp", ".incomplete")):
        return "left over"
    try:
        if path.suffix == ".json":
            json.dumps(json.loads(path.read_text()), allow_nan=False)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    weights.get_tensor(key)
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".py" and path.read_bytes() != (ROOT / path.name).read_bytes():
            return "not the module of this repository"
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return ""


def _files(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(FASTEST):
            continue
        if NOT_COMPARED.search(name):
            yield name, "there"
        elif path.suffix == ".json":
            try:
                yield name, _without_times(json.loads(path.read_text()))
            except ValueError:
                yield name, "no JSON"
        elif path.suffix == ".csv":
            with path.open() as file:
                yield name, [_without_times(row) for row in csv.DictReader(file)]
        elif path.suffix == ".md":
            yield name, list(_untimed_lines(path.read_text().splitlines()))
        else:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def _untimed_lines(lines: list[str]) -> Iterator[str]:
    """Yield the lines without times, and no line of a table with times."""
    for is_table, block in groupby(lines, lambda line: line.startswith("|")):
        kept = list(block)
        untimed = [line for line in kept if not TIMED_LINES.search(line)]
        yield from untimed if not is_table or len(untimed) == len(kept) else ()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_times(each) for name, each in value.items() if not TIMES.search(str(name))}
    if isinstance(value, list):
        return [_without_times(each) for each in value]
    return value


def where(found: Any, expected: Any) -> str:
    """Return the first figure that differs."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in found.keys() | expected.keys():
            if found.get(name) != expected.get(name):
                return f", {name}{where(found.get(name), expected.get(name))}"
    if isinstance(found, list) and isinstance(expected, list):
        for one, other in zip(found, expected, strict=False):
            if one != other:
                return where(one, other)
    if isinstance(found, str) and len(found) == 64:
        return ""
    return f": {str(found)[:80]} and not {str(expected)[:80]}"
