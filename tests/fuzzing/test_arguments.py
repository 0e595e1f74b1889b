# SPDX-License-Identifier: Apache-2.0
"""Arguments of the four scripts: the script works with them, or refuses them in one line, and writes only where told.

The model is a folder that does not exist, so every command ends before long work; a few whole runs are elsewhere
(`tests/reliability`).
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from experiments.errors import Stopped
from experiments.merging.arguments import MergeArguments
from experiments.publishing.hub import HubArguments
from experiments.runs.finetune import finetune
from experiments.runs.sweep import SweepDataArguments, run_sweep
from experiments.runs.sweep_arguments import SweepArguments
from experiments.tasks.glue import GlueDataArguments, load_glue_task
from experiments.tasks.images import ImageDataArguments, load_image_task
from experiments.tasks.mlm import MlmDataArguments, load_mlm_task
from experiments.training.model_arguments import ModelArguments
from experiments.training.stage import RetrainArguments
from experiments.training.trainer_arguments import TrainerArguments
from tests.fuzzing.limits import check

SCRIPTS = {
    "run_glue.py": (lambda: finetune("", GlueDataArguments, load_glue_task), GlueDataArguments, MergeArguments),
    "run_image.py": (lambda: finetune("", ImageDataArguments, load_image_task), ImageDataArguments, MergeArguments),
    "run_mlm.py": (lambda: finetune("", MlmDataArguments, load_mlm_task), MlmDataArguments, MergeArguments),
    "eval_sweep.py": (lambda: run_sweep(""), SweepDataArguments, SweepArguments),
}
# Left out: arguments that start servers, debuggers or other programs, or that set the state of this whole process.
LEFT_OUT = {"model_name_or_path", "report_to", "deepspeed", "debug", "full_determinism", "torch_compile"}
VALUES = st.sampled_from(
    ("0", "1", "-1", "2", "0.5", "1e309", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "1e-400", "true", "no", "",
     " ", "[]", "{}", "[1]", '{"a": 1}', "1,2,3", ",", "a=b", "=", "../../up", "/", ".", "~", "\x1b[31m", "a\nb", "é",
     "-", "$x^$", "%s", "{0}", "x" * 5000, "/dev/null", "/proc/self/mem", "cola", "steps", "leader")
) | st.text(max_size=12)  # fmt: skip


@st.composite
def commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draw a script and one to five of its arguments with their values."""
    script = draw(st.sampled_from(sorted(SCRIPTS)))
    _, data, merging = SCRIPTS[script]
    groups = (ModelArguments, data, merging, TrainerArguments, RetrainArguments, HubArguments)
    names = sorted({field.name for group in groups for field in fields(group) if field.init} - LEFT_OUT)
    words = []
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=5)):
        words += [f"--{name}", *draw(st.lists(VALUES, max_size=2))]
    return script, words


def call(script: str) -> None:
    """Run a script; --help, which random words may ask for, ends it with exit code 0."""
    try:
        with redirect_stdout(io.StringIO()):
            SCRIPTS[script][0]()
    except SystemExit as ended:
        assert not ended.code, f"exit code {ended.code}"


def written_outside(before: set[str], after: set[str]) -> set[str]:
    return {name for name in after - before if name != "out"}


@settings(max_examples=15)  # each takes half a second
@given(commands())
@example(("run_glue.py", ["-h"]))
@pytest.mark.filterwarnings("ignore")
def test_any_command_works_or_is_refused(command):
    script, words = command
    before = Path.cwd(), sys.argv, os.environ.copy()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.argv = [script, "--model_name_or_path", "absent", "--output_dir", "out", "--use_cpu", *words]
        try:
            check(lambda: call(script), Stopped, OSError)
            assert not written_outside(set(), set(os.listdir("."))), "written beside the output folder"
        finally:
            os.chdir(before[0])
            sys.argv = before[1]
            for name in set(os.environ) - set(before[2]):
                del os.environ[name]
            os.environ.update(before[2])
