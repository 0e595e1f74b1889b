# SPDX-License-Identifier: Apache-2.0
"""Tests of `TrainingArguments`: they work, or are refused in one line before anything is loaded."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from experiments.command_line import parse_arguments
from experiments.errors import BadInput
from experiments.training.trainer_arguments import NEEDED_ARGUMENTS, RANGES, UNSUPPORTED, TrainerArguments
from tests.support.script_run import call_script
from tests.support.tiny_texts import write_glue, write_model_config

# Arguments of many kinds that work together.
WORKING = (
    "--optim", "sgd", "--optim_args", "momentum=0.9", "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs",
    '{"num_cycles": 1}', "--max_grad_norm", 0, "--warmup_steps", 0.1, "--max_steps", 2,
    "--gradient_accumulation_steps", 2, "--label_smoothing_factor", 0.1, "--bf16", "--bf16_full_eval",
    "--activation_checkpointing", "true", "--activation_checkpointing_kwargs", '{"use_reentrant": false}',
    "--auto_find_batch_size", "--eval_accumulation_steps", 1, "--full_determinism", "--logging_steps", 1,
    "--include_num_input_tokens_seen", "true", "--disable_tqdm", "true", "--eval_strategy", "steps", "--eval_steps", 1,
    "--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 1, "--save_only_model",
    "--load_best_model_at_end", "--metric_for_best_model", "accuracy", "--seed", 2**32 - 1, "--data_seed", 0,
    "--dataloader_num_workers", 1, "--dataloader_persistent_workers", "--train_sampling_strategy", "sequential",
    "--accelerator_config", '{"split_batches": true}',
)  # fmt: skip
WRONG: list[tuple[object, ...]] = [
    ("--dataloader_drop_last",),
    ("--optim", "nonsense"),
    ("--optim_args", "junk"),
    ("--lr_scheduler_type", "nonsense"),
    ("--lr_scheduler_type", "cosine_with_min_lr"),
    ("--lr_scheduler_kwargs", '{"nonsense": 1}'),
    ("--torch_compile_backend", "nonsense"),
    ("--torch_compile_mode", "nonsense"),
    ("--load_best_model_at_end",),
    ("--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "steps"),
    ("--save_strategy", "best"),
    ("--save_strategy", "best", "--eval_strategy", "epoch"),
    ("--report_to", "none,nonsense"),
    ("--max_steps", 0),
    ("--accelerator_config", '{"nonsense": 1}'),
    ("--dataloader_persistent_workers",),
    ("--fsdp", "full_shard"),
    ("--deepspeed", "nofile.json"),
    ("--output_dir", ""),
]


def parse(*words: object) -> TrainerArguments:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "--use_cpu", *map(str, words)])
        return parse_arguments("", TrainerArguments)[0]


def test_names_are_those_of_transformers():
    named = {*RANGES, *UNSUPPORTED, *NEEDED_ARGUMENTS, *NEEDED_ARGUMENTS.values(), *TrainerArguments.help_texts}
    named |= {name for names in TrainerArguments.in_help.values() for name in names}
    assert named <= {*TrainerArguments.__dataclass_fields__}


def test_arguments_of_many_kinds_work_together(tmp_path):
    write_glue(tmp_path / "glue", "sst2")
    call_script(
        "run_glue.py", "--config_name", write_model_config(tmp_path), "--dataset_name", tmp_path / "glue",
        "--task_name", "sst2", "--do_train", "--do_eval", "--use_cpu", *WORKING, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "all_results.json").read_text())


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(map(str, words)))
def test_a_mistake_is_one_line(tmp_path, words):
    with pytest.raises(BadInput) as error:
        parse("--output_dir", tmp_path / "out", *words)
    assert "\n" not in str(error.value) and str(error.value).startswith(("--", "arguments: "))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RANGES)
def test_numbers_are_in_range(tmp_path, name):
    least, most = RANGES[name]
    for wrong in (least - 1, most * 10, "nan", "one"):
        text = int(wrong) if isinstance(wrong, float) and wrong == int(wrong) else wrong
        with pytest.raises(BadInput, match=rf"^--{name}\b.*"):
            parse("--output_dir", tmp_path, f"--{name}={text}")


@pytest.mark.parametrize("below", ["file", "file/out", "x" * 300, "link"])
def test_a_folder_that_cannot_be_made(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match="^--output_dir "):
        parse("--output_dir", tmp_path / "new" / ".." / below)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("given", "capabilities", "warns"),
    [("--bf16", {"avx512_bf16": False}, True), ("--bf16", {"avx512_bf16": True}, False), ("--use_cpu", {}, False)],
)
def test_emulated_bfloat16_is_said_to_be_slow(monkeypatch, tmp_path, caplog, given, capabilities, warns):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    parse("--output_dir", tmp_path, given)
    assert ("--bf16" in caplog.text) == warns
