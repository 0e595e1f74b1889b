# SPDX-License-Identifier: Apache-2.0
"""The five laws of the design, on random weights of every head, and what else a head promises.

1. r = 0 is upstream. 2. Sizes and sources account for every latent. 3. Exact duplicates merge without any change.
4. Gradients, checkpointing, compilation, export and half precision keep the merges. 5. Batches do not matter.
"""

import copy
import json
import pickle

import pytest
import torch
from accelerate import infer_auto_device_map
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.models.perceiver import modeling_perceiver as upstream

import configuration_tome_perceiver as configuration
import layers_tome_perceiver as layers
import merging_tome_perceiver as merging
import modeling_tome_perceiver as tome

from .tiny_models import (
    HEADS,
    IMAGE_HEADS,
    NUM_LATENTS,
    NUM_LAYERS,
    TEXT_HEADS,
    flat_logits,
    relative_difference,
    repeat_latents,
    run,
    spread_weights,
    stock_class,
    stock_config,
    stock_model,
    take_row,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tome_class,
    unmerge,
)

# Five latents left, with layers that merge nothing among those that do.
R_LIST = [3, 0, 2, 1, 0, 1]
GROUPS = [None, [0, 1, 2, 0, 3, 4, 4, 0, 5, 6, 2, 0], None, [0, 1, 1, 2, 3, 0, 3], None, None]
MERGES = {
    "bipartite": dict(r=R_LIST),
    "value": dict(r=R_LIST, merge_metric="value"),
    "hidden": dict(r=R_LIST, merge_metric="hidden"),
    "energy": dict(r=R_LIST, merge_method="energy"),
    "size_penalty": dict(r=R_LIST, merge_method="size_penalty"),
    "k_center": dict(r=R_LIST, merge_method="k_center"),
    "random": dict(r=R_LIST, merge_method="random"),
    "groups": dict(merge_groups=GROUPS),
}
MERGES_AND_PRUNE = {**MERGES, "prune": dict(r=R_LIST, merge_method="prune")}
ATTENTION = ["eager", "sdpa"]

every_head = pytest.mark.parametrize("head", HEADS)
every_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())
every_merge_and_prune = pytest.mark.parametrize("merge", MERGES_AND_PRUNE.values(), ids=MERGES_AND_PRUNE.keys())
every_attention = pytest.mark.parametrize("attention", ATTENTION)


def assert_same(value, reference, tolerance=1e-12):
    """Nested tuples, dicts and tensors of the same layout and, but for the rounding, the same numbers."""
    if isinstance(reference, dict):
        assert list(value) == list(reference)
        value, reference = list(value.values()), list(reference.values())
    if isinstance(reference, (tuple, list)):
        assert isinstance(value, (tuple, list)) and len(value) == len(reference)
        for one, other in zip(value, reference, strict=True):
            assert_same(one, other, tolerance)
    else:
        assert value.shape == reference.shape and value.dtype == reference.dtype
        assert relative_difference(value, reference) <= tolerance


def labels_for(head, rows=2):
    if head == "ForMaskedLM":
        labels = torch.randint(0, 262, (rows, 20))
        labels[:, 3:] = -100
        return labels
    return torch.arange(rows) % 3


# Law 1: r = 0 is upstream


@every_head
def test_state_dict_is_upstreams(head):
    ours, stock = tiny_model(head, r=2).state_dict(), stock_model(head).state_dict()
    assert list(ours) == list(stock)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in stock.items()}


@every_head
def test_same_seed_gives_upstreams_initial_weights(head):
    """And leaves the random state where upstream leaves it, so that a finetuning run draws the same batches."""
    torch.manual_seed(3)
    stock, stock_state = stock_class(head)(stock_config()).state_dict(), torch.get_rng_state()
    torch.manual_seed(3)
    ours, state = tome_class(head)(tiny_config(r=2)).state_dict(), torch.get_rng_state()
    assert torch.equal(state, stock_state)
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


@every_head
@every_attention
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_r_0_gives_upstreams_logits(head, attention, dtype, tolerance):
    """With padding in the texts, and not for want of a model that listens to its inputs."""
    model, stock = tiny_model(head, dtype, attn_implementation=attention), stock_model(head, dtype)
    assert model.config._attn_implementation == attention
    inputs = tiny_inputs(head, batch=3, dtype=dtype)
    with torch.no_grad():
        expected = flat_logits(stock(**inputs))
        other = flat_logits(stock(**tiny_inputs(head, batch=3, dtype=dtype, seed=1)))
    assert relative_difference(run(model, inputs).logits, expected) <= tolerance
    assert relative_difference(other, expected) > 0.01


@every_head
def test_sdpa_is_what_runs_unless_one_asks_for_eager(head, monkeypatch):
    calls = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    inputs = tiny_inputs(head)
    run(tiny_model(head), inputs)
    # The encoder's cross-attention and a decoder's; that of the masked LM has keys and values of different widths.
    assert len(calls) == NUM_LAYERS + (1 if head in ("Model", "ForMaskedLM") else 2)
    calls.clear()
    run(tiny_model(head, attn_implementation="eager"), inputs)
    assert not calls


