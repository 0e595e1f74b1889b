# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/training_step.py: it times the scripts' own Trainers."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.training_step import ELASTIC, TrainingStepArguments, build_trainers, step
from tests.support.script_run import bad_input_line, call_script

SCRIPT = "benchmarks.training_step.py"
FIRST = ("--shapes", "small_vision", "--batch_size", 2, "--r", 0, "--flops_ratio", 0.77, "--rounds", 1)


@pytest.mark.parametrize("bf16", [(), ("--bf16",)])
def test_every_way_to_train_has_a_row_beside_the_first(tmp_path, capsys, bf16):
    call_script(SCRIPT, *FIRST, *bf16, "--output_dir", tmp_path)
    (cell,) = json.loads((tmp_path / "training_step.json").read_text())["cells"]
    rows = {row["name"]: row["timing"] for row in cell["rows"]}
    assert list(rows) == ["r = 0", "floor 0.77", "floor 0.77, fixed groups", ELASTIC]
    assert all(timing["latency_ms"]["median"] > 0 for timing in rows.values())
    assert ELASTIC in capsys.readouterr().out


def test_trainers_start_with_equal_weights_and_take_the_steps_of_the_scripts(tmp_path):
    """Weights are equal, outputs are bfloat16 under autocast, and each elastic step draws another merging."""
    arguments = TrainingStepArguments(shapes="small_vision", batch_size=[2], flops_ratio=[0.77], bf16=True)
    (cell,) = arguments.cells()
    made = build_trainers(arguments, cell, tmp_path)
    plain, elastic = made["r = 0"], made[ELASTIC]
    for one, other in zip(plain.model.parameters(), elastic.model.parameters(), strict=True):
        assert one.equal(other) and one is not other
    inputs = {"inputs": torch.randn(cell.input_shape), "labels": torch.zeros(2, dtype=torch.int64)}
    seen, dtypes = [], []
    elastic.model.register_forward_pre_hook(lambda *_: seen.append(elastic.model.r))
    layer = plain.model.base_model.encoder.self_attends[0].mlp.dense1
    layer.register_forward_hook(lambda module, given, output: dtypes.append(output.dtype))
    step(plain, inputs)
    for _ in range(4):
        step(elastic, inputs)
    assert set(dtypes) == {torch.bfloat16}
    assert seen[::2] == [0] * 4 and len({str(r) for r in seen[1::2]}) > 1
    assert all(parameter.grad is None for parameter in plain.model.parameters())


def test_bad_input_is_one_line(tmp_path, capsys):
    assert "--flops_ratio 0.01" in bad_input_line(capsys, SCRIPT, *FIRST, "--flops_ratio", 0.01)
