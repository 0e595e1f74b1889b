# SPDX-License-Identifier: Apache-2.0
"""The parts of a Perceiver that merging changes: attention, layer, encoder, decoders, image preprocessing.

`modeling_tome_perceiver.py` builds the models from them, with the functions of `merging_tome_perceiver.py`. Each module
class here is a subclass of its upstream class in `transformers.models.perceiver.modeling_perceiver`: upstream's
constructors build the parts, then `use_tome_classes` changes their classes to those of this module.

Letters: B batch size, S inputs, N latents, M latents left, Q decoder queries, H heads, C channels of a latent, D
channels of a head's keys, E channels of a head's values.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.perceiver import modeling_perceiver as upstream
from transformers.pytorch_utils import apply_chunking_to_forward

# In the repository these files are top-level modules; in a Hub checkpoint they are a package, which must import only
# its own files. If one of those is broken, its error is raised: a copy elsewhere on the path must not replace it.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig
    from .merging_tome_perceiver import Match, get_method, log_size_bias, match_groups, merge_latents, merge_sources
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from merging_tome_perceiver import Match, get_method, log_size_bias, match_groups, merge_latents, merge_sources

# Most attention scores to compute at once on a CPU, so that they stay in its cache: 8 MB in float32.
MAX_CACHED_SCORES = 2**21


@dataclass
class ToMePerceiverModelOutput(upstream.PerceiverModelOutput):
    """Upstream's model output with the sizes and sources of the latents.

    Args:
        latent_sizes: (B, M) in float32, the number of the N latents that each remaining latent contains; each row sums
            to N. The encoder returns `None` if nothing merged.
        latent_sources: (B, M, N) of 0 and 1, which of the N latents each remaining latent contains; returned if
            `output_latent_sources=True`. Each of the N latents is in exactly one remaining latent, or in none if the
            method drops it. The sums over N are the sizes.
    """

    latent_sizes: Tensor | None = None
    latent_sources: Tensor | None = None


class AttentionOutput(NamedTuple):
    """Output of attention (B, Q, C), its keys (B, H, N, D), its values (B, H, N, E) and, on request, its weights."""

    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None


MatchLatents = Callable[[AttentionOutput, Tensor | None], Match]
"""Function that decides what a layer merges, given the output of its attention and the sizes of its latents."""

METRICS: dict[str, Callable[[AttentionOutput], Tensor]] = {
    # ToMe compares keys averaged over heads (section 3, "token similarity").
    "key": lambda attention: attention.keys.mean(dim=1),
    "value": lambda attention: attention.values.mean(dim=1),
    "hidden": lambda attention: attention.hidden_states,
}
"""The vectors that matching compares, by `config.merge_metric`: (B, N, D), (B, N, E) or (B, N, C)."""


class LayerOutput(NamedTuple):
    """Latents (B, M, C) after a layer, their sizes (B, M), the layer's match and, on request, its attention weights."""

    hidden_states: Tensor
    sizes: Tensor | None
    match: Match | None
    attention_weights: Tensor | None


