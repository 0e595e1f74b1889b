# SPDX-License-Identifier: Apache-2.0
"""Arguments from a command line or a file, and the command as it is written down."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field

import pytest
import torch
from transformers.trainer_utils import IntervalStrategy

from experiments.command_line import parse_arguments, shown_command
from experiments.errors import BadInput
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


@dataclass
class Needed:
    needed_name: str


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
        ("rate: 2", {"rate": 2.0}),
        ("size: '8'", {"size": 8}),
        ("size: -8", {"size": -8}),
        ("name: 8", {"name": "8"}),
        ("name: -x", {"name": "-x"}),
        ("name: --flag", {"name": "--flag"}),
        ("name: 'a b'", {"name": "a b"}),
        ("name: true", {"name": "true"}),
        ("optim_args: [8, 4]", {"optim_args": "8,4"}),
        ("names: floor", {"names": ["floor"]}),
        ("names: [8, [4, 2]]", {"names": ["8", "4,2"]}),
        ("shares: 0.5", {"shares": [0.5]}),
        ("shares: [0.5, 1e-1]", {"shares": [0.5, 0.1]}),
        ("flag: yes", {"flag": True}),
        ("flag: 'yes'", {"flag": True}),
        ("kept: false", {"kept": False}),
        ("strategy: no", {"strategy": "no"}),
        ("lr_scheduler_kwargs: {a: 1}", {"lr_scheduler_kwargs": '{"a": 1}'}),
        ("name: null\nshares: null\nnames: []", {}),
        ("\ufeffsize: 3", {"size": 3}),
    ],
)
def test_a_value_in_a_file_is_what_it_would_be_on_a_command_line(monkeypatch, tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert parse(monkeypatch, tmp_path / "a.yaml") == Arguments(**expected)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", b'{"sise": 3}', "sise: there is no such argument; did you mean size?"),
        ("a.yaml", b"no-flag: 3", "no-flag: there is no such argument"),
        ("a.yaml", b"1: 3", "1: there is no such argument"),
        ("a.json", b"{", "Expecting property name"),
        ("a.yaml", b"[1", "line 1: "),
        ("a.yaml", b"size: 1\n  rate: 2", "line 2: "),
        ("a.yaml", b"x: !!python/object:x {}", "could not determine a constructor"),
        ("a.yaml", b"---\nsize: 1\n---\nsize: 2", "line 3: "),
        ("a.yaml", b"", "is empty; allowed is a mapping"),
        ("a.json", b"", "Expecting value"),
        ("a.json", b"null", "is empty; allowed is a mapping"),
        ("a.yaml", b"- size", "holds a list; allowed is a mapping"),
        ("a.yaml", b"size", "holds a single value, 'size'; allowed is a mapping"),
        ("a.yaml", b"size: 1\nsize: 2", "size: stands there twice"),
        ("a.json", b'{"size": 1, "size": 2}', "size: stands there twice"),
        ("a.yaml", b"name: \xff", "utf-8"),
        ("a.yaml", b"size: one", "--size one: allowed is an integer"),
        ("a.yaml", b"size: 1.5", "--size 1.5: allowed is an integer"),
        ("a.yaml", b"size: true", "--size true: allowed is an integer"),
        ("a.yaml", b"size: [1, 2]", "--size [1, 2]: allowed is a single value"),
        ("a.yaml", b"size: {a: 1}", "--size {'a': 1}: allowed is a single value"),
        ("a.yaml", b"size: null", "--size null: allowed is a value"),
        ("a.yaml", b"rate: .nan", "--rate nan: allowed is a number"),
        ("a.json", b'{"rate": -Infinity}', "--rate -inf: allowed is a number"),
        ("a.yaml", b"flag: perhaps", "--flag perhaps: allowed is true or false"),
        ("a.yaml", b"flag: 2", "--flag 2: allowed is true or false"),
        ("a.yaml", b"names: [a, null]", "--names: an entry of the list is null"),
        ("a.yaml", b"optim_args: [[1], 2]", "--optim_args [[1], 2]: allowed are single values"),
        ("a.yaml", b"name: [a, b]", "--name ['a', 'b']: allowed is a single value, not a list"),
        ("a.yaml", b"name: {a: b}", "--name {'a': 'b'}: allowed is a single value, not a mapping"),
        ("a.yaml", b"shares: [0.5, x]", "--shares x: allowed is a number"),
        ("a.yaml", b"strategy: never", "--strategy never: allowed are no, steps, epoch"),
        ("b.yaml", None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_meant(monkeypatch, tmp_path, name, text, says):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(BadInput) as error:
        parse(monkeypatch, path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and says in line and "\n" not in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--sise", 3], "--sise: there is no such argument; did you mean --size?"),
        (["--sise=3"], "--sise: there is no such argument; did you mean --size?"),
        (["--zzz"], "--zzz: there is no such argument"),
        (["--size", 3, "extra"], "extra: stands alone; allowed are arguments, --NAME VALUE"),
        (["--size", 3, "a.yaml"], "a.yaml: stands alone; allowed are arguments, --NAME VALUE; a file of arguments"),
        (["--size"], "--size: expected one argument"),
        (["--size", "x"], "--size x: allowed is an integer"),
        (["--size", ""], "--size '': allowed is an integer"),
        (["--name", ""], "--name '': allowed is a text that is not empty"),
        (["--names", "a", " "], "--names ' ': allowed is a text that is not empty"),
        (["--rate", "nan"], "--rate nan: allowed is a number"),
        (["--rate=-inf"], "--rate -inf: allowed is a number"),
        (["--shares", 1, "inf"], "--shares inf: allowed is a number"),
        (["--flag", "perhaps"], "--flag perhaps: allowed is true or false"),
        (["--strategy", "never"], "--strategy never: allowed are no, steps, epoch"),
        (["--name", "d\udcff"], "--name d\udcff: must be a name in UTF-8"),
        (["--name=d\udcff"], "--name d\udcff: must be a name in UTF-8"),
        (["--size", 1, "--names", "a", "d\udcff"], "--names d\udcff: must be a name in UTF-8"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_one_line(monkeypatch, capsys, words, line):
    with pytest.raises(BadInput) as error:
        parse(monkeypatch, *words)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_an_argument_that_has_to_be_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(BadInput, match="^--needed_name: not given; allowed is a value for each$"):
        parse_arguments("", Needed)


def test_what_the_command_line_overrides_is_not_said_of_the_file(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("size: 3")
    with pytest.raises(BadInput, match="^--size x: "):
        parse(monkeypatch, tmp_path / "a.yaml", "--size", "x")


@pytest.mark.parametrize(
    ("given", "capabilities", "warns"),
    [
        (["--bf16"], {"avx2": True, "avx512_bf16": False}, True),
        (["--bf16_full_eval"], {}, True),
        (["--bf16"], {"avx512_bf16": True}, False),
        (["--bf16"], {"architecture": "arm64", "bf16": True}, False),
        ([], {}, False),
    ],
)
def test_emulated_bfloat16_is_said_to_be_slow(monkeypatch, tmp_path, caplog, given, capabilities, warns):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(sys, "argv", ["run.py", "--output_dir", str(tmp_path), "--use_cpu", *given])
    parse_arguments("", TrainerArguments)
    assert ("--bf16" in caplog.text) == warns
