# SPDX-License-Identifier: Apache-2.0
"""Tests of two processes: they give the results of one process with batches of twice the size.

Starting processes takes most of the time, so one start of two runs all the commands, one after the other.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.training.sharding import check_sharding
from tests.support.script_run import ROOT, call_script
from tests.support.tiny_texts import LABELS, write_glue, write_model_config
from tests.training.test_resume import Killed, killed_at

VALIDATION, TEST = 19, 7  # neither two processes nor their batches of 4 divide them
# SGD, so that weights are as close as gradients: Adam turns a rounding error in a zero gradient into a full step. With
# momentum, because PyTorch cannot resume an optimizer without state under FSDP.
TRAINING = (
    "--use_cpu", "--optim", "sgd", "--optim_args", "momentum=0.5", "--learning_rate", 0.2, "--logging_steps", 1,
    "--per_device_eval_batch_size", 4, "--save_strategy", "epoch", "--retrain_epochs", 1, "--disable_tqdm", "true",
)  # fmt: skip
FINETUNING = ("--do_train", "--do_eval", "--do_predict", "--num_train_epochs", 2, "--r", 2)
FINETUNING_STEPS = 8
# --elastic trains from scratch, in one stage.
ELASTIC = ("--elastic", "--retrain_epochs", 0)
CALIBRATION = (
    "--do_train", "--do_eval", "--num_train_epochs", 1, "--retrain_epochs", 0, "--max_changed", 0.9,
    "--schedule", "floor",
)  # fmt: skip
SWEEP = ("--r", 0, 2, "--timing_rounds", 1, "--timing_batch_size", 2)
SHARDED = {"sharded": True}
KILLED = ("killed", "killed_sharded")
CONFIGS = sorted((ROOT / "examples").glob("accelerate_*.yaml"))


def run_commands(commands: Path) -> None:
    """Run the scripts that a JSON file lists, in each of several processes.

    Each is [NAME, ARGUMENTS, OPTIONS], where OPTIONS may have `sharded`, and `killed_at` with the number of a step.
    """
    *runs, mistake = json.loads(commands.read_text())
    for number, (name, arguments, options) in enumerate(runs):
        print(f"== {number}", flush=True)
        # A closed process group cannot be opened again for the next command.
        kept_open = patch("torch.distributed.destroy_process_group")
        with kept_open as closed, sharded() if options.get("sharded") else nullcontext():
            if step := options.get("killed_at"):
                with pytest.raises(Killed), killed_at(Trainer, "training_step", call=step):
                    call_script(name, *arguments)
            else:
                call_script(name, *arguments)
                closed.assert_called_once_with()
        assert torch.distributed.get_world_size() == 2
    # The first process writes for longer, and an error in one process ends the others.
    torch.distributed.barrier()
    print("== mistake", flush=True)
    try:
        call_script(mistake[0], *mistake[1])
    finally:
        assert not torch.distributed.is_initialized()


@contextmanager
def sharded() -> Iterator[None]:
    """Use the settings of the FSDP example on CPUs, which accelerate shards on if they are declared as GPUs."""
    command = ["--config_file", str(ROOT / "examples" / "accelerate_fsdp.yaml"), "--main_process_port", "0", "run.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    initialize = PartialState.__init__

    def pass_for_gpus(state: PartialState, *arguments: object, **options: object) -> None:
        initialize(state, *arguments, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    with pytest.MonkeyPatch.context() as patch:
        for name, value in prepare_multi_gpu_env(arguments).items():
            if "FSDP" in name:
                patch.setenv(name, value)
        patch.setattr(PartialState, "__init__", pass_for_gpus)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def data(folder) -> tuple[object, ...]:
    # Own cache, because `datasets` caches a folder by its name.
    return (
        "--task_name", "sst2", "--dataset_name", write_glue(folder / "glue", "sst2", 24, VALIDATION, TEST),
        "--cache_dir", folder / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finetuning(folder, data) -> tuple[object, ...]:
    config = write_model_config(folder, attention_probs_dropout_prob=0.0)
    return "--config_name", config, *data, *FINETUNING, *TRAINING


@pytest.fixture(scope="module")
def one(folder, data, finetuning) -> tuple[Path, str]:
    """Run the commands in one process, with batches of 6; return its folder, and what it printed in `glue`."""
    folder = folder / "one"
    with redirect_stdout(io.StringIO()) as printed:
        call_script("run_glue.py", *finetuning, "--per_device_train_batch_size", 6, "--output_dir", folder / "glue")
    elastic = (*finetuning, *ELASTIC, "--per_device_train_batch_size", 6)
    call_script("run_glue.py", *elastic, "--output_dir", folder / "elastic")
    checkpoint = ("--model_name_or_path", folder / "glue" / "finetuned", *data)
    training = (*TRAINING, "--per_device_train_batch_size", 6)
    call_script("eval_sweep.py", *checkpoint, *training, *SWEEP, "--output_dir", folder / "sweep")
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def two(folder, data, finetuning, one) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the commands in two processes, each with batches of 3; return folder and exit; the last command fails."""
    folder = folder / "two"
    folder.mkdir()
    checkpoint = ("--model_name_or_path", one[0] / "glue" / "finetuned", *data)
    batches = ("--per_device_train_batch_size", 3)
    sweep = (*checkpoint, *TRAINING, *batches, *SWEEP)
    killed, killed_sharded = ((*finetuning, *batches, "--output_dir", folder / name) for name in KILLED)
    calibrated = (*checkpoint, *TRAINING, *batches, *CALIBRATION)
    elastic = (*finetuning, *ELASTIC, *batches)
    mistake = ("--use_cpu", "--do_eval", "--r", -1, "--output_dir", folder / "mistaken")
    commands = [
        ("run_glue.py", (*finetuning, *batches, "--output_dir", folder / "glue"), {}),
        ("eval_sweep.py", (*sweep, "--output_dir", folder / "sweep"), {}),
        ("run_glue.py", killed, {"killed_at": FINETUNING_STEPS + 2}),
        ("run_glue.py", (*killed, "--resume_from_checkpoint", "last"), {}),
        ("run_glue.py", (*finetuning, *batches, "--output_dir", folder / "glue_sharded"), SHARDED),
        ("eval_sweep.py", (*sweep, "--output_dir", folder / "sweep_sharded"), SHARDED),
        ("run_glue.py", killed_sharded, SHARDED | {"killed_at": FINETUNING_STEPS - 2}),
        ("run_glue.py", (*killed_sharded, "--resume_from_checkpoint", "last"), SHARDED),
        ("run_glue.py", (*calibrated, "--output_dir", folder / "calibrated"), SHARDED),
        ("run_glue.py", (*elastic, "--output_dir", folder / "elastic"), {}),
        ("run_glue.py", (*elastic, "--output_dir", folder / "elastic_sharded"), SHARDED),
        ("run_glue.py", (*checkpoint, *mistake), {}),
    ]
    (folder / "commands.json").write_text(json.dumps(commands, default=str))
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            "--redirects", "3", "--log_dir", folder / "logs",
            "--module", "tests.training.test_distributed", folder / "commands.json",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert all("== mistake" in text for text in logs(folder, "stdout")), logs(folder, "stderr") + [result.stderr]
    return folder, result


