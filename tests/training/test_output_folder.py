# SPDX-License-Identifier: Apache-2.0
"""What a folder of results may hold, and what is said when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainingArguments

from experiments.errors import BadInput
from experiments.runs.finetune_stages import Run
from experiments.training.checkpoint import last_checkpoint
from experiments.training.output_folder import (
    check_disk_space,
    check_no_other_experiment,
    claim,
    claim_for_evaluation,
    lock_folder,
    note_content,
    read_note,
    save_metrics,
    traces,
    write_json,
)
from tests.support.script_run import ROOT, bad_input_line, call_script
from tests.support.tiny_texts import write_glue, write_model_config

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(
    ("strategy", "models", "copies"), [("no", 1, 1), ("no", 2, 2), ("steps", 1, 4), ("epoch", 2, 5)]
)
def test_a_disk_without_room_is_named_before_training(tmp_path, monkeypatch, strategy, models, copies):
    """Every model that stays, and with checkpoints the weights and two averages of the gradient besides."""
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB
    needed = copies * 4_000_000
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy=strategy, use_cpu=True)
    asked = []

    def usage(free: int):
        def disk_usage(folder: Path) -> Usage:
            asked.append(Path(folder))
            return Usage(10**9, 0, free)

        return disk_usage

    monkeypatch.setattr(shutil, "disk_usage", usage(needed))
    folder = tmp_path / "not" / "there" / "yet"
    check_disk_space(folder, model, arguments, models)
    monkeypatch.setattr(shutil, "disk_usage", usage(needed - 1))
    model.weight.data = torch.zeros(1)
    check_disk_space(folder, model, arguments, models)
    model.weight.data = torch.zeros(1000, 1000)
    with pytest.raises(BadInput) as error:
        check_disk_space(folder, model, arguments, models)
    assert f"--output_dir {folder}" in str(error.value)
    assert f"{needed / 1e9:.2f} GB" in str(error.value) and "are free" in str(error.value)
    assert set(asked) == {tmp_path}  # of the folder that is there
    assert not (tmp_path / "not").exists()


def test_a_disk_without_room_says_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 2_500_000_000))
    monkeypatch.setattr(nn.Parameter, "numel", lambda parameter: 10**9)
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", use_cpu=True)
    with pytest.raises(BadInput, match=r"2\.50 GB are free there; training writes at least 8\.00 GB"):
        check_disk_space(tmp_path, nn.Linear(1, 1), arguments, models=1)


def test_metrics_add_up(tmp_path):
    save_metrics(tmp_path / "out", "train", {"train_loss": 2.0, "epoch": 1.0})
    save_metrics(tmp_path / "out", "eval", {"eval_accuracy": 0.5})
    save_metrics(tmp_path / "out", "train", {"train_loss": 1.0, "epoch": 2.0})

    def read(name: str) -> dict[str, float]:
        return json.loads((tmp_path / "out" / name).read_text())

    assert read("all_results.json") == {"train_loss": 1.0, "epoch": 2.0, "eval_accuracy": 0.5}
    assert read("train_results.json") == {"train_loss": 1.0, "epoch": 2.0}
    assert read("eval_results.json") == {"eval_accuracy": 0.5}


@pytest.mark.parametrize("call", [1, 2])
def test_metrics_are_whole_or_not_there(tmp_path, monkeypatch, call):
    """A stop in the middle of writing either file leaves the other one, and this one as it was."""
    save_metrics(tmp_path, "eval", {"eval_accuracy": 0.5})
    write_text, calls = Path.write_text, []

    def stopping(path: Path, text: str, **options: object) -> int:
        calls.append(path)
        if len(calls) == call:
            write_text(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", stopping)
    with pytest.raises(KeyboardInterrupt):
        save_metrics(tmp_path, "eval", {"eval_accuracy": 0.75})
    monkeypatch.undo()
    everything, own = (json.loads((tmp_path / f"{name}_results.json").read_text()) for name in ("all", "eval"))
    assert (everything["eval_accuracy"], own["eval_accuracy"]) == ((0.5, 0.5) if call == 1 else (0.75, 0.5))
    save_metrics(tmp_path, "eval", {"eval_accuracy": 1.0})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_accuracy": 1.0}


def noted(**changes: object) -> dict[str, object]:
    """What decides a training."""
    contents = {"weights_to_start_from": "a", "train": "b", "evaluation": "c"}
    return {"seed": 1, "betas": (0.9, 0.99), "content": contents | changes.pop("content", {}), **changes}


def test_a_folder_is_claimed_once_something_is_there(tmp_path):
    """A note alone owns nothing; with anything beside it, the same arguments and contents are the same experiment."""
    folder = tmp_path / "out"
    claim(folder, noted(), longer=False, write=False)
    assert not folder.exists()
    claim(folder, noted(seed=2), longer=False, write=True)
    claim(folder, noted(), longer=False, write=True)
    (folder / "config.json").write_text("{}")
    before = (folder / "arguments.json").read_bytes()
    claim(folder, noted(), longer=False, write=True)
    assert (folder / "arguments.json").read_bytes() == before
    with pytest.raises(BadInput, match="holds another experiment, whose seed is 1 and not 2"):
        claim(folder, noted(seed=2), longer=True, write=True)
    with pytest.raises(BadInput, match="whose task is None and not rte"):
        claim(folder, noted(task="rte"), longer=False, write=True)
    for name in noted()["content"]:
        with pytest.raises(BadInput, match=f"with another content of its {name.replace('_', ' ')}"):
            claim(folder, noted(content={name: "x"}), longer=False, write=True)
    assert (folder / "arguments.json").read_bytes() == before


@pytest.mark.parametrize("name", ["num_train_epochs", "max_steps"])
def test_only_what_goes_on_may_be_longer_and_says_so(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / "arguments.json", noted(**{name: 2}))
    with pytest.raises(BadInput, match=f"whose {name} is 2 and not 3"):
        claim(tmp_path, noted(**{name: 3}), longer=False, write=True)
    with pytest.raises(BadInput, match=f"whose {name} is 2 and not 1"):
        claim(tmp_path, noted(**{name: 1}), longer=True, write=True)
    for _ in range(2):
        claim(tmp_path, noted(**{name: 3}), longer=True, write=True)
        note = read_note(tmp_path)
        assert note[name] == 3 and note["continued_from"] == {name: 2}


@pytest.mark.parametrize(
    "trace", ["config.json", "trainer_state.json", "sweep_results.json", "all_results.json", "checkpoint-3"]
)
def test_what_is_there_without_a_claim_is_another_experiment(tmp_path, trace):
    (tmp_path / trace).mkdir()
    for check in (
        lambda: check_no_other_experiment(tmp_path, "sweep.json"),
        lambda: claim(tmp_path, noted(), longer=True, write=True),
        lambda: claim_for_evaluation(tmp_path, {"content": {"weights": "a"}}, write=True),
    ):
        with pytest.raises(BadInput, match=r"holds another experiment, \(") as error:
            check()
        assert trace in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "sweep.json").write_text("{}")
    check_no_other_experiment(tmp_path, "sweep.json")


def test_other_files_are_no_experiment(tmp_path):
    for name in ("train.log", "checkpoint-best"):
        (tmp_path / name).write_text("")
    check_no_other_experiment(tmp_path, "sweep.json")
    check_no_other_experiment(tmp_path / "not_there", "sweep.json")
    claim(tmp_path, noted(), longer=False, write=True)


def test_an_evaluation_is_of_what_a_training_left_or_has_a_folder_of_its_own(tmp_path):
    evaluation = {"bf16": False, "content": {"weights": "z", "config": "y", "evaluation": "c"}}
    claim(tmp_path, noted(bf16=False), longer=False, write=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="holds another experiment"):
        claim_for_evaluation(tmp_path, evaluation, write=True)  # training has not ended
    for name, fingerprint in (("weights", "z"), ("config", "y")):
        note_content(tmp_path, name, fingerprint)
    claim_for_evaluation(tmp_path, evaluation, write=True)
    with pytest.raises(BadInput, match="whose bf16 is False and not True"):
        claim_for_evaluation(tmp_path, evaluation | {"bf16": True}, write=True)
    for name in evaluation["content"]:
        other = evaluation | {"content": evaluation["content"] | {name: "x"}}
        with pytest.raises(BadInput, match=f"content of its {name}"):
            claim_for_evaluation(tmp_path, other, write=True)
    # Predictions are noted when they come, and then count too.
    predicting = evaluation | {"content": evaluation["content"] | {"prediction": "p"}}
    claim_for_evaluation(tmp_path, predicting, write=True)
    with pytest.raises(BadInput, match="content of its prediction"):
        claim_for_evaluation(tmp_path, evaluation | {"content": {"prediction": "q"}}, write=True)
    claim(tmp_path, noted(bf16=False), longer=False, write=True)  # the training is still the same


def test_a_checkpoint_of_another_program_may_be_evaluated_where_it_is(tmp_path):
    """As long as there are no figures of something else."""
    (tmp_path / "config.json").write_text("{}")
    evaluation = {"model_name_or_path": str(tmp_path), "content": {"weights": "z"}}
    claim_for_evaluation(tmp_path, evaluation, write=False)
    (tmp_path / "all_results.json").write_text("{}")
    with pytest.raises(BadInput, match="holds another experiment"):
        claim_for_evaluation(tmp_path, evaluation, write=False)


def test_json_is_what_every_parser_takes(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "results.json", {"loss": float("nan")})
    assert not (tmp_path / "results.json").exists()


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    return (
        "--config_name", write_model_config(folder), "--task_name", "sst2",
        "--dataset_name", write_glue(folder / "glue", "sst2"), "--do_train", "--do_eval", "--do_predict", "--use_cpu",
        "--num_train_epochs", 1, "--per_device_train_batch_size", 12, "--save_strategy", "no",
        # `datasets` takes a folder for another one of the same name that it has seen before.
        "--cache_dir", folder / "cache",
    )  # fmt: skip


@pytest.mark.parametrize("name", [".eval_results.json.partial", ".predict_results_sst2.txt.partial"])
def test_a_full_disk_is_one_line_and_what_was_written_stays(command, tmp_path, capsys, name):
    """Where a file should go is a device that is always full."""
    (tmp_path / name).symlink_to("/dev/full")
    line = bad_input_line(capsys, "run_glue.py", *command, "--output_dir", tmp_path)
    assert "--output_dir" in line and "No space left on device" in line
    assert "train_loss" in json.loads((tmp_path / "train_results.json").read_text())
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000
    assert not (tmp_path / name.removeprefix(".").removesuffix(".partial")).exists()
    call_script("run_glue.py", *command, "--output_dir", tmp_path, "--resume_from_checkpoint", "last")
    assert len((tmp_path / "predict_results_sst2.txt").read_text().splitlines()) == 1 + 6


def test_a_disk_that_is_full_as_weights_are_written(command, tmp_path, capsys, monkeypatch):
    """safetensors says it in words, with an error of its own."""

    def save(trainer: Trainer, *arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Trainer, "save_model", save)
    line = bad_input_line(capsys, "run_glue.py", *command, "--output_dir", tmp_path)
    assert "--output_dir" in line and "No space left on device" in line
    assert json.loads((tmp_path / "arguments.json").read_text())["task_name"] == "sst2"
    assert not (tmp_path / "train_results.json").exists()


@pytest.mark.parametrize("free", [0, 10**9])
def test_a_disk_that_is_full_as_the_optimizer_is_written(command, tmp_path, capsys, monkeypatch, free):
    """torch.save says nothing of it, so the disk is looked at; with room, the error keeps its traceback."""

    def save(trainer: Trainer, *arguments: object) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    arguments = (*command, "--save_strategy", "epoch", "--output_dir", tmp_path)
    if free:
        with pytest.raises(RuntimeError, match="iostream error"):
            call_script("run_glue.py", *arguments)
    else:
        line = bad_input_line(capsys, "run_glue.py", *arguments)
        assert "No space left on device" in line and str(tmp_path) in line
    assert last_checkpoint(tmp_path) is None


def test_a_disk_that_is_full_behind_another_error(command, tmp_path, capsys, monkeypatch):
    """Libraries raise their own error from it; any other error keeps its traceback."""

    def save(*arguments: object) -> None:
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise RuntimeError("writing failed") from error

    monkeypatch.setattr("experiments.training.stage.save_metrics", save)
    code = errno.ENOSPC
    line = bad_input_line(capsys, "run_glue.py", *command, "--output_dir", tmp_path / "full")
    assert "No space left on device; writing failed" in line
    code = errno.EIO
    with pytest.raises(RuntimeError, match="writing failed"):
        call_script("run_glue.py", *command, "--output_dir", tmp_path / "broken")


HOLDING = """
import sys, time
from pathlib import Path
from experiments.training.output_folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_second_run_is_refused_while_one_writes_and_not_after_it_was_killed(command, tmp_path, capsys, end):
    folder = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, folder], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as first:  # fmt: skip
        assert first.stdout.readline() == "locked\n"
        line = bad_input_line(capsys, "run_glue.py", *command, "--output_dir", folder)
        assert line.startswith(f"error: --output_dir {folder}: another run is writing there")
        assert traces(folder) == [] and not (folder / "arguments.json").exists()
        first.send_signal(end)
    call_script("run_glue.py", *command, "--output_dir", folder)
    assert (folder / "eval_results.json").exists() and not (folder / ".lock").exists()


