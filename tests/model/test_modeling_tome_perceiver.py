# SPDX-License-Identifier: Apache-2.0
"""Tests that every unmerged head equals upstream's, and that models work with transformers and accelerate.

The laws of merging are in `test_modeling_merges.py`, those of running it in `test_modeling_execution.py`, and what a
caller may say in `test_modeling_arguments.py`; all on random weights.
"""

import pytest
import torch
from accelerate import infer_auto_device_map
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.models.perceiver import modeling_perceiver as upstream

import layers_tome_perceiver as layers
import modeling_tome_perceiver as tome
from tests.support.tiny_merges import (
    DUPLICATES,
    R_LIST,
    assert_same,
    every_attention,
    every_head,
    labels_for,
    loss_and_gradients,
)
from tests.support.tiny_models import (
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
    tiny_config,
    tiny_inputs,
    tiny_model,
    tome_class,
)

# r = 0 is upstream


@every_head
def test_state_dict_is_upstreams(head):
    ours, stock = tiny_model(head, r=2).state_dict(), stock_model(head).state_dict()
    assert list(ours) == list(stock)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in stock.items()}


@every_head
def test_same_seed_gives_upstreams_initial_weights(head):
    """The random state afterwards is upstream's too, so a finetuning run draws the same batches."""
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
    """Texts have padding, and the logits do depend on the inputs."""
    model, stock = tiny_model(head, dtype, attn_implementation=attention), stock_model(head, dtype)
    assert model.config._attn_implementation == attention
    inputs = tiny_inputs(head, batch=3, dtype=dtype)
    with torch.no_grad():
        expected = flat_logits(stock(**inputs))
        other = flat_logits(stock(**tiny_inputs(head, batch=3, dtype=dtype, seed=1)))
    assert relative_difference(run(model, inputs).logits, expected) <= tolerance
    assert relative_difference(other, expected) > 0.01


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForImageClassificationLearned"])
def test_heads_that_attend_one_after_another_give_the_same(head, monkeypatch):
    model, inputs = tiny_model(head, attn_implementation="eager", r=R_LIST), tiny_inputs(head)
    loss, gradients = loss_and_gradients(model, inputs)
    monkeypatch.setattr(layers, "MAX_CACHED_SCORES", 200)
    again, gradients_again = loss_and_gradients(model, inputs)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.fixture
def fused_keys(monkeypatch):
    """Record the number of keys in each call of PyTorch's fused attention."""
    keys, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, *a, **named: keys.append(k.shape[2]) or real(q, k, *a, **named)
    )
    return keys


@every_head
def test_sdpa_is_what_runs_unless_one_asks_for_eager_and_added_keys_have_no_weight(head, fused_keys):
    """Layers with 9 to 15 keys are padded to 16 keys; outputs and gradients stay the same."""
    inputs, eager = tiny_inputs(head), tiny_model(head, attn_implementation="eager", r=R_LIST)
    loss, gradients = loss_and_gradients(eager, inputs)
    assert not fused_keys
    again, gradients_again = loss_and_gradients(tiny_model(head, r=R_LIST), inputs)
    # Calls of both cross-attentions; the masked LM's decoder has keys and values of different widths, so no fused call.
    assert len(fused_keys) == NUM_LAYERS + (1 if head in ("Model", "ForMaskedLM") else 2)
    assert 16 in fused_keys
    assert relative_difference(again, loss) <= 1e-12
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_cpu_trains_by_products_in_bfloat16(autocast, fused_keys):
    model = tiny_model("ForSequenceClassification", torch.float32 if autocast else torch.bfloat16, r=R_LIST)
    inputs = tiny_inputs("ForSequenceClassification")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        run(model.train(), inputs)
        assert not fused_keys
        run(model.eval(), inputs)
        assert len(fused_keys) == NUM_LAYERS + 2


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
    """A base model assembled from parts, as in upstream's documentation: its decoder weights merged latents too."""

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
    """transformers chooses the loss by the name of the class."""
    inputs = tiny_inputs(head) | dict(labels=labels_for(head))
    with torch.no_grad():
        ours, expected = tiny_model(head)(**inputs).loss, stock_model(head)(**inputs).loss
    assert expected > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM", "ForMultimodalAutoencoding"])
@pytest.mark.parametrize("hidden_states, attentions", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("return_dict", [False, True], ids=["tuple", "dict"])
def test_r_0_gives_upstreams_output_layout(head, hidden_states, attentions, return_dict):
    """Every entry of the output, hidden states and attention weights included, as a tuple and as a dictionary."""
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
    """The model merges from the first call, at the r given to `from_pretrained`."""
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
def test_saved_model_loads_back_with_its_schedule(head, tmp_path):
    merge = dict(r=R_LIST, proportional_attention=False)
    model = tiny_model(head, torch.float32, **merge)
    model.save_pretrained(tmp_path)
    again, loading = tome_class(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert {name: getattr(again.config, name) for name in merge} == merge
    assert again.config.merge_schedule == model.config.merge_schedule != [0] * NUM_LAYERS
    inputs = tiny_inputs(head, dtype=torch.float32)
    # Equal up to rounding: kernels sum in another order if the weights are aligned differently in memory.
    assert relative_difference(run(again, inputs).logits, run(model, inputs).logits) <= 1e-6


@pytest.mark.parametrize("head", TEXT_HEADS)
def test_keys_and_values_of_different_widths(head, fused_keys):
    """As in the published language model: no fused attention on the CPU, upstream's logits, and merging works."""
    inputs, widths = tiny_inputs(head), dict(qk_channels=8, v_channels=16)
    with torch.no_grad():
        expected = flat_logits(stock_model(head, **widths)(**inputs))
    model = tiny_model(head, **widths)
    assert relative_difference(run(model, inputs).logits, expected) <= 1e-12
    # Only the classifier's decoder has keys and values of equal width.
    assert len(fused_keys) == (head == "ForSequenceClassification")
    model.r = R_LIST
    assert run(model, inputs).base.latent_sizes.sum(dim=1).tolist() == [NUM_LATENTS] * 2


# What Trainer and accelerate ask of a model


class Rows(torch.utils.data.Dataset):
    """Dataset of the rows of a labelled batch."""

    def __init__(self, head):
        self.rows = dict(tiny_inputs(head, batch=8, dtype=torch.float32), labels=labels_for(head, 8))

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {name: value[row] for name, value in self.rows.items()}


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForImageClassificationLearned"])
def test_gradient_accumulation_gives_the_loss_and_gradient_norm_of_one_batch(head, tmp_path):
    """One step on 8 rows equals one step on 4 accumulated batches of 2 rows."""
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
    """`_no_split_modules` names every layer class, so a device map never splits a layer."""
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
