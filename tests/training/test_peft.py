# SPDX-License-Identifier: Apache-2.0
"""Tests of PEFT: LoRA trains with merging on, and adapters are saved, loaded, merged and calibrated."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.model.test_remote_code import assert_runs_from, run_elsewhere
from tests.support.script_run import bad_input_line
from tests.support.tiny_models import flat_logits, run, tiny_inputs, tiny_model
from tests.support.tiny_texts import write_glue

TARGETS = ["query", "key", "value"]
TEXT, IMAGE, MASKED_LM = "ForSequenceClassification", "ForImageClassificationLearned", "ForMaskedLM"
CONVOLUTION = "ForImageClassificationConvProcessing"
# Modules that are trained and saved whole: a new head, and the running statistics of a batch norm.
SAVED = {
    TEXT: ["perceiver.decoder"],
    IMAGE: ["perceiver.decoder"],
    MASKED_LM: [],
    CONVOLUTION: ["perceiver.decoder", "perceiver.input_preprocessor.convnet.batchnorm"],
}
every_head = pytest.mark.parametrize("head", SAVED)
model_of = partial(tiny_model, dtype=torch.float32, r=2)


def with_lora(head: str, **options: object) -> PeftModel:
    """Return a model that merges latents, with LoRA."""
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=SAVED[head] or None, **options)
    return get_peft_model(model_of(head), config)


def inputs_of(head: str, batch: int = 2) -> dict[str, Tensor]:
    return tiny_inputs(head, batch, torch.float32)


def logits(model: torch.nn.Module, head: str, **arguments: object) -> Tensor:
    with torch.no_grad():
        return flat_logits(model.eval()(**inputs_of(head), **arguments))


def train(model: PeftModel, head: str, steps: int = 3) -> None:
    """Train for a few steps of SGD; the gradients of the last one stay."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.05)
    labels = torch.full((2, 20), 7) if head == MASKED_LM else torch.tensor([0, 2])
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs_of(head), labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> dict[str, PeftModel]:
    models = {}
    for head in SAVED:
        models[head] = with_lora(head)
        train(models[head], head)
    return models


@every_head
def test_lora_trains_adapters_and_head_and_nothing_else(trained, head):
    """Gradients reach the adapters through the merges; the base weights stay."""
    base, weights = model_of(head).state_dict(), dict(trained[head].named_parameters())
    for name, weight in weights.items():
        if ".lora_A." in name and ".encoder." in name:
            assert weight.grad.abs().max() > 0, name
        if not weight.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(weight, base[plain]), name
    adapted = {name.partition(".lora_A")[0].rpartition(".")[2] for name in weights if ".lora_A" in name}
    assert adapted == {*TARGETS}
    assert (logits(trained[head], head) - run(model_of(head), inputs_of(head)).logits).abs().max() > 1e-3


@every_head
def test_a_saved_adapter_loads_onto_its_base(trained, head, tmp_path):
    trained[head].save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of(head), tmp_path)
    assert torch.equal(logits(loaded, head), logits(trained[head], head))


def test_without_its_batch_norm_an_adapter_is_incomplete(tmp_path):
    """Training changes the running statistics of a batch norm, which PEFT saves only if it is told to."""
    model = get_peft_model(model_of(CONVOLUTION), LoraConfig(target_modules=TARGETS))
    train(model, CONVOLUTION)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model_of(CONVOLUTION), tmp_path)
    assert (logits(loaded, CONVOLUTION) - logits(model, CONVOLUTION)).abs().max() > 1e-4


@every_head
def test_merged_adapters_give_the_same_logits_and_an_ordinary_checkpoint(trained, head, tmp_path):
    merged = copy.deepcopy(trained[head]).merge_and_unload()
    assert (logits(merged, head) - logits(trained[head], head)).abs().max() < 1e-5
    assert merged.state_dict().keys() == model_of(head).state_dict().keys()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path), head), logits(merged, head))