def test_a_lock_leaves_nothing_in_a_folder_that_it_made(tmp_path):
    with pytest.raises(BadInput), lock_folder(tmp_path / "new" / "out"):
        assert (tmp_path / "new" / "out").exists()
        raise BadInput("nothing came of it")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with lock_folder(tmp_path / "there"):
        pass
    assert list((tmp_path / "there").iterdir()) == []


def test_what_another_run_left_is_refused_before_a_search(command, tmp_path, capsys, monkeypatch):
    call_script("run_glue.py", *command, "--output_dir", tmp_path / "out")
    monkeypatch.setattr(Run, "resolve_merging", None)
    model = ("--model_name_or_path", tmp_path / "out", "--flops_ratio", 0.985, "--do_train", "false")
    before = read_note(tmp_path / "out")
    line = bad_input_line(capsys, "run_glue.py", *command[2:], *model, "--output_dir", tmp_path / "out")
    assert "--output_dir" in line and "holds another" in line
    assert read_note(tmp_path / "out") == before


def test_a_finished_checkpoint_predicts_another_file_into_its_own_folder(command, tmp_path):
    """No training file is given, and what it was trained and evaluated with is not asked for again."""
    folder = tmp_path / "out"
    call_script("run_glue.py", *command, "--config_overrides", "num_latents=6", "--output_dir", folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*_results.json") if "all" not in path.name}
    (tmp_path / "own.csv").write_text("sentence\naaa\nbbb\n")
    given = ("--model_name_or_path", folder, "--test_file", tmp_path / "own.csv", "--do_predict", "--use_cpu")
    call_script("run_glue.py", *given, "--output_dir", folder)
    assert len((folder / "predict_results_own.txt").read_text().splitlines()) == 3
    changed = {path.name for path in folder.glob("*_results.json") if before.get(path.name) != path.read_bytes()}
    assert changed == {"all_results.json", "predict_results.json"}
