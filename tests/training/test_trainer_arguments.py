# SPDX-License-Identifier: Apache-2.0
"""Every argument of `TrainingArguments`, also of a later transformers: it works, or is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing

import pytest
from transformers import TrainingArguments

from experiments.command_line import parse_arguments
from experiments.errors import BadInput
from experiments.training.trainer_arguments import RANGES, REFUSED, TrainerArguments
from tests.support.script_run import call_script
from tests.support.tiny_texts import write_glue, write_model_config

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}

# Values that work, a few arguments in each run.
WORK = {
    "optimizer and scheduler": (
        "--optim", "sgd", "--optim_args", "momentum=0.9", "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs",
        '{"num_cycles": 1}', "--learning_rate", 1e-3, "--weight_decay", 0.1, "--max_grad_norm", 0, "--warmup_steps",
        0.1, "--max_steps", 2, "--gradient_accumulation_steps", 2, "--average_tokens_across_devices", "false",
        "--label_smoothing_factor", 0.1, "--adam_beta1", 0, "--adam_beta2", 0, "--adam_epsilon", 1e-6,
    ),
    "precision and memory": (
        "--bf16", "--bf16_full_eval", "--tf32", "false", "--activation_checkpointing", "true",
        "--activation_checkpointing_kwargs", '{"use_reentrant": false}', "--torch_empty_cache_steps", 1,
        "--auto_find_batch_size", "--eval_accumulation_steps", 1, "--eval_use_gather_object",
    ),
    "half precision": (
        "--fp16", "--fp16_full_eval", "--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs",
        '{"use_reentrant": true}', "--full_determinism", "--debug", "underflow_overflow",
    ),
    "logging": (
        "--logging_strategy", "steps", "--logging_steps", 1, "--logging_first_step", "--log_on_each_node", "false",
        "--logging_nan_inf_filter", "false", "--include_num_input_tokens_seen", "true", "--log_level", "error",
        "--log_level_replica", "error", "--disable_tqdm", "true", "--report_to", "none", "--run_name", "x",
        "--project", "x", "--trackio_space_id", "x/y", "--trackio_bucket_id", "x", "--trackio_static_space_id", "x",
    ),
    "evaluating and saving": (
        "--eval_strategy", "steps", "--eval_steps", 1, "--eval_delay", 1, "--eval_on_start", "--save_strategy",
        "steps", "--save_steps", 1, "--save_total_limit", 1, "--save_only_model", "--save_on_each_node",
        "--enable_jit_checkpoint", "--load_best_model_at_end", "--metric_for_best_model", "accuracy",
        "--greater_is_better", "true", "--max_steps", 2, "--ignore_data_skip",
        "--restore_callback_states_from_checkpoint",
    ),
    "data": (
        "--seed", 2**32 - 1, "--data_seed", 0, "--dataloader_num_workers", 1,
        "--dataloader_prefetch_factor", 1, "--dataloader_persistent_workers", "--dataloader_multiprocessing_context",
        "fork", "--dataloader_in_order", "false", "--dataloader_pin_memory", "false", "--train_sampling_strategy",
        "sequential", "--remove_unused_columns", "false", "--accelerator_config", '{"split_batches": true}',
        "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 10**6, "--num_train_epochs", 0.5,
    ),
    "what only several processes or a push take": (
        "--ddp_find_unused_parameters", "true", "--ddp_bucket_cap_mb", 1, "--ddp_broadcast_buffers", "true",
        "--ddp_static_graph", "true", "--ddp_timeout", 60, "--local_rank", 0, "--hub_token", "x",
        "--hub_private_repo", "true", "--hub_model_id", "x/y", "--hub_strategy", "end", "--hub_always_push",
        "--hub_revision", "main",
    ),
}  # fmt: skip
# Tried elsewhere: in every run of a script, or because they need a Hub, a compiler or much time.
ELSEWHERE = {
    "output_dir", "do_train", "do_eval", "do_predict", "use_cpu", "resume_from_checkpoint", "push_to_hub",
    "torch_compile", "skip_memory_metrics",
}  # fmt: skip
# Values that the arguments alone show to be wrong.
WRONG: list[tuple[object, ...]] = [
    ("--batch_eval_metrics",),
    ("--dataloader_drop_last",),
    ("--eval_do_concat_batches", "false"),
    ("--include_for_metrics", "inputs"),
    ("--prediction_loss_only",),
    ("--neftune_noise_alpha", 5),
    ("--use_liger_kernel",),
    ("--liger_kernel_config", '{"rope": true}'),
    ("--use_cache",),
    ("--parallelism_config", "x"),
    ("--label_names", "labels"),
    ("--length_column_name", "x"),
    ("--optim_target_modules", "all"),
    ("--optim", "galore_adamw"),
    ("--optim", "apollo_adamw"),
    ("--optim", "nonsense"),
    ("--optim_args", "junk"),
    ("--lr_scheduler_type", "nonsense"),
    ("--lr_scheduler_type", "cosine_with_min_lr"),
    ("--lr_scheduler_type", "warmup_stable_decay"),
    ("--lr_scheduler_type", "reduce_lr_on_plateau"),
    ("--lr_scheduler_type", "greedy"),
    ("--lr_scheduler_kwargs", '{"nonsense": 1}'),
    ("--lr_scheduler_kwargs", "{nonsense"),
    ("--lr_scheduler_kwargs", "nonsense"),
    ("--activation_checkpointing_kwargs", '{"nonsense": 1}'),
    ("--torch_compile_backend", "nonsense"),
    ("--torch_compile_mode", "nonsense"),
    ("--tf32", "nonsense"),
    ("--bf16", "--fp16"),
    ("--bf16_full_eval", "--fp16_full_eval"),
    ("--load_best_model_at_end",),
    ("--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "steps"),
    ("--save_strategy", "best"),
    ("--save_strategy", "best", "--eval_strategy", "epoch"),
    ("--logging_steps", 1.5),
    ("--include_num_input_tokens_seen", "nonsense"),
    ("--log_level", "nonsense"),
    ("--report_to", "nonsense"),
    ("--report_to", "none,nonsense"),
    ("--max_steps", 0),
    ("--accelerator_config", '{"nonsense": 1}'),
    ("--accelerator_config", "nofile.json"),
    ("--dataloader_persistent_workers",),
    ("--dataloader_prefetch_factor", 2),
    ("--dataloader_multiprocessing_context", "nonsense"),
    ("--train_sampling_strategy", "nonsense"),
    ("--ddp_backend", "gloo"),
    ("--ddp_backend", "nonsense"),
    ("--fsdp", "full_shard"),
    ("--fsdp", "nonsense"),
    ("--fsdp_config", "nofile.json"),
    ("--deepspeed", "nofile.json"),
    ("--debug", "nonsense"),
    ("--output_dir", ""),
]


def parse(*words: object) -> TrainerArguments:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "--use_cpu", *map(str, words)])
        return parse_arguments("", TrainerArguments)[0]


def names(words: tuple[object, ...]) -> set[str]:
    return {str(word).removeprefix("--") for word in words if str(word).startswith("--")}


def numbers() -> dict[str, type]:
    """The fields that are numbers, by the type that their annotation names."""
    hints = typing.get_type_hints(TrainingArguments)
    kinds = {name: [kind for kind in (typing.get_args(hints[name]) or (hints[name],))] for name in FIELDS}
    return {name: kind for name in FIELDS for kind in (int, float) if kind in kinds[name]}


def test_every_argument_is_tried():
    """Of a later transformers, too: an argument that it adds belongs into one of the lists."""
    tried = {name for words in (*WORK.values(), *WRONG) for name in names(words)} | ELSEWHERE
    assert tried == set(FIELDS)
    assert set(REFUSED) <= {name for words in WRONG for name in names(words)}
    assert set(numbers()) - {"neftune_noise_alpha"} <= set(RANGES) and set(RANGES) <= set(numbers())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_glue(folder / "glue", "sst2")
    return (
        "--config_name", write_model_config(folder), "--dataset_name", folder / "glue", "--task_name", "sst2",
        "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 1, "--save_strategy", "no",
    )  # fmt: skip


@pytest.mark.parametrize("run", WORK)
def test_it_works(inputs, tmp_path, run):
    call_script("run_glue.py", *inputs, *WORK[run], "--output_dir", tmp_path / "out")
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "all_results.json").read_text())


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(map(str, words)))
def test_it_is_refused_in_one_line(tmp_path, words):
    with pytest.raises(BadInput) as error:
        parse("--output_dir", tmp_path / "out", *words)
    assert "\n" not in str(error.value) and str(error.value).startswith(("--", "arguments: "))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(RANGES))
def test_numbers_are_in_range(tmp_path, name):
    least, most = RANGES[name]
    for wrong in (least - 1, most * 10, -(10**30), 10**40, "nan", "inf", "-inf", "one", ""):
        text = wrong if isinstance(wrong, str) or numbers()[name] is float else int(wrong)
        with pytest.raises(BadInput, match=rf"^--{name} .*: allowed "):
            parse("--output_dir", tmp_path, f"--{name}={text}")


def test_an_optimizer_whose_package_is_missing(tmp_path):
    with pytest.raises(BadInput, match="^--optim lomo: .*install"):
        parse("--output_dir", tmp_path, "--optim", "lomo")


@pytest.mark.parametrize("below", ["file", "file/out", "x" * 300, "link"])
def test_a_folder_that_cannot_be_made(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInput, match="^--output_dir "):
        parse("--output_dir", tmp_path / "new" / ".." / below)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "mine"
