# SPDX-License-Identifier: Apache-2.0
"""Models of the published shapes, and of two small ones, with random weights, stock and merging, to measure speed on.

Speed does not depend on what weights say, so nothing is downloaded.

Letters: B batch, S bytes of a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PerceiverConfig, PreTrainedModel
from transformers.models.perceiver import modeling_perceiver as upstream

import modeling_tome_perceiver as tome
from configuration_tome_perceiver import ToMePerceiverConfig
from cost_tome_perceiver import ForwardCost, forward_cost

# `deepmind/language-perceiver`; every other field has its default.
PUBLISHED_LANGUAGE_SHAPES: dict[str, Any] = {"qk_channels": 256, "v_channels": 1280}
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RGB_CHANNELS = 3

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What rounding may make of outputs between two orders of summation, as a part of the largest of them.
OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def _example_shapes(name: str) -> dict[str, Any]:
    """Of a config in `examples/`, by which models are trained from scratch."""
    fields = json.loads((EXAMPLES / name).read_text())
    return {name: value for name, value in fields.items() if name not in ("architectures", "model_type")}


@dataclass(frozen=True)
class PublishedModel:
    """A published model, or one that this project trains."""

    hub_id: str  # the checkpoint's, or a description
    architecture: str  # name of the stock class
    fields: Mapping[str, Any]  # fields of its config
    # Fields that change in a model of the same widths with fewer layers; none if it is small already.
    fewer_layers: Mapping[str, Any] = field(default_factory=dict)
    takes_text: bool = True  # texts (B, S), else images
    # Shares of its FLOPs that schedules come down to, in place of a benchmark's own.
    flops_ratio: tuple[float, ...] | None = None

    def small(self) -> PublishedModel:
        """The same widths with fewer layers."""
        return replace(self, fields={**self.fields, **self.fewer_layers})

    def config(self, **merging: Any) -> ToMePerceiverConfig:
        """Its config, with fields that say what merges."""
        return ToMePerceiverConfig(**{**self.fields, **merging})

    def input_shape(self, batch_size: int, length: int | None) -> tuple[int, ...]:
        """(B, S) for S = `length`, or (B, 3, height, width), as `cost_tome_perceiver.forward_cost` takes it."""
        if not self.takes_text:
            return batch_size, RGB_CHANNELS, self.config().image_size, self.config().image_size
        return batch_size, length

    def cost(self, input_shape: tuple[int, ...], **merging: Any) -> ForwardCost:
        """FLOPs of a forward pass, by what computes."""
        return forward_cost(self.config(**merging), input_shape, self.architecture)

    def draw_inputs(self, input_shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        """Random inputs of that shape."""
        if self.takes_text:
            return torch.randint(self.config().vocab_size, input_shape, device=device)
        return torch.randn(input_shape, device=device).to(dtype)

    def build_stock(self, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
        """The stock model with random weights, in evaluation mode and without gradients."""
        torch.manual_seed(seed)
        # A config is written to by the model that it builds.
        model = getattr(upstream, self.architecture)(PerceiverConfig(**self.fields))
        return model.eval().requires_grad_(False).to(device, dtype)

    def build_stock_again(self, stock: PreTrainedModel) -> PreTrainedModel:
        """A second stock model on the tensors of the first, in evaluation mode and without gradients."""
        return _on_tensors_of(stock, type(stock), PerceiverConfig(**self.fields))

    def build_merging(
        self, stock: PreTrainedModel, modeling: ModuleType = tome, **merging: Any
    ) -> tome.ToMePerceiverPreTrainedModel:
        """Ours on the tensors of a stock model, in evaluation mode and without gradients.

        Args:
            stock: the model.
            modeling: `modeling_tome_perceiver`, of this or of another commit.
            merging: fields of the config that say what merges.
        """
        config = modeling.ToMePerceiverConfig(**{**self.fields, **merging})
        return _on_tensors_of(stock, getattr(modeling, f"ToMe{self.architecture}"), config)


def _on_tensors_of(stock: PreTrainedModel, model_class: type, config: PerceiverConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(stock.state_dict(), assign=True)
    return model.eval().requires_grad_(False)


PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "language": PublishedModel(
        "deepmind/language-perceiver",
        "PerceiverForSequenceClassification",
        PUBLISHED_LANGUAGE_SHAPES,
        fewer_layers={"num_self_attends_per_block": 6},
    ),
    "vision": PublishedModel(
        "deepmind/vision-perceiver-conv",
        "PerceiverForImageClassificationConvProcessing",
        _example_shapes("vision_conv_perceiver.json"),
        fewer_layers={"num_blocks": 1},
        takes_text=False,
    ),
    # So narrow that the fixed price of each operation counts: the image model of the README, and the text model that is
    # trained towards a teacher.
    "small_language": PublishedModel(
        "64 latents x 384, 12 layers",
        "PerceiverForSequenceClassification",
        {**_example_shapes("taught_mlm_perceiver.json"), "vocab_size": 16_384},
        flops_ratio=(0.77, 0.6),
    ),
    "small_vision": PublishedModel(
        "48 latents x 64, 8 layers",
        "PerceiverForImageClassificationConvProcessing",
        _example_shapes("small_image_perceiver.json"),
        takes_text=False,
        flops_ratio=(0.77, 0.6),
    ),
}


@torch.inference_mode()
def check_outputs(model: PreTrainedModel, same: PreTrainedModel, inputs: Tensor) -> float:
    """The largest difference between what two models give that should give the same, a stock model and ours that merges
    nothing: the latents and the logits, each as a part of the largest of them.

    Raises:
        AssertionError: if it is more than rounding, so that the two would not be doing the same work.
    """
    expected, given = model.base_model(inputs), same.base_model(inputs)
    difference = max(
        relative_difference(given[name], expected[name]).item() for name in ("last_hidden_state", "logits")
    )
    tolerance = OUTPUT_TOLERANCE[model.dtype]
    assert difference <= tolerance, f"outputs differ by {difference} of the largest, more than {tolerance}"
    return difference


def relative_difference(values: Tensor, reference: Tensor) -> Tensor:
    """The largest difference over the largest reference, both over all entries."""
    return (values.float() - reference.float()).abs().max() / reference.float().abs().max()
