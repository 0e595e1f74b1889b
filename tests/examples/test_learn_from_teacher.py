# SPDX-License-Identifier: Apache-2.0
"""Tests of from_bert.py and learn_from_teacher.py on tiny models, run as scripts and as Trainers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments

from examples.language.learn_from_teacher import (
    MAP_FILE,
    MASKED_WEIGHT,
    TaughtArguments,
    TaughtTrainer,
    TeacherMap,
    load_taught_task,
    slow_parameters,
    unmasked,
)
from experiments.tasks.scores import IGNORE_INDEX
from experiments.training.stage import task_trainer
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_teachers import TEACHER_CHANNELS, write_student_tokenizer, write_teacher
from tests.support.tiny_texts import write_model_config, write_sentences

LENGTH, CHANNELS = 16, 2 * TEACHER_CHANNELS
SIZES = {
    "architectures": ["PerceiverForMaskedLM"], "num_latents": LENGTH, "d_latents": CHANNELS, "d_model": CHANNELS,
    "qk_channels": TEACHER_CHANNELS, "v_channels": CHANNELS, "num_blocks": 1, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "self_attention_widening_factor": 1,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
START, LEARN = "examples.language.from_bert", "examples.language.learn_from_teacher"
TRAINING = (
    "--do_train", "--use_cpu", "--max_steps", 4, "--per_device_train_batch_size", 8, "--learning_rate", 1e-2,
    "--save_steps", 2, "--lr_scheduler_type", "constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("taught")
    return {
        "config_name": write_model_config(folder, **SIZES),
        "tokenizer_name": write_student_tokenizer(folder / "student"),
        "dataset_name": write_sentences(folder / "data", "one"),
        "dataset_config_name": "one",
        "teacher_name_or_path": write_teacher(folder / "teacher"),
        "max_seq_length": LENGTH,
    }


@pytest.fixture(scope="module")
def start(inputs, tmp_path_factory) -> Path:
    """Write the checkpoint that is initialised from the teacher."""
    folder = tmp_path_factory.mktemp("start") / "start"
    call_script(START, *flags(inputs), "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def command(inputs, start) -> tuple[object, ...]:
    """Return the arguments that train that checkpoint."""
    data = {name: value for name, value in inputs.items() if name not in ("config_name", "tokenizer_name")}
    return (*flags(data), "--model_name_or_path", start, *TRAINING)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """Return the output folder of a whole training."""
    folder = tmp_path_factory.mktemp("outputs") / "whole"
    call_script(LEARN, *command, "--output_dir", folder)
    return folder


@pytest.fixture
def prepared(inputs, start):
    names = ("dataset_name", "dataset_config_name", "teacher_name_or_path")
    arguments = TaughtArguments(max_seq_length=LENGTH, **{name: str(inputs[name]) for name in names})
    model = ToMePerceiverForMaskedLM.from_pretrained(start)
    task = load_taught_task(arguments, predict=False, seed=0)
    return model, task.prepare(model.config, AutoTokenizer.from_pretrained(start), seed=0)


def flags(given: dict[str, object]) -> tuple[object, ...]:
    return tuple(word for name, value in given.items() for word in (f"--{name}", value))


def trainer_for(prepared, folder: Path, **arguments: object) -> TaughtTrainer:
    training = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **arguments)
    return task_trainer(*prepared, training, folder)


def test_a_start_has_the_berts_weights_and_is_not_overwritten(inputs, start, capsys):
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (start, inputs["teacher_name_or_path"]))
    copied = ours["perceiver.encoder.self_attends.0.attention.self.query.weight"][:, :TEACHER_CHANNELS]
    assert copied.equal(theirs["encoder.layer.0.attention.self.query.weight"])
    assert "holds a checkpoint" in bad_input_line(capsys, START, *flags(inputs), "--output_dir", start)


def test_a_config_without_room_is_one_line(inputs, tmp_path, capsys):
    given = (*flags(inputs), "--config_overrides", "num_self_attends_per_block=3", "--output_dir", tmp_path / "out")
    assert "num_self_attends_per_block 3: must be 2" in bad_input_line(capsys, START, *given)
    assert not (tmp_path / "out").exists()


def test_the_loss_is_of_the_teachers_states_at_each_token_and_of_masked_tokens(prepared, tmp_path):
    model, task = prepared
    trainer = trainer_for(prepared, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    batch = task.collate([task.train[index] for index in range(len(task.train))])
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    handle = model.embedding_decoder.register_forward_pre_hook(trainer._hold_states)
    trainer._fit_map()
    loss = trainer.training_step(model, dict(batch))
    plain = model.train()(**batch).loss
    handle.remove()
    wanted = trainer.teacher.states(unmasked(batch), batch["attention_mask"])[mask]
    states = trainer._states[:, : mask.shape[1]][mask]
    expected = trainer.teacher_map.distance(states, wanted) + MASKED_WEIGHT * plain
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.teacher_map.linear.weight.grad.abs().max() > 0


def test_the_teacher_reads_what_was_masked(prepared):
    _, task = prepared
    rows = [task.train[index] for index in range(8)]
    read = unmasked(task.collate(rows))
    for index in range(8):
        original = task.train.examples[index]["input_ids"]
        assert read[index, : len(original)].tolist() == original
    assert any((example["labels"] != IGNORE_INDEX).any() for example in rows)


def test_the_map_begins_with_the_best_linear_reading_of_the_teachers_states():
    torch.manual_seed(0)
    wanted = torch.randn(500, 5)
    wanted[:, 3] = 0.5  # a constant channel is no division by zero
    states = torch.cat([wanted, torch.randn(500, 7)], dim=1) @ torch.randn(12, 12) + 1
    reader = TeacherMap(12, 5)
    reader.fit(states, wanted)
    assert reader.distance(states, wanted).item() == pytest.approx(0, abs=0.04)


def test_a_tenth_of_the_learning_rate_for_what_tells_positions_apart(prepared, tmp_path):
    model, _ = prepared
    trainer = trainer_for(prepared, tmp_path, learning_rate=1e-2, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    slower = {id(parameter) for parameter in slow_parameters(model)}
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert rates == pytest.approx(
        {
            id(each): 1e-3 if id(each) in slower else 1e-2
            for module in (model, trainer.teacher_map)
            for each in module.parameters()
        }
    )
    assert trainer.create_optimizer() is optimizer


def test_a_resumed_run_is_the_same_to_the_step(command, whole, tmp_path):
    call_script(LEARN, *command, "--max_steps", 2, "--output_dir", tmp_path)
    call_script(LEARN, *command, "--resume_from_checkpoint", "last", "--output_dir", tmp_path)
    for name in ("model.safetensors", f"checkpoint-4/{MAP_FILE}"):
        one, other = load_file(whole / name), load_file(tmp_path / name)
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), name
    maps = [load_file(whole / f"checkpoint-{step}" / MAP_FILE)["linear.weight"] for step in (2, 4)]
    assert maps[0].shape == (TEACHER_CHANNELS, CHANNELS) and not maps[0].equal(maps[1])


def test_gradients_of_the_map_are_of_one_step_alone(prepared, tmp_path):
    """One step with two accumulated batches changes the map as one step with one batch does."""
    moved = []
    for size, accumulated in ((8, 1), (4, 2)):
        trainer = trainer_for(
            prepared, tmp_path, max_steps=1, optim="sgd", max_grad_norm=0.0, save_strategy="no",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, learning_rate=1e-3,
        )  # fmt: skip
        trainer.train()
        moved.append(trainer.teacher_map.linear.weight.grad.norm())
    assert moved[1] < 1.5 * moved[0]


def test_half_precision_on_a_cpu(command, tmp_path):
    """The student runs in bfloat16, the map in float32."""
    call_script(LEARN, *command, "--bf16", "--max_steps", 1, "--output_dir", tmp_path)
    assert load_file(tmp_path / "checkpoint-1" / MAP_FILE)["linear.weight"].dtype == torch.float32


def test_nothing_of_the_teacher_is_left_in_a_model(whole):
    for folder in (whole, whole / "checkpoint-2"):
        _, loading = ToMePerceiverForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not list(whole.glob(MAP_FILE))


def test_another_teacher_or_none_is_another_run(command, whole, tmp_path, capsys):
    before = json.loads((whole / "arguments.json").read_text())
    again = (*command, "--resume_from_checkpoint", "last", "--output_dir", whole)
    other = write_teacher(tmp_path / "other", letters="abcz")
    assert "train" in bad_input_line(capsys, LEARN, *again, "--teacher_name_or_path", other)
    place = again.index("--teacher_name_or_path")
    assert "train" in bad_input_line(capsys, "run_mlm.py", *again[:place], *again[place + 2 :])
    assert json.loads((whole / "arguments.json").read_text()) == before


def test_the_teacher_is_given_and_teaches_alone(command, tmp_path, capsys):
    line = bad_input_line(capsys, LEARN, *command, "--elastic", "--output_dir", tmp_path / "out")
    assert line.startswith("error: --elastic")
    place = command.index("--teacher_name_or_path")
    line = bad_input_line(capsys, LEARN, *command[:place], *command[place + 2 :], "--output_dir", tmp_path / "out")
    assert "--teacher_name_or_path: not given" in line and not (tmp_path / "out").exists()
