# SPDX-License-Identifier: Apache-2.0
"""Tests of command line arguments, argument files, `--help`, and the recorded command."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field

import pytest
from transformers.trainer_utils import IntervalStrategy

from experiments.command_line import parse_arguments, shown_command
from experiments.errors import BadInput
from experiments.merging.arguments import MergeArguments
from experiments.training.trainer_arguments import TrainerArguments


@dataclass
class Arguments:
    size: int = 1
    rate: float = 0.5
    name: str | None = None
    names: list[str] = field(default_factory=list)
    shares: list[float] | None = None
    flag: bool = False
    kept: bool = True
    strategy: IntervalStrategy = IntervalStrategy.STEPS
    lr_scheduler_kwargs: dict | str | None = None
    optim_args: str | None = None


def parse(monkeypatch, *words: object) -> Arguments:
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    return parse_arguments("", Arguments)[0]


@pytest.mark.parametrize(
    "given",
    [
        ("--token", "hf_abc"),
        ("--hub_token", "hf_abc"),
        ("--hub-token=hf_abc",),
        ("--token=hf_abc", "--hub_token", "hf_abc"),
    ],
)
def test_a_command_is_shown_without_its_tokens(monkeypatch, given):
    monkeypatch.setattr(sys, "argv", ["run.py", "--r", "1 2", *given, "--do_eval"])
    shown = shown_command()
    assert "hf_abc" not in shown
    assert shlex.split(shown)[:4] == ["python", "run.py", "--r", "1 2"] and shown.endswith(" --do_eval")


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_arguments_stand_in_a_file_and_those_that_follow_come_first(monkeypatch, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text('{"size": 3, "rate": 0.25, "names": ["a", "b"]}')
    assert parse(monkeypatch, path) == Arguments(size=3, rate=0.25, names=["a", "b"])
    later = parse(monkeypatch, path, "--size", 4, "--names", "c")
    assert later == Arguments(size=4, rate=0.25, names=["c"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate: 1e-3", {"rate": 1e-3}),
        ("rate: -1.5e-3", {"rate": -1.5e-3}),
        ("size: '8'", {"size": 8}),
        ("name: 8", {"name": "8"}),
        ("name: --flag", {"name": "--flag"}),
        ("name: true", {"name": "true"}),
        ("optim_args: [8, 4]", {"optim_args": "8,4"}),
        ("names: floor", {"names": ["floor"]}),
        ("names: [8, [4, 2]]", {"names": ["8", "4,2"]}),
        ("shares: [0.5, 1e-1]", {"shares": [0.5, 0.1]}),
        ("flag: yes\nkept: false", {"flag": True, "kept": False}),
        ("strategy: no", {"strategy": "no"}),
        ("lr_scheduler_kwargs: {a: 1}", {"lr_scheduler_kwargs": '{"a": 1}'}),
        ("name: null\nshares: null\nnames: []", {}),
        ("\ufeffsize: 3", {"size": 3}),
    ],
)
def test_a_value_in_a_file_means_what_it_means_on_a_command_line(monkeypatch, tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert parse(monkeypatch, tmp_path / "a.yaml") == Arguments(**expected)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", b'{"sise": 3}', "--sise: unknown argument; did you mean --size?"),
        ("a.json", b"{", "Expecting property name"),
        ("a.yaml", b"size: 1\n  rate: 2", "line 2: "),
        ("a.yaml", b"x: !!python/object:x {}", "could not determine a constructor"),
        ("a.yaml", b"", "must be a mapping"),
        ("a.yaml", b"size: 1\nsize: 2", "size: is given twice"),
        ("a.json", b'{"size": 1, "size": 2}', "size: is given twice"),
        ("a.yaml", b"name: \xff", "utf-8"),
        ("a.yaml", b"size: 1.5", "--size: invalid int value: '1.5'"),
        ("a.yaml", b"size: [1, 2]", "--size [1, 2]: must be a single value"),
        ("a.yaml", b"size: null", "--size None: must be a value"),
        ("a.yaml", b"rate: .nan", "--rate nan: must be a finite number"),
        ("a.yaml", b"names: [a, null]", "--names null: must be a value"),
        ("a.yaml", b"optim_args: [[1], 2]", "--optim_args [[1], 2]: must be a list of single values"),
        ("a.yaml", b"name: {a: b}", "--name {'a': 'b'}: must be a single value, not a mapping"),
        ("b.yaml", None, "No such file"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(monkeypatch, tmp_path, name, text, says):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(BadInput) as error:
        parse(monkeypatch, path)
    line = str(error.value)
    assert line.startswith((f"{path}: ", "--")) and says in line and "\n" not in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--sise=3"], "--sise: unknown argument; did you mean --size?"),
        (["--size", 3, "extra"], "extra: unexpected"),
        (["--size", 3, "a.yaml"], "a.yaml: unexpected"),
        (["--size"], "--size: expected one argument"),
        (["--size", "x"], "--size: invalid int value: 'x'"),
        (["--name", ""], "--name '': must not be empty"),
        (["--names", "a", " "], "--names ' ': must not be empty"),
        (["--rate", "nan"], "--rate nan: must be a finite number"),
        (["--strategy", "never"], "--strategy: invalid choice: 'never'"),
        (["--name=d\udcff"], "--name d\udcff: must be a name in UTF-8"),
    ],
)
def test_a_mistake_on_a_command_line_is_one_line(monkeypatch, capsys, words, line):
    with pytest.raises(BadInput) as error:
        parse(monkeypatch, *words)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("option", "lists_all"), [("--help", False), ("--help_all", True)])
def test_help_lists_our_arguments_and_the_trainers_that_are_needed_most(monkeypatch, capsys, option, lists_all):
    monkeypatch.setattr(sys, "argv", ["run.py", "--size", "x", option])
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments("What it does.", MergeArguments, TrainerArguments)
    page = capsys.readouterr().out
    assert exit_info.value.code == 0 and "What it does." in page
    assert "\nmerging:\n" in page and "(default: search)" in " ".join(page.split())
    assert page.count("  --learning_rate ") == 1
    listed = {name for name in TrainerArguments.__dataclass_fields__ if f"  --{name} " in page}
    assert ({*TrainerArguments.__dataclass_fields__} - listed <= {"deepspeed_plugin", "fsdp_plugin_args"}) == lists_all
