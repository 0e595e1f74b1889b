# SPDX-License-Identifier: Apache-2.0
"""Tests of gradients, activation checkpointing, compilation, export, half precision and copies with merging."""

import copy
import pickle
import shutil

import pytest
import torch

from merging_tome_perceiver import match_bipartite
from tests.support.tiny_merges import (
    AT_START,
    DUPLICATES,
    GROUPS,
    HEAD_AND_MERGE,
    MERGES,
    MERGES_AND_PRUNE,
    R_LIST,
    every_head,
    every_head_and_every_merge,
    loss_and_gradients,
)
from tests.support.tiny_models import (
    IMAGE_HEADS,
    NUM_LATENTS,
    TEXT_HEADS,
    flat_logits,
    relative_difference,
    repeat_latents,
    run,
    tiny_inputs,
    tiny_model,
)


@pytest.mark.parametrize("head, merge", [pair for pair in HEAD_AND_MERGE if pair[1] != "prune"])
def test_gradients_reach_every_latent_and_every_parameter(head, merge):
    """Every parameter that has a gradient without merging has one with merging."""
    inputs = tiny_inputs(head)
    _, gradients = loss_and_gradients(tiny_model(head, **MERGES[merge]), inputs)
    _, whole = loss_and_gradients(tiny_model(head), inputs)
    (latents,) = [gradient for name, gradient in gradients.items() if name.endswith("embeddings.latents")]
    assert latents.shape == (NUM_LATENTS, 16)
    assert (latents.abs().amax(dim=1) > 1e-6 * latents.abs().max()).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    learning = {name for name, gradient in whole.items() if gradient.any()}
    assert {name for name, gradient in gradients.items() if gradient.any()} == learning


def assert_same_gradients(gradients, expected, tolerance=1e-12):
    """Check that names are equal, and values equal up to rounding, relative to the largest gradient."""
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in expected:
        assert (gradients[name] - expected[name]).abs().max() <= tolerance * largest, name


def test_gradients_of_duplicates_are_those_of_the_unmerged_model():
    """Each merged latent gets the share size / total of the gradient, which is the gradient without merging."""
    merge, duplicates = DUPLICATES["groups in two steps"]
    inputs = tiny_inputs("ForSequenceClassification")
    model = repeat_latents(tiny_model("ForSequenceClassification", **merge), duplicates)
    whole = repeat_latents(tiny_model("ForSequenceClassification"), duplicates)
    _, gradients = loss_and_gradients(model, inputs)
    _, expected = loss_and_gradients(whole, inputs)
    assert_same_gradients(gradients, expected, 1e-9)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@every_head_and_every_merge
def test_checkpointing_recomputes_the_same_merges(head, use_reentrant, merge):
    """Loss and gradients are equal up to rounding, also with dropout, and layers run twice."""
    model = tiny_model(head, attention_probs_dropout_prob=0.1, **MERGES_AND_PRUNE[merge]).train()
    inputs = tiny_inputs(head)
    runs = []
    layer = model.base_model.encoder.self_attends[0]
    layer.attention.register_forward_pre_hook(lambda module, arguments: runs.append(1))
    torch.manual_seed(1)
    loss, gradients = loss_and_gradients(model, inputs)
    assert len(runs) == 2  # one for each block
    runs.clear()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(1)
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(model, inputs)
    assert len(runs) == 4
    torch.testing.assert_close(checkpointed_loss, loss, rtol=1e-12, atol=0)
    assert_same_gradients(checkpointed_gradients, gradients)


# Two layers only, because compiling takes seconds for each layer.
TWO_LAYERS = dict(num_blocks=2, num_self_attends_per_block=1)
TWO_MERGES = {
    "bipartite": dict(r=[3, 2]),
    "k_center": dict(r=[3, 2], merge_method="k_center"),
    "leader": dict(r=[3, 2], merge_method="leader"),
    "groups": dict(merge_groups=[GROUPS[1], GROUPS[3]]),
    "groups at the start": dict(latent_groups=AT_START, r=[3, 2]),
}


def compiled_alike(head, merge):
    torch.compiler.reset()
    model, inputs = tiny_model(head, **TWO_LAYERS, **merge), tiny_inputs(head)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_difference(flat_logits(compiled(**inputs)), run(model, inputs).logits) <= 1e-12
    return model, compiled, inputs


@pytest.mark.parametrize("head", TEXT_HEADS + IMAGE_HEADS)
def test_compiles_to_one_graph_with_merging_on(head):
    compiled_alike(head, TWO_MERGES["bipartite"])


@pytest.mark.parametrize("merge", [name for name in TWO_MERGES if name != "bipartite"])
def test_every_source_of_merges_compiles_to_one_graph(merge):
    compiled_alike("ForSequenceClassification", TWO_MERGES[merge])


def test_is_compiled_anew_when_r_is_set():
    model, compiled, inputs = compiled_alike("ForSequenceClassification", TWO_MERGES["bipartite"])
    before = run(model, inputs).logits
    model.r = [0, 4]
    expected = run(model, inputs).logits
    assert relative_difference(expected, before) > 1e-3
    with torch.no_grad():
        assert relative_difference(flat_logits(compiled(**inputs)), expected) <= 1e-12


