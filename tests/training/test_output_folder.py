# SPDX-License-Identifier: Apache-2.0
"""Tests of output folders: each holds the results of one run; messages if the disk is full."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
from torch import nn
from transformers import Trainer, TrainingArguments

from experiments.errors import BadInput
from experiments.runs import finetune
from experiments.runs.finetune_stages import Run
from experiments.training.evaluation import predict_and_save
from experiments.training.output_folder import (
    check_disk_space,
    claim_folder,
    claim_training,
    list_result_files,
    lock_folder,
    save_metrics,
)
from experiments.training.resume import last_checkpoint
from experiments.training.run_record import RunRecord, update_record
from tests.support.script_run import bad_input_line, call_script, start_fork
from tests.support.tiny_texts import write_glue, write_model_config

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(("strategy", "copies"), [("no", 2), ("steps", 5)])
def test_a_disk_without_room_is_named_before_training(tmp_path, monkeypatch, strategy, copies):
    """Space is needed for two models, and for checkpoints with the weights and two averages of the gradient."""
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB
    needed, folder = copies * 4_000_000, tmp_path / "not" / "there"
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy=strategy, use_cpu=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 0, free) if place.exists() else None)
    free = needed
    check_disk_space(folder, model, arguments, models=2)
    free = needed - 1
    with pytest.raises(BadInput, match=f"--output_dir {folder}: .*GB are free there; .*{needed / 1e9:.2f} GB"):
        check_disk_space(folder, model, arguments, models=2)
    assert not (tmp_path / "not").exists()


def test_metrics_add_up(tmp_path):
    save_metrics(tmp_path / "out", "train", {"train_loss": 2.0, "epoch": 1.0})
    save_metrics(tmp_path / "out", "eval", {"eval_accuracy": 0.5})
    save_metrics(tmp_path / "out", "train", {"train_loss": 1.0, "epoch": 2.0})

    def read(name: str) -> dict[str, float]:
        return json.loads((tmp_path / "out" / name).read_text())

    assert read("all_results.json") == {"train_loss": 1.0, "epoch": 2.0, "eval_accuracy": 0.5}
    assert read("train_results.json") == {"train_loss": 1.0, "epoch": 2.0}
    assert read("eval_results.json") == {"eval_accuracy": 0.5}


def record(content: dict[str, str] | None = None, **changes: object) -> RunRecord:
    """Return the run record of a training."""
    contents = {"weights_to_start_from": "a", "train": "b", "evaluation": "c"}
    return RunRecord({"seed": 1, "betas": (0.9, 0.99), **changes}, contents | (content or {}))


def test_a_folder_is_claimed_once_results_are_there(tmp_path):
    """A run record alone does not claim a folder; with results, equal arguments and contents are the same run."""
    folder = tmp_path / "out"
    claim_folder(folder, record(), write=False)
    assert not folder.exists()
    claim_folder(folder, record(seed=2), write=True)
    claim_folder(folder, record(), write=True)
    (folder / "config.json").write_text("{}")
    before = (folder / "arguments.json").read_bytes()
    claim_folder(folder, record(), write=True)
    with pytest.raises(BadInput, match=r"holds another run \(seed 1, now 2\)"):
        claim_folder(folder, record(seed=2), longer=True, write=True)
    with pytest.raises(BadInput, match="task None, now rte"):
        claim_folder(folder, record(task="rte"), write=True)
    for name in record().content:
        with pytest.raises(BadInput, match=f"other content of its {name.replace('_', ' ')}"):
            claim_folder(folder, record({name: "x"}), write=True)
    assert (folder / "arguments.json").read_bytes() == before


@pytest.mark.parametrize("name", ["num_train_epochs", "max_steps"])
def test_only_a_run_that_resumes_may_be_longer_and_records_it(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    record(**{name: 2}).write(tmp_path)
    with pytest.raises(BadInput, match=f"{name} 2, now 3"):
        claim_folder(tmp_path, record(**{name: 3}), write=True)
    with pytest.raises(BadInput, match=f"{name} 2, now 1"):
        claim_folder(tmp_path, record(**{name: 1}), longer=True, write=True)
    for _ in range(2):
        claim_folder(tmp_path, record(**{name: 3}), longer=True, write=True)
        written = RunRecord.read(tmp_path)
        assert written.arguments[name] == 3 and written.notes == {"continued_from": {name: 2}}


@pytest.mark.parametrize(
    "file", ["config.json", "trainer_state.json", "sweep_results.json", "all_results.json", "checkpoint-3"]
)
def test_results_without_a_record_are_another_run(tmp_path, file):
    (tmp_path / file).mkdir()
    for run in (record(), RunRecord({}, {"weights": "a"})):
        with pytest.raises(BadInput, match=rf"--output_dir {tmp_path}: holds another run \({file}\)"):
            claim_folder(tmp_path, run, write=True)


def test_other_files_are_no_results(tmp_path):
    for name in ("train.log", "checkpoint-best"):
        (tmp_path / name).write_text("")
    assert list_result_files(tmp_path) == list_result_files(tmp_path / "not_there") == []
    claim_folder(tmp_path, record(), write=True)


def test_a_file_that_a_kill_left_half_written_goes_once_the_folder_is_claimed(tmp_path):
    (tmp_path / "checkpoint-8").mkdir()
    record().write(tmp_path)
    half_written = [tmp_path / ".all_results.json.partial", tmp_path / "checkpoint-8" / ".run_record.json.partial"]
    for path in half_written:
        path.write_text("{")
    with pytest.raises(BadInput):
        claim_folder(tmp_path, record(seed=2), write=True)
    claim_folder(tmp_path, record(), write=False)
    assert all(path.exists() for path in half_written)
    claim_folder(tmp_path, record(), write=True)
    assert not any(path.exists() for path in half_written)


@pytest.fixture
def stages(tmp_path) -> dict[Path, RunRecord]:
    """Return the folders and run records of finetuning and retraining."""
    return dict.fromkeys((tmp_path / "finetuned", tmp_path), record(num_train_epochs=2))


@pytest.mark.parametrize(
    ("file", "says"),
    [("checkpoint-3", "was stopped after checkpoint-3"), ("finetuned/train_results.json", "finetuned has ended")],
)
def test_a_stopped_training_begins_anew_only_if_asked_to(stages, tmp_path, file, says):
    claim_training(stages, None, write=True)
    (tmp_path / file).mkdir()
    with pytest.raises(BadInput, match=f"{says}; use --resume_from_checkpoint last .* false"):
        claim_training(stages, None, write=True)
    for asked, resume in (("last", "last"), ("false", None)):
        assert claim_training(stages, asked, write=True) == dict.fromkeys(stages, resume)
    (tmp_path / "train_results.json").touch()  # the whole run has ended
    claim_training(stages, None, write=True)


def test_only_a_stage_that_none_began_from_may_be_longer(stages, tmp_path):
    claim_training(stages, None, write=True)
    longer = dict.fromkeys(stages, record(num_train_epochs=3))
    (tmp_path / "finetuned" / "checkpoint-3").mkdir()
    claim_training(longer, "last", write=False)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(BadInput, match="num_train_epochs 2, now 3"):
        claim_training(longer, "last", write=False)


def test_an_evaluation_is_of_the_result_of_a_training_or_has_a_folder_of_its_own(tmp_path):
    contents = {"weights": "z", "config": "y", "evaluation": "c"}
    evaluation = RunRecord({"bf16": False}, contents)
    claim_folder(tmp_path, record(bf16=False), write=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="holds another run"):
        claim_folder(tmp_path, evaluation, write=True)  # training has not ended
    update_record(tmp_path, {"weights": "z", "config": "y"})
    claim_folder(tmp_path, evaluation, write=True)
    with pytest.raises(BadInput, match="bf16 False, now True"):
        claim_folder(tmp_path, RunRecord({"bf16": True}, contents), write=True)
    for name in contents:
        with pytest.raises(BadInput, match=f"content of its {name}"):
            claim_folder(tmp_path, RunRecord({"bf16": False}, contents | {name: "x"}), write=True)
    # Predictions are recorded when they are written, and compared from then on.
    claim_folder(tmp_path, RunRecord({"bf16": False}, contents | {"prediction": "p"}), write=True)
    with pytest.raises(BadInput, match="content of its prediction"):
        claim_folder(tmp_path, RunRecord({"bf16": False}, {"prediction": "q"}), write=True)
    claim_folder(tmp_path, record(bf16=False), write=True)  # the training is still the same


def test_a_checkpoint_of_another_program_may_be_evaluated_where_it_is(tmp_path):
    """If the folder holds no results of another run."""
    (tmp_path / "config.json").write_text("{}")
    evaluation = RunRecord({"model_name_or_path": str(tmp_path)}, {"weights": "z"})
    claim_folder(tmp_path, evaluation, write=False)
    (tmp_path / "all_results.json").write_text("{}")
    with pytest.raises(BadInput, match="holds another run"):
        claim_folder(tmp_path, evaluation, write=False)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("inputs")
    return (
        "--config_name", write_model_config(folder), "--task_name", "sst2",
        "--dataset_name", write_glue(folder / "glue", "sst2"), "--do_train", "--do_eval", "--do_predict", "--use_cpu",
        "--num_train_epochs", 1, "--per_device_train_batch_size", 12, "--save_strategy", "no",
        # Own cache, because `datasets` caches a folder by its name.
        "--cache_dir", folder / "cache",
    )  # fmt: skip


def test_a_full_disk_is_one_line_and_written_files_stay(command, tmp_path, capsys):
    """A file is written to /dev/full."""
    name = ".predict_results_sst2.txt.partial"

    def predict(*arguments: object) -> None:
        (tmp_path / name).symlink_to("/dev/full")
        predict_and_save(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "predict_and_save", predict)
        line = bad_input_line(capsys, "run_glue.py", *command, "--output_dir", tmp_path, exit_code=1)
    assert "--output_dir" in line and "No space left on device" in line
    assert "train_loss" in json.loads((tmp_path / "train_results.json").read_text())
    assert (tmp_path / "model.safetensors").stat().st_size > 10_000
    assert not (tmp_path / name.removeprefix(".").removesuffix(".partial")).exists()
    call_script("run_glue.py", *command, "--output_dir", tmp_path, "--resume_from_checkpoint", "last")
    assert len((tmp_path / "predict_results_sst2.txt").read_text().splitlines()) == 1 + 6


def test_a_disk_that_is_full_as_the_optimizer_is_written(command, tmp_path, capsys, monkeypatch):
    """torch.save does not name the cause."""

    def save(trainer: Trainer, *arguments: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    arguments = (*command, "--save_strategy", "epoch", "--output_dir", tmp_path)
    line = bad_input_line(capsys, "run_glue.py", *arguments, exit_code=1)
    assert "iostream error" in line and "--output_dir" in line
    assert last_checkpoint(tmp_path) is None


def hold(folder: Path, held: Path) -> None:
    """Lock a folder until this process ends, and create the file `held` once it is locked."""
    with lock_folder(folder):
        held.touch()
        time.sleep(60)


def test_a_second_run_is_refused_while_one_writes_and_not_after_it_was_killed(command, tmp_path, capsys):
    folder, held = tmp_path / "out", tmp_path / "held"
    first = start_fork(hold, folder, held)
    while not held.exists():
        assert first.is_alive()
        time.sleep(0.01)
    line = bad_input_line(capsys, "run_glue.py", *command, "--output_dir", folder)
    assert line.startswith(f"error: --output_dir {folder}: another run is writing there")
    assert [path.name for path in folder.iterdir()] == [".lock"]
    first.kill()
    first.join(10)
    with lock_folder(folder):
        assert (folder / ".lock").exists()
    assert list(folder.iterdir()) == []


def test_a_run_may_lock_its_folder_again(tmp_path):
    with lock_folder(tmp_path):
        with lock_folder(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


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
    before = RunRecord.read(tmp_path / "out")
    line = bad_input_line(capsys, "run_glue.py", *command[2:], *model, "--output_dir", tmp_path / "out")
    assert "--output_dir" in line and "holds another" in line
    assert RunRecord.read(tmp_path / "out") == before
