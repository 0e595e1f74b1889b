# SPDX-License-Identifier: Apache-2.0
"""What is answered before anything is imported that takes seconds: `--help`, and an argument that there is not.

The page of each script is kept in docs/help, under a line that says what it was made of, and above the names of all
arguments. Where it was not made of what is installed and written here now, the script answers from its arguments
themselves, as it does for `--help_all`.

  python -m experiments.help_page    # make all pages; `make help-pages`
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

from experiments.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "help"
SCRIPTS = ("run_glue.py", "run_image.py", "run_mlm.py", "eval_sweep.py")
WIDTH = 100
ARGUMENTS = re.compile(r"^class \w+Arguments\b", re.MULTILINE)
NAMES = "\n# all arguments: "
# Run with a script, in one process since what is imported takes seconds: what --help and what --help_all shows.
BOTH_PAGES = """
import runpy, sys
script = sys.argv[1]
for option in ("--help", "--help_all"):
    sys.argv = [script, option]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        print(end="\\0")
"""


class HelpFormatter(argparse.HelpFormatter):
    """argparse's own.

    Modifications:
    - every page is as wide as every other one
    - paragraphs are filled, what is indented stays as it is
    - an argument is shown by one of its two spellings, with what it takes: N, X (a number), TEXT, FILE, FOLDER or words
    - defaults stand at the end, where there is one to speak of and the text does not
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=33, width=WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width) for part in paragraphs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = max(action.option_strings, key=lambda spelled: (len(spelled), "_" in spelled), default=action.dest)
        takes = "" if action.nargs in (0, "?") else " " + self._format_args(action, self._taken(action))
        return name + takes

    def _taken(self, action: argparse.Action) -> str:
        if action.choices is not None:
            listed = "|".join(map(str, action.choices))
            return listed if len(listed) < 32 else "NAME"
        by_type = {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]
        return {"dir": "FOLDER", "file": "FILE"}.get(action.dest.rpartition("_")[2], by_type)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return f"{default_metavar} ..." if action.nargs == "+" else default_metavar

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", getattr(action.default, "value", action.default)
        if default is None or default is False or default == [] or re.search("default|: none", text, re.IGNORECASE):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        # argparse formats the text with %. A default stays on one line.
        return f"{text} (default:\N{NO-BREAK SPACE}{shown.replace('%', '%%')})"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line.replace("\N{NO-BREAK SPACE}", " ") for line in super()._split_lines(text, width)]


def answer_at_once(script: str) -> None:
    """Show the kept page and exit, if `--help` is asked for; refuse an argument that there is not. Do neither if the
    page is not that of today.

    Args:
        script: path of the script.

    Raises:
        BadInput: naming the argument, and the one that may have been meant.
    """
    page = PAGES / Path(script).with_suffix(".txt").name
    if not page.exists():
        return
    made_of, _, kept = page.read_text(encoding="utf-8").partition("\n")
    text, _, names = kept.partition(NAMES)
    listed = names.replace("#", "").split()
    helps = bool({"--help", "-h"} & set(sys.argv[1:]))
    unknown = first_unknown(sys.argv[1:], listed) if listed else None
    if not (helps or unknown) or made_of != made_of_line(script):
        return
    if unknown is None or helps:
        print(text, end="")
        sys.exit(0)
    raise BadInput(f"{unknown}: there is no such argument{suggestion(unknown, listed, '--')}")


def first_unknown(words: Iterable[str], names: Iterable[str]) -> str | None:
    """The first word of a command line that argparse would take for an argument, and is none of these and no --no_NAME;
    `None` if all are."""
    known = {"help", "help_all", *names}
    for word in words:
        if word == "--":
            return None
        spelled = word.partition("=")[0]
        name = spelled.removeprefix("--").replace("-", "_")
        if word.startswith("--") and " " not in word and not {name, name.removeprefix("no_")} & known:
            return spelled
    return None


def suggestion(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The name that may have been meant, with the prefix of all names, to end a message with."""
    near = get_close_matches(name.removeprefix(prefix).replace("-", "_"), list(names), n=1, cutoff=0.7)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def made_of_line(script: str) -> str:
    """What the page of a script follows from: the version of transformers, and a digest of the script's docstring and
    of the fields of all arguments here. What their texts quote from elsewhere, a test compares."""
    digest = hashlib.sha256((ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8"))) or "").encode())
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        for field in _fields(path.read_text(encoding="utf-8")):
            digest.update(field.encode())
    return f"# transformers {metadata.version('transformers')}, arguments {digest.hexdigest()[:16]}"


def _fields(source: str) -> Iterator[str]:
    """The source of each field of each class of arguments."""
    if ARGUMENTS.search(source) is None:
        return
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            yield node.name
            for statement in node.body:
                if isinstance(statement, (ast.AnnAssign, ast.Assign)):
                    yield "\n".join(lines[statement.lineno - 1 : statement.end_lineno])


def make_pages() -> None:
    """Make the page of each script anew, by the script."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        page = PAGES / Path(script).with_suffix(".txt").name
        page.unlink(missing_ok=True)
        command = [sys.executable, "-c", BOTH_PAGES, str(ROOT / script)]
        run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, cwd=ROOT)
        text, everything, _ = run.stdout.split("\0")
        page.write_text(kept_page(script, text, everything), encoding="utf-8")


def kept_page(script: str, text: str, everything: str) -> str:
    """What is kept of a script.

    Args:
        script: its path.
        text: what `--help` shows.
        everything: what `--help_all` shows.
    """
    names = " ".join(re.findall(r"^  --(\w+)", everything, re.MULTILINE))
    wrapped = textwrap.fill(names, WIDTH, initial_indent=NAMES.strip() + " ", subsequent_indent="# ")
    return f"{made_of_line(script)}\n{text}\n{wrapped}\n"


if __name__ == "__main__":
    make_pages()
