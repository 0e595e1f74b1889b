# SPDX-License-Identifier: Apache-2.0
"""What a student learns of its teacher, what a checkpoint holds of that, and what is left of it in the end."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, TrainingArguments

from experiments.errors import BadInput
from experiments.tasks.mlm import NOT_ASKED, TaughtMlmArguments, load_taught_mlm_task
from experiments.training import taught
from experiments.training.checkpoint import difference
from experiments.training.elastic import ElasticTrainer
from experiments.training.identity import content
from experiments.training.output_folder import ARGUMENTS_FILE
from experiments.training.stage import task_trainer
from experiments.training.taught import MAP_FILE, MASKED_WEIGHT, TaughtTrainer, slower_parameters, unmasked
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_teachers import TEACHER_CHANNELS, write_student_tokenizer, write_teacher
from tests.support.tiny_texts import MODEL, write_model_config, write_sentences

LENGTH = 24
TRAINING = (
    "--do_train", "--use_cpu", "--max_steps", 4, "--per_device_train_batch_size", 8, "--learning_rate", 1e-2,
    "--save_steps", 2, "--lr_scheduler_type", "constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("taught")
    config = write_model_config(folder, architectures=["PerceiverForMaskedLM"])
    return (
        "--config_name", config, "--tokenizer_name", write_student_tokenizer(folder / "student"),
        "--dataset_name", write_sentences(folder / "data", "one"), "--dataset_config_name", "one",
        "--teacher_name_or_path", write_teacher(folder / "teacher"), "--max_seq_length", LENGTH,
    )  # fmt: skip


@pytest.fixture
def prepared(command):
    given = dict(zip(command[::2], map(str, command[1::2]), strict=True))
    names = ("dataset_name", "dataset_config_name", "teacher_name_or_path")
    arguments = TaughtMlmArguments(max_seq_length=LENGTH, **{name: given[f"--{name}"] for name in names})
    task = load_taught_mlm_task(arguments, predict=False, seed=0)
    model = ToMePerceiverForMaskedLM(config())
    return model, task.prepared(model.config, AutoTokenizer.from_pretrained(given["--tokenizer_name"]), seed=0), task


def config():
    return ToMePerceiverForMaskedLM.config_class(
        **MODEL | {"architectures": ["PerceiverForMaskedLM"], "attention_probs_dropout_prob": 0.0}
    )


def trainer_for(model, task, folder: Path, **arguments: object) -> TaughtTrainer:
    return task_trainer(
        model, task, TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **arguments), folder
    )


def test_the_loss_is_of_standardised_states_where_there_is_text_and_of_masked_tokens(prepared, tmp_path):
    """At the start the map is 0: each of the standardised states is 1 away, in the mean over what they are from."""
    model, task, _ = prepared
    trainer = trainer_for(model, task, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    trainer._begin_map()
    batch = task.collate([task.train[index] for index in range(len(task.train))])
    assert not batch["attention_mask"].all() and batch["labels"].shape[1] > batch["input_ids"].shape[1]
    handle = model.embedding_decoder.register_forward_pre_hook(trainer._hold_states)
    loss = trainer.training_step(model, dict(batch))
    handle.remove()
    plain = model.train()(**batch).loss
    assert loss.item() == pytest.approx(1 + MASKED_WEIGHT * plain.item(), rel=1e-2)
    # As much as is 1 in itself: the bias of a map that is 0 has as its gradient the mean of the states.
    assert trainer.teacher_map.linear.weight.grad.abs().max() > 0
    assert trainer.teacher_map.linear.bias.grad.abs().max() < 1e-2


def test_the_teacher_reads_what_was_masked(prepared):
    _, task, _ = prepared
    rows = [task.train[index] for index in range(8)]
    read = unmasked(task.collate(rows))
    for index in range(8):
        original = task.train.examples[index]["input_ids"]
        assert read[index, : len(original)].tolist() == original
    assert any((example["labels"] != NOT_ASKED).any() for example in rows)


def test_a_tenth_of_the_learning_rate_for_what_tells_positions_apart(prepared, tmp_path):
    model, task, _ = prepared
    trainer = trainer_for(model, task, tmp_path, learning_rate=1e-2, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    slower = {id(parameter) for parameter in slower_parameters(model)}
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert rates == pytest.approx(
        {
            id(each): 1e-3 if id(each) in slower else 1e-2
            for module in (model, trainer.teacher_map)
            for each in module.parameters()
        }
    )
    decayed = [each for group in optimizer.param_groups if group["weight_decay"] for each in group["params"]]
    assert 0 < len(decayed) < len(rates) and trainer.create_optimizer() is optimizer


def test_a_resumed_run_is_the_same_to_the_step(command, tmp_path):
    call_script("run_mlm.py", *command, *TRAINING, "--output_dir", tmp_path / "whole")
    call_script("run_mlm.py", *command, *TRAINING, "--max_steps", 2, "--output_dir", tmp_path / "parts")
    call_script(
        "run_mlm.py", *command, *TRAINING, "--resume_from_checkpoint", "last", "--output_dir", tmp_path / "parts"
    )
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    for name in ("model.safetensors", f"checkpoint-4/{MAP_FILE}", "checkpoint-4/model.safetensors"):
        one, other = load_file(whole / name), load_file(parts / name)
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), name
    moved = load_file(whole / "checkpoint-4" / MAP_FILE)
    assert moved["linear.weight"].shape == (TEACHER_CHANNELS, MODEL["d_latents"]) and moved["linear.weight"].any()
    assert moved["deviation"].min() > 0.01


def test_gradients_of_one_step_are_no_part_of_the_next(prepared, tmp_path):
    """Also where a step is of several batches."""
    model, task, _ = prepared
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    moved = []
    for batches in ({"per_device_train_batch_size": 8}, accumulated):
        start = copy.deepcopy(model)
        trainer = trainer_for(
            start, task, tmp_path, max_steps=3, optim="sgd", max_grad_norm=0.0, save_strategy="no", **batches
        )
        trainer.train()
        moved.append(trainer.teacher_map.linear.weight.detach())
    one, other = moved
    assert (one - other).norm() < 0.2 * one.norm()  # batches are of other lengths


def test_half_precision_on_a_cpu(command, tmp_path):
    """The student's states are in half precision there, the map is not."""
    call_script("run_mlm.py", *command, *TRAINING, "--bf16", "--max_steps", 1, "--output_dir", tmp_path)
    assert load_file(tmp_path / "checkpoint-1" / MAP_FILE)["linear.weight"].dtype == torch.float32


