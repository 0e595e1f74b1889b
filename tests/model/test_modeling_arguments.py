# SPDX-License-Identifier: Apache-2.0
"""Tests of what callers pass to a model: r, masks, settings, inputs; and the messages that refuse wrong values."""

import pytest
import torch
import transformers
from packaging.version import Version

import modeling_tome_perceiver as tome
from tests.support.tiny_merges import (
    MERGES,
    R_LIST,
    every_attention,
    loss_and_gradients,
)
from tests.support.tiny_models import (
    HEADS,
    TEXT_HEADS,
    relative_difference,
    run,
    stock_model,
    tiny_inputs,
    tiny_model,
    tome_class,
)

# Masks of the inputs


def masks_alike(mask):
    """Return the same mask in every accepted form."""
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_is_all_padding_gives_no_nan(attention, dtype):
    """It also does not change other rows."""
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


def test_r_is_set_at_any_time():
    """A new r leaves nothing of the earlier one."""
    model, inputs = tiny_model("ForSequenceClassification"), tiny_inputs("ForSequenceClassification")
    for r in (R_LIST, 1, 0):
        model.r = r
        assert model.r == model.config.r == model.base_model.config.r == r
        assert torch.equal(run(model, inputs).logits, run(tiny_model("ForSequenceClassification", r=r), inputs).logits)


@pytest.mark.parametrize("bad", [-1, None, [1]], ids=str)
def test_bad_r_is_refused_and_the_old_one_stays(bad):
    model = tiny_model("ForSequenceClassification", r=R_LIST)
    with pytest.raises(ValueError) as error:
        model.r = bad
    assert str(error.value).startswith(f"r={bad!r}: ") and "\n" not in str(error.value)
    assert model.r == R_LIST
    assert model.config.merge_schedule == R_LIST


# Bad input


def test_bad_setting_over_a_stock_folder_is_refused(tmp_path):
    stock_model("ForSequenceClassification", torch.float32).save_pretrained(tmp_path)
    for bad, message in (
        (dict(r=-8), r"^r=-8: [^\n]*$"),
        (dict(merge_method="best"), r"^merge_method='best' is not registered; [^\n]*bipartite[^\n]*$"),
    ):
        with pytest.raises(ValueError, match=message):
            tome.ToMePerceiverForSequenceClassification.from_pretrained(tmp_path, **bad)


@pytest.mark.parametrize("head", TEXT_HEADS)
def test_too_long_a_text_is_one_line(head):
    model = tiny_model(head)
    run(model, dict(input_ids=torch.zeros(1, 20, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"^inputs: [^\n]*21[^\n]*max_position_embeddings=20$"):
        model(input_ids=torch.zeros(1, 21, dtype=torch.long))


@pytest.mark.parametrize("height, width", [(9, 9), (4, 8), (16, 16), (4, 16)])
def test_image_of_another_size_is_one_line_for_learned_positions(height, width):
    """Also an image with as many pixels; only with interpolated positions, as upstream has them, it is accepted."""
    model, stock = (make("ForImageClassificationLearned", torch.float32) for make in (tiny_model, stock_model))
    pixels = torch.randn(2, 3, height, width)
    with pytest.raises(ValueError, match=rf"^inputs: [^\n]*{height} x {width}[^\n]*must be 8 x 8[^\n]*$"):
        model(pixel_values=pixels)
    if Version(transformers.__version__) < Version("5.4"):
        pytest.skip("before transformers 5.4, upstream interpolates to the size that the positions have already")
    with torch.no_grad():
        expected = stock(pixel_values=pixels, interpolate_pos_encoding=True).logits
        logits = model(pixel_values=pixels, interpolate_pos_encoding=True).logits
    assert relative_difference(logits, expected) <= 2e-5


def test_inputs_of_another_width_are_one_line():
    with pytest.raises(ValueError, match=r"^inputs: [^\n]*17[^\n]*d_model=16$"):
        tiny_model("Model")(inputs=torch.zeros(1, 5, 17, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (1, 9), (2, 9, 9), (9,), (3, 1, 1, 9)], ids=str)
def test_mask_of_another_shape_is_one_line(shape):
    """A mask of length 1 or of one row would otherwise broadcast."""
    model = tiny_model("ForSequenceClassification")
    with pytest.raises(ValueError, match=r"^attention_mask: has shape .*must have \(2, 9\) or \(2, 1, 1, 9\)[^\n]*$"):
        model(input_ids=torch.zeros(2, 9, dtype=torch.long), attention_mask=torch.ones(shape))


@pytest.mark.parametrize(
    "name, value",
    [
        ("merge_method", "best"),
        ("merge_metric", "best"),
        ("r", "8"),
        ("min_latents", 0),
        ("proportional_attention", "no"),
        ("r_inflection", 3),
        ("merge_groups", [[0] * 5, *[None] * 5]),
        ("num_self_attends_per_block", 4),
        ("num_latents", 14),
    ],
)
def test_junk_set_in_the_config_of_a_built_model_is_one_line(name, value):
    model = tiny_model("ForSequenceClassification", min_latents=2)
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=rf"^{name}[^\n]*$"):
        model(**tiny_inputs("ForSequenceClassification"))


def test_labels_that_contradict_each_other_make_no_classifier():
    bad = dict(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})
    with pytest.raises(ValueError, match=r"^id2label\[0\]='a': [^\n]*$"):
        tiny_model("ForSequenceClassification", num_labels=2, **bad)
    tiny_model("ForMaskedLM", num_labels=2, **bad)


