# SPDX-License-Identifier: Apache-2.0
"""Arguments in a JSON or YAML file, as the words of a command line: so both mean the same, and are checked alike."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from experiments.errors import BadInput, naming
from experiments.help_page import suggestion

ENDINGS = (".yaml", ".yml", ".json")
# What a command line spells with commas may be a list in a file.
COMMA_SEPARATED = ("r", "dataset_config_name", "config_overrides", "optim_args", "fsdp", "report_to", "debug")


def words_of_file(path: Path, fields: dict[str, dataclasses.Field], options: dict[str, argparse.Action]) -> list[str]:
    """The words that a command line would say the same with.

    Args:
        path: of the file, one mapping from names of arguments to values.
        fields: the arguments by name.
        options: what argparse does with each, by name.

    Raises:
        BadInput: for a file that cannot be read or is no such mapping, an unknown name, or a value that no argument
            of its kind has. Whether its text can be read as the argument's type is left to argparse.
    """
    given = read_mapping(path)
    words = []
    for name, value in given.items():
        if name not in fields:
            raise BadInput(f"{path}: {name}: there is no such argument{suggestion(str(name), fields)}")
        try:
            words += _words(name, value, fields[name], options[name])
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
    return words


def read_mapping(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
        BadInput: if it cannot be read, or is no mapping, or says anything twice.
    """
    with naming(str(path), OSError, UnicodeError):
        text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
        else:
            loader = yaml.SafeLoader(text)
            loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _yaml_mapping(path))
            content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise BadInput(f"{path}: {where}{error.problem or error.context}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        with naming(str(path), Exception):
            raise error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {_kind(content)}"
        raise BadInput(f"{path}: {found}; allowed is a mapping from names of arguments to values")
    return content


def _words(name: str, value: Any, field: dataclasses.Field, option: argparse.Action) -> list[str]:
    takes_several = option.nargs == "+"
    if value is None or value == []:
        # Only if that is what the argument is without the file.
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default in (None, []):
            return []
        raise BadInput(f"--{name} {'null' if value is None else '[]'}: allowed is a value; leave the line out for none")
    if isinstance(value, list):
        if takes_several:
            entries = [_spelled(name, entry, option) for entry in value]
            if len(entries) == 1:
                return [f"--{name}={entries[0]}"]
            return [f"--{name}", *entries]
        if name not in COMMA_SEPARATED:
            raise BadInput(f"--{name} {value}: allowed is a single value, not a list")
    return [f"--{name}={_spelled(name, value, option)}"]


def _spelled(name: str, value: Any, option: argparse.Action) -> str:
    """A value as on a command line."""
    if isinstance(value, bool):
        # YAML reads an unquoted no, yes, on or off so.
        word = "yes" if value else "no"
        return word if option.choices is not None and word in option.choices else str(value).lower()
    if isinstance(value, list):
        if any(isinstance(entry, (list, dict)) or entry is None for entry in value):
            raise BadInput(f"--{name} {value}: allowed are single values in this list")
        return ",".join(_spelled(name, entry, option) for entry in value)
    if isinstance(value, dict):
        if name not in TrainingArguments._VALID_DICT_FIELDS:
            raise BadInput(f"--{name} {value}: allowed is a single value, not a mapping")
        return json.dumps(value)
    if value is None:
        raise BadInput(f"--{name}: an entry of the list is null; allowed are values")
    return str(value)


def _yaml_mapping(path: Path) -> Any:
    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
        loader.flatten_mapping(node)
        return _once(path, loader.construct_pairs(node, deep=True))

    return construct


def _once(path: Path, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadInput(f"{path}: {name}: stands there twice; allowed is each once")
        found[name] = value
    return found


def _kind(content: Any) -> str:
    return "list" if isinstance(content, list) else f"single value, {content!r}"
