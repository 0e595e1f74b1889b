# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's card says, and that the Hub's own classes read it back."""

from __future__ import annotations

import pytest
import transformers
from huggingface_hub import ModelCard
from PIL import Image

from experiments.publishing.card import (
    AUTO_CLASSES,
    Card,
    Measured,
    WhatMerges,
    address_card,
    measured_in,
    results_table,
    scores,
)
from experiments.tasks.base import Source
from experiments.training.output_folder import save_metrics
from tests.support.tiny_models import tiny_config

GLUE = Source("--task_name stsb", "nyu-mll/glue", True, "stsb", "validation")
ROWS = [
    Measured("finetuned", 0, {"pearson": 0.85, "pearson_stderr": 0.01, "spearmanr": 0.84, "spearmanr_stderr": 0.02}),
    Measured("retrained", [2, 0], {"pearson": 0.8, "pearson_stderr": 0.03, "spearmanr": 0.7, "spearmanr_stderr": 0.04}),
]


def card_of(**fields: object) -> Card:
    """A card that says no more than it has to, and `fields`."""
    least = {"model_id": "model", "source": GLUE, "hub_task": "text-classification", "base_model": None}
    return Card(**least | fields)


def test_only_figures_with_a_standard_error_are_results():
    metrics = {"eval_f1": 0.5, "eval_f1_stderr": 0.1, "eval_runtime": 3.0, "eval_samples": 4, "epoch": 1.0}
    assert scores(metrics, "eval") == {"f1": 0.5, "f1_stderr": 0.1}


def test_rows_do_not_collapse_on_the_hub():
    """The Hub keys a result by task, dataset and the metric's type, name and arguments."""
    data = card_of(measured=ROWS).data
    read = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.eval_results
    assert len({(result.metric_type, result.metric_name, str(result.metric_args)) for result in read}) == 4
    assert [result.metric_value for result in read] == [0.85, 0.84, 0.8, 0.7]
    assert read[2].metric_name == "Pearson (r=2,0, retrained)"
    assert read[2].metric_args == {"r": [2, 0], "model": "retrained", "standard_error": 0.03}


def test_changes_are_no_results():
    """They are of two rows; what stands beside a row is a figure of its own."""
    row = Measured("merged", 2, {"f1": 0.5, "f1_stderr": 0.1, "f1_change": -0.2, "f1_change_stderr": 0.1, "loss": 3.0})
    assert row.scores == {"f1": (0.5, 0.1)}
    assert [result.metric_type for result in card_of(measured=[row]).data.eval_results] == ["f1"]


@pytest.mark.parametrize(("on_hub", "datasets"), [(True, ["nyu-mll/glue"]), (False, None)])
def test_data_that_are_not_on_the_hub_are_not_linked(on_hub, datasets):
    source = Source("", "nyu-mll/glue", on_hub)
    assert card_of(source=source).data.datasets == datasets


def test_a_folder_is_no_base_model(tmp_path):
    assert card_of(base_model=str(tmp_path)).data.base_model is None
    assert card_of(base_model="some/model").data.base_model == "some/model"


def test_the_table_has_a_column_for_each_metric():
    assert results_table(ROWS).splitlines() == [
        "|  | r | Pearson | Spearman |",
        "|---|---|---|---|",
        "| finetuned | 0 | 0.8500 ± 0.0100 | 0.8400 ± 0.0200 |",
        "| retrained | 2,0 | 0.8000 ± 0.0300 | 0.7000 ± 0.0400 |",
    ]


def test_what_was_not_measured_is_no_row(tmp_path):
    save_metrics(tmp_path, "merged", {"merged_f1": 0.5, "merged_f1_stderr": 0.1, "merged_runtime": 1.0})
    assert measured_in(tmp_path, "merged", "merged", 2) == [Measured("merged", 2, {"f1": 0.5, "f1_stderr": 0.1})]
    assert measured_in(tmp_path, "eval", "eval", 2) == []


@pytest.mark.parametrize("hub_task", sorted(AUTO_CLASSES))
def test_the_code_that_a_card_shows_is_code(hub_task):
    usage = card_of(hub_task=hub_task, model_id="someone/model", revision="r2").usage
    code = usage.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert f"import {AUTO_CLASSES[hub_task]}, pipeline" in code and f'pipeline("{hub_task}", ' in code
    assert hasattr(transformers, AUTO_CLASSES[hub_task])


def test_a_card_says_only_what_there_is_to_say(tmp_path):
    """No merging, figures or training: no picture and no heading without a text; other sections where there are."""
    card_of(sections={"Branches": "Two.", "Nothing": ""}).write(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# model", "## Use it", "## Branches"]
    assert not (tmp_path / "schedule.png").exists()


def test_a_report_stands_in_place_of_the_table():
    card = card_of(measured=ROWS, evaluated_on=1500, report="As measured.", what="and what it does.")
    assert "## Results\n\nAs measured.\n\n" in card.text and "1,500" not in card.text
    assert "A [Perceiver IO](https://arxiv.org/abs/2107.14795) and what it does.\n" in card.text
    assert len(card.data.eval_results) == 4


@pytest.mark.parametrize("measured", [ROWS, []])
def test_a_card_is_whole_and_moves_to_its_repository(tmp_path, measured):
    config = tiny_config(r=2, architectures=["ToMePerceiverForSequenceClassification"])
    card = card_of(
        model_id=str(tmp_path), revision="r2", measured=measured, evaluated_on=1500, trained_on=3000,
        merging=WhatMerges(config, (1, 20), "at most 0.5 of the FLOPs"),
        steps={
            "Finetuning": {"learning_rate": 0.1, "data_seed": None, "max_grad_norm": 1.0},
            "Retraining": {"learning_rate": 0.2, "max_grad_norm": 2.0, "elastic": True},
        },
    )  # fmt: skip
    card.write(tmp_path)
    before = (tmp_path / "README.md").read_text()
    assert f'from_pretrained("{tmp_path}", revision="r2"' in before
    assert "12 latents to 1" in before.replace("\n", " ") and "data_seed" not in before
    assert ("On 1,500 examples" in before) == bool(measured)
    assert "`learning_rate`: 0.1" in before and "`learning_rate`: 0.2" in before and "samples: 3,000" in before
    assert "`max_grad_norm`: 2.0" in before and "`max_grad_norm`: 1.0" not in before and "`elastic`: True" in before
    assert "merge_method: bipartite" in before and "budget: at most 0.5 of the FLOPs" in before
    address_card(tmp_path, "someone/model")
    after = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in after and after.count('"someone/model", revision="r2"') == 2
    address_card(tmp_path, "someone/other")
    assert (tmp_path / "README.md").read_text() == after.replace("someone/model", "someone/other")
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors()) > 10
