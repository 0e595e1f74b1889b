# SPDX-License-Identifier: Apache-2.0
"""Check code blocks without running them: parse the arguments of scripts, compile Python, and look up its imports."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from experiments.errors import BadInput
from tests.documents.pages import ROOT, Block

# Packages that only a separate environment has; a script that needs one is not checked.
OPTIONAL_PACKAGES = ("gradio", "playwright", "ray")
# Refusals that depend on the files and the processor of this machine, not on the arguments.
REFUSALS_OF_THE_MACHINE = (
    "there is no such file",
    "must be a folder with all",
    "not compiled with CUDA",
    "doesn't support bf16/gpu",
)
# Bash calls this function for each command that it does not find, and with an empty PATH it finds none.
SPELL_COMMANDS = r"""
command_not_found_handle() { printf '%s\0' "$#" "$@" >> "$SPELLED"; }
cd() { :; }
source() { :; }
"""
# Seconds that bash may take to expand a block.
TIME_LIMIT = 20
ENVIRONMENT_FOLDER = re.compile(r"(?<![\w/])(?:\./)?\.venv/(?:\w+/)?bin/")

# A command in the docstring of a script: an indented line, with the lines that continue it.
DOCSTRING_COMMAND = re.compile(r"^ {2,}(python (?:.*\\\n)*.*)$", re.MULTILINE)


class Parsed(Exception):
    """Raised in place of a script's work, once its arguments are parsed."""


def spell_commands(text: str) -> list[list[str]]:
    """Return the words of each command in a piece of bash, with loops and variables expanded by bash itself.

    Raises:
        ValueError: for a syntax error or an endless loop.
    """
    with tempfile.TemporaryDirectory() as folder:
        spelled = Path(folder, "spelled")
        spelled.touch()
        text = ENVIRONMENT_FOLDER.sub("", text)
        environment = {"PATH": "/nonexistent", "SPELLED": str(spelled)}
        shell = ["/bin/bash", "--noprofile", "--norc"]
        checked = subprocess.run([*shell, "-n", "-c", text], env=environment, capture_output=True, text=True)
        if checked.returncode:
            raise ValueError(checked.stderr.strip())
        try:
            program = f"{SPELL_COMMANDS}\n{text}\nwait"
            subprocess.run(
                [*shell, "-c", program], env=environment, cwd=folder, capture_output=True, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            raise ValueError("the block loops for ever if its commands do nothing") from None
        words = spelled.read_text().split("\0")[:-1]
    commands = []
    while words:
        count = int(words[0])
        commands.append(words[1 : count + 1])
        words = words[count + 1 :]
    return commands


def docstring_commands(path: Path) -> list[list[str]]:
    """Return the words of each command in the docstring of a script, which is its `--help` page too."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    return [words for command in DOCSTRING_COMMAND.findall(text) for words in spell_commands(command)]


def check_block(block: Block) -> list[str]:
    """Return what is wrong with a block of bash or Python, one line for each mistake."""
    if block.mark == "commit":
        return []
    try:
        if block.language == "python":
            return check_python(block.text)
        if block.language == "bash":
            mistakes = (check_command(command) for command in spell_commands(block.text))
            return [mistake for mistake in mistakes if mistake]
    except (SyntaxError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def check_python(text: str) -> list[str]:
    """Compile Python, and look up the names that it imports from modules of the repository."""
    mistakes = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and _file_of(node.module).exists():
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            mistakes += [f"{node.module} has no {name}" for name in missing]
    return mistakes


def check_command(words: list[str]) -> str | None:
    """Return what is wrong with a command: a script, target or file that does not exist, or an argument it refuses."""
    words = words[2:] if words[0] == "timeout" else words
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        missing = [word for word in arguments if "=" not in word and word not in targets]
        return f"make has no target {', '.join(missing)}" if missing else None
    if program not in ("python", "python3", "torchrun", "accelerate") or arguments[:1] in (["-c"], ["-"]):
        return None
    if arguments[:1] == ["-m"]:
        script, arguments = _file_of(arguments[1]), arguments[2:]
        if not script.exists():
            return None
    else:
        position = next((index for index, word in enumerate(arguments) if word.endswith(".py")), None)
        if position is None:
            return f"{' '.join(words)}: names no script"
        before, script, arguments = arguments[:position], ROOT / arguments[position], arguments[position + 1 :]
        for option, value in zip(before, before[1:], strict=False):
            if option == "--config_file" and not (ROOT / value).exists():
                return f"{value}: no such file"
    if not script.exists():
        return f"{script.relative_to(ROOT)}: no such script"
    mistake = parse_with(script, arguments)
    return f"{script.relative_to(ROOT)}: {mistake}" if mistake else None


def parse_with(script: Path, arguments: list[str]) -> str | None:
    """Parse arguments with a script's own parser, and stop there; return the line with which it refuses them."""
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    errors = io.StringIO()
    with _stopping_once_parsed(script, arguments), contextlib.redirect_stderr(errors):
        try:
            module = importlib.import_module(name)
            module.main()
        except Parsed:
            return None
        except ModuleNotFoundError as error:
            return None if error.name in OPTIONAL_PACKAGES else str(error)
        except BadInput as error:
            return None if any(text in str(error) for text in REFUSALS_OF_THE_MACHINE) else str(error)
        except SystemExit as stop:
            return errors.getvalue().strip().splitlines()[-1] if stop.code else None
    return "has no arguments"


@contextlib.contextmanager
def _stopping_once_parsed(script: Path, arguments: list[str]) -> Iterator[None]:
    """Within the block, a script runs in the repository with these arguments and raises `Parsed` after parsing."""
    with pytest.MonkeyPatch.context() as patch:
        for parser, method in (
            (HfArgumentParser, "parse_args_into_dataclasses"),
            (argparse.ArgumentParser, "parse_args"),
        ):
            patch.setattr(parser, method, _then_stop(getattr(parser, method)))
        patch.setattr(sys, "argv", [script.name, *arguments])
        patch.syspath_prepend(str(script.parent))
        patch.chdir(ROOT)
        yield


def _then_stop(parse):
    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    return parse_and_stop


def _file_of(module: str) -> Path:
    """Return the path that a module of the repository would have."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
