# SPDX-License-Identifier: Apache-2.0
"""The start of a masked language model that computes nearly what its teacher, a BERT, computes.

A Perceiver with a latent for each position and layers as wide as a BERT's has room for all of its weights. Each latent
reads the token of its position, the self-attention layers do what the BERT's layers do, and each position reads its
latent back. Two things differ, and training has to make up for them:

- A BERT normalises the sum of a branch and what it is added to (post-norm), a Perceiver what goes into the branch
  (pre-norm). So the scale and the shift of each layer norm are those that fit the teacher's states best on some
  training examples, by dimension, and what a branch adds is scaled as the sum that it is added to.
- A latent whose position has no token must read something. It reads the first token, so it is a duplicate of the first
  latent: harmless but for its weight in attention, and the first to be merged.

Channels beyond the BERT's width hold where a latent stands: a code for each position, which tells it from all others.

Letters: B batch, S input positions, N latents, P positions, H channels of the BERT, K of the code, C of latents, V
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from configuration_tome_perceiver import ToMePerceiverConfig
from experiments.tasks.teacher import Teacher
from experiments.training.findable import log_frequencies
from modeling_tome_perceiver import ToMePerceiverForMaskedLM, padding_bias

CODE_SHARE = 0.75
"""Channels of the code for each position: so many of as many orthonormal directions are still nearly orthogonal."""
INPUT_CODE, LATENT_CODE = 0.1, 2.0
"""Length of the code, beside that of a token's embedding and of what a latent reads. Inputs keep the statistics of
their layer norm; latents are found again although what layers add differs from token to token by twenty times."""
SHARPNESS = 48.0
"""Score of a position for its own latent, before softmax."""
FIRST = 0.5
"""Of that, the score of the first position for all latents: what those read whose position has no token."""
STEEPEST = 1.5
"""What a branch adds is scaled by so many times the median scale of all channels at most. A BERT's smallest norm
weights ask for more, of a few channels that then are all that a layer norm sees."""
LEAST_VARIANCE = 1e-8
FITTED_ON = 64
"""Training examples. Their padding is token 0, which nothing looks at."""


def why_not_from_bert(config: ToMePerceiverConfig, teacher: PreTrainedModel) -> str | None:
    """What of a config has no room for a teacher's layers, if anything; a line that says what is allowed."""
    bert = teacher.config
    if bert.model_type != "bert" or getattr(bert, "position_embedding_type", "absolute") != "absolute":
        return f"the teacher is a {bert.model_type}; allowed is a BERT"
    width, positions = bert.hidden_size, config.max_position_embeddings
    code = round(CODE_SHARE * positions)
    heads = config.num_cross_attention_heads
    for name, value, allowed, fits in (
        ("num_blocks", config.num_blocks, "1", config.num_blocks == 1),
        ("num_self_attends_per_block", config.num_self_attends_per_block, str(bert.num_hidden_layers),
         config.num_self_attends_per_block == bert.num_hidden_layers),
        ("num_self_attention_heads", config.num_self_attention_heads, str(bert.num_attention_heads),
         config.num_self_attention_heads == bert.num_attention_heads),
        ("hidden_act", config.hidden_act, bert.hidden_act, config.hidden_act == bert.hidden_act),
        ("num_latents", config.num_latents, f"{positions} and more", config.num_latents >= positions),
        ("qk_channels", config.qk_channels, str(width), config.qk_channels == width),
        ("d_latents", config.d_latents, f"{width + code} and more", config.d_latents >= width + code),
        ("d_model", config.d_model, str(config.d_latents), config.d_model == config.d_latents),
        ("self_attention_widening_factor", config.self_attention_widening_factor,
         f"{-(-bert.intermediate_size // config.d_latents)} and more",
         config.self_attention_widening_factor * config.d_latents >= bert.intermediate_size),
        ("num_cross_attention_heads", heads, f"1 to {max(1, width // code)}", heads * code <= width),
        ("use_query_residual", config.use_query_residual, "true", config.use_query_residual),
    ):  # fmt: skip
        if not fits:
            return f"{name} is {value}; allowed is {allowed}"
    return None


