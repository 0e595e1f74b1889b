# SPDX-License-Identifier: Apache-2.0
"""benchmarks/unused_latents.py: what stands apart, the first latents alone, and the rows of both."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PerceiverTokenizer

from benchmarks.unused_latents import first_latents, stand_apart
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_models import tiny_inputs, tiny_model
from tests.support.tiny_texts import MODEL, write_glue

SCRIPT = "benchmarks.unused_latents.py"
LATENTS = 24


def test_what_stands_apart_is_counted_by_kind():
    """Four latents, of which the first two hold a token: {0, 2}, {1}, {3}; and {0, 1}, {2, 3}, nothing."""
    sources = torch.tensor([[[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]])
    with_token, without = stand_apart(sources, torch.tensor([2, 2]))
    assert (with_token.tolist(), without.tolist()) == ([2, 1], [1, 1])
    with_token, without = stand_apart(sources, torch.tensor([4, 4]))
    assert (with_token.tolist(), without.tolist()) == ([3, 2], [0, 0])


def test_the_first_latents_alone_are_a_model_of_so_many():
    model, inputs = tiny_model("ForSequenceClassification"), tiny_inputs("ForSequenceClassification")
    latents = model.base_model.embeddings.latents
    with torch.no_grad():
        whole = model(**inputs).logits
        with first_latents(model, 5):
            cut = model(**inputs).logits
    fewer = tiny_model("ForSequenceClassification", num_latents=5)
    weights = model.state_dict() | {"perceiver.embeddings.latents": latents.detach()[:5]}
    fewer.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(cut, fewer(**inputs).logits)
        assert model(**inputs).logits.equal(whole) and not cut.allclose(whole)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unused")
    write_glue(folder / "glue", "sst2")
    fields = {name: value for name, value in MODEL.items() if name not in ("architectures", "model_type")}
    fields |= {"num_latents": LATENTS, "max_position_embeddings": 24, "num_labels": 2}
    model = tiny_model("ForSequenceClassification", **fields)
    model.config.id2label = {0: "negative", 1: "positive"}
    model.config.label2id = {"negative": 0, "positive": 1}
    model.save_pretrained(folder / "model")
    PerceiverTokenizer().save_pretrained(folder / "model")
    data = ("--dataset_name", folder / "glue", "--task_name", "sst2", "--use_cpu")
    return "--model_name_or_path", folder / "model", *data


def test_rows_of_both_kinds_are_written(inputs, tmp_path, capsys):
    call_script(SCRIPT, *inputs, "--r", 3, 4, "--first", 24, 12, "--output_dir", tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "unused_latents.json").read_text())["rows"]}
    assert list(rows) == ["r = 3", "r = 4", "first 24 latents", "first 12 latents"]
    whole = rows["first 24 latents"]
    assert (whole["flops_ratio"], whole["accuracy_change"], whole["accuracy_change_stderr"]) == (1, 0, 0)
    assert rows["first 12 latents"]["flops_ratio"] < 1 and "tokens" not in rows["first 12 latents"]
    # 4 layers; whatever is left holds a token or does not.
    for r in (3, 4):
        row = rows[f"r = {r}"]
        assert row["apart_with_token"] + row["apart_without"] == pytest.approx(LATENTS - 4 * r)
        assert row["apart_with_token"] <= row["tokens"]
    assert "apart, with a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [((), "--r, --first: none"), (("--first", 25), "--first 25: allowed are 1 to 24"), (("--r", 0), "--r 0")],
)
def test_bad_input_is_one_line(inputs, tmp_path, capsys, given, named):
    assert named in bad_input_line(capsys, SCRIPT, *inputs, *given, "--output_dir", tmp_path / "out")
