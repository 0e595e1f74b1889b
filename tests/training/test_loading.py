# SPDX-License-Identifier: Apache-2.0
"""Tests of loading checkpoints for a task: labels, weights, and messages if they do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PerceiverTokenizer, TrainingArguments, pipeline

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.errors import BadInput
from experiments.tasks.glue import GlueDataArguments, GlueTask, load_glue_task
from experiments.training.loading import load_config, load_model, load_model_and_task, requested_config
from experiments.training.model_arguments import ModelArguments
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.script_run import call_script
from tests.support.tiny_texts import MODEL, POSITIONS, write_glue

HEAD = "perceiver.decoder.decoder.final_layer.weight"


def saved(folder: Path, names: list[str], **changes: object) -> Path:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    config = ToMePerceiverConfig(**MODEL | labels | changes)
    model = ToMePerceiverForSequenceClassification(config)
    torch.nn.init.ones_(model.perceiver.decoder.decoder.final_layer.bias)
    model.save_pretrained(folder)
    PerceiverTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("sst2", "mrpc", "stsb"):
        write_glue(folder, name)
    return folder


def glue(folder: Path, name: str) -> GlueTask:
    return load_glue_task(GlueDataArguments(task_name=name, dataset_name=str(folder)), predict=False, seed=0)


def named(folder: Path, **given: object) -> ModelArguments:
    return ModelArguments(model_name_or_path=str(folder), **given)


@pytest.mark.parametrize("names", [["POSITIVE", "Negative"], ["LABEL_0", "LABEL_1"]])
def test_a_checkpoints_own_names_and_order_stay(data, tmp_path, caplog, names):
    """Meaningless names are matched in order, with a warning."""
    with caplog.at_level("WARNING"):
        config = load_config(named(saved(tmp_path, names)), {}, glue(data, "sst2"))
    assert config.id2label == dict(enumerate(names)) and list(config.label2id) == names
    warned = re.search("'LABEL_0', 'LABEL_1' .*'negative', 'positive'", caplog.text)
    assert bool(warned) == ("LABEL_0" in names)


def test_f1_and_predictions_are_the_same_for_any_order(data, tmp_path):
    """A checkpoint with reversed outputs and names gives the same predictions and F1."""
    plain = saved(tmp_path / "plain", ["not_equivalent", "equivalent"])
    turned = saved(tmp_path / "turned", ["EQUIVALENT", "NOT_EQUIVALENT"])
    weights = load_file(plain / "model.safetensors")
    for name, value in weights.items():
        if ".final_layer." in name:
            weights[name] = value.flip(0).contiguous()
    save_file(weights, turned / "model.safetensors", metadata={"format": "pt"})
    outcomes = []
    for folder in (plain, turned):
        out = tmp_path / f"out_{folder.name}"
        call_script(
            "run_glue.py", "--model_name_or_path", folder, "--task_name", "mrpc", "--dataset_name", data, "--do_eval",
            "--do_predict", "--use_cpu", "--output_dir", out,
        )  # fmt: skip
        results = json.loads((out / "eval_results.json").read_text())
        figures = {name: results[name] for name in results if "f1" in name or "accuracy" in name or "combined" in name}
        outcomes.append((figures, (out / "predict_results_mrpc.txt").read_text()))
    assert outcomes[0] == outcomes[1] and len(outcomes[0][0]) == 6


@pytest.mark.parametrize(
    ("names", "changes", "says"),
    [
        (["cat", "dog"], {}, ["'cat', 'dog'", "'negative', 'positive'"]),
        (["cat", "dog", "bird"], {}, ["3 labels", "2"]),
        (["negative", "positive"], {"problem_type": "multi_label_classification"}, ["several labels", "a class"]),
    ],
)
def test_other_labels_are_refused_or_start_a_new_head(data, tmp_path, names, changes, says):
    folder, task = saved(tmp_path, names, **changes), glue(data, "sst2")
    with pytest.raises(BadInput) as error:
        load_config(named(folder), {}, task)
    assert all(part in str(error.value) for part in (*says, "--ignore_mismatched_sizes")), error.value
    arguments = named(folder, ignore_mismatched_sizes=True)
    model = load_model(arguments, load_config(arguments, {}, task), task)
    assert list(model.config.id2label.values()) == ["negative", "positive"]
    start = load_file(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == (".final_layer." not in name), name


def test_a_head_that_fits_is_kept_whatever_may_be_ignored(data, tmp_path):
    folder, task = saved(tmp_path, ["positive", "negative"]), glue(data, "sst2")
    arguments = named(folder, ignore_mismatched_sizes=True)
    model = load_model(arguments, load_config(arguments, {}, task), task)
    assert model.state_dict()[HEAD].equal(load_file(folder / "model.safetensors")[HEAD])


def test_numbers_and_classes_are_not_mistaken(data, tmp_path):
    number = saved(tmp_path / "number", ["LABEL_0"], problem_type="regression")
    with pytest.raises(BadInput, match="1 labels and the data 2"):
        load_config(named(number), {}, glue(data, "sst2"))
    assert load_config(named(number), {}, glue(data, "stsb")).problem_type == "regression"
    classes = saved(tmp_path / "classes", ["negative", "positive"])
    with pytest.raises(BadInput, match="2 labels and the data 1"):
        load_config(named(classes), {}, glue(data, "stsb"))


@pytest.mark.parametrize("damage", ["cut", "lacks", "more", "shape"])
def test_damaged_weights_are_one_line(data, tmp_path, damage):
    folder, task = saved(tmp_path, ["negative", "positive"]), glue(data, "sst2")
    path = folder / "model.safetensors"
    weights, content = load_file(path), path.read_bytes()
    latents = "perceiver.embeddings.latents"
    changed = {
        "lacks": {name: value for name, value in weights.items() if name != latents},
        "more": weights | {"perceiver.encoder.self_attends.9.layernorm.weight": torch.ones(8)},
        "shape": weights | {latents: torch.ones(3, 8)},
    }
    if damage in changed:
        save_file(changed[damage], path, metadata={"format": "pt"})
    else:
        path.write_bytes(content[: len(content) // 2])
    for ignore in (False, True):
        arguments = named(folder, ignore_mismatched_sizes=ignore)
        with pytest.raises(BadInput) as error:
            load_model(arguments, load_config(arguments, {}, task), task)
        assert "\n" not in str(error.value) and f"--model_name_or_path {folder}: " in str(error.value)
        assert damage != "shape" or latents in str(error.value)


def test_a_head_that_is_lost_is_not_drawn_in_silence(data, tmp_path):
    folder, task = saved(tmp_path, ["negative", "positive"]), glue(data, "sst2")
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"its weights lack {HEAD}"):
        load_model(named(folder), load_config(named(folder), {}, task), task)


@pytest.mark.parametrize(
    ("content", "overrides", "says"),
    [
        ("[1, 2]", None, "holds a list"),
        ('{"num_latents": 8', None, "--config_name"),
        ('{"num_latents": "eight"}', None, "num_latents"),
        ("{}", "no_such_key=3", "no_such_key"),
        ("{}", "num_latents=-3", "num_latents=-3"),
        ("{}", "id2label=3", "id2label"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, content, overrides, says):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(BadInput) as error:
        requested_config(ModelArguments(config_name=str(path), config_overrides=overrides))
    assert "\n" not in str(error.value) and says in str(error.value), error.value


def test_a_folder_without_a_config_is_no_model_from_scratch(tmp_path):
    for given in ({"model_name_or_path": str(tmp_path)}, {"config_name": str(tmp_path)}):
        with pytest.raises(BadInput, match="has no config.json"):
            requested_config(ModelArguments(**given))


def test_a_pipeline_cuts_long_text_to_the_positions_of_the_model(data, tmp_path):
    folder = saved(tmp_path / "start", ["negative", "positive"])
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model, prepared = load_model_and_task(named(folder), {}, glue(data, "sst2"), training)
    model.save_pretrained(tmp_path / "out")
    prepared.processing_class.save_pretrained(tmp_path / "out")
    pipe = pipeline("text-classification", str(tmp_path / "out"), trust_remote_code=True)
    assert pipe.tokenizer.model_max_length == POSITIONS
    assert pipe("long " * POSITIONS, truncation=True)[0]["label"] in ("negative", "positive")