@torch.no_grad()
def start_from_bert(
    model: ToMePerceiverForMaskedLM, teacher: Teacher, examples: Mapping[str, Any], counts: Tensor
) -> None:
    """Give a model its teacher's weights.

    Args:
        model: of which all has been drawn, and of whose config `why_not_from_bert` says nothing.
        teacher: whose last hidden states the decoder's first H channels are to be.
        examples: lists of `input_ids` and `attention_mask`, to fit layer norms on.
        counts: (V,), how often each token stands in the training examples; the bias of the tokens' logits is their log
            frequency.
    """
    bert, encoder = teacher.model, model.perceiver.encoder
    decoder, inputs = model.perceiver.decoder, model.perceiver.input_preprocessor
    width = bert.config.hidden_size
    code = _code(model.config.max_position_embeddings)
    model.embedding_decoder.bias.copy_(log_frequencies(counts))
    ids, mask = (
        pad_sequence([torch.as_tensor(row) for row in examples[name]], batch_first=True)
        for name in ("input_ids", "attention_mask")
    )

    _copy_embeddings(inputs, teacher, code)
    embedded = inputs(ids)[0]
    states = bert.embeddings(teacher.ids[ids])
    reading = encoder.cross_attention.attention.self.layernorm2
    _fit(reading, embedded, states, mask)
    _place(model.perceiver.embeddings.latents, width, LATENT_CODE * states.norm(dim=-1).mean() * code)
    _pass_on(encoder.cross_attention, width)
    _find(encoder.cross_attention, model.perceiver.embeddings.latents, embedded, code, width, first=FIRST)
    latents = encoder.cross_attention(
        model.perceiver.embeddings(len(ids)), inputs=embedded, bias=padding_bias(mask, embedded)
    ).hidden_states

    for ours, theirs in zip(encoder.self_attends, bert.encoder.layer, strict=True):
        copied = ours.attention.self
        scale = _fit(copied.layernorm1, latents, states, mask)
        heads = copied.num_heads
        for name in ("query", "key", "value"):
            _copy(getattr(copied, name), getattr(theirs.attention.self, name), heads_out=heads)
        _copy(ours.attention.output.dense, theirs.attention.output.dense, heads_in=heads, scale=scale)
        latents = ours.attention(latents, None, None, False).hidden_states
        states = theirs.attention(states, padding_bias(mask, states))[0]
        scale = _fit(ours.layernorm, latents, states, mask)
        _copy(ours.mlp.dense1, theirs.intermediate.dense)
        _copy(ours.mlp.dense2, theirs.output.dense, scale=scale)
        latents = latents + ours.feed_forward_chunk(latents)
        states = theirs.output(theirs.intermediate(states), states)

    reads = decoder.decoding_cross_attention
    _fit(reads.attention.self.layernorm2, latents, states, mask)
    queries = decoder.output_position_encodings.position_embeddings
    _place(queries, width, code)
    _pass_on(reads, width)
    _find(reads, queries, latents, code, width)


def _code(positions: int) -> Tensor:
    """(P, K), of length 1 and nearly orthogonal."""
    directions = torch.linalg.qr(torch.randn(positions, positions))[0]
    return F.normalize(directions[:, : round(CODE_SHARE * positions)], dim=1)


def _copy_embeddings(inputs: nn.Module, teacher: Teacher, code: Tensor) -> None:
    """Embeddings of tokens and positions, and behind those of positions their code.

    The mean of each is taken off, as the layer norm after them does, whose mean is over more channels here.
    """
    theirs = teacher.model.embeddings
    tokens = theirs.word_embeddings.weight[teacher.ids]
    places = theirs.position_embeddings.weight[: len(code)] + theirs.token_type_embeddings.weight[0]
    width = tokens.shape[1]
    for ours, values in ((inputs.embeddings.weight, tokens), (inputs.position_embeddings.weight, places)):
        ours.zero_()
        ours[:, :width] = values - values.mean(dim=1, keepdim=True)
    inputs.position_embeddings.weight[:, width : width + code.shape[1]] = INPUT_CODE * tokens.norm(dim=1).mean() * code


def _place(vectors: Tensor, width: int, code: Tensor) -> None:
    """Let vectors (P or more, C) be their code (P, K), in the channels behind the first `width`."""
    vectors.zero_()
    vectors[: len(code), width : width + code.shape[1]] = code


