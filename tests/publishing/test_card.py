# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's card says, and that the Hub's own classes read it back."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from transformers import PerceiverTokenizer, TrainingArguments

from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import Merging
from experiments.measurement import Quartiles, describe_environment
from experiments.publishing.card import (
    AUTO_CLASSES,
    PROCESSORS,
    TRAINING_SHOWN,
    Card,
    Measured,
    WhatMerges,
    address_card,
    measured_in,
    results_table,
    shown_r,
)
from experiments.tasks.base import Source
from experiments.tasks.scores import Score
from experiments.training.output_folder import save_metrics
from experiments.training.run_record import training_fields
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.tiny_models import stock_model, tiny_config

GLUE = Source("--task_name stsb", "nyu-mll/glue", True, "stsb", "validation")
ROWS = [
    Measured("finetuned", 0, {"pearson": Score(0.85, 0.01), "spearmanr": Score(0.84, 0.02)}),
    Measured("retrained", [2, 0], {"pearson": Score(0.8, 0.03), "spearmanr": Score(0.7, 0.04)}),
]


def card_of(**fields: object) -> Card:
    """A card that says no more than it has to, and `fields`."""
    least = {"model_id": "model", "source": GLUE, "hub_task": "text-classification", "base_model": None}
    return Card(**least | fields)


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
    row = Measured("merged", 2, {"f1": Score(0.5, 0.1, -0.2, 0.1, compared=True)})
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


def test_what_has_changed_stands_beside_the_figure():
    rows = [
        Measured("unmerged", 0, {"f1": Score(0.5, 0.1)}),
        Measured("merged", 2, {"f1": Score(0.4, 0.1, -0.1, 0.02, compared=True)}),
    ]
    assert results_table(rows).splitlines() == [
        "|  | r | F1 | change, paired by example |",
        "|---|---|---|---|",
        "| unmerged | 0 | 0.5000 ± 0.1000 |  |",
        "| merged | 2 | 0.4000 ± 0.1000 | -0.1000 ± 0.0200 |",
    ]


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"r": 2}, 2),
        ({"r": [2, 0, 0, 0, 0, 0]}, [2, 0, 0, 0, 0, 0]),
        ({"r": 0, "latent_groups": [0, 0, 1]}, "fixed groups"),
        ({"r": [1, 0], "latent_groups": [0, 0, 1]}, "fixed groups, then 1,0"),
        ({"r": 0, "merge_groups": [[0, 0, 1]]}, "fixed groups"),
    ],
)
def test_fixed_groups_are_not_shown_as_an_r_of_nothing(fields, shown):
    assert shown_r(replace(Merging.none(ToMePerceiverConfig()), **fields)) == shown


def test_what_was_not_measured_is_no_row(tmp_path):
    save_metrics(tmp_path, "merged", {"merged_f1": 0.5, "merged_f1_stderr": 0.1, "merged_runtime": 1.0})
    assert measured_in(tmp_path, "merged", "merged", 2) == [Measured("merged", 2, {"f1": Score(0.5, 0.1)})]
    assert measured_in(tmp_path, "eval", "eval", 2) == []


@pytest.mark.parametrize("hub_task", sorted(AUTO_CLASSES))
def test_the_code_that_a_card_shows_is_code(hub_task):
    usage = card_of(hub_task=hub_task, model_id="someone/model", revision="r2").usage
    code = usage.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert (
        f"import {AUTO_CLASSES[hub_task]}, {PROCESSORS[hub_task][0]}, pipeline" in code
        and f'pipeline("{hub_task}", ' in code
    )
    assert hasattr(transformers, AUTO_CLASSES[hub_task]) and hasattr(transformers, PROCESSORS[hub_task][0])


def test_a_card_says_only_what_there_is_to_say(tmp_path):
    """No merging, figures or training: no picture and no heading without a text; other sections where there are."""
    card_of(sections={"Branches": "Two.", "Nothing": ""}).write(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# model", "## Use it", "## Data", "## Branches", "## Limits", "## Licence", "## Made with",
    ]  # fmt: skip
    assert not (tmp_path / "schedule.png").exists()


def test_a_report_stands_in_place_of_the_table():
    card = card_of(measured=ROWS, evaluated_on=1500, report="As measured.", what="and what it does.")
    assert "## Results\n\nAs measured.\n\n" in card.text and "On 1,500" not in card.text
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
    assert f'from_pretrained("{tmp_path.name}", revision="r2"' in before and str(tmp_path) not in before
    assert "12 latents to 1" in before.replace("\n", " ") and "data_seed" not in before
    assert ("On 1,500 examples" in before) == bool(measured)
    assert "`learning_rate`: 0.1" in before and "`learning_rate`: 0.2" in before and "samples: 3,000" in before
    assert "`max_grad_norm`: 2.0" in before and "`max_grad_norm`: 1.0" not in before and "`elastic`: True" in before
    assert "As finetuning, but:" in before and "for an input of shape (20,)" in before
    assert "merge_method: bipartite" in before and "budget: at most 0.5 of the FLOPs" in before
    address_card(tmp_path, "someone/model")
    after = (tmp_path / "README.md").read_text()
    assert f'"{tmp_path.name}"' not in after and after.count('"someone/model", revision="r2"') == 3
    address_card(tmp_path, "someone/other")
    assert (tmp_path / "README.md").read_text() == after.replace("someone/model", "someone/other")
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors()) > 10


