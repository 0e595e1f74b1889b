# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints training may go on from: whole ones, of the same experiment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.errors import BadInput
from experiments.training.checkpoint import (
    check_checkpoint,
    checkpoints,
    difference,
    fault,
    last_checkpoint,
    read_stamp,
    remove_checkpoints,
    stamp,
)

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write_checkpoint(folder: Path, step: int, state: str = '{"global_step": 1}', without: str | None = None) -> Path:
    """As Trainer writes one, without a stamp."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(4)}, path / "model.safetensors")
    for name in FILES[1:4]:
        torch.save({"step": step}, path / name)
    (path / "trainer_state.json").write_text(state)
    if without is not None:
        (path / without).unlink()
    return path


def test_the_last_checkpoint_is_the_one_of_the_most_steps(tmp_path):
    """By number: 10 comes after 9."""
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 2):
        write_checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_checkpoints_that_are_not_whole_are_passed_over_and_named(tmp_path, caplog):
    write_checkpoint(tmp_path, 1)
    for step, name in enumerate(FILES[1:], start=2):
        write_checkpoint(tmp_path, step, without=name)
    write_checkpoint(tmp_path, 6, state='{"global_st')
    (tmp_path / "checkpoint-7").mkdir()
    write_checkpoint(tmp_path / "checkpoint-best", 8)
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert caplog.text.count("is passed over") == 7 and "optimizer" in caplog.text


@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "another byte"])
def test_a_damaged_file_is_a_fault(tmp_path, stamped, name, damage):
    """With a stamp, whatever has changed; without one, what cannot be read."""
    path = write_checkpoint(tmp_path, 1)
    if stamped:
        stamp(path, {"seed": 1}, 2.5)
    assert fault(path) is None
    data = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    elif damage == "another byte":
        # The last byte of the last tensor.
        (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        (path / name).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    seen = stamped or damage in ("cut", "empty") or (damage == "gone" and not name.endswith(".safetensors"))
    if not stamped and damage == "another byte":
        return  # what a program reads without complaint is not known to have been another
    assert (fault(path) is not None) == seen


def test_a_checkpoint_of_several_processes(tmp_path):
    path = write_checkpoint(tmp_path, 1)
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    assert fault(path) is None


def test_only_checkpoints_of_the_same_experiment(tmp_path, caplog):
    """Training may be longer; whatever else differs makes it another one, also where a path is the same."""
    experiment = {"seed": 1, "num_train_epochs": 2, "train_file": "a.csv", "content": {"train": "abc"}}
    for step in (1, 2):
        stamp(write_checkpoint(tmp_path, step), experiment, 0.5 * step)
    newest = tmp_path / "checkpoint-2"
    assert read_stamp(newest)["loss_sum"] == 1.0
    assert last_checkpoint(tmp_path, experiment | {"num_train_epochs": 3, "train_file": "b.csv"}) == newest
    for other in ({"seed": 2}, {"content": {"train": "abd"}}, {"more": 1}):
        assert last_checkpoint(tmp_path, experiment | other) is None
        with pytest.raises(BadInput, match="--resume_from_checkpoint .* it is of another experiment"):
            check_checkpoint(str(newest), experiment | other)
    check_checkpoint(str(newest), experiment)
    assert "checkpoint-2 is passed over: it is of another experiment, whose seed is 1 and not 2" in caplog.text


def test_what_tells_two_experiments_apart():
    """JSON has no tuples; what stands in the other one alone is not compared."""
    assert difference({"r": [1, 2], "more": 1}, {"r": (1, 2)}) is None
    assert difference({"r": [1, 2]}, {"r": (2, 1)}) == "whose r is [1, 2] and not [2, 1]"
    assert difference({"seed": 1}, {"seed": 2}, ignored=("seed",)) is None
    assert difference({}, {"content": {"train": "x"}}) == "with another content of its train"


def test_removed_checkpoints_are_gone(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    remove_checkpoints(tmp_path)
    assert checkpoints(tmp_path) == [] and (tmp_path / "checkpoint-best").exists()
