# SPDX-License-Identifier: Apache-2.0
"""Command lines of the scripts: parse arguments into dataclasses, print `--help`, and describe the command in reports.

Extends transformers' `HfArgumentParser` with YAML files, checks of values, and errors in one line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
import textwrap
from argparse import ArgumentError
from difflib import get_close_matches
from enum import Enum
from inspect import isclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from experiments.errors import BadInput, naming
from experiments.escaping import HIDDEN, SECRET_ARGUMENTS, hide_tokens, printable

FILE_ENDINGS = (".yaml", ".yml", ".json")
# Arguments whose value is text separated by commas; a file may give a list instead.
COMMA_SEPARATED = ("r", "dataset_config_name", "config_overrides", "optim_args", "fsdp", "report_to", "debug")
# Width of the `--help` page, in characters.
HELP_WIDTH = 100


class Parser(HfArgumentParser):
    """`HfArgumentParser` that raises `BadInput` instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def parse_arguments(description: str, *dataclass_types: type) -> tuple[Any, ...]:
    """Parse the command line as the official example scripts do.

    `SCRIPT.py FILE.json ...` or `SCRIPT.py FILE.yaml ...` reads arguments from the file; later arguments override it.

    Args:
        description: first part of the `--help` page.
        dataclass_types: dataclasses whose fields are the arguments.

    Returns:
        One instance of each dataclass, in their order.

    Raises:
        BadInput: for an unreadable file, an unknown argument, or a value that argparse or a dataclass refuses.
    """
    words = sys.argv[1:]
    if {"-h", "--help", "--help_all"} & {*words}:
        print(help_page(description, dataclass_types, everything="--help_all" in words))
        sys.exit(0)
    parser = Parser(dataclass_types, allow_abbrev=False, add_help=False, exit_on_error=False)
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    if words and words[0].endswith(FILE_ENDINGS) and not words[0].startswith("-"):
        words = _read_words(Path(words[0]), fields) + words[1:]
    try:
        given, unknown = parser.parse_known_args(words)
    except ArgumentError as error:
        raise BadInput(f"{(error.argument_name or '').partition('/')[0]}: {error.message}") from error
    if unknown:
        _refuse_unknown(unknown[0].partition("=")[0], [*fields])
    for name, value in vars(given).items():
        if value != parser.get_default(name):
            for entry in value if isinstance(value, list) else [value]:
                _check_value(name, entry)
    with naming("arguments", OSError, ValueError):
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)


def _refuse_unknown(word: str, names: list[str]) -> NoReturn:
    if word.startswith("--"):
        similar = get_close_matches(word.removeprefix("--").replace("-", "_"), names, n=1, cutoff=0.7)
        raise BadInput(f"{word}: unknown argument" + (f"; did you mean --{similar[0]}?" if similar else ""))
    hint = "; put a file of arguments first" if word.endswith(FILE_ENDINGS) else ""
    raise BadInput(f"{word}: unexpected; give arguments as --NAME VALUE{hint}")


def _check_value(name: str, value: Any) -> None:
    """Refuse values that argparse accepts but no argument can use: nan, infinity, empty text, or text not in UTF-8."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"--{name} {value}: must be a finite number")
    if isinstance(value, str):
        if not value.strip():
            raise BadInput(f"--{name} '{value}': must not be empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadInput(f"--{name} {value}: must be a name in UTF-8; rename the file or folder") from None


def _read_words(path: Path, fields: dict[str, dataclasses.Field]) -> list[str]:
    """Return the contents of a file of arguments as words of a command line, so that both are checked alike."""
    with naming(str(path), OSError, ValueError, RecursionError, yaml.YAMLError):
        given = _read_mapping(path)
    words: list[str] = []
    for name, value in given.items():
        words += _to_words(fields[name], value) if name in fields else [f"--{name}={value}"]
    return words


def _read_mapping(path: Path) -> dict[Any, Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        content = json.loads(text, object_pairs_hook=_refuse_repeats)
    else:
        try:
            content = yaml.load(text, _YamlLoader)
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
            raise ValueError(f"{line}{error.problem or error.context}") from None
    if not isinstance(content, dict):
        raise ValueError("must be a mapping from argument names to values")
    return content


def _refuse_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]}: is given twice; give it once")
    return dict(pairs)


class _YamlLoader(yaml.SafeLoader):
    """YAML loader that refuses a name given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        _refuse_repeats([(key.value, None) for key, _ in node.value])
        return mapping


