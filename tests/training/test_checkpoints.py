# SPDX-License-Identifier: Apache-2.0
"""Tests of resuming: training resumes only from complete checkpoints of the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.errors import BadInput
from experiments.training.resume import (
    assign_resume,
    check_resume,
    checkpoints,
    find_fault,
    last_checkpoint,
    read_loss_sum,
    record_checkpoint,
    remove_checkpoints,
    remove_for_signal,
    remove_old_checkpoints,
)
from experiments.training.run_record import RunRecord

RECORDED = "run_record.json"
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
RECORD = RunRecord({"seed": 1, "num_train_epochs": 2, "train_file": "a.csv"}, {"train": "abc"})


def write_checkpoint(folder: Path, step: int, without: str | None = None) -> Path:
    """Write a checkpoint as Trainer does, with its run record."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(4)}, path / "model.safetensors")
    for name in FILES[1:4]:
        torch.save({"step": step}, path / name)
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    if without is not None:
        (path / without).unlink()
    record_checkpoint(path, RECORD, 0.5 * step)
    return path


def test_the_last_checkpoint_is_the_one_of_the_most_steps(tmp_path):
    """Steps are compared as numbers: 10 comes after 9."""
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert read_loss_sum(tmp_path / "checkpoint-10") == 5.0


def test_checkpoints_that_are_not_whole_are_passed_over_and_named(tmp_path, caplog):
    """Without the optimizer's state, Trainer would silently start anew; without a run record, saving was cut off."""
    write_checkpoint(tmp_path, 1)
    for step, name in enumerate(FILES[1:4], start=2):
        write_checkpoint(tmp_path, step, without=name)
    (write_checkpoint(tmp_path, 5) / "run_record.json").unlink()
    (write_checkpoint(tmp_path, 6) / "run_record.json").write_text('{"record": {"se')
    (tmp_path / "checkpoint-7").mkdir()
    write_checkpoint(tmp_path / "checkpoint-best", 8)
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert caplog.text.count("is skipped") == 7 and "optimizer" in caplog.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "gone", "another byte"])
def test_a_damaged_file_is_a_fault(tmp_path, name, damage):
    path = write_checkpoint(tmp_path, 1)
    assert find_fault(path) is None
    data = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert find_fault(path) is not None


def test_a_checkpoint_of_several_processes(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    record_checkpoint(path, RECORD, None)
    assert find_fault(path) is None


def test_only_checkpoints_of_the_same_run(tmp_path, caplog):
    """Training may be longer; any other difference makes it another run, also if a path is the same."""
    newest = write_checkpoint(tmp_path, 2)
    longer = RunRecord({"seed": 1, "num_train_epochs": 3, "train_file": "b.csv"}, {"train": "abc"})
    assert last_checkpoint(tmp_path, longer) == newest
    check_resume(str(newest), RECORD)
    for other in (RunRecord({"seed": 2}), RunRecord({}, {"train": "abd"}), RunRecord({"more": 1})):
        assert last_checkpoint(tmp_path, other) is None
        with pytest.raises(BadInput, match="--resume_from_checkpoint .* it is of another run"):
            check_resume(str(newest), other)
    assert "checkpoint-2 is skipped: it is of another run (seed 1, now 2)" in caplog.text


def test_a_folder_without_the_state_of_a_training_is_named():
    for place in ("not_there", "examples"):
        with pytest.raises(BadInput, match=f"--resume_from_checkpoint {place}: .*use 'last'"):
            check_resume(place)


@pytest.mark.parametrize(
    ("given", "finetuning", "retraining"),
    [
        (None, None, None),
        ("last", "last", "last"),
        ("True", "last", "last"),
        ("false", None, None),
        ("out/finetuned/checkpoint-6", "out/finetuned/checkpoint-6", None),
        ("out/checkpoint-3", "last", "out/checkpoint-3"),
        ("elsewhere/checkpoint-3", "elsewhere/checkpoint-3", None),
    ],
)
def test_a_named_checkpoint_belongs_to_its_stage(given, finetuning, retraining):
    """The stage before it is done, the stage after it has not begun."""
    first, second = Path("out/finetuned"), Path("out")
    assert assign_resume(given, [first, second]) == {first: finetuning, second: retraining}
    assert assign_resume(given, [second])[second] == (finetuning if given != "out/checkpoint-3" else retraining)


def test_removed_checkpoints_are_gone(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    remove_checkpoints(tmp_path)
    assert checkpoints(tmp_path) == [] and (tmp_path / "checkpoint-best").exists()


@pytest.mark.parametrize(
    ("limit", "best", "left"), [(None, None, [9, 8, 3]), (2, None, [9, 8]), (1, 3, [9, 3]), (2, 3, [9, 3])]
)
def test_the_checkpoints_of_the_fewest_steps_are_removed(tmp_path, limit, best, left):
    """Whatever the file system's clock says."""
    for step in (9, 8, 3):  # the newest one was written first
        write_checkpoint(tmp_path, step)
    remove_old_checkpoints(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_a_checkpoint_for_a_signal_is_removed_once_there_is_a_later_one(tmp_path):
    for step, for_signal in ((2, False), (3, True), (5, True)):
        record_checkpoint(write_checkpoint(tmp_path, step), RECORD, None, for_signal)
    remove_for_signal(tmp_path, before=5)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-2"]


def test_a_record_that_was_changed_is_a_fault(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    text = (path / RECORDED).read_text()
    (path / RECORDED).write_text(text.replace('"loss_sum": 0.5', '"loss_sum": 0.7'))
    assert find_fault(path) == f"its {RECORDED} has changed"
