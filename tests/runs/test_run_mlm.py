# SPDX-License-Identifier: Apache-2.0
"""Tests of run_mlm.py, run on tiny sentences, and of sweeps, groups, pipelines and classifiers from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, pipeline

from experiments.tasks.mlm import IGNORE_INDEX, MlmDataArguments, load_mlm_task
from modeling_tome_perceiver import ToMePerceiverForMaskedLM
from tests.support.script_run import call_script, run_script
from tests.support.tiny_texts import write_model_config, write_sentences

LENGTH = 48
TRAINING = (
    "--do_train", "--do_eval", "--use_cpu", "--per_device_train_batch_size", 16, "--learning_rate", 1e-2,
    "--save_strategy", "no", "--per_device_eval_batch_size", 5,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[object, ...]:
    folder = write_sentences(tmp_path_factory.mktemp("data"), "one", "two")
    return "--dataset_name", folder, "--dataset_config_name", "one,two", "--mlm_probability", 0.3


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """Train, merge and retrain in one run of the script, in its own process."""
    folder = tmp_path_factory.mktemp("outputs")
    config = write_model_config(
        folder, architectures=["PerceiverForMaskedLM"], attention_probs_dropout_prob=0.0,
        **dict.fromkeys(("d_model", "d_latents", "qk_channels", "v_channels"), 16),
    )  # fmt: skip
    result = run_script(
        "run_mlm.py", "--config_name", config, *data, "--max_seq_length", LENGTH, *TRAINING, "--num_train_epochs", 6,
        "--r", 1, "--retrain_epochs", 1, "--output_dir", folder / "mlm",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return folder / "mlm"


def results(output_dir: Path, split: str = "all") -> dict[str, float]:
    return json.loads((output_dir / f"{split}_results.json").read_text())


def test_learns_merges_and_retrains(trained):
    """A masked letter is one of three, and the rest of the sentence tells which."""
    assert results(trained / "finetuned")["eval_accuracy"] > 0.6
    unmerged, retrained = (ToMePerceiverForMaskedLM.from_pretrained(at) for at in (trained / "finetuned", trained))
    assert (unmerged.r, retrained.r) == (0, 1)
    assert retrained.config.max_position_embeddings == LENGTH
    assert {"merged_accuracy", "merged_accuracy_stderr", "eval_loss"} <= set(results(trained))


def test_figures_are_those_of_each_sentence_by_itself(trained, data):
    """Padding in Trainer's batches does not change them."""
    model = ToMePerceiverForMaskedLM.from_pretrained(trained).eval()
    arguments = MlmDataArguments(dataset_name=str(data[1]), dataset_config_name="one,two", mlm_probability=0.3)
    task = load_mlm_task(arguments, predict=False, seed=3)
    sight = task.prepare(model.config, AutoTokenizer.from_pretrained(trained), seed=3)
    right = asked = 0
    for example in sight.evaluation[""]:
        where = example["labels"] != IGNORE_INDEX
        with torch.no_grad():
            logits = model(input_ids=example["input_ids"][None]).logits[0, : len(where)]
        right += int((logits.argmax(-1) == example["labels"])[where].sum())
        asked += int(where.sum())
    assert results(trained)["eval_accuracy"] == pytest.approx(right / asked)
    assert results(trained)["eval_samples"] == len(sight.evaluation[""])


def test_the_card_says_what_was_measured_and_shows_code_that_runs(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert [result.metric_value for result in card.data.eval_results] == [
        results(trained / "finetuned")["eval_accuracy"], results(trained)["merged_accuracy"],
        results(trained)["eval_accuracy"],
    ]  # fmt: skip
    assert f'checkpoint = "{trained.name}"\npipe = pipeline("fill-mask", checkpoint, ' in card.text
    pipe = pipeline("fill-mask", str(trained / "finetuned"), trust_remote_code=True)
    shown = next(line for line in card.text.splitlines() if line.startswith("pipe("))
    assert len(eval(shown, {"pipe": pipe})) == 5
    assert pipe(f"bbbbb{pipe.tokenizer.mask_token}bbbbb")[0]["token_str"] == "b"


def test_joined_lines(data, tmp_path):
    """Every input has equally many tokens; a sweep evaluates the same inputs."""
    config = write_model_config(tmp_path, architectures=["PerceiverForMaskedLM"])
    packed = (*data, "--line_by_line", "False", "--max_seq_length", 20)
    call_script(
        "run_mlm.py", "--config_name", config, *packed, *TRAINING, "--max_steps", 2, "--output_dir", tmp_path / "out"
    )
    call_script(
        "eval_sweep.py", "--model_name_or_path", tmp_path / "out", *packed, "--r", 0, "--timing_rounds", 1, "--use_cpu",
        "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    row = json.loads((tmp_path / "sweep" / "sweep_results.json").read_text())["rows"][0]
    assert row["merged"]["accuracy"] == pytest.approx(results(tmp_path / "out")["eval_accuracy"])


def test_a_sweep_compares_sentence_by_sentence(trained, data, tmp_path):
    """An unmerged row changes nothing, and all rows have the same masked tokens."""
    call_script(
        "eval_sweep.py", "--model_name_or_path", trained, *data, "--r", 0, 1, "--timing_rounds", 1, "--use_cpu",
        "--per_device_eval_batch_size", 4, "--output_dir", tmp_path / "sweep",
    )  # fmt: skip
    unmerged, merged = (
        row["merged"] for row in json.loads((tmp_path / "sweep" / "sweep_results.json").read_text())["rows"]
    )
    assert merged["accuracy"] == pytest.approx(results(trained)["eval_accuracy"])
    assert merged["accuracy_change"] == pytest.approx(merged["accuracy"] - unmerged["accuracy"])
    assert merged["accuracy_change_stderr"] >= 0
    assert ModelCard.load(tmp_path / "sweep" / "README.md").data.pipeline_tag == "fill-mask"