@every_attention
def test_attention_drops_out_in_training_only(attention):
    model = tiny_model("ForSequenceClassification", attn_implementation=attention, r=R_LIST)
    dropping = tiny_model(
        "ForSequenceClassification", attn_implementation=attention, r=R_LIST, attention_probs_dropout_prob=0.5
    )
    inputs = tiny_inputs("ForSequenceClassification")
    expected = run(model, inputs).logits
    assert torch.equal(run(dropping, inputs).logits, expected)
    assert torch.equal(run(model.train(), inputs).logits, expected)
    assert relative_difference(run(dropping.train(), inputs).logits, expected) > 0.01


def test_attention_is_switched_on_a_built_model():
    model, inputs = tiny_model("ForSequenceClassification", r=R_LIST), tiny_inputs("ForSequenceClassification")
    expected = run(model, inputs).logits
    model.set_attn_implementation("eager")
    attentions = [module for module in model.modules() if isinstance(module, layers.ToMePerceiverSelfAttention)]
    assert len(attentions) == 5
    assert all(module.config._attn_implementation == "eager" for module in attentions)
    assert relative_difference(run(model, inputs).logits, expected) <= 1e-12


def test_base_model_takes_upstreams_parts():
    """A base model put together by hand, as upstream's documentation does: its decoder weighs merged latents too."""

    def classifier(model_class, config):
        torch.manual_seed(0)
        preprocessor = upstream.PerceiverTextPreprocessor(config)
        decoder = upstream.PerceiverClassificationDecoder(
            config,
            num_channels=config.d_latents,
            trainable_position_encoding_kwargs=dict(num_channels=config.d_latents, index_dims=1),
            use_query_residual=True,
        )
        model = model_class(config, input_preprocessor=preprocessor, decoder=decoder)
        return spread_weights(model).double().eval()

    inputs = tiny_inputs("ForSequenceClassification")
    inputs["inputs"] = inputs.pop("input_ids")
    model = classifier(tome.ToMePerceiverModel, tiny_config())
    with torch.no_grad():
        expected = classifier(upstream.PerceiverModel, stock_config())(**inputs).logits
    assert relative_difference(run(model, inputs).logits, expected) <= 1e-12
    merge, duplicates = DUPLICATES["matched at once"]
    whole = run(repeat_latents(model, duplicates), inputs).logits
    model.r = merge["r"]
    merged = run(model, inputs)
    assert merged.base.latent_sizes.shape == (2, 8)
    assert relative_difference(merged.logits, whole) <= 1e-9


@pytest.mark.parametrize("head", [*TEXT_HEADS, *IMAGE_HEADS])
def test_r_0_gives_upstreams_loss(head):
    """transformers chooses the loss by the end of the class's name."""
    inputs = tiny_inputs(head) | dict(labels=labels_for(head))
    with torch.no_grad():
        ours, expected = tiny_model(head)(**inputs).loss, stock_model(head)(**inputs).loss
    assert expected > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM", "ForMultimodalAutoencoding"])
@pytest.mark.parametrize("hidden_states", [False, True], ids=["", "hidden_states"])
@pytest.mark.parametrize("attentions", [False, True], ids=["", "attentions"])
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_r_0_gives_upstreams_output_layout(head, hidden_states, attentions, return_dict):
    """Every entry of the output, hidden states and attention weights too, as a tuple and as a dictionary."""
    inputs = tiny_inputs(head) | dict(
        output_hidden_states=hidden_states, output_attentions=attentions, return_dict=return_dict
    )
    with torch.no_grad():
        ours, stock = tiny_model(head)(**inputs), stock_model(head)(**inputs)
    if return_dict:
        ours, stock = dict(ours), dict(stock)
        assert set(ours) - set(stock) <= {"latent_sizes"}
        ours.pop("latent_sizes", None)
    assert_same(ours, stock)


@every_head
def test_stock_folder_loads_with_no_key_amiss(head, tmp_path):
    """And merges from the first call, at the r given to `from_pretrained`."""
    stock = stock_model(head, torch.float32)
    stock.save_pretrained(tmp_path)
    model, loading = tome_class(head).from_pretrained(tmp_path, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(loading)
    assert not any(loading.values()), loading
    inputs = tiny_inputs(head, dtype=torch.float32)
    with torch.no_grad():
        expected = flat_logits(stock(**inputs))
    assert relative_difference(run(model, inputs).logits, expected) <= 2e-5
    merged = tome_class(head).from_pretrained(tmp_path, r=R_LIST)
    assert merged.r == R_LIST
    assert run(merged, inputs).base.latent_sizes.shape == (2, 5)
    model.r = R_LIST
    assert torch.equal(run(model, inputs).logits, run(merged, inputs).logits)


@every_head
@pytest.mark.parametrize(
    "merge",
    [
        dict(r=1, r_inflection=-1.0, min_latents=4, merge_method="random"),
        dict(r=R_LIST, proportional_attention=False),
        dict(merge_groups=GROUPS),
    ],
    ids=["integer", "list", "groups"],
)
def test_saved_model_loads_back_with_its_schedule(head, merge, tmp_path):
    model = tiny_model(head, torch.float32, **merge)
    model.save_pretrained(tmp_path)
    again, loading = tome_class(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert {name: getattr(again.config, name) for name in merge} == merge
    assert again.config.merge_schedule == model.config.merge_schedule != [0] * NUM_LAYERS
    inputs = tiny_inputs(head, dtype=torch.float32)
    assert torch.equal(run(again, inputs).logits, run(model, inputs).logits)


def test_saved_r_is_the_one_that_was_set_last(tmp_path):
    """Also from a stock folder, whose model type it leaves behind."""
    stock_model("ForSequenceClassification", torch.float32).save_pretrained(tmp_path / "stock")
    model = tome.ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "stock", r=1)
    model.r = R_LIST
    model.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == "tome_perceiver"
    assert written["r"] == R_LIST
    assert written["architectures"] == ["ToMePerceiverForSequenceClassification"]
    assert tome.ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "ours").r == R_LIST


