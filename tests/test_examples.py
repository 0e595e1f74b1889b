# SPDX-License-Identifier: Apache-2.0
"""The example files are what the scripts take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import TrainingArguments

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.command_line import parse_arguments
from experiments.image_task import ImageDataArguments
from experiments.model_arguments import MergeArguments, ModelArguments
from experiments.sweep import SweepArguments
from experiments.training import RetrainArguments
from tests.script_run import ROOT, run_script

EXAMPLES = ROOT / "examples"


def test_digits_are_all_there(tmp_path):
    result = run_script("examples/digits_dataset.py", "--output_dir", tmp_path / "digits")
    assert result.returncode == 0, result.stderr
    digits = load_dataset(str(tmp_path / "digits"))
    assert {name: len(split) for name, split in digits.items()} == {"train": 1297, "test": 500}
    assert digits["train"][0]["image"].size == (8, 8)
    assert sorted(set(digits["test"]["label"])) == list(range(10))


@pytest.mark.parametrize(
    ("name", "own_arguments"),
    [("demo_finetune.yaml", MergeArguments), ("demo_sweep.yaml", SweepArguments)],
)
def test_argument_files_are_understood(monkeypatch, name, own_arguments):
    """Every key is an argument: an unknown one is an error."""
    monkeypatch.setattr(sys, "argv", ["script.py", str(EXAMPLES / name)])
    types = (ModelArguments, ImageDataArguments, own_arguments, RetrainArguments, TrainingArguments)
    parsed = parse_arguments("", *types)
    assert parsed[1].dataset_name == "outputs/demo/digits"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_perceiver.json")), ids=lambda path: path.name)
def test_configs_are_perceivers(path: Path):
    config = ToMePerceiverConfig.from_json_file(path)
    assert len(config.latents_per_layer) == config.num_self_attention_layers
