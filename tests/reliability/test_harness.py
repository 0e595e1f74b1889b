# SPDX-License-Identifier: Apache-2.0
"""Tests of the harness itself: it detects hangs, kills, broken files and stale results."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.reliability.bad_input import BadInputCase
from tests.reliability.case import PASSED, Verdict, try_case
from tests.reliability.left import broken, differences, left
from tests.reliability.running import Kill, run_forked
from tests.reliability.verdicts import report, write_report
from tests.support.script_run import ROOT


@pytest.fixture
def evaluate(inputs, tmp_path):
    """Return a function that runs an evaluation in `tmp_path`."""
    return lambda *more: run_forked("run_glue.py", (*inputs.text_evaluation, "--output_dir", "out"), tmp_path, *more)


def test_a_run_is_what_it_is_in_an_interpreter(evaluate):
    outcome = evaluate()
    assert (outcome.exit_code, outcome.training_steps, outcome.evaluation_steps) == (0, 0, 3)
    assert outcome.fault == PASSED and not outcome.errors


@pytest.mark.parametrize("kill", [Kill(seconds=0.1), Kill(function="transformers:Trainer.predict")])
def test_a_kill_is_seen(evaluate, kill):
    outcome = evaluate(kill)
    assert outcome.killed and not outcome.hung
    assert kill.function is None or outcome.evaluation_steps == 0
    assert kill.seconds is None or "<module>" in outcome.stack


def test_half_a_file_is_left_by_a_kill_while_it_is_written(evaluate, tmp_path):
    assert evaluate(Kill(function="pathlib:Path.write_text", half=True)).killed
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and any(not path.read_text().endswith("}\n") for path in files)


def test_a_run_that_takes_too_long_hangs(evaluate):
    outcome = evaluate(None, 0.1)
    assert outcome.hung and not outcome.killed and outcome.fault[1] == "hang"


@pytest.mark.parametrize(
    ("arguments", "says", "fault"),
    [
        (("--do_eval",), (), "silently wrong"),
        (("--r", -1, "--do_eval"), ("-2",), "other"),
        (("--task_name", "x", "--do_eval"), ("task_name", "x"), ""),
    ],
)
def test_only_a_complete_refusal_passes(inputs, tmp_path, arguments, says, fault):
    """A command that works, a message without the value, and a good message."""
    case = BadInputCase("a class", "a case", "run_glue.py", lambda *_: (*inputs.text_evaluation, *arguments), says)
    assert try_case(case, inputs, tmp_path / "case").fault == fault


def test_broken_files_are_found(tmp_path):
    save_file({"weight": torch.zeros(64)}, tmp_path / "good.safetensors")
    (tmp_path / "good.json").write_text('{"a": 1}')
    module = ROOT / "configuration_tome_perceiver.py"
    (tmp_path / module.name).write_bytes(module.read_bytes())
    assert broken(tmp_path) == []
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-8])
    (tmp_path / "cut.json").write_text('{"a": ')
    (tmp_path / "nan.json").write_text('{"a": NaN}')
    (tmp_path / ".x.json.partial").write_text("")
    (tmp_path / module.name).write_bytes(module.read_bytes()[:4096])
    names = {line.partition(":")[0] for line in broken(tmp_path)}
    assert names == {"cut.safetensors", "cut.json", "nan.json", ".x.json.partial", module.name}


def test_only_times_may_differ(tmp_path):
    figures = {"eval_loss": 1.0, "eval_runtime": 2.0, "rows": [{"accuracy": 0.5, "latency_ms": {"median": 3}}]}
    folders = [tmp_path / name for name in ("one", "other")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        later = figures | {"eval_runtime": number, "rows": [{"accuracy": 0.5, "latency_ms": {"median": number}}]}
        (folder / "results.json").write_text(json.dumps(later))
        (folder / "README.md").write_text(f"Accuracy 0.5\n\n| r | speed |\n|---|---|\n| 0 | {number}.0x |\n")
    one, other = map(left, folders)
    assert differences(one, other) == []
    changed = json.loads((folders[0] / "results.json").read_text())
    changed["rows"][0]["accuracy"] = 0.25
    (folders[0] / "results.json").write_text(json.dumps(changed))
    (folders[0] / "README.md").write_text("Accuracy 0.25\n")
    (folders[0] / "more.txt").write_text("x")
    wrong = differences(left(folders[0]), other)
    assert len(wrong) == 3 and any("0.25 and not 0.5" in line for line in wrong)


def test_the_tables_count_and_stand_between_the_markers(tmp_path):
    verdicts = [
        Verdict("bad inputs", "images", "one", "", "", "", ""),
        Verdict("bad inputs", "images", "two", "exit code 0", "silently wrong", "", ""),
        Verdict("kills", "run_glue", "three", "", "", "", "", ("training", "training")),
    ]
    text = report(verdicts, "heading")
    assert "| images | 2 | 1 | 1 | 0 | 0 | 0 |" in text and "| training | 2 |" in text
    assert "- two (silently wrong): exit code 0" in text
    page = tmp_path / "page.md"
    marks = [f"<!-- {mark}: written by make reliability -->" for mark in ("begin", "end")]
    page.write_text("\n".join(["before", marks[0], "old", marks[1], "after", ""]))
    write_report(page, "of another command", "another command")
    write_report(page, text)
    assert "another command" not in page.read_text()
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written and text in written