@every_head
@pytest.mark.filterwarnings("ignore:samples")
def test_merging_of_latents_works_through_a_peft_model(trained, head):
    """`calibrate`, `merge_to` and the arguments of a call do the same as on the model with merged adapters."""
    adapted = copy.deepcopy(trained[head])
    merged = copy.deepcopy(trained[head]).merge_and_unload()
    samples, budget = [inputs_of(head)] * 4, {"flops_ratio": 0.99}
    options = dict(flops_ratios=[0.99], schedules=["floor"], merge_methods=["bipartite"], merge_metrics=["key"])
    rows = [model.calibrate(samples, **options).rows for model in (adapted, merged)]
    assert [row.merging for row in rows[0]] == [row.merging for row in rows[1]]
    for arguments in (dict(r=0), dict(r=1), budget):
        assert (logits(adapted, head, **arguments) - logits(merged, head, **arguments)).abs().max() < 1e-5
    with_budget = logits(adapted, head, **budget)
    adapted.get_base_model().r = 0
    assert torch.equal(logits(adapted, head), logits(adapted, head, r=0))
    adapted.merge_to(**budget)
    assert torch.equal(logits(adapted, head), with_budget)


def test_sequence_classification_trains_a_new_head_only_if_it_is_named():
    """PEFT's SEQ_CLS looks for heads called classifier or score, and leaves a Perceiver's frozen."""
    options = dict(task_type=TaskType.SEQ_CLS, target_modules=["query"])
    for saved, is_trained in ((None, False), (SAVED[TEXT], True)):
        model = get_peft_model(model_of(TEXT), LoraConfig(modules_to_save=saved, **options))
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        assert any(name.endswith("final_layer.weight") for name in trained) == is_trained


class Rows(torch.utils.data.Dataset):
    """Eight texts with labels, each like the first of `tiny_inputs`."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, object]:
        inputs = tiny_inputs(TEXT, batch=8)
        return {"input_ids": inputs["input_ids"][index], "labels": index % 3}


def test_trainer_trains_saves_and_resumes_an_adapter(tmp_path):
    """Gradient accumulation gives the loss of one batch, and a resumed training its uninterrupted result."""
    weights, losses = {}, {}
    for name, batch_size, resumed in (("whole", 4, None), ("accumulated", 2, None), ("resumed", 4, "checkpoint-1")):
        torch.manual_seed(0)
        model = with_lora(TEXT, lora_dropout=0.0)
        arguments = TrainingArguments(
            tmp_path / name, per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
            max_steps=2, save_steps=1, logging_steps=1, optim="sgd", learning_rate=0.01, use_cpu=True,
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resumed and str(tmp_path / "whole" / resumed))
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights[name] = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert (tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert losses["accumulated"] == pytest.approx(losses["whole"], rel=1e-3)
    for key, weight in weights["whole"].items():
        assert torch.allclose(weight, weights["resumed"][key], atol=1e-6), key


def test_an_adapter_loads_on_remote_code(trained, tmp_path):
    """In a new process without this repository, by PEFT and by the Auto class of transformers."""
    head, base, adapter = TEXT, tmp_path / "base", tmp_path / "adapter"
    model_of(head).save_pretrained(base)
    model = copy.deepcopy(trained[head])
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    torch.save(inputs_of(head), tmp_path / "inputs.pt")
    task = dict(base=str(base), adapter=str(adapter), inputs=str(tmp_path / "inputs.pt"))
    report = torch.load(run_elsewhere("load_adapter.py", task, tmp_path / "elsewhere"))
    assert_runs_from(tmp_path / "elsewhere", report["classes"])
    for name in ("peft", "auto", "merged"):
        assert (report[name] - logits(model, head)).abs().max() < 1e-5, name
    assert (report["peft_r"] - logits(model, head, r=1)).abs().max() < 1e-5


@pytest.mark.parametrize("with_config", [False, True])
def test_scripts_refuse_an_adapter_and_say_what_to_do(trained, tmp_path, capsys, with_config):
    adapter = tmp_path / "adapter"
    trained[TEXT].save_pretrained(adapter)
    if with_config:
        trained[TEXT].get_base_model().config.save_pretrained(adapter)
    data = write_glue(tmp_path / "glue", "sst2")
    for script, given in (
        ("run_glue.py", ("--do_eval", "--output_dir")),
        ("eval_sweep.py", ("--r", 2, "--output_dir")),
    ):
        line = bad_input_line(
            capsys, script, "--model_name_or_path", adapter, "--task_name", "sst2", "--dataset_name", data,
            "--use_cpu", *given, tmp_path / "out",
        )  # fmt: skip
        assert line.startswith(f"error: --model_name_or_path {adapter}: ") and "merge_and_unload" in line
    assert not Path(tmp_path / "out").exists()
