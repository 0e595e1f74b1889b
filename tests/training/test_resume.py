# SPDX-License-Identifier: Apache-2.0
"""A run that is killed anywhere ends, with the same command and --resume_from_checkpoint, as if it never was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Trainer, TrainerState

from experiments.runs.sweep_report import SweepResults
from experiments.training import stage as training
from experiments.training import trainer
from experiments.training.resume import last_checkpoint
from tests.support import tiny_images
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_texts import write_glue, write_model_config

# Finetuning is 8 steps, with checkpoints after 3, 6 and 8, and retraining 4, with checkpoints after 3 and 4.
FINETUNING_STEPS = 8
TRAINING = (
    "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 2, "--learning_rate", 3e-3,
    "--save_strategy", "steps", "--save_steps", 3,
)  # fmt: skip
BATCH = ("--per_device_train_batch_size", 6)
RETRAINING = ("--r", 2, "--retrain_epochs", 1)
LAST = ("--resume_from_checkpoint", "last")


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it, so the disk stays as it is; tests/reliability sends signals."""


@contextmanager
def killed_at(owner: object, name: str, call: int = 1) -> Iterator[None]:
    """Raise `Killed` as a function is called for the n-th time; the first call is 1."""
    function, calls = getattr(owner, name), 0

    def killing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killing)
        yield


def kill(script: str, arguments: tuple[object, ...], owner: object, name: str, call: int = 1) -> None:
    with pytest.raises(Killed), killed_at(owner, name, call):
        call_script(script, *arguments)


def steps_of(script: str, *arguments: object) -> int:
    """Run a script, and count how often it trains on a batch: what is resumed trains only on what is left."""
    train, steps = Trainer.training_step, 0

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal steps
        steps += 1
        return train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", counting)
        call_script(script, *arguments)
    return steps


