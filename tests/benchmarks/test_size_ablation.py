# SPDX-License-Identifier: Apache-2.0
"""benchmarks/size_ablation.py leaves the sizes out where it says, and nowhere else."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PerceiverTokenizer

from benchmarks.size_ablation import DECODER, PLACES, SELF_ATTENTION, without_sizes
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_models import stock_model, tiny_model
from tests.support.tiny_texts import write_glue

SCRIPT = "benchmarks.size_ablation.py"
BATCH = {"input_ids": torch.arange(6, 24).view(2, 9)}


def logits(model, places=()):
    with torch.no_grad(), without_sizes(model, places):
        return model(**BATCH).logits


def test_without_sizes_anywhere_is_no_proportional_attention():
    model = tiny_model("ForSequenceClassification", r=[4, 2, 0, 0, 0, 0])
    plain = tiny_model("ForSequenceClassification", r=[4, 2, 0, 0, 0, 0], proportional_attention=False)
    torch.testing.assert_close(logits(model, (SELF_ATTENTION, DECODER)), logits(plain))
    torch.testing.assert_close(logits(model), logits(model, ()))
    each = [logits(model, places) for places in PLACES.values()]
    assert all(not one.equal(other) for index, one in enumerate(each) for other in each[:index])


def test_the_decoder_alone_counts_for_a_merge_in_the_last_layer():
    """After the last layer's attention there is none but the decoder's."""
    model = tiny_model("ForSequenceClassification", r=[0, 0, 0, 0, 0, 4])
    torch.testing.assert_close(logits(model, (SELF_ATTENTION,)), logits(model))
    assert not logits(model, (DECODER,)).equal(logits(model))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    data = write_glue(folder / "glue", "sst2")
    stock_model("ForSequenceClassification", torch.float32, num_labels=2).save_pretrained(folder / "model")
    PerceiverTokenizer(model_max_length=20).save_pretrained(folder / "model")
    return "--model_name_or_path", folder / "model", "--task_name", "sst2", "--dataset_name", data, "--use_cpu"


def test_every_place_is_a_row(inputs, tmp_path, capsys):
    call_script(SCRIPT, *inputs, "--flops_ratio", 0.99, "--output_dir", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "size_ablation.json").read_text())["rows"]
    assert [row["sizes"] for row in rows] == list(PLACES)
    assert rows[0]["accuracy_change"] == 0 and sum(rows[0]["r"]) > 0
    assert (tmp_path / "out" / "size_ablation.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--flops_ratio", 0.01), "--flops_ratio 0.01"), (("--schedule", "search"), "--schedule search")],
)
def test_bad_input_is_one_line(inputs, tmp_path, capsys, arguments, says):
    line = bad_input_line(capsys, SCRIPT, *inputs, *arguments, "--output_dir", tmp_path / "out")
    assert says in line and not (tmp_path / "out").exists()
