# SPDX-License-Identifier: Apache-2.0
"""Tests of model cards: their content, and that the Hub's classes read it."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jinja2
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
    ALWAYS_LISTED,
    USAGES,
    Card,
    MergingSummary,
    ResultRow,
    set_card_repository,
    shown_r,
)
from experiments.tasks.base import Source
from experiments.tasks.scores import Score
from experiments.training.run_record import training_fields
from frontier_tome_perceiver import Frontier, FrontierRow
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.tiny_models import stock_model, tiny_config

GLUE = Source("--task_name stsb", "nyu-mll/glue", True, "stsb", "validation")
ROWS = [
    ResultRow("finetuned", 0, {"pearson": Score(0.85, 0.01), "spearmanr": Score(0.84, 0.02)}),
    ResultRow("retrained", [2, 0], {"pearson": Score(0.8, 0.03), "spearmanr": Score(0.7, 0.04, -0.1, 0.01, True)}),
]
UNMERGED, CONFIG = (tiny_config(r=r, architectures=["ToMePerceiverForSequenceClassification"]) for r in (0, 2))


@pytest.fixture(autouse=True)
def strict_template(monkeypatch):
    """Make undefined names in the template an error, instead of empty text."""
    monkeypatch.setattr(jinja2, "Template", partial(jinja2.Template, undefined=jinja2.StrictUndefined))


def card_of(**fields: object) -> Card:
    """Return a card with the given fields and as few others as possible."""
    least = {"model_id": "model", "source": GLUE, "hub_task": "text-classification", "base_model": None}
    return Card(**least | fields)


def full_card(**fields: object) -> Card:
    """Return a card with a text in every section."""
    merging = MergingSummary(CONFIG, (1, 20), "at most 0.5", UNMERGED, speedup=Quartiles(1.5, 1.25, 1.75), batch_size=8)
    training = training_fields(TrainingArguments(output_dir="out", deepspeed=None, seed=7))
    everything = {
        "base_model": "deepmind/language-perceiver", "results": ROWS, "evaluated_on": 1500, "trained_on": 3000,
        "merging": merging, "trainings": {"Training": training}, "labels": ["no", "yes"],
        "data_fields": {"max_seq_length": 48}, "sections": {"Branches": "Two.", "Nothing": ""},
    }  # fmt: skip
    return card_of(**everything | fields)


def text_of(card: Card) -> str:
    return card.render().text


def code_of(card: Card) -> str:
    return text_of(card).partition("```python\n")[2].partition("```")[0]


def test_the_head_is_what_the_hub_documents():
    """Compare with the documented metadata, because `ModelCard.validate` needs a network."""
    card = full_card().render()
    head = yaml.safe_load(card.content.split("---\n")[1])
    assert head["base_model"] == "deepmind/language-perceiver" and head["pipeline_tag"] == "text-classification"
    assert head["datasets"] == ["nyu-mll/glue"] and head["metrics"] == ["pearson", "spearmanr"] and head["tags"]
    (model,) = head["model-index"]
    for result in model["results"]:
        assert set(result) == {"task", "dataset", "metrics"} and result["task"] == {"type": "text-classification"}
        assert set(result["dataset"]) == {"name", "type", "config", "split"}
        assert all(isinstance(value, str) for value in result["dataset"].values())
        assert all(math.isfinite(metric["value"]) for metric in result["metrics"])
    name, read = model_index_to_eval_results(head["model-index"])
    assert eval_results_to_model_index(name, read) == head["model-index"] and card.data.to_dict() == head
    # The Hub keys a result by task, dataset and the metric's type, name and arguments.
    assert len({(result.metric_type, result.metric_name, str(result.metric_args)) for result in read}) == 4
    assert [result.metric_value for result in read] == [0.85, 0.84, 0.8, 0.7]
    assert read[2].metric_name == "Pearson (r=2,0, retrained)"
    assert read[2].metric_args == {"r": [2, 0], "model": "retrained", "standard_error": 0.03}


def test_what_is_on_this_machine_only_is_not_linked(tmp_path):
    data = card_of(source=Source("", "nyu-mll/glue", False), base_model=str(tmp_path)).data
    assert data.datasets is None and data.base_model is None


def test_the_results_are_a_table_or_a_report():
    assert """
