# SPDX-License-Identifier: Apache-2.0
"""Tests of resuming: a run that is killed anywhere ends with the same results after --resume_from_checkpoint."""

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
from experiments.training.run_record import RunRecord
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
FIGURES = ("train_loss", "epoch", "merged_loss", "merged_accuracy", "eval_loss", "eval_accuracy")


class Killed(BaseException):
    """Exception that ends a run as a kill does: nothing catches it, so files stay; tests/reliability kills."""


@contextmanager
def killed_at(owner: object, name: str, call: int = 1) -> Iterator[None]:
    """Raise `Killed` when a function is called for the n-th time, counted from 1."""
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
    """Run a script and count its training steps; a resumed run has only the remaining ones."""
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
    """Return what must be equal: the weights of both stages, bit for bit, and their figures."""
    figures = []
    for folder in (output_dir / "finetuned", output_dir):
        if (folder / "all_results.json").exists():
            figures.append((folder / "model.safetensors").read_bytes())
            results = json.loads((folder / "all_results.json").read_text())
            figures += [results.get(name) for name in FIGURES]
    return tuple(figures)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    """Write sentences, and the config of a model with dropout; return the arguments."""
    folder = tmp_path_factory.mktemp("inputs")
    config = write_model_config(folder, attention_probs_dropout_prob=0.1)
    # Own cache, because `datasets` caches a folder by its name.
    return (
        "--config_name", config, "--task_name", "sst2", "--dataset_name", write_glue(folder / "glue", "sst2"),
        "--cache_dir", folder / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def both_stages(inputs, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """Return the arguments of finetuning and retraining, and the output folder of an uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("outputs") / "whole"
    arguments = (*inputs, *TRAINING, *BATCH, *RETRAINING)
    call_script("run_glue.py", *arguments, "--output_dir", output_dir)
    assert (output_dir / "finetuned" / "checkpoint-6").exists() and (output_dir / "checkpoint-3").exists()
    return arguments, output_dir


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """Return the arguments of one stage, and the output folder of an uninterrupted run."""
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
    """Retraining starts over after a checkpoint of finetuning; finetuning is done before a checkpoint of retraining."""
    arguments, whole = both_stages
    arguments = (*arguments, "--output_dir", tmp_path)
    killed_in = 8 if resume.startswith("finetuned") else FINETUNING_STEPS + 4
    kill("run_glue.py", arguments, Trainer, "training_step", killed_in)
    assert steps_of("run_glue.py", *arguments, "--resume_from_checkpoint", tmp_path / resume) == steps
    assert left(tmp_path) == left(whole)


def test_a_run_that_has_ended_is_left_as_it_is(both_stages, tmp_path):
    """Resumed once more, it only evaluates, also without any checkpoint left."""
    arguments, whole = both_stages
    shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    with killed_at(Trainer, "training_step"):
        call_script("run_glue.py", *arguments, "--output_dir", tmp_path / "copy", *LAST)
    assert left(tmp_path / "copy") == left(whole)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("images")
    config = tiny_images.write_model_config(folder, attention_probs_dropout_prob=0.1)
    return (
        "--config_name",
        config,
        "--dataset_name",
        tiny_images.write_images(folder / "data", {"train": 24, "test": 6}),
    )


@pytest.mark.parametrize(
    ("data", "size", "accumulated", "given"),
    [
        pytest.param("inputs", 2, 3, ("--lr_scheduler_type", "cosine", "--warmup_steps", 2), id="accumulation"),
        pytest.param("inputs", 3, 2, ("--elastic",), id="a merging drawn in every step"),
        pytest.param("images", 6, 1, ("--crop_scale", 0.5, "--horizontal_flip", 0.5), id="augmented images"),
    ],
)
def test_random_draws_of_a_step_go_on_in_the_middle_of_an_epoch(request, tmp_path, data, size, accumulated, given):
    """It is killed in step 8, after the checkpoint of step 6."""
    script = {"inputs": "run_glue.py", "images": "run_image.py"}[data]
    arguments = (
        *request.getfixturevalue(data), *TRAINING, *given, "--per_device_train_batch_size", size,
        "--gradient_accumulation_steps", accumulated, "--output_dir",
    )  # fmt: skip
    call_script(script, *arguments, tmp_path / "whole")
    kill(script, (*arguments, tmp_path / "killed"), Trainer, "training_step", accumulated * 7 + 1)
    assert steps_of(script, *arguments, tmp_path / "killed", *LAST) == accumulated * 2
    assert left(tmp_path / "killed") == left(tmp_path / "whole")


@pytest.mark.parametrize("resume", ["last", "checkpoint-8"])
def test_training_may_go_on_for_longer(trained, tmp_path, resume):
    """From the newest checkpoint of a run that has ended, or from a named one."""
    arguments, whole = trained
    longer = tmp_path / "longer"
    shutil.copytree(whole, longer)
    resume = resume if resume == "last" else longer / resume
    arguments = (*arguments, "--num_train_epochs", 3, "--output_dir", longer, "--resume_from_checkpoint", resume)
    assert steps_of("run_glue.py", *arguments) == 4
    assert json.loads((longer / "train_results.json").read_text())["train_resumed_from"] == "checkpoint-8"
    assert left(longer) != left(whole) and RunRecord.read(longer).arguments["num_train_epochs"] == 3


def test_a_trained_model_may_be_evaluated_in_its_folder(inputs, trained, tmp_path, capsys):
    """The figures are the same; an evaluation with another merging is refused."""
    arguments, whole = trained
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    evaluation = (*inputs[2:], "--do_eval", "--use_cpu", "--model_name_or_path", copy, "--output_dir", copy)
    call_script("run_glue.py", *evaluation)
    before, after = (json.loads((folder / "eval_results.json").read_text()) for folder in (whole, copy))
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert "other content of its config" in bad_input_line(capsys, "run_glue.py", *evaluation, "--r", 2)
    with killed_at(Trainer, "training_step"):
        call_script("run_glue.py", *arguments, *LAST, "--output_dir", copy)  # still the result of that training


def test_what_was_stopped_begins_anew_only_if_asked_to(trained, tmp_path, capsys):
    """Starting over removes its checkpoints, so that no later run resumes from them."""
    arguments, whole = trained
    arguments = (*arguments, "--output_dir", tmp_path)
    kill("run_glue.py", arguments, Trainer, "training_step", 8)
    before = contents(tmp_path)
    assert "stopped after checkpoint-6" in bad_input_line(capsys, "run_glue.py", *arguments)
    assert contents(tmp_path) == before
    kill("run_glue.py", (*arguments, "--resume_from_checkpoint", "false"), Trainer, "training_step", 2)
    assert last_checkpoint(tmp_path) is None
    call_script("run_glue.py", *arguments, *LAST)
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
    """The loss would show it one step later, after the checkpoint."""
    arguments = (*inputs, *TRAINING, *BATCH, "--max_grad_norm", 0, "--learning_rate", 1e30, "--output_dir", tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        call_script("run_glue.py", *arguments, "--save_steps", 1, "--optim", "sgd")
    assert exit_info.value.code == 1
    assert "training has diverged" in capsys.readouterr().err
    for weights in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


@pytest.fixture(scope="module")
def sweep(trained, tmp_path_factory) -> tuple[tuple[object, ...], Path]:
    """Return the arguments of a sweep with retraining, and the output folder of an uninterrupted run."""
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
    for old, new, row in zip(before, cells(tmp_path), cells(whole), strict=True):
        # Finished cells stay exactly the same, measured times included.
        assert {name: new[name] for name in old} == old and new.keys() == row.keys()
        assert (new["merged"], new["retrained"]) == (row["merged"], row["retrained"])
    for r in ("r0", "r2"):
        weights = [folder / "retrained" / r / "model.safetensors" for folder in (tmp_path, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert (tmp_path / "retrained" / r / "README.md").exists()