def logs(folder: Path, stream: str) -> list[str]:
    """Return what each process wrote to a stream."""
    return [next(folder.glob(f"logs/*/attempt_0/{rank}/{stream}.log")).read_text() for rank in (0, 1)]


def blocks(printed: str) -> list[str]:
    return re.findall(r"^-- .*$", printed, re.MULTILINE)


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def apart(first: Path, second: Path) -> float:
    """Return the largest difference between the weights of two checkpoints."""
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("checkpoint", ["glue/finetuned/checkpoint-8", "glue/checkpoint-4"])
def test_each_process_keeps_its_own_state_of_the_random_generators(two, checkpoint):
    states = sorted(path.name for path in (two[0] / checkpoint).glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.parametrize("sharded", ["", "_sharded"])
@pytest.mark.parametrize("stage", ["glue/finetuned", "glue", "sweep/retrained/r0", "sweep/retrained/r2"])
def test_weights_are_those_of_one_process(one, two, stage, sharded):
    """Also in the second stage, before which accelerate prepares the model for evaluation only."""
    name, slash, rest = stage.partition("/")
    assert apart(one[0] / stage, two[0] / f"{name}{sharded}{slash}{rest}") < 1e-5
    start = one[0] / "glue" / ("finetuned" if stage != "glue/finetuned" else "finetuned/checkpoint-4")
    assert apart(one[0] / stage, start) > 1e-3  # it was trained


@pytest.mark.parametrize("sharded", ["", "_sharded"])
@pytest.mark.parametrize("stage", ["finetuned", "."])
def test_metrics_are_those_of_one_process(one, two, stage, sharded):
    first, second = results(one[0] / "glue" / stage), results(two[0] / f"glue{sharded}" / stage)
    # Under FSDP, Trainer does not time the preparation of a whole model.
    assert {*first} ^ {*second} <= {f"{split}_model_preparation_time" for split in ("merged", "eval", "predict")}
    assert second["train_loss"] == pytest.approx(first["train_loss"], abs=1e-5)
    assert second["eval_accuracy"] == first["eval_accuracy"]
    assert second["eval_samples"] == VALIDATION
    assert (second["eval_accuracy"] * VALIDATION) % 1 == pytest.approx(0, abs=1e-9)
    # The last batch is filled up with repeated examples, which only the loss counts.
    assert second["eval_loss"] == pytest.approx(first["eval_loss"], rel=0.05)


def test_every_input_is_predicted_once_and_in_order(one, two):
    first, second = ((folder / "glue" / "predict_results_sst2.txt").read_text() for folder in (one[0], two[0]))
    assert first == second
    lines = [line.split("\t") for line in second.splitlines()]
    assert [index for index, _ in lines] == ["index", *map(str, range(TEST))]
    assert {label for _, label in lines[1:]} == set(LABELS["sst2"])  # another order would show


def test_only_the_first_process_prints_and_writes(one, two):
    """Each block of results is printed as often as by one process."""
    folder, _ = two
    first, second = logs(folder, "stdout")
    assert [block for block in blocks(one[1]) if "evaluating" in block and "retrained" in block]
    assert blocks(first.partition("== 1")[0]) == blocks(one[1])
    assert [line for line in second.splitlines() if not line.startswith("== ")] == []
    for name in ("glue", "sweep"):
        files = [
            sorted(str(path.relative_to(side / name)) for path in (side / name).rglob("*") if path.is_file())
            for side in (one[0], folder)
        ]
        assert files[0] == sorted({re.sub(r"rng_state_\d", "rng_state", file) for file in files[1]})


@pytest.mark.parametrize("name", ["sweep", "sweep_sharded"])
def test_a_sweep_is_that_of_one_process(one, two, name):
    sweeps = one[0] / "sweep", two[0] / name
    first, second = (json.loads((folder / "sweep_results.json").read_text()) for folder in sweeps)
    assert [row["name"] for row in second["rows"]] == ["r=0", "r=2"]
    for ours, theirs in zip(second["rows"], first["rows"], strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours["merged"], ours["retrained"]) == (theirs["merged"], theirs["retrained"])
    assert second["evaluated_on"] == VALIDATION


@pytest.mark.parametrize("sharded", ["", "_sharded"])
def test_two_killed_processes_go_on(two, sharded):
    """Killed while retraining and resumed, they only evaluate finetuning, and must then train in step.

    The sharded ones are killed while finetuning, and resume from a checkpoint.
    """
    folder, _ = two
    for stage in ("finetuned", "."):
        assert apart(folder / f"glue{sharded}" / stage, folder / f"killed{sharded}" / stage) < 1e-6
    resumed = results(folder / f"killed{sharded}" / "finetuned").get("train_resumed_from")
    assert resumed == ("checkpoint-4" if sharded else None)


def test_sharded_training_saves_whole_checkpoints(one, two):
    """They have our code and names, whatever FSDP calls the classes of a sharded model."""
    finetuned, checkpoint = (folder / "finetuned" for folder in (one[0] / "glue", two[0] / "glue_sharded"))
    states = sorted(path.name for path in (checkpoint / "checkpoint-8").glob("*fsdp*"))
    assert states == ["pytorch_model_fsdp.bin"]  # it was sharded
    for place in (checkpoint, checkpoint / "checkpoint-8"):
        configs = [json.loads((folder / "config.json").read_text()) for folder in (finetuned, place)]
        for name in ("architectures", "auto_map"):
            assert configs[0][name] == configs[1][name]
        code = [sorted(path.name for path in folder.glob("*.py")) for folder in (finetuned, place)]
        assert code[0] == code[1] and len(code[0]) == 6


def test_sharded_training_measures_the_frontier_of_its_weights(two):
    config = json.loads((two[0] / "calibrated" / "config.json").read_text())
    assert config["merge_frontier"]["rows"]
    assert sum(ToMePerceiverConfig.from_dict(config).merge_schedule) > 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fsdp_version": 1}, "fsdp_version 1: "),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type SHARDED_STATE_DICT: "),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading true: "),
        ({"nonsense": 1}, "nonsense"),
        ({}, "--optim sgd: "),
    ],
)
def test_settings_of_fsdp_that_do_not_work_are_refused(tmp_path, monkeypatch, settings, named):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it too
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = TrainingArguments(tmp_path, use_cpu=True, optim="sgd", resume_from_checkpoint="last")
    arguments.fsdp_plugin_args = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"} | settings
    arguments.distributed_state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    with pytest.raises(BadInput, match=named):
        check_sharding(arguments)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_fsdp_is_refused_where_accelerate_would_not_shard(tmp_path, kind):
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    check_sharding(arguments)
    arguments.fsdp = True
    arguments.distributed_state = SimpleNamespace(distributed_type=kind)
    with pytest.raises(BadInput, match="--fsdp True: .*GPUs"):
        check_sharding(arguments)


