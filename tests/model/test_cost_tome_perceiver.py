# SPDX-License-Identifier: Apache-2.0
"""Tests of the FLOPs formula against the paper's figures and PyTorch's FLOP counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import modeling_tome_perceiver as modeling
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import MASKED_LM_QK_CHANNELS, FlopsShare, ForwardCost, Merging, forward_cost
from merging_tome_perceiver import MERGE_METHODS, product_flops

TEXT_CLASSIFIER = "ToMePerceiverForSequenceClassification"

# `deepmind/language-perceiver` reading 128 bytes; GFLOPs at a constant r.
PUBLISHED_LANGUAGE_SHAPES: dict[str, Any] = {"qk_channels": 256, "v_channels": 1280, "d_model": 768, "num_labels": 2}
PUBLISHED_INPUT = (1, 128)
# By r: GFLOPs of the formula, and of the paper "Token Merging Perceiver", which also counts layer norms and never
# merges the first latent.
PUBLISHED_GFLOPS = {0: (105.98, 106.08), 4: (84.10, 84.18), 8: (62.76, 62.82), 12: (44.38, 44.51), 16: (34.29, 34.49)}

# An odd number of latents, so that halves are unequal, and all widths different.
SMALL: dict[str, Any] = {
    "num_latents": 11,
    "d_latents": 24,
    "d_model": 16,
    "num_blocks": 1,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "num_labels": 5,
    "vocab_size": 30,
    "max_position_embeddings": 9,
    "image_size": 8,
    "train_size": [4, 6],
    "num_frames": 2,
    "audio_samples_per_frame": 24,
    "samples_per_patch": 8,
    "output_shape": [1, 2, 8, 8],
    "output_num_channels": 12,
}

INPUT_SHAPES: dict[str, Any] = {
    "ToMePerceiverModel": (1, 7, 16),
    TEXT_CLASSIFIER: (1, 7),
    "ToMePerceiverForMaskedLM": (1, 7),
    "ToMePerceiverForImageClassificationLearned": (1, 3, 8, 8),
    "ToMePerceiverForImageClassificationFourier": (1, 3, 8, 6),
    "ToMePerceiverForImageClassificationConvProcessing": (1, 3, 19, 32),
    "ToMePerceiverForOpticalFlow": (1, 2, 27, 4, 6),
    "ToMePerceiverForMultimodalAutoencoding": {"audio": (1, 48, 1), "image": (1, 2, 3, 8, 8), "label": (1, 5)},
}
OUTPUT_POINTS = {"audio": 4, "image": 7}
MULTIMODAL = "ToMePerceiverForMultimodalAutoencoding"

SETTINGS = {
    "stock": {},
    "constant r": {"r": 2},
    "list": {"r": [3, 0, 4]},
    "min_latents": {"r": 4, "min_latents": 6},
    "groups": {"merge_groups": [None, [0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4], None]},
    "groups at the start": {"latent_groups": [0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4], "r": 1},
    "shared blocks": {"r": 1, "num_blocks": 2, "num_self_attends_per_block": 2},
    "qk_channels": {"r": 2, "qk_channels": 8, "v_channels": 24},
    "qk_channels alone": {"r": 2, "qk_channels": 24},
    "v_channels alone": {"r": 2, "v_channels": 24},
    "as wide as the queries": {"r": 2, "cross_attention_shape_for_attention": "q"},
    "values compared": {"r": 2, "qk_channels": 8, "v_channels": 24, "merge_metric": "value"},
    "latents compared": {"r": 2, "qk_channels": 8, "v_channels": 24, "merge_metric": "hidden"},
    "widening": {"r": 2, "self_attention_widening_factor": 2, "cross_attention_widening_factor": 3},
}


def counted_flops(architecture: str, config: ToMePerceiverConfig, input_shape: Any) -> int:
    """Return the FLOPs that PyTorch counts for a forward pass of a random model."""
    # Eager attention, because the counter does not count the CPU's fused attention.
    config._attn_implementation = "eager"
    # The counter's hooks fail on upstream's modules if gradients could flow.
    model = getattr(modeling, architecture)(config).eval().requires_grad_(False)
    options = {}
    if architecture == MULTIMODAL:
        inputs: Any = {modality: torch.zeros(shape) for modality, shape in input_shape.items()}
        options["subsampled_output_points"] = {name: torch.arange(count) for name, count in OUTPUT_POINTS.items()}
    elif len(input_shape) == 2:
        inputs = torch.zeros(input_shape, dtype=torch.int64)
    else:
        inputs = torch.zeros(input_shape)
    with FlopCounterMode(display=False) as counter:
        model(inputs, **options)
    return counter.get_total_flops()


def cost(architecture: str, config: ToMePerceiverConfig, input_shape: Any) -> ForwardCost:
    return forward_cost(config, input_shape, architecture, OUTPUT_POINTS if architecture == MULTIMODAL else None)


def published(r: int) -> ToMePerceiverConfig:
    return ToMePerceiverConfig(r=r, **PUBLISHED_LANGUAGE_SHAPES)


@pytest.mark.parametrize("r", PUBLISHED_GFLOPS)
def test_published_language_shapes_cost_the_papers_row(r):
    gflops = forward_cost(published(r), PUBLISHED_INPUT, TEXT_CLASSIFIER).total / 1e9
    closed_form, printed = PUBLISHED_GFLOPS[r]
    assert gflops == pytest.approx(closed_form, abs=0.005) and gflops == pytest.approx(printed, rel=0.01)


@pytest.mark.parametrize("architecture", INPUT_SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_closed_form_is_what_pytorch_counts(architecture, setting):
    config = ToMePerceiverConfig(**{**SMALL, **SETTINGS[setting]})
    input_shape = INPUT_SHAPES[architecture]
    assert cost(architecture, config, input_shape).total_with_matching == counted_flops(
        architecture, config, input_shape
    )


def test_queries_that_every_row_repeats_are_projected_once():
    """The formula counts them for each row, because upstream computes them for each row."""
    config = ToMePerceiverConfig(**{**SMALL, "r": 2})
    rows = 3
    closed_form = cost("ToMePerceiverForMaskedLM", config, (rows, 7)).total_with_matching
    encoder = product_flops(config.num_latents, config.d_latents, config.d_model)
    decoder = product_flops(config.max_position_embeddings, config.d_model, MASKED_LM_QK_CHANNELS)
    counted = counted_flops("ToMePerceiverForMaskedLM", config, (rows, 7))
    assert counted == closed_form - (rows - 1) * (encoder + decoder)


@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("r", [2, 20])
def test_every_merging_method_costs_what_pytorch_counts(method, r):
    config = ToMePerceiverConfig(**SMALL, r=r, merge_method=method)
    counted = counted_flops("ToMePerceiverModel", config, INPUT_SHAPES["ToMePerceiverModel"])
    assert cost("ToMePerceiverModel", config, INPUT_SHAPES["ToMePerceiverModel"]).total_with_matching == counted


@pytest.mark.parametrize("architecture", sorted(INPUT_SHAPES.keys() - {MULTIMODAL}))
def test_cost_is_linear_in_the_batch(architecture):
    config, rest = ToMePerceiverConfig(**SMALL, r=2), INPUT_SHAPES[architecture][1:]
    one, many = (forward_cost(config, (batch, *rest), architecture).total_with_matching for batch in (1, 6))
    assert many == 6 * one
    shares = [FlopsShare(config, (batch, *rest), architecture)(Merging.of(config)) for batch in (1, 6)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-12) and shares[0] < 1


@pytest.mark.parametrize("architectures", [["PerceiverForMaskedLM"], ["ToMePerceiverForMaskedLM"]])
def test_architecture_is_read_from_the_config_under_either_name(architectures):
    config = ToMePerceiverConfig(**SMALL, architectures=architectures)
    assert forward_cost(config, (1, 7)) == forward_cost(config, (1, 7), "PerceiverForMaskedLM")


@pytest.mark.parametrize(
    ("input_shape", "architecture", "setting", "message"),
    [
        ((1, 7), None, {}, "config.architectures"),
        ((1, 7), "BertModel", {}, "architecture='BertModel'"),
        ((1, 7, 16), TEXT_CLASSIFIER, {}, "input_shape=(1, 7, 16): must be (B, S)"),
        ((1, 7, 17), "PerceiverModel", {}, "must be (B, S, 16)"),
        ((1, 1, 8, 8), "PerceiverForImageClassificationLearned", {}, "must be (B, 3, height, width)"),
        ({"text": (1, 7)}, TEXT_CLASSIFIER, {}, "input_shape: must be one shape"),
        ((1, 7), MULTIMODAL, {}, "'audio', 'image' and 'label'"),
        (INPUT_SHAPES[MULTIMODAL], MULTIMODAL, {}, "output_points=None"),
        ((1, 7), TEXT_CLASSIFIER, {"r": 1, "merge_method": "mine"}, "merge_method='mine'"),
    ],
)
def test_unknown_shapes_and_architectures_are_one_line(input_shape, architecture, setting, message):
    with pytest.raises(ValueError) as error:
        forward_cost(ToMePerceiverConfig(**{**SMALL, **setting}), input_shape, architecture)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