# Tokens


@pytest.mark.parametrize("head", TEXT_HEADS)
@pytest.mark.parametrize("tokens", [270, 250], ids=["more", "fewer"])
def test_tokens_are_resized_and_saved(head, tokens, tmp_path):
    """Outputs for the old tokens stay the same."""
    model, inputs = tiny_model(head, torch.float32, r=R_LIST), tiny_inputs(head)
    inputs["input_ids"] = inputs["input_ids"] % 250
    before = run(model, inputs).logits
    assert model.get_input_embeddings() is model.perceiver.input_preprocessor.embeddings
    model.resize_token_embeddings(tokens)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == tokens
    after = run(model, inputs).logits
    if head == "ForMaskedLM":
        length = after.shape[1] // tokens
        before, after = before.view(2, length, 262)[..., :250], after.view(2, length, tokens)[..., :250]
    assert relative_difference(after, before) <= 2e-5
    loss_and_gradients(model, inputs)
    model.save_pretrained(tmp_path)
    again, loading = tome_class(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert relative_difference(run(again, inputs).logits, run(model, inputs).logits) <= 2e-5


def test_a_new_tokens_bias_learns():
    model = tiny_model("ForMaskedLM", torch.float32)
    loss_and_gradients(model, tiny_inputs("ForMaskedLM"))
    model.resize_token_embeddings(270)
    _, gradients = loss_and_gradients(model, tiny_inputs("ForMaskedLM"))
    assert gradients["embedding_decoder.bias"].shape == (270,) and gradients["embedding_decoder.bias"][262:].any()


@pytest.mark.parametrize("head", ["Model", "ForOpticalFlow"])
def test_a_model_without_tokens_says_so_in_one_line(head):
    for call in (lambda m: m.get_input_embeddings(), lambda m: m.resize_token_embeddings(270)):
        with pytest.raises(NotImplementedError, match=rf"^input embeddings: ToMePerceiver{head} has none; [^\n]*$"):
            call(tiny_model(head))


def test_masked_language_labels_of_another_length_are_one_line():
    model = tiny_model("ForMaskedLM")
    with pytest.raises(ValueError, match=r"^labels: have shape \(2, 9\); must have a label for .* 20 positions"):
        model(**tiny_inputs("ForMaskedLM"), labels=torch.zeros(2, 9, dtype=torch.int64))


# Inputs at the edge


@pytest.mark.parametrize("merge", [{}, MERGES["bipartite"], dict(MERGES["groups at the start"], merge_method="ward")])
@pytest.mark.parametrize("head", [head for head in HEADS if head != "ForMultimodalAutoencoding"])
def test_what_runs_unmerged_runs_merged_on_the_meta_device_and_on_no_rows(head, merge):
    model = tiny_model(head, **merge)
    inputs = {name: value for name, value in tiny_inputs(head).items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        several = model(**inputs)
        none = model(**{name: value[:0] for name, value in inputs.items()})
        abstract = model.to("meta")(**{name: value.to("meta") for name, value in inputs.items()})
    field = "last_hidden_state" if head == "Model" else "logits"
    assert getattr(none, field).shape == (0, *getattr(several, field).shape[1:])
    assert getattr(abstract, field).shape == getattr(several, field).shape
