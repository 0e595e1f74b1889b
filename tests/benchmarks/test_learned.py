# SPDX-License-Identifier: Apache-2.0
"""benchmarks/learned.py: soft merging becomes hard, and what a masked pass says of a prefix is what the prefix says.

Letters: N latents (12), C channels.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PerceiverImageProcessorPil

from benchmarks.learned import (
    encoding_by,
    farthest_first,
    learned_embedding,
    masked_encoding,
    matching_by,
    prefix_logits,
    soft_encoding,
)
from configuration_tome_perceiver import ToMePerceiverConfig
from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from search_tome_perceiver import output_divergence
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_images import LABELS, MODEL, write_images
from tests.support.tiny_models import NUM_LATENTS, tiny_inputs, tiny_model

SCRIPT = "benchmarks.learned.py"
HEAD = "ForImageClassificationConvProcessing"
R = [4, 0, 3, 1, 0, 0]
EVERY_CHANNEL = torch.eye(16, dtype=torch.float64)


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs(HEAD)).logits


def test_soft_merging_becomes_bipartite_matching(monkeypatch):
    monkeypatch.setattr("benchmarks.learned.LEAST_SIZE", 1e-12)
    model = tiny_model(HEAD, r=R, merge_metric="hidden")
    hard = logits(model)
    with encoding_by(model, soft_encoding(model, EVERY_CHANNEL, R, temperature=1e-9)):
        torch.testing.assert_close(logits(model), hard)
    with encoding_by(model, soft_encoding(model, EVERY_CHANNEL, R, temperature=0.1)):
        assert not torch.allclose(logits(model), hard)
    assert logits(model).equal(hard)


@pytest.mark.parametrize("method", ["bipartite", "leader"])
def test_an_embedding_of_all_channels_matches_as_hidden(method):
    model = tiny_model(HEAD, r=R, merge_metric="hidden", merge_method=method)
    hidden = logits(model)
    with matching_by(EVERY_CHANNEL):
        assert logits(model).equal(hidden)
    with matching_by(EVERY_CHANNEL[:, :1]):
        assert not logits(model).equal(hidden)
    assert logits(model).equal(hidden)


def test_an_embedding_learns_to_change_the_outputs_less(monkeypatch):
    monkeypatch.setattr("benchmarks.learned.TEMPERATURES", (0.1, 0.1))
    model = tiny_model(HEAD).requires_grad_(False)
    inputs, start = tiny_inputs(HEAD, batch=4), EVERY_CHANNEL[:, :3]
    before = logits_of(model, inputs)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    embedding = learned_embedding(model, iter([inputs] * 20), start, [R], passes=80, learning_rate=0.05)
    apart = []
    for projection in (start, embedding):
        with encoding_by(model, soft_encoding(model, projection, R, 0.1)):
            apart.append(output_divergence(logits_of(model, inputs), before, regression=False).mean())
    assert apart[1] < 0.9 * apart[0]
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("block", [1, 5])
def test_one_masked_pass_says_what_each_prefix_says(block):
    model, inputs = tiny_model(HEAD), tiny_inputs(HEAD)
    with torch.no_grad():
        together = prefix_logits(model, inputs, block)
    counts = [*range(block, NUM_LATENTS, block), NUM_LATENTS]
    assert len(together) == len(counts)
    for count, each in zip(counts, together, strict=True):
        with encoding_by(model, masked_encoding(model, block, count)):
            torch.testing.assert_close(logits_of(model, inputs), each)


def test_a_mask_of_one_block_hides_nothing():
    model = tiny_model(HEAD)
    unmasked = logits(model)
    with encoding_by(model, masked_encoding(model, NUM_LATENTS)):
        torch.testing.assert_close(logits(model), unmasked)


def test_farthest_first_leaves_what_is_said_already_to_the_end():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.0]])
    assert farthest_first(points @ points.T) == [0, 3, 2, 1]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    config = ToMePerceiverConfig(**MODEL | {"model_type": "tome_perceiver", "num_labels": len(LABELS)})
    ToMePerceiverForImageClassificationConvProcessing(config).save_pretrained(folder / "model")
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    images = write_images(folder / "images", {"train": 24, "test": 20})
    return (
        "--model_name_or_path", folder / "model", "--dataset_name", images, "--use_cpu", "--embedding_channels", 4,
        "--embedding_passes", 48, "--mask_block", 2, "--training_passes", 48,
    )  # fmt: skip


def test_both_ideas_are_measured(arguments, tmp_path, capsys):
    call_script(SCRIPT, *arguments, "--flops_ratio", 0.99, "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "learned.json").read_text())["rows"]
    assert [row["name"] for row in rows if row["idea"] == "embedding"] == [
        f"0.99 {method}, {name}"
        for method in ("bipartite", "leader")
        for name in ("hidden", "key", "start", "learned")
    ]  # fmt: skip
    masked = [row for row in rows if row["idea"] == "masked"]
    assert [row["way"] for row in masked] == [*["as it is"] * 2, *["elastic"] * 2, *["masked"] * 2]
    assert all(row["flops_ratio"] <= 0.99 or "unmerged" in row["name"] or "8 latents" in row["name"] for row in masked)
    assert {"unmerged", "elastic"} == set(masked[-1]["changes"])
    assert (tmp_path / "learned.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--idea", "other"), "--idea other: allowed are embedding, masked"),
        (("--embedding_passes", 0), "--embedding_passes 0"),
        (("--flops_ratio", 0.01), "--flops_ratio 0.01"),
    ],
)
def test_bad_input_is_one_line(arguments, tmp_path, capsys, given, says):
    assert says in bad_input_line(capsys, SCRIPT, *arguments, *given, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
