# SPDX-License-Identifier: Apache-2.0
"""Tests of --push_to_hub and --push_only against a local Hub, and of loading what was pushed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import PerceiverTokenizer

from experiments.publishing import hub as hub_upload
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.loopback_hub import USER, WRITE_TOKEN, LoopbackHub
from tests.support.script_run import PROGRAMS, ROOT, bad_input_line, call_script
from tests.support.tiny_texts import write_glue, write_model_config

TOKEN = ("--hub_token", WRITE_TOKEN)
SENTENCE = "aaaxx"


@pytest.fixture()
def hub(tmp_path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        yield hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train to a folder that is never pushed."""
    folder = tmp_path_factory.mktemp("trained")
    call_script("run_glue.py", *arguments(folder), "--output_dir", folder / "out")
    return folder


def arguments(folder: Path) -> tuple[object, ...]:
    return (
        "--config_name", write_model_config(folder), "--dataset_name", write_glue(folder / "glue", "sst2"),
        "--task_name", "sst2", "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 1, "--save_strategy", "no",
        "--r", 1, "--token", "hf_secretfordownloads",
    )  # fmt: skip


def logits(folder: Path) -> list[float]:
    model = ToMePerceiverForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**PerceiverTokenizer()(SENTENCE, return_tensors="pt")).logits[0].tolist()


def test_a_run_is_pushed_in_one_commit(hub, trained, tmp_path, capsys):
    """The commit holds checkpoint, code, tokenizer, figures and a card that loads from the Hub, and nothing secret."""
    call_script("run_glue.py", *arguments(trained), "--push_to_hub", *TOKEN, "--output_dir", tmp_path / "pushed")
    assert [commit.branch for commit in hub.commits] == ["main"]
    files = hub.files(f"{USER}/pushed")
    for name in ("model.safetensors", "config.json", "modeling_tome_perceiver.py", "tokenizer_config.json",
                 "README.md", "schedule.png", "all_results.json", "eval_results.json"):  # fmt: skip
        assert files[name] == (tmp_path / "pushed" / name).read_bytes()
    assert "training_args.bin" not in files
    for secret in (WRITE_TOKEN, "hf_secretfordownloads"):
        assert not any(secret.encode() in data for data in files.values())
    # No path of this machine is pushed; the folder keeps the paths, so the same command still resumes.
    assert [name for name, data in files.items() if str(trained.parent).encode() in data] == []
    assert str(trained) in (tmp_path / "pushed" / "arguments.json").read_text()
    call_script(
        "run_glue.py", *arguments(trained), "--resume_from_checkpoint", "last", "--output_dir", tmp_path / "pushed"
    )
    card = ModelCard(files["README.md"].decode())
    assert f'\ncheckpoint = "{USER}/pushed"\n' in card.text
    assert card.data.eval_results[0].metric_value == json.loads(files["eval_results.json"])["eval_accuracy"]
    assert f"{USER}/pushed" in capsys.readouterr().out


@pytest.mark.parametrize("branch", ["main", "tries"])
def test_push_only_pushes_what_is_there_once(hub, trained, branch):
    where = ("--hub_model_id", "later", *(("--hub_revision", branch) if branch != "main" else ()))
    for _ in range(2):
        call_script("run_glue.py", "--push_only", *where, *TOKEN, "--output_dir", trained / "out")
    assert [commit.branch for commit in hub.commits] == [branch]
    pushed = hub.files(f"{USER}/later", branch)["model.safetensors"]
    assert pushed == (trained / "out" / "model.safetensors").read_bytes()
    assert ("config.json" in hub.files(f"{USER}/later")) == (branch == "main")
    assert f'"{USER}/later"' in (trained / "out" / "README.md").read_text()