def _pass_on(layer: nn.Module, width: int) -> None:
    """Let what a cross-attention layer reads be what it gives, in the first `width` channels."""
    for dense in (layer.attention.self.value, layer.attention.output.dense, layer.mlp.dense2):
        nn.init.zeros_(dense.weight)
        nn.init.zeros_(dense.bias)
    nn.init.eye_(layer.attention.self.value.weight)
    nn.init.eye_(layer.attention.output.dense.weight[:width])


def _find(layer: nn.Module, queries: Tensor, keys: Tensor, code: Tensor, width: int, first: float = 0.0) -> None:
    """Let query i of a cross-attention layer read key i, of codes (P, K): by all of a code, or by as many of its
    channels as a head has, drawn for each head.

    Args:
        queries, keys: (number, C) and (B, number, C), before their layer norms.
        first: the score of key 0 for every query, as a share.
    """
    attention, channels = layer.attention.self, code.shape[1]
    asked, held = attention.layernorm1(queries), attention.layernorm2(keys)
    count = min(len(code), held.shape[1])
    lengths = [
        (vectors[..., :count, width : width + channels] * code[:count]).sum(dim=-1).mean() for vectors in (asked, held)
    ]
    for dense in (attention.query, attention.key):
        nn.init.zeros_(dense.weight)
        nn.init.zeros_(dense.bias)
    size = attention.qk_channels_per_head
    used = min(size, channels)
    factor = SHARPNESS * math.sqrt(size) * channels / used
    for head in range(attention.num_heads):
        rows = torch.arange(head * size, head * size + used)
        chosen = torch.randperm(channels)[:used]
        attention.query.weight[rows, width + chosen] = factor / lengths[0]
        attention.query.bias[rows] = first * factor * code[0, chosen]
        attention.key.weight[rows, width + chosen] = 1 / lengths[1]


def _fit(norm: nn.LayerNorm, latents: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """Set scale and shift of a layer norm so that latents (B, N, C) after it are the states (B, S, H) as nearly as can
    be, at the positions of `mask` (B, S).

    Returns:
        (H,), the slope of the latents themselves over the states.
    """
    held = mask.bool()
    states = states[held]
    latents = latents[:, : held.shape[1]][held]
    width = states.shape[1]
    normed = F.layer_norm(latents, norm.normalized_shape, eps=norm.eps)[:, :width]
    slope = _slope(normed, states)
    norm.weight.fill_(1.0)
    norm.bias.zero_()
    norm.weight[:width] = slope
    norm.bias[:width] = states.mean(dim=0) - slope * normed.mean(dim=0)
    scale = _slope(states, latents[:, :width])
    return scale.clamp(max=STEEPEST * scale.median())


def _slope(over: Tensor, values: Tensor) -> Tensor:
    """(H,), of the line through values (number, H) over others (number, H), by channel; 0 over what does not vary."""
    varied = over - over.mean(dim=0)
    return (varied * (values - values.mean(dim=0))).mean(dim=0) / varied.square().mean(dim=0).clamp(min=LEAST_VARIANCE)


def _copy(
    ours: nn.Linear, theirs: nn.Linear, heads_in: int = 1, heads_out: int = 1, scale: Tensor | None = None
) -> None:
    """Copy a product to one with more channels, or more channels of each head.

    What is left over stays as it was drawn in the first product of a branch. In the second one, which has a scale, it
    adds nothing, until it has learnt to.
    """
    rows = _channels(theirs.out_features, ours.out_features, heads_out)
    columns = _channels(theirs.in_features, ours.in_features, heads_in)
    if scale is None:
        scale = torch.ones(theirs.out_features)
        ours.weight[rows] = 0.0
    else:
        nn.init.zeros_(ours.weight)
    nn.init.zeros_(ours.bias)
    ours.weight[rows[:, None], columns] = scale[:, None] * theirs.weight
    ours.bias[rows] = scale * theirs.bias


def _channels(count: int, room: int, heads: int) -> Tensor:
    """(count,), the first channels of each head."""
    return (torch.arange(heads)[:, None] * (room // heads) + torch.arange(count // heads)).flatten()