def _to_words(field: dataclasses.Field, value: Any) -> list[str]:
    """Return the words of a command line that set an argument to a value from a file."""
    name = field.name
    if value is None or value == []:
        if _default(field) in (None, []):
            return []
        raise BadInput(f"--{name} {value}: must be a value; remove the line for the default")
    if isinstance(value, list) and getattr(field.type, "__origin__", None) is list:
        entries = [_spell(field, entry) for entry in value]
        return [f"--{name}", *entries] if len(entries) > 1 else [f"--{name}={entries[0]}"]
    if isinstance(value, list) and name not in COMMA_SEPARATED:
        raise BadInput(f"--{name} {value}: must be a single value, not a list")
    return [f"--{name}={_spell(field, value)}"]


def _spell(field: dataclasses.Field, value: Any) -> str:
    """Return a value from a file as typed on a command line."""
    if value is False and isclass(field.type) and issubclass(field.type, Enum):
        return "no"  # YAML reads an unquoted no as false
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        if field.name not in TrainingArguments._VALID_DICT_FIELDS:
            raise BadInput(f"--{field.name} {value}: must be a single value, not a mapping")
        return json.dumps(value)
    if isinstance(value, list):
        if any(isinstance(entry, (list, dict)) or entry is None for entry in value):
            raise BadInput(f"--{field.name} {value}: must be a list of single values")
        return ",".join(_spell(field, entry) for entry in value)
    if value is None:
        raise BadInput(f"--{field.name} null: must be a value in each entry of the list")
    return str(value)


def help_page(description: str, dataclass_types: tuple[type, ...], everything: bool) -> str:
    """Return the `--help` page, which lists the arguments by group.

    Args:
        description: first part of the page.
        dataclass_types: dataclasses of the arguments. If one has `in_help` (argument names by heading), only
            the arguments named there are listed.
        everything: list all arguments, also those not in `in_help`.
    """
    groups: dict[str, list[str]] = {}
    for kind in dataclass_types:
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        in_help: dict[str, tuple[str, ...]] = getattr(kind, "in_help", {})
        listed = {name: heading for heading, names in in_help.items() for name in names}
        rest = [name for name in fields if name not in listed] if everything or not listed else []
        for name in [*listed, *rest]:
            heading = listed.get(name, getattr(kind, "_argument_group_name", "arguments"))
            groups.setdefault(heading, []).append(_help_entry(fields[name], getattr(kind, "help_texts", {})))
    usage = f"usage: {Path(sys.argv[0]).name} [FILE.yaml | FILE.json] [arguments]"
    sections = ("\n".join([f"{heading}:", *entries]) for heading, entries in groups.items())
    end = "FILE.yaml or FILE.json may hold any of the arguments; arguments after the file override it."
    if not everything:
        end += "\n--help_all lists every argument, including all of transformers' TrainingArguments."
    return "\n\n".join([usage, description.strip(), *sections, end])


def _help_entry(field: dataclasses.Field, texts: dict[str, str]) -> str:
    text = " ".join(texts.get(field.name, field.metadata.get("help", "")).split())
    default = _default(field)
    if not (default is None or default is False or default in ([], dataclasses.MISSING)) and "default" not in text:
        shown = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
        text += f" (default: {shown})"
    indent = f"  --{field.name:<30} "
    return textwrap.fill(text, HELP_WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def shown_command() -> str:
    """Return the running command line for a report: secrets are left out, and absolute paths are shortened.

    A path inside the current folder becomes relative to it; any other path is cut to its last part.
    """
    words = ["python", *(_shorten_path(word) for word in sys.argv)]
    for index, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in SECRET_ARGUMENTS:
            if equals:
                words[index] = f"{option}={HIDDEN}"
            elif index + 1 < len(words):
                words[index + 1] = HIDDEN
    return printable(hide_tokens(shlex.join(words)))


def _shorten_path(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if not path.is_absolute():
        return word
    return option + equals + (str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name)
