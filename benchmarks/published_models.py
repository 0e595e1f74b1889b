# SPDX-License-Identifier: Apache-2.0
"""Models with random weights for the benchmarks of speed, stock and merging: two published shapes and three small ones.

Speed does not depend on the values of the weights, so nothing is downloaded.

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

# Config of `deepmind/language-perceiver`: its fields that differ from the defaults.
PUBLISHED_LANGUAGE_SHAPES: dict[str, Any] = {"qk_channels": 256, "v_channels": 1280}
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RGB_CHANNELS = 3

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference that rounding may cause between outputs, relative to the largest output.
OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def _example_shapes(name: str) -> dict[str, Any]:
    """Read the shapes from a config file in `examples/`."""
    fields = json.loads((EXAMPLES / name).read_text())
    return {name: value for name, value in fields.items() if name not in ("architectures", "model_type")}


@dataclass(frozen=True)
class PublishedModel:
    """Shapes of a published model, or of one that this project trains."""

    hub_id: str  # Hub id of the checkpoint, or a description
    architecture: str  # name of the transformers class
    fields: Mapping[str, Any]  # fields of its config
    # Config fields that differ with `--small`, which keeps the widths and has fewer layers.
    fewer_layers: Mapping[str, Any] = field(default_factory=dict)
    takes_text: bool = True  # whether inputs are texts (B, S); otherwise images
    # Default of --flops_ratio for this model; `None`: the default of the benchmark.
    flops_ratio: tuple[float, ...] | None = None

    def small(self) -> PublishedModel:
        """Return the model with the same widths and fewer layers."""
        return replace(self, fields={**self.fields, **self.fewer_layers})

    def config(self, **merging: Any) -> ToMePerceiverConfig:
        """Return the config, with the given merging fields."""
        return ToMePerceiverConfig(**{**self.fields, **merging})

    def input_shape(self, batch_size: int, length: int | None) -> tuple[int, ...]:
        """Return the shape (B, S) of texts with S = `length`, or (B, 3, height, width) of images."""
        if not self.takes_text:
            return batch_size, RGB_CHANNELS, self.config().image_size, self.config().image_size
        return batch_size, length

    def cost(self, input_shape: tuple[int, ...], **merging: Any) -> ForwardCost:
        """Return the FLOPs of a forward pass by part."""
        return forward_cost(self.config(**merging), input_shape, self.architecture)

    def draw_inputs(self, input_shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        """Draw random inputs of a shape."""
        if self.takes_text:
            return torch.randint(self.config().vocab_size, input_shape, device=device)
        return torch.randn(input_shape, device=device).to(dtype)

    def build_stock(self, dtype: torch.dtype, device: str, seed: int = 0) -> PreTrainedModel:
        """Build the stock model with random weights, in evaluation mode and without gradients."""
        torch.manual_seed(seed)
        # Building a model modifies its config, so each model gets a new one.
        model = getattr(upstream, self.architecture)(PerceiverConfig(**self.fields))
        return model.eval().requires_grad_(False).to(device, dtype)

    def build_stock_again(self, stock: PreTrainedModel) -> PreTrainedModel:
        """Build a second stock model that shares the tensors of the first."""
        return _build_on_tensors(stock, type(stock), PerceiverConfig(**self.fields))

    def build_merging(
        self, stock: PreTrainedModel, modeling: ModuleType = tome, **merging: Any
    ) -> tome.ToMePerceiverPreTrainedModel:
        """Build our model on the tensors of a stock model, in evaluation mode and without gradients.

        Args:
            stock: the stock model.
            modeling: the module `modeling_tome_perceiver` of this or of another commit.
            merging: merging fields of the config.
        """
        config = modeling.ToMePerceiverConfig(**{**self.fields, **merging})
        return _build_on_tensors(stock, getattr(modeling, f"ToMe{self.architecture}"), config)


def _build_on_tensors(stock: PreTrainedModel, model_class: type, config: PerceiverConfig) -> PreTrainedModel:
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
    # Narrow models, in which the fixed overhead of each operation matters: the image model of the README, and the text
    # model that is distilled from a teacher.
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
    # The model of `make demo`.
    "digits": PublishedModel(
        "64 latents x 64, 9 layers",
        "PerceiverForImageClassificationConvProcessing",
        _example_shapes("digits_perceiver.json"),
        takes_text=False,
    ),
}


@torch.inference_mode()
def check_outputs(model: PreTrainedModel, same: PreTrainedModel, inputs: Tensor) -> float:
    """Return the largest relative difference between the outputs (latents and logits) of two equivalent models.

    Raises:
        AssertionError: if it is larger than rounding, because then the two models do different work.
    """
    expected, given = model.base_model(inputs), same.base_model(inputs)
    difference = max(
        relative_difference(given[name], expected[name]).item() for name in ("last_hidden_state", "logits")
    )
    tolerance = OUTPUT_TOLERANCE[model.dtype]
    assert difference <= tolerance, f"outputs differ by {difference} of the largest, more than {tolerance}"
    return difference


def relative_difference(values: Tensor, reference: Tensor) -> Tensor:
    """Return the largest absolute difference divided by the largest absolute reference, over all entries."""
    return (values.float() - reference.float()).abs().max() / reference.float().abs().max()
