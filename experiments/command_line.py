# SPDX-License-Identifier: Apache-2.0
"""From a command line, with or without a JSON or YAML file of arguments, to dataclasses of arguments."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from experiments.argument_file import ENDINGS, words_of_file
from experiments.errors import BadInput, naming
from experiments.help_page import HelpFormatter, suggestion

WHAT_TO_RUN = "what to run"
MORE = """--help_all lists all other arguments too. Each argument may also be a line of FILE.yaml or FILE.json; what \
follows the file on the command line comes before it."""
SECRETS = ("--token", "--hub_token", "--hub-token")


class Parser(HfArgumentParser):
    """transformers' `HfArgumentParser`.

    Modifications:
    - what it refuses is a `BadInput`: one line, without the usage
    - numbers are finite, and -1e-3 is one; texts are not empty, as one is from a variable of the shell that is not set
    - a name that is not known comes with the one that may have been meant
    - of a dataclass that has `in_help`, texts by heading and name, `--help` lists these alone; `--help_all` lists all
    """

    def __init__(self, dataclass_types: tuple[type, ...], **kwargs: Any) -> None:
        super().__init__(dataclass_types, **kwargs)
        self.add_argument("--help_all", action=_HelpAll, nargs=0, default=SUPPRESS, dest=SUPPRESS)
        for kind, convert in ((int, _integer), (float, _number), (str, _text), (string_to_bool, _boolean)):
            self.register("type", kind, convert)
        # argparse takes -1 for a value, and -1e-3 for an argument.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|^-(inf|nan)$", re.IGNORECASE)

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for heading, actions in self._sections(everything).items():
            formatter.start_section(heading)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(None if everything else MORE)
        return formatter.format_help()

    def _sections(self, everything: bool) -> dict[str, list[Action]]:
        """The arguments that are listed, by the heading that they stand under."""
        chosen = {kind._argument_group_name: kind.in_help for kind in self.dataclass_types if hasattr(kind, "in_help")}
        texts = {
            name: text for in_help in chosen.values() for texts in in_help.values() for name, text in texts.items()
        }
        headings = {
            name: heading for in_help in chosen.values() for heading, names in in_help.items() for name in names
        }
        titles = [group.title or "" for group in self._action_groups]
        sections: dict[str, list[Action]] = {WHAT_TO_RUN: []}
        for title in titles:
            # A heading that is a group's title stands in that group's place.
            for heading in chosen.get(title, [title]):
                if heading not in titles or heading == title:
                    sections[heading] = []
        sections |= {title: [] for title in chosen}
        for group in self._action_groups:
            for action in group._group_actions:
                if action.dest in ("help", SUPPRESS) or action.nargs == 0:  # --no_NAME is --NAME false
                    continue
                action.help = texts.get(action.dest, action.help)
                sections[headings.get(action.dest, group.title or "")].append(action)
        order = [*headings]
        for actions in sections.values():
            actions.sort(key=lambda action: order.index(action.dest) if action.dest in headings else -1)
        return {
            heading: actions
            for heading, actions in sections.items()
            if actions and (everything or heading not in chosen)
        }

    def error(self, message: str) -> NoReturn:
        argument = re.match(r"argument (--\w+)[^:]*: (.*)", message, re.DOTALL)
        choice = re.match(r"argument (--\w+)[^:]*: invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        required = re.match(r"the following arguments are required: (.*)", message)
        if choice is not None:
            # Text that an enumeration shows as NAME.MEMBER in some versions of Python.
            raise BadInput(f"{choice[1]} {choice[2]}: allowed are {choice[3].replace(chr(39), '')}")
        if argument is not None:
            # Our own messages begin with the value, argparse's do not.
            separator = " " if ": allowed is" in argument[2] else ": "
            raise BadInput(f"{argument[1]}{separator}{argument[2]}")
        if required is not None:
            names = ", ".join(name.partition("/")[0] for name in required[1].split(", "))
            raise BadInput(f"{names}: not given; allowed is a value for each")
        raise BadInput(message)

    def refuse_unknown(self, words: list[str]) -> None:
        """Refuse words that are no arguments.

        Raises:
            BadInput: naming the first one.
        """
        if not words:
            return
        word = words[0].partition("=")[0]
        if word.startswith("--"):
            near = suggestion(word, [action.dest for action in self._actions], "--")
            raise BadInput(f"{word}: there is no such argument{near}")
        where = "; a file of arguments comes first" if word.endswith(ENDINGS) else ""
        raise BadInput(f"{word}: stands alone; allowed are arguments, --NAME VALUE{where}")


def parse_arguments(description: str, *dataclass_types: type) -> tuple[Any, ...]:
    """Parse the command line as the official example scripts do.

    Args:
        description: what `--help` begins with.
        dataclass_types: whose fields are the arguments.

    Returns:
        An instance of each. `SCRIPT.py FILE.json ...` or `FILE.yaml ...` reads arguments from that file; those that
        follow it come before them.

    Raises:
        BadInput: for a file that is not there, and for values that argparse or the dataclasses refuse.
    """
    parser = Parser(
        dataclass_types,
        # A list of them all would be pages long and come before the description.
        usage="%(prog)s [FILE.yaml | FILE.json] [arguments]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    words = sys.argv[1:]
    if not words or not words[0].endswith(ENDINGS) or words[0].startswith("-"):
        return _parsed(parser, words)
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    options = {action.dest: action for action in reversed(parser._actions)}
    path = Path(words[0])
    from_file = words_of_file(path, fields, options)
    try:
        return _parsed(parser, from_file + words[1:])
    except BadInput as error:
        # Said of the file, if it is the one that says it.
        name = re.match(r"--\w*", str(error))
        named = name is not None and any(word.partition("=")[0] == name[0] for word in from_file)
        overridden = name is not None and any(word.partition("=")[0] == name[0] for word in words[1:])
        raise BadInput(f"{path}: {error}" if named and not overridden else str(error)) from error


def shown_command() -> str:
    """The command line that is running, to be written down: without the tokens in it, and without where on this
    machine things are: a path that is not below the current folder is shown by its last name."""
    words = ["python", *(_placeless(word) for word in sys.argv)]
    for index, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option in SECRETS:
            if equals:
                words[index] = f"{option}=..."
            elif index + 1 < len(words):
                words[index + 1] = "..."
    return shlex.join(words)


def _placeless(word: str) -> str:
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if not path.is_absolute():
        return word
    return option + equals + (str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name)


def _parsed(parser: Parser, words: list[str]) -> tuple[Any, ...]:
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        option, value = (name, value if equals else "") if word.startswith("--") else (option, word)
        if re.search(r"[\ud800-\udfff]", word):
            raise BadInput(f"{option} {value}: must be a name in UTF-8; rename the file or folder")
    parser.refuse_unknown(parser.parse_known_args(words)[1])
    with naming("arguments", OSError, ValueError):
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)


class _HelpAll(Action):
    """Shows all there is."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        print(parser.format_help(everything=True), end="")
        sys.exit(0)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{_shown(text)}: allowed is an integer") from None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentTypeError(f"{_shown(text)}: allowed is a number")
    return number


def _text(text: str) -> str:
    if not text.strip():
        raise ArgumentTypeError(f"{_shown(text)}: allowed is a text that is not empty")
    return text


def _boolean(text: str | bool) -> bool:
    try:
        return string_to_bool(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{text}: allowed is true or false") from None


def _shown(text: str) -> str:
    """A value in a message, visible also where it is empty."""
    return text if text.strip() else f"'{text}'"
