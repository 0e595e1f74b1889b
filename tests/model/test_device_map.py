# SPDX-License-Identifier: Apache-2.0
"""Tests of accelerate's device maps and offloading, on CPU and disk, and of copies: the outputs stay the same."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import HEADS, run, tiny_inputs, tiny_model

Move = Callable[[PreTrainedModel, Path], PreTrainedModel]

model_of = partial(tiny_model, dtype=torch.float32, r=2)


@contextmanager
def two_threads() -> Iterator[None]:
    """Inside a search only: operations in two threads are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def offload_to_cpu(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, torch.device("cpu"))


def offload_to_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return disk_offload(model, folder, torch.device("cpu"))


def dispatch(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    base = "" if model is model.base_model else f"{model.base_model_prefix}."
    places = {name: "cpu" for name, _ in model.named_children()} if base else {}
    places |= {f"{base}{name}": "cpu" for name, _ in model.base_model.named_children()} | {f"{base}encoder": "disk"}
    places.pop(model.base_model_prefix, None)
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True,
        skip_keys=model._skip_keys_device_placement,
    )  # fmt: skip


def load_on_cpu(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, device_map={"": "cpu"})


def load_partly_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load with room for seven tenths of the weights, so that the largest modules stay on the disk."""
    model.save_pretrained(folder / "checkpoint")
    room = sum(weight.nbytes for weight in model.parameters()) * 7 // 10
    loaded = type(model).from_pretrained(
        folder / "checkpoint", device_map="auto", max_memory={"cpu": room}, offload_folder=folder / "offloaded"
    )
    assert "disk" in loaded.hf_device_map.values()
    return loaded


TEXT, MASKED_LM = "ForSequenceClassification", "ForMaskedLM"
# Not the multimodal head, whose padding upstream keeps in a ParameterDict that accelerate never loads.
CASES: list[tuple[str, Move]] = [
    *((head, load_partly_on_disk) for head in HEADS if head != "ForMultimodalAutoencoding"),
    *((head, offload_to_disk) for head in HEADS if head not in ("ForMultimodalAutoencoding", MASKED_LM)),
    *((TEXT, move) for move in (offload_to_cpu, dispatch, load_on_cpu)),
    (MASKED_LM, dispatch),
]


def logits(model: PreTrainedModel, head: str, **arguments: object) -> Tensor:
    return run(model, tiny_inputs(head, dtype=torch.float32), **arguments).logits


@pytest.mark.parametrize(("head", "move"), CASES)
def test_logits_are_the_same_wherever_the_weights_are(head, move, tmp_path):
    model = model_of(head)
    expected = logits(model, head), logits(model, head, r=1)
    moved = move(model, tmp_path)
    assert torch.equal(logits(moved, head), expected[0])
    assert torch.equal(logits(moved, head, r=1), expected[1])


@pytest.mark.parametrize(("head", "move"), [(TEXT, offload_to_disk), (MASKED_LM, load_partly_on_disk)])
@pytest.mark.filterwarnings("ignore:samples")
def test_budgets_are_the_same_wherever_the_weights_are(head, move, tmp_path, monkeypatch):
    """A search runs samples in threads; offloaded weights that one thread drops must not be missing in another."""
    whole, samples = model_of(head), [tiny_inputs(head, 2, torch.float32)] * 4
    options = dict(flops_ratios=[0.95], schedules=["floor"], merge_methods=["bipartite"], merge_metrics=["key"])
    expected = whole.calibrate(samples, **options)
    moved = move(model_of(head), tmp_path)
    with two_threads():
        frontier = moved.calibrate(samples, **options)
    assert [row.merging for row in frontier.rows] == [row.merging for row in expected.rows]
    assert frontier.weights == expected.weights
    for model in (whole, moved):
        model.merge_to(flops_ratio=0.95)
    assert torch.equal(logits(moved, head), logits(whole, head))
    assert torch.equal(logits(moved, head, flops_ratio=0.95), logits(whole, head))
    monkeypatch.setattr("frontier_tome_perceiver.TIMED_ROUNDS", 1)
    moved.merge_to(latency_ratio=1.0, samples=samples)


def save_and_load(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), save_and_load])
@pytest.mark.parametrize("head", HEADS)
def test_copies_merge_alike_and_have_their_own_settings(head, copy_of):
    model = model_of(head)
    copied = copy_of(model)
    assert torch.equal(logits(copied, head), logits(model, head))
    assert torch.equal(logits(copied, head, r=1), logits(model, head, r=1))
    copied.r = 0
    assert model.r == 2