def left(output_dir: Path) -> tuple[bytes | float, ...]:
    """What must be the same: the weights of both stages, bit for bit, and what was measured of them."""
    figures = []
    for folder in (output_dir / "finetuned", output_dir):
        if (folder / "all_results.json").exists():
            figures.append((folder / "model.safetensors").read_bytes())
            results = json.loads((folder / "all_results.json").read_text())
            figures += [results.get(name) for name in ("merged_loss", "merged_accuracy", "eval_loss", "eval_accuracy")]
            figures.append(results["epoch"])
    return tuple(figures)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    """Sentences, and a model with dropout."""
    folder = tmp_path_factory.mktemp("inputs")
    config = write_model_config(folder, attention_probs_dropout_prob=0.1)
    # A cache of its own: `datasets` takes a folder for another one of the same name that it has seen before.
    return (
        "--config_name", config, "--task_name", "sst2", "--dataset_name", write_glue(folder / "glue", "sst2"),
        "--cache_dir", folder / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def both_stages(inputs, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """The arguments of finetuning and retraining, and what they leave if nothing happens."""
    output_dir = tmp_path_factory.mktemp("outputs") / "whole"
    arguments = (*inputs, *TRAINING, *BATCH, *RETRAINING)
    call_script("run_glue.py", *arguments, "--output_dir", output_dir)
    assert (output_dir / "finetuned" / "checkpoint-6").exists() and (output_dir / "checkpoint-3").exists()
    return arguments, output_dir


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """The arguments of one stage, and what they leave."""
    output_dir = tmp_path_factory.mktemp("outputs") / "trained"
    arguments = (*inputs, *TRAINING, *BATCH)
    call_script("run_glue.py", *arguments, "--output_dir", output_dir)
    return arguments, output_dir


@pytest.mark.parametrize(
    ("owner", "name", "call", "newest", "steps"),
    [
        pytest.param(Trainer, "training_step", 2, None, 12, id="before the first checkpoint"),
        pytest.param(TrainerState, "save_to_json", 2, "finetuned/checkpoint-3", 9, id="at the end of the second one"),
        pytest.param(trainer, "record_checkpoint", 3, "finetuned/checkpoint-6", 6, id="before a checkpoint's record"),
        pytest.param(training, "save_metrics", 1, "finetuned/checkpoint-8", 4, id="before finetuning is noted as done"),
        pytest.param(Trainer, "training_step", FINETUNING_STEPS + 4, "checkpoint-3", 1, id="retraining, later"),
        pytest.param(Trainer, "predict", 3, "checkpoint-4", 0, id="before the last evaluation"),
    ],
)
def test_a_killed_run_goes_on(both_stages, tmp_path, owner, name, call, newest, steps):
    arguments, whole = both_stages
    arguments = (*arguments, "--output_dir", tmp_path)
    kill("run_glue.py", arguments, owner, name, call)
    found = last_checkpoint(tmp_path) or last_checkpoint(tmp_path / "finetuned")
    assert found == (None if newest is None else tmp_path / newest)
    assert steps_of("run_glue.py", *arguments, *LAST) == steps
    assert left(tmp_path) == left(whole)


@pytest.mark.parametrize(("resume", "steps"), [("finetuned/checkpoint-6", 2 + 4), ("checkpoint-3", 1)])
def test_a_named_checkpoint_belongs_to_its_stage(both_stages, tmp_path, resume, steps):
    """Retraining begins anew after a checkpoint of finetuning; finetuning has ended before one of retraining."""
    arguments, whole = both_stages
    arguments = (*arguments, "--output_dir", tmp_path)
    killed_in = 8 if resume.startswith("finetuned") else FINETUNING_STEPS + 4
    kill("run_glue.py", arguments, Trainer, "training_step", killed_in)
    assert steps_of("run_glue.py", *arguments, "--resume_from_checkpoint", tmp_path / resume) == steps
    assert left(tmp_path) == left(whole)


def test_a_run_that_has_ended_is_left_as_it_is(both_stages, tmp_path):
    """Resumed once more, it only evaluates, though there be no checkpoint left."""
    arguments, whole = both_stages
    shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    with killed_at(Trainer, "training_step"):
        call_script("run_glue.py", *arguments, "--output_dir", tmp_path / "copy", *LAST)
    assert left(tmp_path / "copy") == left(whole)


def test_with_gradient_accumulation(inputs, tmp_path):
    """Killed in the middle of a step, in the middle of an epoch."""
    arguments = (
        *inputs, *TRAINING, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 3,
        "--lr_scheduler_type", "cosine", "--warmup_steps", 2, "--output_dir",
    )  # fmt: skip
    call_script("run_glue.py", *arguments, tmp_path / "whole")
    kill("run_glue.py", (*arguments, tmp_path / "killed"), Trainer, "training_step", 3 * 6 + 2)
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-6"
    assert steps_of("run_glue.py", *arguments, tmp_path / "killed", *LAST) == 3 * 2
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_with_a_merging_drawn_in_every_step(inputs, tmp_path):
    """Resumed in the middle of an epoch, the steps merge as they would have, in parts of them too."""
    arguments = (
        *inputs, *TRAINING, "--elastic", "--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2,
        "--output_dir",
    )  # fmt: skip
    call_script("run_glue.py", *arguments, tmp_path / "whole")
    kill("run_glue.py", (*arguments, tmp_path / "killed"), Trainer, "training_step", 2 * 6 + 2)
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-6"
    assert steps_of("run_glue.py", *arguments, tmp_path / "killed", *LAST) == 2 * 2
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


def test_with_augmented_images(tmp_path):
    """Resumed in the middle of an epoch, the images are cropped and mirrored as they would have been."""
    config = tiny_images.write_model_config(tmp_path, attention_probs_dropout_prob=0.1)
    images = tiny_images.write_images(tmp_path / "images", {"train": 24, "test": 6})
    arguments = (
        "--config_name", config, "--dataset_name", images, *TRAINING, *BATCH,
        "--crop_scale", 0.5, "--horizontal_flip", 0.5, "--output_dir",
    )  # fmt: skip
    call_script("run_image.py", *arguments, tmp_path / "whole")
    kill("run_image.py", (*arguments, tmp_path / "killed"), Trainer, "training_step", 8)
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-6"
    assert steps_of("run_image.py", *arguments, tmp_path / "killed", *LAST) == 2
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


@pytest.mark.parametrize("resume", ["last", "checkpoint-8"])
def test_training_may_go_on_for_longer(trained, tmp_path, resume):
    """From the newest checkpoint of a run that has ended, or from a named one."""
    arguments, whole = trained
    longer = tmp_path / "longer"
    shutil.copytree(whole, longer)
    resume = resume if resume == "last" else longer / resume
    arguments = (*arguments, "--num_train_epochs", 3, "--output_dir", longer)
    assert steps_of("run_glue.py", *arguments, "--resume_from_checkpoint", resume) == 4
    state = json.loads((longer / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (12, 3.0)
    assert (longer / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    assert json.loads((longer / "arguments.json").read_text())["num_train_epochs"] == 3


def test_finetuning_before_retraining_may_not_go_on_for_longer(both_stages, tmp_path, capsys):
    """What was retrained began from what finetuning left."""
    arguments, whole = both_stages
    shutil.copytree(whole, tmp_path / "copy")
    line = bad_input_line(
        capsys, "run_glue.py", *arguments, *LAST, "--num_train_epochs", 3, "--output_dir", tmp_path / "copy"
    )
    assert "num_train_epochs 2" in line
    assert contents(tmp_path / "copy") == contents(whole)


def test_what_is_trained_may_be_evaluated_where_it_is(inputs, trained, tmp_path, capsys):
    """The same figures come out; those of another merging, another model or other data would be taken for its own."""
    arguments, whole = trained
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    evaluation = (*inputs[2:], "--do_eval", "--use_cpu", "--output_dir", copy)
    call_script("run_glue.py", *evaluation, "--model_name_or_path", copy)
    before, after = (json.loads((folder / "eval_results.json").read_text()) for folder in (whole, copy))
    for name in ("eval_loss", "eval_accuracy"):
        assert after[name] == pytest.approx(before[name], rel=1e-6)
    left_there = contents(copy)
    others = {
        "other content of its config": ("--model_name_or_path", copy, "--r", 2),
        "other content of its weights": ("--model_name_or_path", whole / "checkpoint-3"),
        "other content of its evaluation": ("--model_name_or_path", copy, "--max_eval_samples", 5),
    }
    for says, other in others.items():
        assert says in bad_input_line(capsys, "run_glue.py", *evaluation, *other)
    assert contents(copy) == left_there
    call_script("run_glue.py", *arguments, *LAST, "--output_dir", copy)


def test_what_was_stopped_is_not_begun_anew_in_silence(trained, tmp_path, capsys):
    """Its checkpoints would go; when they are to go, none of them is left for a later run to go on from."""
    arguments, whole = trained
    arguments = (*arguments, "--output_dir", tmp_path)
    kill("run_glue.py", arguments, Trainer, "training_step", 8)
    before = contents(tmp_path)
    line = bad_input_line(capsys, "run_glue.py", *arguments)
    assert "stopped after checkpoint-6" in line and "--resume_from_checkpoint last" in line and "false" in line
    assert contents(tmp_path) == before
    kill("run_glue.py", (*arguments, "--resume_from_checkpoint", "false"), Trainer, "training_step", 2)
    assert last_checkpoint(tmp_path) is None
    call_script("run_glue.py", *arguments, *LAST)
    assert left(tmp_path) == left(whole)


def test_the_loss_after_a_resume_is_that_of_all_steps(trained, tmp_path):
    arguments, whole = trained
    arguments = (*arguments, "--output_dir", tmp_path)
    kill("run_glue.py", arguments, Trainer, "training_step", 8)
    call_script("run_glue.py", *arguments, *LAST)
    results, expected = (json.loads((folder / "train_results.json").read_text()) for folder in (tmp_path, whole))
    assert results["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-12)
    assert results["train_resumed_from"] == "checkpoint-6" and "train_resumed_from" not in expected
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][-1]
    assert logged["train_loss"] == results["train_loss"]


def test_a_checkpoint_with_one_byte_changed_is_passed_over(trained, tmp_path, caplog):
    arguments, whole = trained
    arguments = (*arguments, "--output_dir", tmp_path)
    kill("run_glue.py", arguments, Trainer, "training_step", 8)
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert steps_of("run_glue.py", *arguments, *LAST) == 8 - 3
    assert "checkpoint-6 is passed over" in caplog.text
    assert left(tmp_path) == left(whole)


def test_a_training_that_diverges_stops_with_the_last_good_checkpoint(inputs, tmp_path, capsys):
    arguments = (*inputs, *TRAINING, *BATCH, "--output_dir", tmp_path / "out")
    step, calls = Trainer.compute_loss, 0

    def diverging(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        loss = step(*args, **kwargs)
        return loss * float("nan") if calls == 5 else loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr(Trainer, "compute_loss", diverging)
        call_script("run_glue.py", *arguments)
    assert exit_info.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the loss is nan after step 4" in line and "checkpoint-3 is the last good checkpoint" in line
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(inputs, tmp_path, capsys):
    """The loss that shows it would come one step later, after the checkpoint."""
    arguments = (*inputs, *TRAINING, *BATCH, "--max_grad_norm", 0, "--learning_rate", 1e30, "--output_dir", tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        call_script("run_glue.py", *arguments, "--save_steps", 1, "--optim", "sgd")
    assert exit_info.value.code == 1
    assert "training has diverged" in capsys.readouterr().err
    for weights in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


@pytest.mark.parametrize("kind", ["not there", "weights alone", "the end of training"])
def test_what_is_no_checkpoint_is_named_and_nothing_is_written(trained, tmp_path, capsys, kind):
    """Weights without the optimizer's state would start that anew, and say nothing."""
    arguments, whole = trained
    folder = tmp_path / "checkpoint-4"
    if kind == "the end of training":
        folder = whole
    elif kind == "weights alone":
        shutil.copytree(whole / "checkpoint-8", folder)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).unlink()
    line = bad_input_line(
        capsys, "run_glue.py", *arguments, "--resume_from_checkpoint", folder, "--output_dir", tmp_path / "out"
    )
    assert f"--resume_from_checkpoint {folder}" in line and "'last'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["another learning rate", "foreign"])
def test_another_experiment_in_the_folder_is_named_and_stays(trained, tmp_path, capsys, kind):
    arguments, whole = trained
    folder = tmp_path / "out"
    if kind.startswith("another"):
        shutil.copytree(whole, folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    before = contents(folder)
    changes, says = {
        "another learning rate": (("--learning_rate", 1e-4), "learning_rate 0.003, now 0.0001"),
        "foreign": ((), "config.json"),
    }[kind]
    for resume in ((), LAST):
        line = bad_input_line(capsys, "run_glue.py", *arguments, *changes, *resume, "--output_dir", folder)
        assert f"--output_dir {folder}: holds another run" in line and says in line, line
    assert contents(folder) == before


@pytest.fixture(scope="module")
def sweep(trained, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """The arguments of a sweep with retraining, and what they leave if nothing happens."""
    arguments, checkpoint = trained
    output_dir = tmp_path_factory.mktemp("outputs") / "sweep"
    arguments = (
        "--model_name_or_path", checkpoint, *arguments[2:8], "--use_cpu", *BATCH, "--r", 0, 2, "--retrain_epochs", 1,
        "--timing_rounds", 1, "--timing_batch_size", 2, "--save_strategy", "steps", "--save_steps", 3,
        "--learning_rate", 3e-3,
    )  # fmt: skip
    call_script("eval_sweep.py", *arguments, "--output_dir", output_dir)
    return arguments, output_dir


def cells(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "sweep_results.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("owner", "name", "call", "retrained", "steps"),
    [
        pytest.param(SweepResults, "save", 2, 0, 8, id="the second merged cell"),
        pytest.param(Trainer, "training_step", 8, 1, 1, id="retraining, after a checkpoint"),
    ],
)
def test_a_killed_sweep_goes_on(sweep, tmp_path, owner, name, call, retrained, steps):
    arguments, whole = sweep
    arguments = (*arguments, "--output_dir", tmp_path)
    kill("eval_sweep.py", arguments, owner, name, call)
    before = cells(tmp_path)
    assert sum("retrained" in row for row in before) == retrained
    assert steps_of("eval_sweep.py", *arguments) == steps
    check_continued(before, tmp_path, whole)


def check_continued(before: list[dict], output_dir: Path, whole: Path) -> None:
    """Cells that were there stay to the last digit, times of this machine among them; the others come out the same."""
    after, expected = cells(output_dir), cells(whole)
    for old, new, row in zip(before, after, expected, strict=True):
        assert {name: new[name] for name in old} == old
        assert (new["merged"], new["retrained"]) == (row["merged"], row["retrained"])
        assert new.keys() == row.keys()
    for r in ("r0", "r2"):
        weights = [folder / "retrained" / r / "model.safetensors" for folder in (output_dir, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert (output_dir / "retrained" / r / "README.md").exists()