def compile_blocks(model, backend):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(backend=backend, fullgraph=True)


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_layers_of_a_head_that_does_not_compile_as_a_whole_compile():
    head = "ForMultimodalAutoencoding"
    model, inputs = tiny_model(head, r=R_LIST), tiny_inputs(head)
    expected = run(model, inputs).logits
    compile_blocks(model, "eager")
    assert relative_difference(run(model, inputs).logits, expected) <= 1e-12
    assert 0 < compiled_graphs() < len(R_LIST)


@pytest.mark.parametrize("merge", ["bipartite", "leader"])
def test_compiled_layers_serve_every_r_and_every_batch(merge):
    """Graphs do not depend on the number of latents, layers or rows, so no more are compiled after a few settings."""
    settings = {"num_latents": 64, "num_self_attends_per_block": 12, "num_blocks": 1}
    model = tiny_model("ForSequenceClassification", **settings, **MERGES[merge] | {"r": 2})
    eager = tiny_model("ForSequenceClassification", **settings, **MERGES[merge] | {"r": 2})
    compile_blocks(model, "eager")
    warm_up = [[4, 3, 2] + [1, 0, 2] * 3, 2, 0]
    for step, (r, batch) in enumerate([(r, 2) for r in warm_up] + [(3, 4), ([0] * 6 + [5] * 6, 3), (4, 7)]):
        if step == len(warm_up):
            graphs = compiled_graphs()
        model.r = eager.r = r
        inputs = tiny_inputs("ForSequenceClassification", batch=batch)
        assert relative_difference(run(model, inputs).logits, run(eager, inputs).logits) <= 1e-12
    assert compiled_graphs() == graphs < model.config.num_self_attention_layers


def compile_whole(model):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def compile_checkpointed_layers(model):
    model.gradient_checkpointing_enable()
    compile_blocks(model, "aot_eager")
    return model


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("compiling", [compile_whole, compile_checkpointed_layers])
def test_compiled_training_step_has_the_same_gradients(compiling):
    head = "ForSequenceClassification"
    model, inputs = tiny_model(head, **TWO_LAYERS, **TWO_MERGES["bipartite"]).train(), tiny_inputs(head)
    loss, gradients = loss_and_gradients(model, inputs)
    compiled_loss, compiled_gradients = loss_and_gradients(compiling(model), inputs)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-12, atol=0)
    compiled_gradients = {name.removeprefix("_orig_mod."): value for name, value in compiled_gradients.items()}
    assert_same_gradients(compiled_gradients, gradients, 1e-10)


@pytest.mark.parametrize("merge", ["leader", "k_center"])
def test_exports_with_a_dynamic_batch(merge):
    model = tiny_model("ForSequenceClassification", **TWO_LAYERS, **TWO_MERGES[merge])
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model,
        (),
        tiny_inputs("ForSequenceClassification", batch=3),
        dynamic_shapes=dict(input_ids={0: batch}, attention_mask={0: batch}),
    )
    for rows in (1, 5):
        inputs = tiny_inputs("ForSequenceClassification", batch=rows, seed=2)
        with torch.no_grad():
            logits = flat_logits(program.module()(**inputs))
        assert relative_difference(logits, run(model, inputs).logits) <= 1e-12


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("head, merge", [pair for pair in HEAD_AND_MERGE if pair[1] != "prune"])
def test_half_precision_keeps_the_schedule_and_gives_no_nan(head, precision, merge):
    if head == "ForMultimodalAutoencoding" and precision != "autocast":
        pytest.skip("upstream's multimodal preprocessor masks in float32: the stock model takes no half precision")
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    model, inputs = tiny_model(head, dtype, **MERGES[merge]), tiny_inputs(head, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        output = run(model, inputs)
    assert output.base.latent_sizes.shape == (2, model.config.latents_per_layer[-1])
    assert torch.equal(output.base.latent_sizes.sum(dim=1), torch.full((2,), 12.0))
    assert output.logits.isfinite().all()
    if merge == "groups":
        # The same latents merge in any precision, so the logits are near those of full precision.
        expected = run(tiny_model(head, **MERGES[merge]), tiny_inputs(head)).logits
        assert relative_difference(output.logits.double(), expected) < 0.1


@every_head
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_merge_alike_and_apart(head, duplicate):
    """Setting r of a copy does not change the original."""
    model, inputs = tiny_model(head, r=R_LIST), tiny_inputs(head)
    expected = run(model, inputs).logits
    copied = duplicate(model)
    assert type(copied) is type(model) and copied.r == R_LIST
    assert torch.equal(run(copied, inputs).logits, expected)
    copied.r = 0
    assert run(copied, inputs).base.latent_sizes.shape == (2, 12)
    assert model.r == R_LIST
    assert torch.equal(run(model, inputs).logits, expected)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="PyTorch compiles with a C++ compiler")
def test_compiled_matching_serves_any_number_of_latents_down_to_two():
    """With the inductor backend, whose code for a maximum over a single entry fails (PyTorch 2.13)."""
    torch.compiler.reset()
    compiled = torch.compile(match_bipartite, dynamic=True)
    for latents, r in ((12, 3), (9, 2), (3, 1), (2, 1)):
        metric = torch.randn(4, latents, 8, generator=torch.Generator().manual_seed(latents))
        for found, expected in zip(compiled(metric, r), match_bipartite(metric, r), strict=True):
            assert found.equal(expected), (latents, r)
