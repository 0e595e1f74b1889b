# SPDX-License-Identifier: Apache-2.0
"""Tests of the argument `r` of a call: it merges as the same r in the config does, and does not change the model."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cost_tome_perceiver import forward_cost
from tests.support.tiny_merges import GROUPS, R_LIST, every_head
from tests.support.tiny_models import (
    flat_logits,
    relative_difference,
    run,
    tiny_inputs,
    tiny_model,
)

HEAD = "ForSequenceClassification"
SETTINGS = {
    "nothing": {},
    "r": dict(r=1),
    "an inflection": dict(r=1, r_inflection=0.5),
    "groups": dict(merge_groups=GROUPS),
    "groups at the start": dict(latent_groups=[0, 1, 2, 3] * 3, r=1),
}


@every_head
@pytest.mark.parametrize("r", [2, R_LIST, 0], ids=str)
def test_a_calls_r_merges_as_the_configs_would(head, r):
    model, inputs = tiny_model(head, r=1), tiny_inputs(head)
    before, own = model.config.to_dict(), run(model, inputs)
    called, expected = run(model, inputs, r=r), run(tiny_model(head, r=r), inputs)
    assert torch.equal(called.logits, expected.logits)
    assert torch.equal(called.base.latent_sources, expected.base.latent_sources)
    assert called.base.latent_sizes.shape != own.base.latent_sizes.shape
    assert model.config.to_dict() == before
    assert torch.equal(run(model, inputs).logits, own.logits)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_r_of_a_call_replaces_the_merging_of_the_config(setting):
    """Only the caps of the config still apply."""
    model, expected = tiny_model(HEAD, min_latents=3, **setting), tiny_model(HEAD, min_latents=3, r=3)
    inputs = tiny_inputs(HEAD)
    called = run(model, inputs, r=3)
    assert torch.equal(called.logits, run(expected, inputs).logits)
    assert called.base.latent_sizes.shape == (2, 3)


@pytest.mark.parametrize("bad", [-1, "8", [1], torch.tensor(2)], ids=str)
@pytest.mark.parametrize("head", ["Model", HEAD])
def test_a_bad_r_is_one_line(head, bad):
    with pytest.raises(ValueError) as error:
        tiny_model(head)(**tiny_inputs(head), r=bad)
    assert str(error.value).startswith(f"r={bad!r}: ") and "\n" not in str(error.value)


def test_threads_that_call_one_model_get_each_its_own():
    model, inputs = tiny_model(HEAD, r=1), tiny_inputs(HEAD)
    settings = [0, 1, 2, 3, R_LIST, [0, 0, 0, 0, 0, 6]]
    expected = [run(tiny_model(HEAD, r=r), inputs).logits for r in settings]

    def call(index):
        with torch.no_grad():
            return index, flat_logits(model(**inputs, r=settings[index]))

    with ThreadPoolExecutor(len(settings)) as pool:
        results = list(pool.map(call, list(range(len(settings))) * 10))
    assert all(relative_difference(logits, expected[index]) <= 1e-12 for index, logits in results)
    assert model.r == 1


def test_a_wrapper_passes_r_on():
    wrapper, inputs = nn.DataParallel(tiny_model(HEAD)), tiny_inputs(HEAD)
    expected = run(tiny_model(HEAD, r=R_LIST), inputs).logits
    with torch.no_grad():
        assert torch.equal(flat_logits(wrapper(**inputs, r=R_LIST)), expected)
        wrapper.module.r = R_LIST
        assert torch.equal(flat_logits(wrapper(**inputs)), expected)


def test_compiled_layers_and_a_compiled_model_accept_r():
    shape = dict(num_blocks=2, num_self_attends_per_block=1)
    inputs, model = tiny_inputs(HEAD), tiny_model(HEAD, **shape)
    expected = run(tiny_model(HEAD, **shape, r=[3, 2]), inputs).logits
    torch.compiler.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_difference(flat_logits(whole(**inputs, r=[3, 2])), expected) <= 1e-12
        assert relative_difference(flat_logits(whole(**inputs)), run(model, inputs).logits) <= 1e-12
    torch.compiler.reset()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert relative_difference(run(model, inputs, r=[3, 2]).logits, expected) <= 1e-12


@every_head
def test_an_unknown_keyword_is_one_line(head):
    """Upstream ignores unknown keywords; those that tokenizers and Trainer pass to every model are accepted."""
    model, inputs = tiny_model(head), tiny_inputs(head)
    for name, value in (("rr", 8), ("max_changed", 0.5), ("inputs_embeds", torch.zeros(1))):
        with pytest.raises(TypeError, match=rf"^{name}: unknown argument[^\n]*ToMePerceiver{head}[^\n]*$"):
            model(**inputs, **{name: value})
    run(model, inputs, num_items_in_batch=2, token_type_ids=torch.zeros(2, 9), inputs_embeds=None)


@every_head
def test_signature_is_upstreams_and_what_merges(head):
    """Trainer, pipelines and torch.export read the signature."""
    model = tiny_model(head)
    if head != "Model":
        stock = inspect.signature(type(model).__mro__[2].forward).parameters
        ours = list(inspect.signature(type(model).forward).parameters)
        assert ours == [name for name in stock if name != "kwargs"] + ["r", "flops_ratio", "kwargs"]
    assert inspect.signature(model.forward).parameters["r"].default is None


def test_flops_ratio_counts_the_config_an_r_or_settings():
    model, shape = tiny_model(HEAD, r=R_LIST), (2, 9)
    merged = model.flops_ratio(shape)
    cost = forward_cost(model.config, shape, type(model).__name__).total_with_matching
    unmerged = forward_cost(tiny_model(HEAD).config, shape, type(model).__name__).total_with_matching
    assert merged == pytest.approx(cost / unmerged) and merged < 1
    assert model.flops_ratio(shape, merging=model.unmerged) == model.flops_ratio(shape, r=0) == 1
    model.r = 1
    assert model.flops_ratio(shape, r=R_LIST) == merged != model.flops_ratio(shape)
    with pytest.raises(ValueError, match="^input_shape"):
        model.flops_ratio((1, 3, 8, 8))
