# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of all eight classes, stock and merging, and their inputs.

Letters: B batch, N latents (12), L self-attention layers (6: three modules, shared by two blocks).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PerceiverConfig, PreTrainedModel
from transformers.models.perceiver import modeling_perceiver as upstream

import modeling_tome_perceiver as tome
from configuration_tome_perceiver import ToMePerceiverConfig

TEXT_HEADS = ["ForSequenceClassification", "ForMaskedLM"]
IMAGE_HEADS = [
    "ForImageClassificationLearned",
    "ForImageClassificationFourier",
    "ForImageClassificationConvProcessing",
]
HEADS = ["Model", *TEXT_HEADS, *IMAGE_HEADS, "ForOpticalFlow", "ForMultimodalAutoencoding"]
"""Names of the eight classes, without "Perceiver" or "ToMePerceiver"."""

NUM_LATENTS, NUM_LAYERS = 12, 6
SIZES: dict[str, Any] = dict(
    num_latents=NUM_LATENTS,
    d_latents=16,
    d_model=16,
    num_blocks=2,
    num_self_attends_per_block=3,
    num_self_attention_heads=2,
    num_cross_attention_heads=2,
    # Keys and values of equal width, because PyTorch's fused attention on the CPU requires it.
    qk_channels=16,
    v_channels=16,
    attention_probs_dropout_prob=0.0,
    # A PerceiverTokenizer has 262 bytes and special tokens.
    vocab_size=262,
    max_position_embeddings=20,
    num_labels=3,
    image_size=8,
    train_size=[8, 8],
    num_frames=2,
    audio_samples_per_frame=16,
    samples_per_patch=4,
    output_shape=[1, 2, 8, 8],
    output_num_channels=8,
    _label_trainable_num_channels=8,
)


def tome_class(head: str) -> type[PreTrainedModel]:
    return getattr(tome, f"ToMePerceiver{head}")


def stock_class(head: str) -> type[PreTrainedModel]:
    return getattr(upstream, f"Perceiver{head}")


def tiny_config(**changes: Any) -> ToMePerceiverConfig:
    return ToMePerceiverConfig(**{**SIZES, **changes})


def stock_config(**changes: Any) -> PerceiverConfig:
    return PerceiverConfig(**{**SIZES, **changes})


def tiny_model(head: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """Build a ToMe model in evaluation mode, with weights drawn by `spread_weights`."""
    attn_implementation = changes.pop("attn_implementation", None)
    config = tiny_config(**changes)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    return spread_weights(tome_class(head)(config)).to(dtype).eval()


def stock_model(head: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """Build the stock model with the same weights as `tiny_model`."""
    return spread_weights(stock_class(head)(stock_config(**changes))).to(dtype).eval()


@torch.no_grad()
def spread_weights(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw weights by name and shape, large enough that every part of the model affects the logits.

    With upstream's initialisation (standard deviation 0.02) all latents are nearly equal and attention is nearly
    uniform, so the effect of a wrong bias or a wrong merge would be as small as rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("latents", "position_embeddings")):
            parameter.copy_(noise)
        elif parameter.dim() >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def repeat_latents(model: PreTrainedModel, groups: list[int]) -> PreTrainedModel:
    """Make the learned latents of each group exact duplicates."""
    latents = model.base_model.embeddings.latents
    with torch.no_grad():
        latents.copy_(latents[[groups.index(group) for group in groups]])
    return model


def tiny_inputs(head: str, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Draw inputs for a head; texts are padded from the second row on."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    if head in IMAGE_HEADS:
        side = 8 if head == "ForImageClassificationLearned" else 16
        return dict(pixel_values=draw(3, side, side))
    if head == "ForOpticalFlow":
        return dict(inputs=draw(2, 27, 8, 8))
    if head == "ForMultimodalAutoencoding":
        return dict(
            inputs=dict(image=draw(2, 3, 8, 8), audio=draw(32, 1), label=draw(3)),
            subsampled_output_points=dict(image=torch.arange(10), audio=torch.arange(4), label=None),
        )
    length = 9
    mask = (torch.arange(length) < length - 2 * torch.arange(batch)[:, None].clamp(max=3)).long()
    if head == "Model":
        return dict(inputs=draw(length, 16), attention_mask=mask)
    return dict(input_ids=torch.randint(0, 262, (batch, length), generator=generator), attention_mask=mask)


def take_row(inputs: Any, row: int) -> Any:
    """Return one row of a batch as a batch of one, without its padding."""
    if isinstance(inputs, dict):
        mask = inputs.get("attention_mask")
        taken = {name: take_row(value, row) for name, value in inputs.items() if name != "subsampled_output_points"}
        if mask is not None:
            taken = {name: value[:, : int(mask[row].sum())] for name, value in taken.items()}
        if "subsampled_output_points" in inputs:
            taken["subsampled_output_points"] = inputs["subsampled_output_points"]
        return taken
    return inputs[row : row + 1]


class Run(NamedTuple):
    """Result of a forward pass: the head's output, flattened to (B, K), and the output of its base model."""

    logits: Tensor
    base: tome.ToMePerceiverModelOutput


def run(model: PreTrainedModel, inputs: dict[str, Any], **arguments: Any) -> Run:
    """Run a forward pass without gradients, and make the base model return `latent_sources`."""
    seen = []
    base: nn.Module = model.base_model
    hooks = [
        base.register_forward_pre_hook(_ask_for_sources, with_kwargs=True),
        base.register_forward_hook(lambda module, arguments, output: seen.append(output)),
    ]
    try:
        with torch.no_grad():
            output = model(**inputs, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return Run(flat_logits(output), seen[0])


def _ask_for_sources(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return arguments, {**keywords, "output_latent_sources": True}


def flat_logits(output: Any) -> Tensor:
    """Flatten a head's output to (B, K); for the base model, which has no logits, its latents."""
    logits = output.last_hidden_state if output.get("logits") is None else output.logits
    parts = list(logits.values()) if isinstance(logits, dict) else [logits]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def unmerge(base: tome.ToMePerceiverModelOutput) -> Tensor:
    """Return (B, N, C): for each of the N learned latents, the final latent that it was merged into."""
    return base.latent_sources.transpose(1, 2).to(base.last_hidden_state.dtype) @ base.last_hidden_state


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute reference."""
    return float((value - reference).abs().max() / reference.abs().max())
