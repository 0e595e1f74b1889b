# SPDX-License-Identifier: Apache-2.0
"""`--help` and what there is no argument for: at once, of today; and what is stopped early ends in one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest

from experiments import help_page
from experiments.help_page import PAGES, SCRIPTS, first_unknown, kept_page, made_of_line
from experiments.training.trainer_arguments import TrainerArguments
from tests.support.script_run import ROOT, call_script

AT_ONCE = """
import runpy, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    heavy = {"torch", "transformers", "datasets", "evaluate", "numpy", "yaml"} & set(sys.modules)
    assert not heavy, heavy
    sys.exit(end.code)
"""


def at_once(*words: str) -> subprocess.CompletedProcess[str]:
    """A script that must not import what takes seconds."""
    command = [sys.executable, "-c", AT_ONCE, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def help_of(capsys, script: str, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        call_script(script, *words)
    assert exit_info.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kept_page_is_what_the_arguments_say(capsys, monkeypatch, tmp_path, script):
    kept = (PAGES / script).with_suffix(".txt").read_text()
    monkeypatch.setattr(help_page, "PAGES", tmp_path)
    made = kept_page(script, help_of(capsys, script, "--help"), help_of(capsys, script, "--help_all"))
    assert kept == made, "arguments have changed: make help-pages"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_before_anything_heavy_is_imported(script):
    start = time.monotonic()
    run = at_once(script, "--help")
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 2 and "--flops_ratio" in run.stdout and "# all arguments" not in run.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_argument_that_there_is_not_is_refused_before_anything_heavy_is_imported(script):
    run = at_once(script, "--r", "-1", "--flop_ratio=0.6")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "error: --flop_ratio: there is no such argument; did you mean --flops_ratio?\n"


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["--sise", "3"], "--sise"),
        (["--sise=3"], "--sise"),
        (["file.yaml", "--size", "1", "--no-sise"], "--no-sise"),
        (["--size", "-1", "--per-cent=2", "--per_cent", "x", "--no_size", "--no-per-cent", "-h"], None),
        (["--help", "--help_all"], None),
        # What argparse does not take for an argument either.
        (["--size", "--a text", "--", "--sise"], None),
    ],
)
def test_the_first_word_that_is_no_argument(words, unknown):
    assert first_unknown(words, ["size", "per_cent"]) == unknown


def test_a_page_of_other_arguments_or_another_transformers_is_not_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(help_page, "PAGES", tmp_path)
    (tmp_path / "run_glue.txt").write_text("# transformers 5.0.0, arguments 0\nan old page\n")
    assert "an old page" not in help_of(capsys, "run_glue.py", "--help")
    (tmp_path / "run_glue.txt").write_text(f"{made_of_line('run_glue.py')}\na page\n")
    assert help_of(capsys, "run_glue.py", "-h") == "a page\n"
    (tmp_path / "run_glue.txt").write_text("# transformers 5.0.0, arguments 0\na page\n\n# all arguments: size\n")
    monkeypatch.setattr("sys.argv", ["run_glue.py", "--r", "2"])
    help_page.answer_at_once("run_glue.py")


def test_a_page_is_of_the_fields_of_arguments_and_of_nothing_else():
    source = "class SomeArguments:\n    a: int = 1\n    def run(self): {}\n\nclass Other:\n    b: int = {}\n"
    fields = [list(help_page._fields(source.format(body, 2))) for body in ("pass", "return 1")]
    assert fields[0] == fields[1] == ["SomeArguments", "    a: int = 1"]


def test_help_is_in_the_order_of_what_one_needs_and_trainers_rest_is_behind_help_all(capsys):
    text = help_of(capsys, "run_glue.py", "--help")
    headings = re.findall(r"^(\w[\w ]*):$", text[text.index("\nwhat to run") :], re.MULTILINE)
    assert headings == [
        "what to run", "model", "sentences", "merging", "training and evaluation", "retraining", "pushing to the Hub",
    ]  # fmt: skip
    assert "--schedule" in text and "(default: search)" in text and "(default: 0.0)" in text
    assert "--adam_beta1" not in text and "--flops-ratio" not in text and "--help_all" in text
    assert all(len(line) <= help_page.WIDTH for line in text[text.index(headings[0]) :].splitlines())
    everything = help_of(capsys, "run_glue.py", "--help_all")
    assert all(f"  --{name}" in everything for name in TrainerArguments.__dataclass_fields__ if name[0] != "_")


def test_what_help_lists_of_trainers_arguments_is_there():
    for texts in TrainerArguments.in_help.values():
        assert set(texts) <= set(TrainerArguments.__dataclass_fields__)


@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_ctrl_c_while_things_are_imported_is_one_line(tmp_path, seconds):
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "run_image.py", "--do_eval", "--output_dir", str(tmp_path / "out")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # Under nohup, and where some CI starts the tests, it is ignored, and a child inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=60)
        # Where a library ignores what is raised in it, the signal is lost, and has to be given again.
        if process.returncode == 130:
            break
    assert process.returncode == 130 and output == ""
    assert error.startswith("error: interrupted") and error.count("\n") == 1