def test_a_push_that_fails_loses_nothing_and_can_be_repeated(hub, trained, tmp_path, capsys, monkeypatch):
    """The results are on disk, the message says how to push them, and the exit code is not 0."""
    monkeypatch.setattr(hub_upload, "RETRY_WAITS", ())
    hub.fail("POST .*/commit/", 1, "503")
    with pytest.raises(SystemExit) as exit_info:
        call_script("run_glue.py", *arguments(trained), "--push_to_hub", *TOKEN, "--output_dir", tmp_path / "pushed")
    assert exit_info.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--push_only" in errors[0] and str(tmp_path / "pushed") in errors[0]
    assert hub.commits == []
    before = (tmp_path / "pushed" / "model.safetensors").read_bytes()
    call_script("run_glue.py", "--push_only", *TOKEN, "--output_dir", tmp_path / "pushed")
    assert hub.files(f"{USER}/pushed")["model.safetensors"] == before


@pytest.mark.parametrize("name", ["run_glue.py", "run_image.py", "eval_sweep.py"])
def test_push_only_of_nothing_is_named(hub, tmp_path, capsys, name):
    line = bad_input_line(capsys, name, "--push_only", *TOKEN, "--output_dir", tmp_path / "nothing")
    assert f"--output_dir {tmp_path / 'nothing'}" in line


def test_evaluating_elsewhere_leaves_nothing_to_push(hub, trained, tmp_path, capsys):
    given = (
        "--model_name_or_path", trained / "out", *arguments(trained)[2:6], "--do_eval", "--use_cpu", "--push_to_hub",
        *TOKEN, "--output_dir", tmp_path / "new",
    )  # fmt: skip
    assert "--push_to_hub" in bad_input_line(capsys, "run_glue.py", *given)


def test_a_sweep_is_pushed_and_comes_back(hub, trained, tmp_path):
    """One commit for each checkpoint: the unmerged one with the table on main, each retrained one on its own branch."""
    sweep = tmp_path / "sweep"
    call_script(
        "eval_sweep.py", "--model_name_or_path", trained / "out", *arguments(trained)[2:6], "--use_cpu",
        "--r", 0, "2,0,1,0", "--retrain_epochs", 1, "--save_strategy", "no", "--timing_rounds", 1,
        "--timing_batch_size", 2, "--push_to_hub", *TOKEN, "--output_dir", sweep,
    )  # fmt: skip
    assert [commit.branch for commit in hub.commits] == ["main", "r0", "r2_0_1_0"]
    repo_id = f"{USER}/sweep"
    for branch in ("main", "r0", "r2_0_1_0"):
        assert [
            name for name, data in hub.files(repo_id, branch).items() if str(tmp_path.parent).encode() in data
        ] == []
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    assert "| r=2,0,1,0 |" in card.text and "![Accuracy against the speed-up" in card.text
    assert "sweep.png" in hub.files(repo_id)
    names = [result.metric_name for result in card.data.eval_results]
    assert names == [
        f"Accuracy (r={r}, {stage})" for r in ("0", "2,0,1,0") for stage in ("merged without retraining", "retrained")
    ]
    assert card.data.eval_results[-1].metric_args["r"] == [2, 0, 1, 0]
    branch = ModelCard(hub.files(repo_id, "r2_0_1_0")["README.md"].decode())
    assert f'checkpoint = "{repo_id}"' in branch.text and 'checkpoint, revision="r2_0_1_0"' in branch.text

    folders = {"main": sweep, "r2_0_1_0": sweep / "retrained" / "r2_0_1_0"}
    oid = hub.commits[1].oid
    folders[oid] = sweep / "retrained" / "r0"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, PROGRAMS / "classify_from_hub.py", json.dumps([(repo_id, revision) for revision in folders])],
        cwd=elsewhere,
        env=hub.environment(elsewhere / "home"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOGITS")).partition(" ")[2])
    for revision, folder in folders.items():
        assert loaded[revision] == pytest.approx(logits(folder), rel=1e-5, abs=1e-6)
    assert len({tuple(values) for values in loaded.values()}) == 3


def test_a_gated_checkpoint_is_named(trained, tmp_path):
    with LoopbackHub() as hub:
        hub.add_repository("others/gated", {"config.json": b"{}"}, gated=True)
        given = ("--model_name_or_path", "others/gated", *arguments(trained)[2:6], "--do_eval")
        done = subprocess.run(
            [sys.executable, "run_glue.py", *map(str, given), "--output_dir", str(tmp_path / "out")],
            cwd=ROOT,
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--model_name_or_path others/gated" in done.stderr.splitlines()[-1]
    assert "gated repo" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