|  | r | Pearson | Spearman | change, paired by example |
|---|---|---|---|---|
| finetuned | 0 | 0.8500 ± 0.0100 | 0.8400 ± 0.0200 |  |
| retrained | 2,0 | 0.8000 ± 0.0300 | 0.7000 ± 0.0400 | -0.1000 ± 0.0100 |

On 1,500 examples""" in text_of(full_card())
    card = card_of(results=ROWS, evaluated_on=1500, report="As measured.")
    assert "## Results\n\nAs measured.\n\n" in text_of(card) and "On 1,500" not in text_of(card)
    assert len(card.data.eval_results) == 4


def test_an_undefined_score_is_said_to_be_and_is_no_result():
    card = card_of(results=[ResultRow("trained", 0, {"pearson": Score(None), "mse": Score(0.5, None)})])
    assert "| undefined | 0.5000 |" in text_of(card) and "A score is undefined where" in text_of(card)
    assert [result.metric_type for result in card.data.eval_results] == ["mse"]


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


def test_a_checkpoint_of_an_experiment_only_method_says_where_it_loads():
    for method in ("random", "bipartite"):
        config = copy.copy(CONFIG)
        config.merge_method = method
        merging = MergingSummary(config, (1, 20), None, UNMERGED)
        assert ("for experiments only" in text_of(card_of(merging=merging))) == (method == "random")


@pytest.mark.parametrize("hub_task", sorted(USAGES))
def test_the_code_of_every_task_compiles(hub_task):
    code = code_of(card_of(hub_task=hub_task, revision="r2"))
    compile(code, "card", "exec")
    for name in (USAGES[hub_task].auto_class, USAGES[hub_task].processor_class):
        assert name in code and hasattr(transformers, name)
    assert code.count('(checkpoint, revision="r2", trust_remote_code=True)') == 2


def test_the_code_of_a_card_runs(tmp_path, monkeypatch):
    """Run the code of a card in the folder above the checkpoint: pipeline, model and tokenizer, another budget."""
    folder = tmp_path / "someones"
    stock_model("ForSequenceClassification", dtype=torch.float32).save_pretrained(folder)
    ToMePerceiverForSequenceClassification.from_pretrained(folder, r=1).save_pretrained(folder)
    PerceiverTokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = code_of(full_card(model_id=str(folder)))
    exec(code.replace("flops_ratio=0.9", "flops_ratio=0.99"), names)  # the least that so small a model can do
    assert names["logits"].shape[0] == 1 and names["model"].r == 0


@pytest.mark.parametrize("bound", [None, 0.02])
def test_the_frontier_says_how_to_move_along_it(tmp_path, bound):
    changed = None if bound is None else 0.0
    rows = [
        FrontierRow(Merging.none(CONFIG), 1.0, 0.0, changed, bound),
        FrontierRow(Merging.of(CONFIG), 0.623, 0.25, changed, bound),
    ]
    frontier = Frontier(rows, CONFIG.num_blocks, (1, 20), 10, 30, [1.0])
    full_card(frontier=frontier).write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("model.merge_to(flops_ratio=0.63)") == 2 and "0.623 |" in text
    assert ("model.merge_to(max_changed=0.02)" in text) == (bound is not None)
    assert ("![Share of changed answers" in text) == (bound is not None)
    assert (tmp_path / "frontier.png").exists()


def test_a_card_has_a_section_for_what_there_is_to_say(tmp_path):
    card_of(sections={"Branches": "Two.", "Nothing": ""}).write(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# model", "## How to load it", "## Data", "## Branches", "## Limits", "## Licence", "## Made with",
    ]  # fmt: skip
    assert not (tmp_path / "schedule.png").exists() and "without training" in text and "trained on" not in text


def test_a_card_says_what_was_done_how_fast_it_is_and_where():
    text = text_of(full_card(revision="r2"))
    for said in (
        "# model, r2",
        "trained on stsb, from [deepmind/language-perceiver](https://huggingface.co/deepmind/language-perceiver)",
        "12 latents become 1", "input of shape (20,) takes", "merge_method: bipartite", "budget: at most 0.5",
        "1.50 times as fast (measured on", "8 inputs at once; quartiles 1.25 to 1.75",
        "- [nyu-mll/glue](https://huggingface.co/datasets/nyu-mll/glue), configuration stsb",
        "- 3,000 training examples", "- 1,500 evaluated examples, of its split 'validation'",
        "- classes: no, yes", "- `max_seq_length`: 48", "- `seed`: 7", f"transformers {transformers.__version__}",
        "The weights are made from deepmind/language-perceiver, whose terms hold.", describe_environment()["python"],
    ):  # fmt: skip
        assert said in text, said


def test_a_training_lists_what_is_not_the_default_and_the_next_one_what_has_changed():
    text = text_of(full_card())
    listed = re.findall(r"^- `(\w+)`: ", text.partition("## Training\n")[2].partition("## ")[0], re.MULTILINE)
    assert "learning_rate" in listed and set(listed) <= set(ALWAYS_LISTED)
    first = {"learning_rate": 0.1, "data_seed": None, "max_grad_norm": 1.0}
    trainings = {"Finetuning": first, "Retraining": first | {"max_grad_norm": 2.0, "elastic": True}}
    text = text_of(full_card(trainings=trainings))
    assert text.count("`learning_rate`: 0.1") == 1 and "data_seed" not in text
    assert "The same as finetuning, except:\n\n- `max_grad_norm`: 2.0\n- `elastic`: True\n" in text


def test_a_checkpoint_that_merges_nothing_says_so(tmp_path):
    full_card(merging=MergingSummary(UNMERGED, (1, 20), None, UNMERGED)).write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "whose latents can be merged" in text and "This checkpoint merges nothing until `model.merge_to`" in text
    assert not (tmp_path / "schedule.png").exists() and "FLOPs are" not in text


def test_no_card_says_where_on_this_machine_anything_is(tmp_path):
    (tmp_path / "base").mkdir()
    settings = tmp_path / "deepspeed.json"
    settings.write_text("{}")
    trainings = {"Training": {"learning_rate": 0.1, "deepspeed": str(settings)}}
    card = full_card(
        model_id=str(tmp_path),
        base_model=str(tmp_path / "base"),
        trainings=trainings,
        data_fields={"anything": str(settings)},
    )
    content = card.render().content
    assert str(tmp_path) not in content and "/tmp" not in content and str(Path.home()) not in content
    assert "`deepspeed`: deepspeed.json" in content and "from base" in content


def test_names_cannot_break_the_card(tmp_path):
    """A hostile name breaks neither the YAML, nor the code, nor the text."""
    source = Source("", "*d* | <b>: [x](y)\n# z", False, "a: b", "sp`lit")
    card = full_card(model_id='mo"del: *a*', source=source, labels=["<i>", "_x_", "a_b", "#"], revision='r"2')
    text = text_of(card)
    assert ModelCard(card.render().content).data.to_dict() == card.data.to_dict()
    compile(code_of(card), "card", "exec")
    assert '# mo"del: \\*a\\*, r"2\n' in text and "- \\*d\\* \\| \\<b\\>: \\[x](y) # z, read from files" in text
    assert "- classes: \\<i\\>, \\_x\\_, a_b, #\n" in text


@pytest.mark.parametrize(
    ("base_card", "licence"), [("---\nlicense: mit\n---\n", "mit"), ("---\nlicense: [\n---\n", None), (None, None)]
)
def test_the_licence_is_that_of_the_base_model(tmp_path, base_card, licence):
    if base_card is not None:
        (tmp_path / "README.md").write_text(base_card)
    card = full_card(base_model=str(tmp_path))
    assert card.data.license == licence
    assert ("The weights are under mit" in text_of(card)) == (licence is not None)
    assert ("add `license:`" in text_of(card)) == (licence is None)


def test_a_card_loads_from_the_repository_it_is_pushed_to(tmp_path):
    full_card(model_id=str(tmp_path)).write(tmp_path)
    before = (tmp_path / "README.md").read_text()
    assert f'\ncheckpoint = "{tmp_path.name}"\n' in before
    for repo_id in ("someone/model", "someone/other"):
        set_card_repository(tmp_path, repo_id)
        assert (tmp_path / "README.md").read_text() == before.replace(f'"{tmp_path.name}"', f'"{repo_id}"')
    with Image.open(tmp_path / "schedule.png") as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors()) > 10