# Law 2: sizes and sources account for every latent


@every_head
@every_merge
def test_sizes_and_sources_account_for_every_latent(head, merge):
    model = tiny_model(head, **merge)
    base = run(model, tiny_inputs(head)).base
    left = model.config.latents_per_layer[-1]
    assert base.last_hidden_state.shape == (2, left, 16)
    assert base.latent_sizes.shape == (2, left)
    assert base.latent_sizes.dtype == torch.float32
    assert torch.equal(base.latent_sizes.sum(dim=1), torch.full((2,), float(NUM_LATENTS)))
    assert base.latent_sources.shape == (2, left, NUM_LATENTS)
    assert set(base.latent_sources.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(base.latent_sources.sum(dim=1), torch.ones(2, NUM_LATENTS))
    assert torch.equal(base.latent_sources.sum(dim=2), base.latent_sizes)
    assert len(base.latent_sizes.unique()) > 1


@every_head
def test_pruned_latents_are_in_no_source(head):
    base = run(tiny_model(head, r=R_LIST, merge_method="prune"), tiny_inputs(head)).base
    assert torch.equal(base.latent_sizes, torch.ones(2, 5))
    assert torch.equal(base.latent_sources.sum(dim=2), torch.ones(2, 5))
    assert torch.equal(base.latent_sources.sum(dim=(1, 2)), torch.full((2,), 5.0))


@every_head
def test_no_merge_leaves_sizes_of_one(head):
    base = run(tiny_model(head), tiny_inputs(head)).base
    assert torch.equal(base.latent_sizes, torch.ones(2, NUM_LATENTS))
    assert torch.equal(base.latent_sources, torch.eye(NUM_LATENTS).expand(2, -1, -1))


def test_sources_are_returned_only_when_asked_for():
    model, inputs = tiny_model("Model", r=1), tiny_inputs("Model")
    with torch.no_grad():
        assert model(**inputs).latent_sources is None
        assert model(**inputs, output_latent_sources=True).latent_sources.shape == (2, 6, 12)


def test_groups_merge_what_they_say():
    sources = run(tiny_model("Model", merge_groups=GROUPS), tiny_inputs("Model")).base.latent_sources
    first, second = GROUPS[1], GROUPS[3]
    expected = torch.zeros(4, NUM_LATENTS)
    for latent in range(NUM_LATENTS):
        expected[second[first[latent]], latent] = 1
    assert torch.equal(sources, expected.expand(2, -1, -1))


@every_attention
@pytest.mark.parametrize("metric", configuration.MERGE_METRICS)
def test_merge_is_the_size_weighted_mean_between_attention_and_mlp(metric, attention):
    """One layer in plain steps: attend with all latents, merge by what is compared, then the MLP on those left."""
    widths = dict(qk_channels=8, v_channels=16)
    model = tiny_model("Model", r=[0, 0, 0, 0, 0, 3], merge_metric=metric, attn_implementation=attention, **widths)
    inputs = tiny_inputs("Model")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        layer, latents = model.encoder.self_attends[2], output.hidden_states[-2]
        normed = layer.attention.self.layernorm1(latents)
        context = stock_model("Model", **widths).encoder.self_attends[2].attention(latents)[0]
        compared = {
            # (B, N, heads x D), split into heads by hand and averaged over them
            "key": layer.attention.self.key(normed).view(2, NUM_LATENTS, 2, 4).mean(dim=2),
            "value": layer.attention.self.value(normed).view(2, NUM_LATENTS, 2, 8).mean(dim=2),
            "hidden": context,
        }
        matches = {name: merging.match_bipartite(what, 3) for name, what in compared.items()}
        merged, sizes = merging.merge_latents(context, None, matches[metric])
        expected = merged + layer.mlp(layer.layernorm(merged))
    # Each metric decides on another merge, so the one that was taken is the one that was asked for.
    assert len({str([part.tolist() for part in match]) for match in matches.values()}) == 3
    assert torch.equal(output.latent_sizes, sizes)
    assert_same(output.last_hidden_state, expected)


# Law 3: exact duplicates merge without any change

DUPLICATES = {
    # r, so that duplicates meet across even and odd positions in two merges: sizes 3, 1 and 2 after the first
    "matched at once": (dict(r=[3, 1, 0, 0, 0, 0]), [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]),
    "matched late, over two blocks": (dict(r=[0, 3, 0, 0, 1, 0]), [0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]),
    "matched, one size": (dict(r=[1, 0, 0, 0, 0, 0]), [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]),
    # While sizes are equal; after that the penalty may outweigh the likeness of duplicates.
    "size_penalty": (dict(r=[3, 0, 0, 0, 0, 0], merge_method="size_penalty"), [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]),
    # Any copies, wherever they stand, as long as no more latents differ than stay.
    "k_center": (dict(r=[5, 2, 0, 1, 0, 0], merge_method="k_center"), [0, 1, 0, 2, 0, 3, 1, 0, 0, 2, 0, 2]),
    "groups in two steps": (
        dict(merge_groups=[[0, 1, 2, 0, 3, 1, 1, 0, 1, 3, 4, 2], None, None, [0, 1, 2, 3, 2], None, None]),
        [0, 1, 2, 0, 3, 1, 1, 0, 1, 3, 2, 2],
    ),
}


def merged_and_whole(head, merge, duplicates, **changes):
    """Outputs of a model whose latents are duplicates, with merging and without."""
    model = repeat_latents(tiny_model(head, **changes, **merge), duplicates)
    inputs = tiny_inputs(head)
    merged = run(model, inputs)
    model.config.merge_groups = None
    model.r = 0
    whole = run(model, inputs)
    assert whole.base.last_hidden_state.shape[1] == NUM_LATENTS
    return merged, whole


@every_head
@every_attention
@pytest.mark.parametrize("merge, duplicates", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_duplicates_merge_without_any_change(head, attention, merge, duplicates):
    merged, whole = merged_and_whole(head, merge, duplicates, attn_implementation=attention)
    # The merges are those of the duplicates and nothing else, and sizes are not uniform, which would hide a fault.
    for row in range(2):
        sources = {frozenset(line.nonzero()[:, 0].tolist()) for line in merged.base.latent_sources[row]}
        assert sources == {frozenset(i for i in range(12) if duplicates[i] == g) for g in set(duplicates)}
        assert len(merged.base.latent_sizes[row].unique()) > 1
    assert relative_difference(unmerge(merged.base), whole.base.last_hidden_state) <= 1e-9
    if head != "Model":
        assert relative_difference(merged.logits, whole.logits) <= 1e-9


@every_head
@pytest.mark.parametrize("merge, duplicates", DUPLICATES.values(), ids=DUPLICATES.keys())
def test_duplicates_do_change_the_output_without_proportional_attention(head, merge, duplicates):
    """So the test above sees the bias."""
    merged, whole = merged_and_whole(head, {**merge, "proportional_attention": False}, duplicates)
    assert relative_difference(unmerge(merged.base), whole.base.last_hidden_state) > 1e-3
    if head != "Model":
        assert relative_difference(merged.logits, whole.logits) > 1e-3


@pytest.mark.parametrize("head", [head for head in HEADS if head != "Model"])
def test_the_decoder_weighs_latents_by_their_sizes(head):
    """A merge in the last layer reaches the decoder only, so its bias alone keeps the duplicates exact."""
    duplicates = [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    merge = dict(merge_groups=[None] * 5 + [duplicates])
    merged, whole = merged_and_whole(head, merge, duplicates)
    assert sorted(merged.base.latent_sizes[0].tolist()) == [1, 1, 1, 1, 1, 7]
    assert relative_difference(merged.logits, whole.logits) <= 1e-9
    unweighted, _ = merged_and_whole(head, {**merge, "proportional_attention": False}, duplicates)
    assert relative_difference(unmerge(unweighted.base), whole.base.last_hidden_state) <= 1e-9
    assert relative_difference(unweighted.logits, whole.logits) > 1e-3


# Law 4: gradients, checkpointing, compilation, export and half precision keep the merges


def loss_and_gradients(model, inputs):
    model.zero_grad()
    logits = flat_logits(model(**inputs))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits.dtype)
    loss = (logits * weights).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_head
@every_merge
def test_gradients_reach_every_latent_and_every_parameter(head, merge):
    """Every parameter that learns without merging learns with it."""
    inputs = tiny_inputs(head)
    _, gradients = loss_and_gradients(tiny_model(head, **merge), inputs)
    _, whole = loss_and_gradients(tiny_model(head), inputs)
    (latents,) = [gradient for name, gradient in gradients.items() if name.endswith("embeddings.latents")]
    assert latents.shape == (NUM_LATENTS, 16)
    assert (latents.abs().amax(dim=1) > 1e-6 * latents.abs().max()).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    learning = {name for name, gradient in whole.items() if gradient.any()}
    assert {name for name, gradient in gradients.items() if gradient.any()} == learning


def test_gradients_of_duplicates_are_those_of_the_unmerged_model():
    """Each merged latent has its share of the gradient, size over total: the same as when nothing had merged."""
    merge, duplicates = DUPLICATES["groups in two steps"]
    inputs = tiny_inputs("ForSequenceClassification")
    model = repeat_latents(tiny_model("ForSequenceClassification", **merge), duplicates)
    whole = repeat_latents(tiny_model("ForSequenceClassification"), duplicates)
    _, gradients = loss_and_gradients(model, inputs)
    _, expected = loss_and_gradients(whole, inputs)
    assert gradients.keys() == expected.keys()
    for name in gradients:
        if name.endswith("attention.self.key.bias"):
            # The same for every key, so softmax takes it out: its gradient is rounding.
            assert gradients[name].abs().max() < 1e-9
        else:
            assert relative_difference(gradients[name], expected[name]) <= 1e-9, name


def test_gradient_of_the_latents_against_finite_differences():
    model, inputs = tiny_model("ForSequenceClassification", r=R_LIST), tiny_inputs("ForSequenceClassification")
    latents = model.base_model.embeddings.latents
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, gradients = loss_and_gradients(model, inputs)
    start, step, losses = latents.detach().clone(), 1e-6, []
    sources = run(model, inputs).base.latent_sources
    for sign in (1, -1):
        with torch.no_grad():
            latents.copy_(start + sign * step * direction)
        assert torch.equal(run(model, inputs).base.latent_sources, sources)
        losses.append(loss_and_gradients(model, inputs)[0])
    expected = (losses[0] - losses[1]) / (2 * step)
    slope = (gradients["perceiver.embeddings.latents"] * direction).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@every_head
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@every_merge
def test_checkpointing_recomputes_the_same_merges(head, use_reentrant, merge):
    """Loss and gradients are the same but for the rounding, dropout included, and layers do run twice."""
    model = tiny_model(head, attention_probs_dropout_prob=0.1, **merge).train()
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
    assert checkpointed_gradients.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name in gradients:
        assert (checkpointed_gradients[name] - gradients[name]).abs().max() <= 1e-12 * largest, name


# Compiling takes seconds for each layer, so two layers must do.
TWO_LAYERS = dict(num_blocks=2, num_self_attends_per_block=1)
TWO_MERGES = {
    "bipartite": dict(r=[3, 2]),
    "energy of latents": dict(r=[3, 2], merge_method="energy", merge_metric="hidden"),
    "size_penalty of values": dict(r=[3, 2], merge_method="size_penalty", merge_metric="value"),
    "k_center": dict(r=[3, 2], merge_method="k_center"),
    "random": dict(r=[3, 2], merge_method="random"),
    "prune": dict(r=[3, 2], merge_method="prune"),
    "groups": dict(merge_groups=[GROUPS[1], GROUPS[3]]),
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


def test_compiled_training_step_has_the_same_gradients():
    torch.compiler.reset()
    head = "ForSequenceClassification"
    model, inputs = tiny_model(head, **TWO_LAYERS, **TWO_MERGES["bipartite"]), tiny_inputs(head)
    loss, gradients = loss_and_gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, inputs)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-12, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name in gradients:
        assert (compiled_gradients[f"_orig_mod.{name}"] - gradients[name]).abs().max() <= 1e-10 * largest, name


def test_exports_with_a_dynamic_batch():
    model = tiny_model("ForSequenceClassification", **TWO_LAYERS, r=[3, 2])
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


@every_head
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
@every_merge
def test_half_precision_keeps_the_schedule_and_gives_no_nan(head, precision, merge):
    if head == "ForMultimodalAutoencoding" and precision != "autocast":
        pytest.skip("upstream's multimodal preprocessor masks in float32: the stock model takes no half precision")
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    model, inputs = tiny_model(head, dtype, **merge), tiny_inputs(head, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        output = run(model, inputs)
    assert output.base.latent_sizes.shape == (2, model.config.latents_per_layer[-1])
    assert torch.equal(output.base.latent_sizes.sum(dim=1), torch.full((2,), 12.0))
    assert output.logits.isfinite().all()
    if merge is MERGES["groups"]:
        # The merges are the same whatever the precision, so the logits are near those of full precision.
        expected = run(tiny_model(head, **merge), tiny_inputs(head)).logits
        assert relative_difference(output.logits.double(), expected) < 0.1


@every_head
def test_autocast_trains(head):
    model, inputs = tiny_model(head, torch.float32, r=R_LIST), tiny_inputs(head, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, inputs)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_head
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_merge_alike_and_apart(head, duplicate):
    """A copy is a model of its own: setting its r leaves the first one's alone."""
    model, inputs = tiny_model(head, r=R_LIST), tiny_inputs(head)
    expected = run(model, inputs).logits
    copied = duplicate(model)
    assert type(copied) is type(model) and copied.r == R_LIST
    assert torch.equal(run(copied, inputs).logits, expected)
    copied.r = 0
    assert run(copied, inputs).base.latent_sizes.shape == (2, 12)
    assert model.r == R_LIST
    assert torch.equal(run(model, inputs).logits, expected)


# Law 5: a row's output is the same alone and in any batch


@every_head
@every_merge_and_prune
def test_a_row_alone_is_as_in_a_batch(head, merge):
    """Alone, a text has no padding."""
    model, inputs = tiny_model(head, **merge), tiny_inputs(head, batch=3)
    together = run(model, inputs)
    for row in range(3):
        alone = run(model, take_row(inputs, row))
        assert relative_difference(alone.logits, together.logits[row : row + 1]) <= 1e-9
        assert torch.equal(alone.base.latent_sources[0], together.base.latent_sources[row])


def test_rows_of_a_batch_merge_each_in_its_own_way():
    """Matching looks at the row, fixed groups and random ones do not."""
    for name, merge in MERGES.items():
        sources = run(tiny_model("Model", **merge), tiny_inputs("Model", batch=3)).base.latent_sources
        assert torch.equal(sources[0], sources[1]) == (name in ("random", "groups"))


# What a head's outputs look like with merging


@every_head
@every_attention
def test_hidden_states_and_attentions_have_the_lengths_of_the_schedule(head, attention):
    """Attention of a layer is over the latents that reach it; a block's last state stands twice, as upstream."""
    model = tiny_model(head, attn_implementation=attention, r=R_LIST)
    output = run(model, tiny_inputs(head), output_hidden_states=True, output_attentions=True)
    base = output.base
    reaching = [NUM_LATENTS, *model.config.latents_per_layer]
    assert [tuple(weights.shape) for weights in base.attentions] == [(2, 2, n, n) for n in reaching[:-1]]
    assert [state.shape[1] for state in base.hidden_states] == [*reaching[:3], reaching[3], *reaching[3:6], reaching[6]]
    assert torch.equal(base.hidden_states[-1], base.last_hidden_state)
    assert len(base.cross_attentions) == (1 if head == "Model" else 2)
    assert base.cross_attentions[0].shape[:3] == (2, 2, NUM_LATENTS)
    if head != "Model":
        assert base.cross_attentions[1].shape[-1] == reaching[-1]
    for weights in (*base.attentions, *base.cross_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert relative_difference(output.logits, run(model, tiny_inputs(head)).logits) <= 1e-12


def test_min_latents_is_kept_and_inflection_followed():
    model = tiny_model("Model", r=2, r_inflection=-1.0, min_latents=3)
    left = model.config.latents_per_layer
    assert left == [8, 5, 3, 3, 3, 3]
    with torch.no_grad():
        output = model(**tiny_inputs("Model"), output_attentions=True)
    assert [weights.shape[-1] for weights in output.attentions] == [12, 8, 5, 3, 3, 3]
    assert output.latent_sizes.shape == (2, 3)


# Masks of the inputs


def masks_alike(mask):
    """The same mask in every form that is allowed."""
    keep = mask.bool()[:, None, None, :]
    return {
        "integers": mask,
        "booleans": mask.bool(),
        "numbers": mask.double(),
        "4-D booleans": keep,
        "4-D integers": keep.long(),
        "4-D scores": torch.zeros(keep.shape).double().masked_fill(~keep, torch.finfo(torch.float64).min),
        "4-D scores of -inf": torch.zeros(keep.shape).double().masked_fill(~keep, float("-inf")),
    }


@every_attention
@pytest.mark.parametrize("head", ["Model", *TEXT_HEADS])
def test_every_form_of_a_mask_means_the_same(head, attention):
    model = tiny_model(head, attn_implementation=attention, r=R_LIST)
    inputs = tiny_inputs(head)
    mask = inputs.pop("attention_mask")
    expected = run(model, inputs | dict(attention_mask=mask)).logits
    for form, value in masks_alike(mask).items():
        assert relative_difference(run(model, inputs | dict(attention_mask=value)).logits, expected) <= 1e-12, form
    assert relative_difference(run(model, inputs).logits, expected) > 1e-3


@every_attention
def test_what_stands_in_padding_does_not_matter(attention):
    model = tiny_model("ForSequenceClassification", attn_implementation=attention, r=R_LIST)
    inputs = tiny_inputs("ForSequenceClassification")
    changed = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
    assert not torch.equal(changed, inputs["input_ids"])
    expected = run(model, inputs).logits
    assert relative_difference(run(model, inputs | dict(input_ids=changed)).logits, expected) <= 1e-12


@every_attention
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_is_all_padding_gives_no_nan(attention, dtype):
    """Nor does it change the rows beside it."""
    model = tiny_model("ForSequenceClassification", dtype, attn_implementation=attention, r=R_LIST)
    inputs = tiny_inputs("ForSequenceClassification")
    expected = run(model, inputs).logits
    inputs["attention_mask"][1] = 0
    logits = run(model, inputs).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-3, atol=0)
    loss, gradients = loss_and_gradients(model, inputs)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())


# Setting r


@every_head
def test_r_is_set_at_any_time(head):
    """Nothing stays from one setting to the next; back at 0 the model is upstream's again."""
    inputs = tiny_inputs(head)
    model = tiny_model(head)
    whole = run(model, inputs).logits
    for r in (R_LIST, 1, [0, 0, 0, 0, 0, 6]):
        model.r = r
        assert model.r == model.config.r == r
        assert model.base_model.config.r == r
        assert torch.equal(run(model, inputs).logits, run(tiny_model(head, r=r), inputs).logits)
        assert run(model, inputs).base.latent_sizes.shape[1] == model.config.latents_per_layer[-1] < 12
    model.r = 0
    assert torch.equal(run(model, inputs).logits, whole)


@pytest.mark.parametrize("bad", [-1, "abc", 2.5, True, None, [1], [1] * 7, [1] * 5 + [True], [1] * 5 + [-1]], ids=str)
def test_bad_r_is_refused_and_the_old_one_stays(bad):
    model = tiny_model("ForSequenceClassification", r=R_LIST)
    with pytest.raises(ValueError) as error:
        model.r = bad
    assert str(error.value).startswith(f"r = {bad!r}: ") and "\n" not in str(error.value)
    assert model.r == R_LIST
    assert model.config.merge_schedule == R_LIST


def test_r_does_not_go_with_groups():
    model, inputs = tiny_model("ForSequenceClassification", **MERGES["groups"]), tiny_inputs(TEXT_HEADS[0])
    expected = run(model, inputs).logits
    for r in (2, R_LIST):
        with pytest.raises(ValueError, match=r"^merge_groups: [^\n]*r must be 0[^\n]*$"):
            model.r = r
    assert model.r == 0 and model.config.merge_groups == GROUPS
    model.r = 0
    assert torch.equal(run(model, inputs).logits, expected)


def test_list_of_r_does_not_go_with_an_inflection():
    model = tiny_model("ForSequenceClassification", r=1, r_inflection=0.5)
    with pytest.raises(ValueError, match=r"^r_inflection = 0\.5: [^\n]*$"):
        model.r = R_LIST
    assert model.r == 1


# Bad input


@every_head
def test_unknown_method_is_refused_at_construction(head):
    with pytest.raises(ValueError, match=r"^merge_method = 'best': allowed are [^\n]*'bipartite'[^\n]*$"):
        tome_class(head)(tiny_config(merge_method="best"))


def test_a_method_of_ones_own_runs(monkeypatch):
    """It gets the mean keys of the heads, R, the sizes so far and the depth of the layer."""
    asked = []

    def match_last(metric, r, sizes, depth):
        asked.append((tuple(metric.shape), r, None if sizes is None else sizes.tolist(), depth))
        assert not metric.requires_grad
        return merging.match_groups([*range(metric.shape[1] - r), *[0] * r], metric.device)

    monkeypatch.setitem(merging.MERGE_METHODS, "last", match_last)
    model, inputs = tiny_model("Model", merge_method="last", r=R_LIST), tiny_inputs("Model")
    with torch.enable_grad():
        model(**inputs)
    # qk_channels = 16 in two heads
    assert asked == [
        ((2, 12, 8), 3, None, 0.0),
        ((2, 9, 8), 2, [[4, *[1] * 8]] * 2, 2 / 6),
        ((2, 7, 8), 1, [[6, *[1] * 6]] * 2, 3 / 6),
        ((2, 6, 8), 1, [[7, *[1] * 5]] * 2, 5 / 6),
    ]
    base = run(model, inputs).base
    assert base.latent_sizes.tolist() == [[8, 1, 1, 1, 1]] * 2


def test_bad_setting_over_a_stock_folder_is_refused(tmp_path):
    stock_model("ForSequenceClassification", torch.float32).save_pretrained(tmp_path)
    for bad, message in (
        (dict(r=-8), r"^r = -8: [^\n]*$"),
        (dict(r="eight"), r"^r = 'eight': [^\n]*$"),
        (dict(r=8, r_inflection=2.0), r"^r_inflection = 2\.0: [^\n]*$"),
        (dict(r=8, min_latents=13), r"^min_latents = 13: [^\n]*num_latents = 12[^\n]*$"),
        (dict(r=8, merge_method="best"), r"^merge_method = 'best': [^\n]*$"),
        (dict(r=8, merge_metric="query"), r"^merge_metric = 'query': [^\n]*'key', 'value', 'hidden'$"),
        (dict(r=8, merge_groups=[None] * 6), r"^merge_groups: [^\n]*$"),
    ):
        with pytest.raises(ValueError, match=message):
            tome.ToMePerceiverForSequenceClassification.from_pretrained(tmp_path, **bad)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(ValueError, match=r"^model_type = 'bert': [^\n]*another architecture[^\n]*$"):
        tome.ToMePerceiverForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", TEXT_HEADS)
def test_too_long_a_text_is_one_line(head):
    model = tiny_model(head)
    run(model, dict(input_ids=torch.zeros(1, 20, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"^inputs: [^\n]*21[^\n]*max_position_embeddings = 20$"):
        model(input_ids=torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize("height, width", [(9, 9), (4, 8), (16, 16), (4, 16)])
def test_image_of_another_size_is_one_line_for_learned_positions(height, width):
    """Also of one with as many pixels; unless one asks for positions to be interpolated, as upstream does."""
    model, stock = (make("ForImageClassificationLearned", torch.float32) for make in (tiny_model, stock_model))
    pixels = torch.randn(2, 3, height, width)
    with pytest.raises(ValueError, match=rf"^inputs: [^\n]*{height} x {width}[^\n]*allowed is 8 x 8[^\n]*$"):
        model(pixel_values=pixels)
    with torch.no_grad():
        expected = stock(pixel_values=pixels, interpolate_pos_encoding=True).logits
        logits = model(pixel_values=pixels, interpolate_pos_encoding=True).logits
    assert relative_difference(logits, expected) <= 2e-5


def test_inputs_of_another_width_are_one_line():
    with pytest.raises(ValueError, match=r"^inputs: [^\n]*17[^\n]*d_model = 16$"):
        tiny_model("Model")(inputs=torch.zeros(1, 5, 17, dtype=torch.float64))


# What Trainer and accelerate ask of a model


class Rows(torch.utils.data.Dataset):
    """A labelled batch of inputs, a row at a time."""

    def __init__(self, head):
        self.rows = dict(tiny_inputs(head, batch=8, dtype=torch.float32), labels=labels_for(head, 8))

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {name: value[row] for name, value in self.rows.items()}


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForImageClassificationLearned"])
def test_gradient_accumulation_gives_the_loss_and_gradient_norm_of_one_batch(head, tmp_path):
    """One step on 8 rows at once is one step on 4 x 2 of them."""
    logs = []
    for accumulation in (1, 4):
        model = tiny_model(head, torch.float32, r=R_LIST)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(head))
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert logs[0]["loss"] > 0.1 and logs[0]["grad_norm"] > 0.1
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-3)
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-3)


@every_head
def test_a_layer_stays_on_one_device(head):
    """`_no_split_modules` names every layer, so a device map cuts between layers and not in one."""
    model = spread_weights(tome_class(head)(tiny_config()))
    names = {name for name, module in model.named_modules() if isinstance(module, layers.ToMePerceiverLayer)}
    assert len(names) == 4 + (head != "Model")
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for part in (0.3, 0.5, 0.7):
        device_map = infer_auto_device_map(
            model,
            max_memory={0: int(part * total), "cpu": 2 * total},
            no_split_module_classes=list(model._no_split_modules),
        )
        assert not [name for name in device_map if any(name.startswith(f"{layer}.") for layer in names)]


@every_head
def test_every_part_is_of_this_module(head):
    """No layer, attention, encoder or decoder is left a stock one, which would drop the sizes in silence."""
    model = tiny_model(head)
    stock = {kind for kind in layers._TOME_CLASSES if kind is not layers._TOME_CLASSES[kind]}
    assert not [name for name, module in model.named_modules() if type(module) in stock]


def test_mask_of_another_length_is_one_line():
    """Also a mask of length 1, which would broadcast in silence."""
    model = tiny_model("ForSequenceClassification")
    for length in (1, 5):
        with pytest.raises(
            ValueError, match=rf"^attention_mask: [^\n]*\(2, {length}\)[^\n]*last dimension of 9[^\n]*$"
        ):
            model(input_ids=torch.zeros(2, 9, dtype=torch.long), attention_mask=torch.ones(2, length))


@pytest.mark.parametrize("name, allowed", [("merge_method", "bipartite"), ("merge_metric", "key")])
def test_unknown_method_or_metric_set_on_a_built_model_is_one_line(name, allowed):
    model = tiny_model("ForSequenceClassification", r=1)
    setattr(model.config, name, "best")
    with pytest.raises(ValueError, match=rf"^{name} = 'best': [^\n]*'{allowed}'[^\n]*$"):
        model(**tiny_inputs("ForSequenceClassification"))


def test_every_metric_that_a_config_allows_is_known_to_the_layers():
    assert tuple(layers.METRICS) == configuration.MERGE_METRICS


@pytest.mark.parametrize("head", TEXT_HEADS)
def test_keys_and_values_of_different_widths(head, monkeypatch):
    """As in the published language model: no fused kernel on the CPU, upstream's logits, and merging all the same."""
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1))
    inputs, widths = tiny_inputs(head), dict(qk_channels=8, v_channels=16)
    with torch.no_grad():
        expected = flat_logits(stock_model(head, **widths)(**inputs))
    model = tiny_model(head, **widths)
    layers_of_unequal_width = [model.base_model.encoder.cross_attention, *model.base_model.encoder.self_attends]
    for layer in layers_of_unequal_width:
        assert layer.attention.self.qk_channels_per_head != layer.attention.self.v_channels_per_head
    if head == "ForSequenceClassification":  # whose decoder keeps equal widths
        monkeypatch.undo()
    assert relative_difference(run(model, inputs).logits, expected) <= 1e-12
    model.r = R_LIST
    assert run(model, inputs).base.latent_sizes.sum(dim=1).tolist() == [NUM_LATENTS] * 2
    assert not calls