class ToMePerceiverSelfAttention(upstream.PerceiverSelfAttention):
    """Upstream's multi-head attention.

    Modifications:
    - uses `scaled_dot_product_attention` where it is faster, unless the attention weights are requested or
      `attn_implementation="eager"`
    - takes an additive bias (B or 1, 1, 1, N) instead of a mask
    - also returns the keys and the values, which matching may compare
    - projects queries only once if all rows of the batch share them (learned latents, a decoder's positions)
    """

    def forward(
        self, hidden_states: Tensor, inputs: Tensor | None, bias: Tensor | None, output_attentions: bool
    ) -> AttentionOutput:
        batch = hidden_states.shape[0]
        hidden_states = self.layernorm1(hidden_states if inputs is None else _drop_repeated_rows(hidden_states))
        inputs = hidden_states if inputs is None else self.layernorm2(inputs)
        queries = self.transpose_for_scores(self.query(hidden_states), self.qk_channels_per_head)
        queries = queries.expand(batch, -1, -1, -1)
        keys = self.transpose_for_scores(self.key(inputs), self.qk_channels_per_head)
        values = self.transpose_for_scores(self.value(inputs), self.v_channels_per_head)
        if output_attentions or not self._uses_fused_attention(queries):
            context, weights = self._attend_unfused(queries, keys, values, bias, output_attentions)
        else:
            dropout, weights = self.dropout.p if self.training else 0.0, None
            bias = None if bias is None else bias.to(queries.dtype)
            k, v, bias = _pad_keys(keys, values, bias)
            context = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias, dropout_p=dropout)
        return AttentionOutput(context.transpose(1, 2).flatten(2), keys, values, weights)

    def _uses_fused_attention(self, queries: Tensor) -> bool:
        """Return whether to use `scaled_dot_product_attention`.

        On a CPU it is slow when training in bfloat16, and when a head's keys and values have different widths; see
        docs/results/throughput ("A training step under autocast to bfloat16").
        """
        if self.config._attn_implementation == "eager":
            return False
        slow = self.qk_channels_per_head != self.v_channels_per_head or (
            self.training and queries.dtype == torch.bfloat16
        )
        return queries.device.type != "cpu" or not slow

    def _attend_unfused(
        self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by matrix products; on a CPU, for a few heads at a time, so that the scores stay in its cache."""
        # Scale the queries and not the scores, which have far more entries.
        queries = queries / math.sqrt(self.qk_channels_per_head)
        heads = queries.shape[1]
        if not (output_attentions or torch.compiler.is_compiling() or queries.device.type != "cpu"):
            scores_per_head = queries.shape[0] * queries.shape[2] * keys.shape[2]
            heads = min(max(MAX_CACHED_SCORES // max(scores_per_head, 1), 1), heads)
        contexts = []
        for q, k, v in zip(*(tensor.split(heads, dim=1) for tensor in (queries, keys, values)), strict=True):
            scores = q @ k.transpose(-1, -2)
            if bias is not None:
                scores += bias
            weights = self.dropout(scores.softmax(dim=-1))
            contexts.append(weights @ v)
        context = contexts[0] if heads == queries.shape[1] else torch.cat(contexts, dim=1)
        return context, weights if output_attentions else None


def _pad_keys(keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pad the keys to a multiple of 16, with padding keys of attention weight 0, where that is faster.

    On a CPU, fused attention handles keys 16 at a time and the rest one by one, which is slower if more than 8 remain
    (docs/results/throughput, "What merging leaves"). For a batch of one, the copies cost as much as they save.
    """
    added = -keys.shape[2] % 16
    if bias is None or keys.device.type != "cpu" or torch.compiler.is_compiling():
        return keys, values, bias
    if keys.shape[0] == 1 or not 0 < added < 8:
        return keys, values, bias
    keys, values = (F.pad(tensor, (0, 0, 0, added)) for tensor in (keys, values))
    return keys, values, F.pad(bias, (0, added), value=-math.inf)


def _drop_repeated_rows(hidden_states: Tensor) -> Tensor:
    """Return one row, (1, Q, C), if `expand` made the rows of (B, Q, C) from one; otherwise return all B rows."""
    return hidden_states[:1] if hidden_states.stride(0) == 0 else hidden_states


class ToMePerceiverAttention(upstream.PerceiverAttention):
    """Upstream's attention with output projection and residual.

    Modifications: passes the bias to the attention, and also returns its keys and values.
    """

    def forward(
        self, hidden_states: Tensor, inputs: Tensor | None, bias: Tensor | None, output_attentions: bool
    ) -> AttentionOutput:
        attended = self.self(hidden_states, inputs, bias, output_attentions)
        projected = self.output(attended.hidden_states)
        if self.use_query_residual:
            projected = projected + hidden_states
        return attended._replace(hidden_states=projected)


class ToMePerceiverLayer(GradientCheckpointingLayer, upstream.PerceiverLayer):
    """Upstream's layer: attention, then an MLP.

    Modifications:
    - merges latents between the two, so that the MLP runs only on those left
    - supports activation checkpointing; the merge is an argument, so a recomputed layer merges the same latents
    """

    def forward(
        self,
        hidden_states: Tensor,
        sizes: Tensor | None = None,
        match_latents: MatchLatents | None = None,
        inputs: Tensor | None = None,
        bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> LayerOutput:
        """
        Args:
            hidden_states: (B, N, C), or a decoder's queries (B, Q, C).
            sizes: (B, N), sizes of the latents; `None` for 1 each.
            match_latents: decides what merges; `None` to merge nothing.
            inputs: (B, S, C'), the inputs of cross-attention; `None` for self-attention.
            bias: (B or 1, 1, 1, S) or (B, 1, 1, N), added to the attention scores.
            output_attentions: also return the attention weights.
        """
        attention = self.attention(hidden_states, inputs, bias, output_attentions)
        hidden_states, weights, match = attention.hidden_states, attention.weights, None
        if match_latents is not None:
            match = match_latents(attention, sizes)
            hidden_states, sizes = merge_latents(hidden_states, sizes, match)
        # Free the keys, the values and the latents before the merge, so that the MLP can use their memory.
        del attention
        hidden_states = hidden_states + apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
        )
        return LayerOutput(hidden_states, sizes, match, weights)


def call_layer(layer: ToMePerceiverLayer, *arguments: Any) -> LayerOutput:
    """Call a layer so that activation checkpointing works.

    Reentrant checkpointing computes gradients only for positional arguments, and returns a plain tuple.
    """
    return LayerOutput(*layer(*arguments))


class ToMePerceiverEncoder(upstream.PerceiverEncoder):
    """Upstream's encoder.

    Modifications:
    - passes the sizes from layer to layer, and tells each layer what to merge: by an argument and not an attribute,
      because blocks share their layer modules
    - can merge fixed groups of the learned latents before they read the inputs
    """

    def forward(
        self,
        hidden_states: Tensor,
        inputs: Tensor,
        bias: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_latent_sources: bool = False,
        plan: MergePlan | None = None,
    ) -> ToMePerceiverModelOutput:
        """
        Args:
            hidden_states: (B, N, C), the latents.
            inputs: (B, S, C'), the preprocessed inputs.
            bias: (B, 1, 1, S), the padding mask as a bias on the attention scores.
            output_attentions, output_hidden_states, output_latent_sources: also return these.
            plan: what to merge in this call; `None` to follow the config.

        Raises:
            ValueError: if a setting is out of range, or if the config's shapes no longer match the model.
        """
        batch, num_latents = hidden_states.shape[:2]
        # The merge schedule is computed from the config. If these fields were changed after the model was built, the
        # schedule would not fit its layers and latents.
        for name, built_with in (("num_self_attends_per_block", len(self.self_attends)), ("num_latents", num_latents)):
            value = getattr(self.config, name)
            if value != built_with:
                raise ValueError(f"{name}={value}: must be {built_with}, the value that the model was built with")
        plan = merge_plan(self.config) if plan is None else plan
        all_hidden_states, all_attentions = [], []
        sources = None
        if output_latent_sources:
            sources = torch.eye(num_latents, device=hidden_states.device).expand(batch, -1, -1)
        layer = self.read(hidden_states, inputs, bias, plan, output_attentions)
        hidden_states, sizes, cross_attention_weights = layer.hidden_states, layer.sizes, layer.attention_weights
        if sources is not None and layer.match is not None:
            sources = merge_sources(sources, layer.match)
        for index, match_latents in enumerate(layer_matchers(plan, hidden_states.device)):
            # Keep the latents only on request; otherwise the next layer can use their memory.
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if layer.match is not None or index == 0:
                bias = latent_bias(self.config, sizes, hidden_states.dtype)
            module = self.self_attends[index % len(self.self_attends)]
            layer = call_layer(module, hidden_states, sizes, match_latents, None, bias, output_attentions)
            hidden_states, sizes = layer.hidden_states, layer.sizes
            all_attentions.append(layer.attention_weights)
            if sources is not None and layer.match is not None:
                sources = merge_sources(sources, layer.match)
            # As upstream, the state between two blocks is returned twice: as the end of one and the start of the next.
            if output_hidden_states and (index + 1) % len(self.self_attends) == 0:
                all_hidden_states.append(hidden_states)
        return ToMePerceiverModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            cross_attentions=(cross_attention_weights,) if output_attentions else None,
            latent_sizes=sizes,
            latent_sources=sources,
        )

    def read(
        self, latents: Tensor, inputs: Tensor, bias: Tensor | None, plan: MergePlan, output_attentions: bool = False
    ) -> LayerOutput:
        """Apply the cross-attention of the latents (B, N, C) to the inputs (B, S, C').

        If the plan has `latent_groups`, the latents are merged in these groups first.
        """
        sizes, match, batch = None, None, latents.shape[0]
        if plan.latent_groups is not None:
            match = match_groups(plan.latent_groups, latents.device)
            merged, size = merge_latents(_drop_repeated_rows(latents), None, match)
            latents, sizes = merged.expand(batch, -1, -1), size.expand(batch, -1)
        layer = call_layer(self.cross_attention, latents, None, None, inputs, bias, output_attentions)
        return layer._replace(sizes=sizes, match=match)


