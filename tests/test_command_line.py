# SPDX-License-Identifier: Apache-2.0
"""Arguments from a command line or a file, and the command as it is written down."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

import pytest
import torch

from experiments.bad_input import BadInput
from experiments.command_line import parse_arguments, shown_command
from experiments.trainer_arguments import TrainerArguments


@dataclass
class Arguments:
    size: int = 1


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


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"size": 3}'), ("a.yaml", "size: 3"), ("a.yml", "size: 3")])
def test_arguments_stand_in_a_file(monkeypatch, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / name)])
    assert parse_arguments("", Arguments)[0].size == 3


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '{"sise": 3}'), ("a.json", "{"), ("a.yaml", "[1"), ("b.yaml", None)]
)
def test_a_file_that_cannot_be_meant(monkeypatch, tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / name)])
    with pytest.raises(BadInput):
        parse_arguments("", Arguments)


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