def written(folder: Path, **fields: object) -> ModelCard:
    """A card with all that there can be in one, as it is read back from its file."""
    config = tiny_config(r=2, architectures=["ToMePerceiverForSequenceClassification"])
    merging = WhatMerges(config, (1, 20), "at most 0.5", speedup=Quartiles(1.5, 1.25, 1.75), batch_size=8)
    training = training_fields(TrainingArguments(output_dir=str(folder), deepspeed=None, seed=7))
    everything = {
        "model_id": str(folder), "measured": ROWS, "evaluated_on": 1500, "trained_on": 3000, "merging": merging,
        "steps": {"Training": training}, "labels": ["no", "yes"], "data_fields": {"max_seq_length": 48},
    }  # fmt: skip
    card_of(**everything | fields).write(folder)
    return ModelCard.load(folder / "README.md")


def test_the_head_is_what_the_hub_documents(tmp_path):
    """What `ModelCard.validate` would ask the Hub needs a network; this is the specification as it is documented, and
    that huggingface_hub reads and writes it without losing anything."""
    card = written(tmp_path, base_model="deepmind/language-perceiver")
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    for name in ("library_name", "pipeline_tag", "base_model"):
        assert isinstance(head[name], str)
    for name in ("tags", "datasets", "metrics"):
        assert head[name] and all(isinstance(entry, str) for entry in head[name])
    (model,) = head["model-index"]
    assert isinstance(model["name"], str) and len(model["results"]) == 1
    for result in model["results"]:
        assert set(result) == {"task", "dataset", "metrics"} and result["task"] == {"type": "text-classification"}
        assert {name: type(value) for name, value in result["dataset"].items()} == dict.fromkeys(
            ("name", "type", "config", "split"), str
        )
        for metric in result["metrics"]:
            assert isinstance(metric["type"], str) and isinstance(metric["name"], str)
            assert isinstance(metric["value"], float) and math.isfinite(metric["value"])
    name, read = model_index_to_eval_results(head["model-index"])
    assert eval_results_to_model_index(name, read) == head["model-index"]
    assert len(read) == 4 and card.data.to_dict() == head


def test_no_card_says_where_on_this_machine_anything_is(tmp_path):
    (tmp_path / "base").mkdir()
    settings = tmp_path / "deepspeed.json"
    settings.write_text("{}")
    steps = {"Training": {"learning_rate": 0.1, "deepspeed": str(settings)}}
    written(tmp_path, base_model=str(tmp_path / "base"), steps=steps, data_fields={"anything": str(settings)})
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in text and "/tmp" not in text and str(Path.home()) not in text
    assert "`deepspeed`: deepspeed.json" in text and "from `base`" in text


def test_a_card_lists_no_default_that_it_does_not_always_list(tmp_path):
    text = written(tmp_path).text
    listed = re.findall(r"^- `(\w+)`: ", text.partition("## Training\n")[2].partition("## ")[0], re.MULTILINE)
    assert set(listed) <= set(TRAINING_SHOWN) and "accelerator_config" not in text


def test_a_card_says_what_it_stands_on_how_fast_it_is_and_where(tmp_path):
    text = written(tmp_path, base_model="deepmind/language-perceiver").text
    for said in (
        "trained on stsb, from [deepmind/language-perceiver](https://huggingface.co/deepmind/language-perceiver)",
        "it was 1.50 times as fast as unmerged (quartiles 1.25 to 1.75, 8 inputs at once)",
        f"On {describe_environment()['processor']}",
        "- [nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue), configuration stsb",
        "- 3,000 training examples",
        "- 1,500 evaluated examples, of its split 'validation'",
        "- tells apart: no, yes",
        "- `max_seq_length`: 48",
        f"transformers {transformers.__version__}",
        "The weights are made from deepmind/language-perceiver, whose terms hold.",
    ):
        assert said in text, said


def test_what_was_not_trained_is_not_said_to_be(tmp_path):
    text = written(tmp_path, base_model="someone/model", steps={}).text
    assert "made from [someone/model]" in text and "without training" in text
    assert "trained on" not in text and "training examples" not in text


def test_a_checkpoint_that_merges_nothing_says_so(tmp_path):
    config = tiny_config(architectures=["ToMePerceiverForSequenceClassification"])
    text = written(tmp_path, merging=WhatMerges(config, (1, 20))).text
    assert "whose latents can be merged" in text and "Nothing, until `model.merge_to`" in text
    assert not (tmp_path / "schedule.png").exists() and "FLOPs are" not in text


@pytest.mark.parametrize(
    ("base_card", "licence"), [("---\nlicense: mit\n---\n", "mit"), ("---\nlicense: [\n---\n", None), (None, None)]
)
def test_the_licence_is_that_of_what_it_was_made_from(tmp_path, base_card, licence):
    base = tmp_path / "base"
    base.mkdir()
    if base_card is not None:
        (base / "README.md").write_text(base_card)
    card = written(tmp_path, base_model=str(base))
    assert card.data.license == licence
    assert ("The weights are under mit" in card.text) == (licence is not None)
    assert ("adds `license:`" in card.text) == (licence is None)


def test_the_code_of_a_card_runs(tmp_path, monkeypatch):
    """From the folder above the checkpoint, with its own code, by Auto classes: pipeline, parts, another budget."""
    folder = tmp_path / "someones"
    stock_model("ForSequenceClassification", dtype=torch.float32).save_pretrained(folder)
    ToMePerceiverForSequenceClassification.from_pretrained(folder, r=1).save_pretrained(folder)
    PerceiverTokenizer().save_pretrained(folder)
    code = written(folder).text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("flops_ratio=0.9", "flops_ratio=0.99"), names)  # the least that so small a model can do
    assert names["logits"].shape[0] == 1 and names["model"].r == 0