def latent_bias(config: ToMePerceiverConfig, sizes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias (B, 1, 1, M) of proportional attention to latents; `None` if it is off or all sizes are 1."""
    return None if sizes is None or not config.proportional_attention else log_size_bias(sizes, dtype)


class MergePlan(NamedTuple):
    """Merges of one forward pass.

    Attributes:
        schedule: number of latents merged away in each layer that runs.
        merge_groups: fixed groups for each layer; `None` to match latents instead.
        latent_groups: groups in which the learned latents merge before they read the inputs; `None` to keep them all.
        merge_method, merge_metric: as in the config.
    """

    schedule: list[int]
    merge_groups: list[list[int] | None] | None
    latent_groups: list[int] | None
    merge_method: str
    merge_metric: str


def merge_plan(
    config: ToMePerceiverConfig, r: int | list[int] | None = None, flops_ratio: float | None = None
) -> MergePlan:
    """Return what to merge in one forward pass: by `r`, by `flops_ratio` or, without either, by the config.

    Args:
        config: config of the model.
        r: number of latents to merge away in each layer, as in the config.
        flops_ratio: merge by the best row of the config's frontier within this share of the FLOPs.

    Raises:
        ValueError: if a setting is out of range, or if both arguments are given.
    """
    if r is not None and flops_ratio is not None:
        raise ValueError(f"r={r}, flops_ratio={flops_ratio}: use one of them")
    if flops_ratio is not None:
        config = config.merged_as(config.frontier_row(flops_ratio))
    schedule, method, metric = config.merge_schedule, config.merge_method, config.merge_metric
    if r is not None:
        return MergePlan(config.schedule_of(r), None, None, method, metric)
    return MergePlan(schedule, config.merge_groups, config.latent_groups, method, metric)


def layer_matchers(plan: MergePlan, device: torch.device) -> list[MatchLatents | None]:
    """Return for each layer the function that decides what merges, by groups or matching; `None` to merge nothing."""
    if plan.merge_groups is not None:
        # Pass groups as tensors: `torch.compile` treats a list as a constant and would recompile the layer for each.
        return [
            None if groups is None else partial(_return_fixed_match, match=match_groups(groups, device))
            for groups in plan.merge_groups
        ]
    method, metric = get_method(plan.merge_method), METRICS[plan.merge_metric]
    matching = partial(_match_by_metric, method=method, metric=metric)
    layers = len(plan.schedule)
    return [partial(matching, r=r, depth=index / layers) if r else None for index, r in enumerate(plan.schedule)]


def _match_by_metric(
    attention: AttentionOutput,
    sizes: Tensor | None,
    method: Callable[..., Match],
    metric: Callable[[AttentionOutput], Tensor],
    r: int,
    depth: float,
) -> Match:
    return method(metric(attention).detach(), r, sizes, depth)


def _return_fixed_match(attention: AttentionOutput, sizes: Tensor | None, match: Match) -> Match:
    return match


class WeighedLatents(NamedTuple):
    """Latents (B, M, C) for a decoder, with the bias (B, 1, 1, M) on their attention scores or `None`.

    They travel together because upstream's decoders pass the latents unchanged to `PerceiverBasicDecoder`, but drop
    every mask.
    """

    latents: Tensor
    bias: Tensor | None


class ToMePerceiverBasicDecoder(upstream.PerceiverBasicDecoder):
    """Upstream's cross-attention decoder. Modifications: takes `WeighedLatents` in place of latents."""

    def forward(
        self, query: Tensor, z: WeighedLatents, query_mask: Tensor | None = None, output_attentions: bool = False
    ) -> upstream.PerceiverDecoderOutput:
        layer = call_layer(self.decoding_cross_attention, query, None, None, z.latents, z.bias, output_attentions)
        return upstream.PerceiverDecoderOutput(
            logits=self.final_layer(layer.hidden_states),
            cross_attentions=(layer.attention_weights,) if output_attentions else None,
        )


class ToMePerceiverEmbeddingDecoder(upstream.PerceiverEmbeddingDecoder):
    """Upstream's output layer of masked language models.

    Modifications: the embeddings may be offloaded or on another device than the hidden states.
    """

    def forward(self, hidden_states: Tensor, embedding_layer: Any) -> Tensor:
        if embedding_layer.weight.device != hidden_states.device:
            # accelerate loads offloaded weights only while their own module runs, so look up every row.
            rows = embedding_layer(torch.arange(embedding_layer.num_embeddings, device=hidden_states.device))
            embedding_layer = SimpleNamespace(weight=rows.to(hidden_states.device))
        return super().forward(hidden_states, embedding_layer)


class ToMePerceiverFourierPositionEncoding(upstream.PerceiverFourierPositionEncoding):
    """Upstream's Fourier features (Jaegle et al., 2022, appendix D).

    Modifications: computes shapes without NumPy, which breaks the graph of `torch.compile`, and positions on the device
    of the inputs, which upstream does since transformers 5.10.
    """

    def forward(
        self,
        index_dims: list[int],
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        pos: Tensor | None = None,
    ) -> Tensor:
        # Build the positions without a batch dimension: all rows share them, and the batch may be empty.
        shared = _linear_positions(index_dims, device) if pos is None else pos[0]
        pos = shared.expand(batch_size, -1, -1) if pos is None else pos
        bands = torch.stack(
            [torch.linspace(1.0, size / 2, self.num_bands, device=pos.device) for size in self.max_resolution]
        )
        phase = math.pi * (shared[:, :, None] * bands).flatten(1)
        features = phase.sin() if self.sine_only else torch.cat([phase.sin(), phase.cos()], dim=-1)
        features = features.expand(batch_size, -1, -1)
        return (torch.cat([pos, features], dim=-1) if self.concat_pos else features).to(dtype)


def _linear_positions(index_dims: Sequence[int], device: torch.device) -> Tensor:
    """Return the positions (S, number of dimensions) of a grid, from -1 to 1 in each dimension, in float32."""
    axes = [torch.linspace(-1.0, 1.0, size, dtype=torch.float32, device=device) for size in index_dims]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


class ToMePerceiverImagePreprocessor(upstream.PerceiverImagePreprocessor):
    """Upstream's image preprocessing.

    Modifications: computes shapes without NumPy, which breaks the graph of `torch.compile`; raises a one-line error for
    an image whose size does not fit the learned positions.
    """

    def _build_network_inputs(
        self, inputs: Tensor, network_input_is_1d: bool = True, interpolate_pos_encoding: bool = False
    ) -> tuple[Tensor, Tensor]:
        batch_size, index_dims = inputs.shape[0], inputs.shape[1:-1]
        if network_input_is_1d:
            inputs = inputs.flatten(1, -2)
        if self.position_encoding_type == "trainable":
            if not interpolate_pos_encoding:
                self._check_learned_positions(index_dims)
            positions = self.position_embeddings(batch_size, interpolate_pos_encoding, index_dims)
        else:
            positions = self.position_embeddings(index_dims, batch_size, device=inputs.device, dtype=inputs.dtype)
        positions = self.positions_projection(positions)
        if not network_input_is_1d:
            positions = positions.unflatten(1, index_dims)
        if self.concat_or_add_pos == "add":
            return inputs + positions, inputs
        return torch.cat([inputs, positions], dim=-1), inputs

    def _check_learned_positions(self, index_dims: torch.Size) -> None:
        count = self.position_embeddings.position_embeddings.shape[0]
        side = math.isqrt(count)
        # One-dimensional learned positions belong to a square image; upstream's interpolation assumes so too.
        is_square = self.position_embeddings.num_dimensions == 1
        if math.prod(index_dims) != count or (is_square and index_dims != (side, side)):
            raise ValueError(
                f"inputs: the image has {' x '.join(map(str, index_dims))} positions; must be {side} x {side} "
                "(config.image_size), or use interpolate_pos_encoding=True"
            )


_TOME_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    upstream.PerceiverSelfAttention: ToMePerceiverSelfAttention,
    upstream.PerceiverAttention: ToMePerceiverAttention,
    upstream.PerceiverLayer: ToMePerceiverLayer,
    upstream.PerceiverEncoder: ToMePerceiverEncoder,
    upstream.PerceiverBasicDecoder: ToMePerceiverBasicDecoder,
    upstream.PerceiverEmbeddingDecoder: ToMePerceiverEmbeddingDecoder,
    upstream.PerceiverFourierPositionEncoding: ToMePerceiverFourierPositionEncoding,
    upstream.PerceiverImagePreprocessor: ToMePerceiverImagePreprocessor,
}


def use_tome_classes(model: nn.Module, config: ToMePerceiverConfig) -> None:
    """Change the class of each part that upstream's constructors built to the class of this module, in place.

    Called once, while the model is built. Upstream's constructors, in seven heads and four decoders, name the classes
    of their parts themselves; building ours instead would mean copying these constructors and following every release.
    The classes here change behaviour only: they have no constructor and add no attribute except `config` on attention,
    so a changed object behaves, pickles and copies like one that its new class built.
    """
    for module in model.modules():
        module.__class__ = _TOME_CLASSES.get(type(module), type(module))
        if isinstance(module, ToMePerceiverSelfAttention):
            module.config = config