@pytest.mark.parametrize("name", ["elastic", "elastic_sharded"])
def test_elastic_training_is_that_of_one_process(one, two, name):
    """Both processes draw the same merging, and average the gradients of both forward passes."""
    assert apart(one[0] / "elastic", two[0] / name) < 1e-5
    assert apart(two[0] / name, one[0] / "elastic" / "checkpoint-4") > 1e-3  # it was trained
    assert apart(one[0] / "elastic", one[0] / "glue" / "finetuned") > 1e-3  # otherwise than without --elastic
    assert json.loads((two[0] / name / "config.json").read_text())["r"] == 2


def test_a_mistake_is_one_line_and_no_success(two):
    folder, result = two
    assert result.returncode != 0
    errors = [[line for line in text.splitlines() if line.startswith("error: ")] for text in logs(folder, "stderr")]
    assert len(errors[0]) == 1 and errors[1] == []
    assert "--r -1" in errors[0][0]
    assert not (folder / "mistaken").exists()
    assert "Traceback" not in "".join(logs(folder, "stderr"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_for_accelerate_starts_what_it_says(path, monkeypatch):
    """accelerate parses its command, and would start as many processes as the file says."""
    config = load_config_from_file(str(path))
    comments = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    command = shlex.split(
        re.search(r"accelerate launch .*?(?<!\\)$", "\n".join(comments), re.DOTALL | re.MULTILINE)[0].replace(
            "\\\n", " "
        )
    )
    assert command[3] == str(path.relative_to(ROOT))
    monkeypatch.chdir(ROOT)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command[2:]))
    assert arguments.multi_gpu or arguments.use_fsdp
    prepare_multi_gpu_env(arguments)
    machines = int(getattr(arguments, "nnodes", None) or 1)
    assert (machines, int(arguments.nproc_per_node)) == (config.num_machines, config.num_processes // machines)
    assert config.num_processes // machines > 1


if __name__ == "__main__":
    run_commands(Path(sys.argv[1]))