def test_nothing_of_the_teacher_is_left(command, tmp_path):
    """Each checkpoint is a stock masked language model by itself."""
    call_script("run_mlm.py", *command, *TRAINING, "--output_dir", tmp_path)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        model, loading = ToMePerceiverForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not list(tmp_path.glob(MAP_FILE))


def test_another_teacher_is_another_experiment(command, tmp_path, capsys):
    call_script("run_mlm.py", *command, *TRAINING, "--output_dir", tmp_path / "out")
    note = json.loads((tmp_path / "out" / ARGUMENTS_FILE).read_text())
    assert note["content"]["teacher"]
    other = write_teacher(tmp_path / "other", letters="abcz")
    again = (*command, *TRAINING, "--resume_from_checkpoint", "last", "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "run_mlm.py", *again, "--teacher_name_or_path", other)
    assert "another content of its teacher" in line
    without = note | {"content": {name: each for name, each in note["content"].items() if name != "teacher"}}
    assert difference(note, without) == "with a teacher"
    assert difference(note, {"content": {"inputs": note["content"]["inputs"]}}) is None


def test_tokens_that_the_teacher_has_not_are_one_line_before_any_work(command, tmp_path, capsys):
    strange = write_student_tokenizer(tmp_path / "strange", letters="abcü")
    given = (*command, *TRAINING, "--tokenizer_name", strange, "--output_dir", tmp_path / "out")
    line = bad_input_line(capsys, "run_mlm.py", *given)
    assert "--teacher_name_or_path" in line and "'ü'" in line and not (tmp_path / "out").exists()


def test_no_teacher_beside_the_unmerged_model(prepared, command, tmp_path, capsys):
    model, task, _ = prepared
    with pytest.raises(BadInput, match="--teacher_name_or_path: allowed without --elastic"):
        task_trainer(model, task, TrainingArguments(output_dir="unused", use_cpu=True), tmp_path, ElasticTrainer)
    line = bad_input_line(capsys, "run_mlm.py", *command, *TRAINING, "--elastic", "--output_dir", tmp_path / "out")
    assert "--teacher_name_or_path" in line


def test_the_teacher_counts_for_what_is_trained_alone(prepared):
    _, task, raw = prepared
    trained, evaluated = (content(raw, task, train=train, calibrates=False) for train in (True, False))
    assert "teacher" in trained and "teacher" not in evaluated


def test_a_state_that_never_changes_is_no_division_by_zero():
    made = taught.TeacherMap(3, 2)
    made.standardise_by(torch.ones(5, 2))
    assert made.distance(torch.ones(4, 3), torch.ones(4, 2)).isfinite()
    assert isinstance(made.linear, nn.Linear)
