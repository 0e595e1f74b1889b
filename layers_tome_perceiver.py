# SPDX-License-Identifier: Apache-2.0
"""The parts of a Perceiver that merging changes: attention, layer, encoder, decoders, image preprocessing.

Every class is a subclass of the one in `transformers.models.perceiver.modeling_perceiver`; upstream's constructors
build the parts, and `take_tome_classes` gives them the classes of this module.

Letters: B batch, S inputs, N latents, M latents left, Q decoder queries, H heads, C channels of a latent, D channels
of a head's keys, E of a head's values.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.perceiver import modeling_perceiver as upstream
from transformers.pytorch_utils import apply_chunking_to_forward

# A Hub checkpoint's code is a package, in which only the relative import may answer: another copy on the path must not
# stand in for a broken module.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig
    from .merging_tome_perceiver import Match, log_size_bias, match_groups, merge_latents, merge_method, merge_sources
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from merging_tome_perceiver import Match, log_size_bias, match_groups, merge_latents, merge_method, merge_sources

# Scores that a CPU's cache holds: 8 MB in float32.
CACHED_SCORES = 2**21


@dataclass
class ToMePerceiverModelOutput(upstream.PerceiverModelOutput):
    """Upstream's model output with the sizes and sources of the latents.

    Args:
        latent_sizes: (B, M) in float32 how many of the N latents each one left stands for; the rows sum to N. An
            encoder's are `None` if none merged.
        latent_sources: (B, M, N) of 0 and 1, which of the N latents each one left stands for; returned when
            `output_latent_sources=True`. It partitions the N latents and its row sums are the sizes (but for the
            latents that a method drops).
    """

    latent_sizes: Tensor | None = None
    latent_sources: Tensor | None = None


class AttentionOutput(NamedTuple):
    """Output of attention (B, Q, C), its keys (B, H, N, D), its values (B, H, N, E) and, if asked for, its weights."""

    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None


MatchLatents = Callable[[AttentionOutput, Tensor | None], Match]
"""Decides what a layer merges, from the output of its attention and the sizes of the latents."""

METRICS: dict[str, Callable[[AttentionOutput], Tensor]] = {
    # The mean over heads is ToMe's metric (section 3, "token similarity").
    "key": lambda attention: attention.keys.mean(dim=1),
    "value": lambda attention: attention.values.mean(dim=1),
    "hidden": lambda attention: attention.hidden_states,
}
"""For each `config.merge_metric` the vectors that matching compares, (B, N, D), (B, N, E) or (B, N, C)."""


class LayerOutput(NamedTuple):
    """Latents (B, M, C) that a layer leaves, their sizes (B, M), its merge and, if asked for, its attention weights."""

    hidden_states: Tensor
    sizes: Tensor | None
    match: Match | None
    attention_weights: Tensor | None


class ToMePerceiverSelfAttention(upstream.PerceiverSelfAttention):
    """Upstream's multi-head attention.

    Modifications:
    - `scaled_dot_product_attention` where that is the faster way, unless the weights are asked for or
      `attn_implementation="eager"`
    - an additive bias (B or 1, 1, 1, N) instead of a mask
    - also returns the keys and the values, which matching may compare
    - queries that one row of the batch repeats to all (learned latents, a decoder's positions) are projected once
    """

    def forward(
        self, hidden_states: Tensor, inputs: Tensor | None, bias: Tensor | None, output_attentions: bool
    ) -> AttentionOutput:
        batch = hidden_states.shape[0]
        hidden_states = self.layernorm1(hidden_states if inputs is None else _repeated_row(hidden_states))
        inputs = hidden_states if inputs is None else self.layernorm2(inputs)
        queries = self.transpose_for_scores(self.query(hidden_states), self.qk_channels_per_head)
        queries = queries.expand(batch, -1, -1, -1)
        keys = self.transpose_for_scores(self.key(inputs), self.qk_channels_per_head)
        values = self.transpose_for_scores(self.value(inputs), self.v_channels_per_head)
        if output_attentions or not self._is_fused(queries):
            context, weights = self._attend(queries, keys, values, bias, output_attentions)
        else:
            dropout, weights = self.dropout.p if self.training else 0.0, None
            bias = None if bias is None else bias.to(queries.dtype)
            k, v, bias = _fill_up_keys(keys, values, bias)
            context = F.scaled_dot_product_attention(queries, k, v, attn_mask=bias, dropout_p=dropout)
        return AttentionOutput(context.transpose(1, 2).flatten(2), keys, values, weights)

    def _is_fused(self, queries: Tensor) -> bool:
        """Whether to use `scaled_dot_product_attention`: a CPU's is slow to train in bfloat16, and for unequal widths.

        Measured in docs/results/throughput ("A training step under autocast to bfloat16").
        """
        if self.config._attn_implementation == "eager":
            return False
        slow = self.qk_channels_per_head != self.v_channels_per_head or (
            self.training and queries.dtype == torch.bfloat16
        )
        return queries.device.type != "cpu" or not slow

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by plain products, on a CPU with as many heads at a time as leave the scores in its cache."""
        # Scaled before the product: there are far fewer queries than scores.
        queries = queries / math.sqrt(self.qk_channels_per_head)
        heads = queries.shape[1]
        if not (output_attentions or torch.compiler.is_compiling() or queries.device.type != "cpu"):
            scores_per_head = queries.shape[0] * queries.shape[2] * keys.shape[2]
            heads = min(max(CACHED_SCORES // max(scores_per_head, 1), 1), heads)
        contexts = []
        for q, k, v in zip(*(each.split(heads, dim=1) for each in (queries, keys, values)), strict=True):
            scores = q @ k.transpose(-1, -2)
            if bias is not None:
                scores += bias
            weights = self.dropout(scores.softmax(dim=-1))
            contexts.append(weights @ v)
        context = contexts[0] if heads == queries.shape[1] else torch.cat(contexts, dim=1)
        return context, weights if output_attentions else None


def _fill_up_keys(keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill up the keys that a merge leaves to a multiple of 16, with keys of weight 0.

    A CPU's fused attention takes 16 keys at once and the others one by one, which is slower for more than 8 of them
    (docs/results/throughput, "What merging leaves"). For a batch of one the copies cost what they save.
    """
    added = -keys.shape[2] % 16
    if bias is None or keys.device.type != "cpu" or torch.compiler.is_compiling():
        return keys, values, bias
    if keys.shape[0] == 1 or not 0 < added < 8:
        return keys, values, bias
    keys, values = (F.pad(each, (0, 0, 0, added)) for each in (keys, values))
    return keys, values, F.pad(bias, (0, added), value=-math.inf)


def _repeated_row(hidden_states: Tensor) -> Tensor:
    """(1, Q, C) if the rows of (B, Q, C) are one row in memory, as `expand` makes them; otherwise all of them."""
    return hidden_states[:1] if hidden_states.stride(0) == 0 else hidden_states


class ToMePerceiverAttention(upstream.PerceiverAttention):
    """Upstream's attention with output projection and residual.

    Modifications: passes the bias and hands on the keys and the values.
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
    - merges between the two, so that the MLP already runs on the latents that are left
    - can be checkpointed; the merge is an argument, so that a recomputed layer merges the same latents
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
            sizes: (B, N), or `None` for 1 each.
            match_latents: decides what merges; `None` if nothing does.
            inputs: (B, S, C'), what cross-attention attends to; `None` for self-attention.
            bias: (B or 1, 1, 1, S) or (B, 1, 1, N), added to the scores.
            output_attentions: return the weights too.
        """
        attention = self.attention(hidden_states, inputs, bias, output_attentions)
        hidden_states, weights, match = attention.hidden_states, attention.weights, None
        if match_latents is not None:
            match = match_latents(attention, sizes)
            hidden_states, sizes = merge_latents(hidden_states, sizes, match)
        # The MLP needs the memory of the keys, of the values and of the latents before the merge.
        del attention
        hidden_states = hidden_states + apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
        )
        return LayerOutput(hidden_states, sizes, match, weights)


def call_layer(layer: ToMePerceiverLayer, *arguments: Any) -> LayerOutput:
    """Call a layer so that it can be checkpointed: reentrant checkpointing gives gradients to positional arguments
    only, and returns a plain tuple."""
    return LayerOutput(*layer(*arguments))


class ToMePerceiverEncoder(upstream.PerceiverEncoder):
    """Upstream's encoder.

    Modifications:
    - threads the sizes through the layers and gives each its merge. Layer modules are shared between blocks, so what a
      layer merges is an argument of its call, never a state of it
    - learned latents in fixed groups merge before they read the inputs
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
            inputs: (B, S, C'), preprocessed.
            bias: (B, 1, 1, S), the padding mask as scores.
            output_attentions, output_hidden_states, output_latent_sources: return them too.
            plan: of this call's merges; `None` for the config's.

        Raises:
            ValueError: for a setting out of its range, or a config that is of another shape than the model by now.
        """
        batch, num_latents = hidden_states.shape[:2]
        # The schedule is the config's, so a number changed in it later would merge other layers or latents.
        for name, built in (("num_self_attends_per_block", len(self.self_attends)), ("num_latents", num_latents)):
            if getattr(self.config, name) != built:
                raise ValueError(f"{name}={getattr(self.config, name)}: must be {built}, as the model was built")
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
            # Only if asked for: held any longer, a layer's latents could not be reused for the next one's.
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
            # As upstream: the state that ends a block stands twice, also as the one that starts the next.
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
        """Let the learned latents (B, N, C) read the inputs (B, S, C'), merged in fixed groups if the plan has any."""
        sizes, match, batch = None, None, latents.shape[0]
        if plan.latent_groups is not None:
            match = match_groups(plan.latent_groups, latents.device)
            merged, size = merge_latents(_repeated_row(latents), None, match)
            latents, sizes = merged.expand(batch, -1, -1), size.expand(batch, -1)
        layer = call_layer(self.cross_attention, latents, None, None, inputs, bias, output_attentions)
        return layer._replace(sizes=sizes, match=match)


def latent_bias(config: ToMePerceiverConfig, sizes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the bias on scores whose keys are latents, (B, 1, 1, M); `None` if sizes make no difference."""
    return None if sizes is None or not config.proportional_attention else log_size_bias(sizes, dtype)


class MergePlan(NamedTuple):
    """Merges of one forward pass.

    Attributes:
        schedule: latents removed in each layer that runs.
        merge_groups: fixed groups for each layer, in place of matching; `None` to match.
        latent_groups: groups of the learned latents before they read the inputs; `None` for none.
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
    """Return the merges of a config, or in their place those of an `r` or of the frontier's best row within a share.

    Raises:
        ValueError: for a setting out of its range, in one line.
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
    """Return the function that decides the merge of each layer, by matching or fixed groups; `None` for no merge."""
    if plan.merge_groups is not None:
        # As tensors from here on: a compiled layer would take lists for constants, and be compiled for each.
        return [
            None if groups is None else partial(_match_fixed, match=match_groups(groups, device))
            for groups in plan.merge_groups
        ]
    method, metric = merge_method(plan.merge_method), METRICS[plan.merge_metric]
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


def _match_fixed(attention: AttentionOutput, sizes: Tensor | None, match: Match) -> Match:
    return match


class WeighedLatents(NamedTuple):
    """Latents (B, M, C) for a decoder, and the bias on their scores (B, 1, 1, M), `None` for none.

    Upstream's decoders hand the latents as they are to the one of cross-attention, and drop every mask on the way.
    """

    latents: Tensor
    bias: Tensor | None


class ToMePerceiverBasicDecoder(upstream.PerceiverBasicDecoder):
    """Upstream's cross-attention decoder. Modifications: takes `WeighedLatents`."""

    def forward(
        self, query: Tensor, z: WeighedLatents, query_mask: Tensor | None = None, output_attentions: bool = False
    ) -> upstream.PerceiverDecoderOutput:
        layer = call_layer(self.decoding_cross_attention, query, None, None, z.latents, z.bias, output_attentions)
        return upstream.PerceiverDecoderOutput(
            logits=self.final_layer(layer.hidden_states),
            cross_attentions=(layer.attention_weights,) if output_attentions else None,
        )


class ToMePerceiverFourierPositionEncoding(upstream.PerceiverFourierPositionEncoding):
    """Upstream's Fourier features (Jaegle et al., 2022, appendix D).

    Modifications: shapes by `math` instead of NumPy, which breaks the graph of `torch.compile`.
    """

    def forward(
        self,
        index_dims: list[int],
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        pos: Tensor | None = None,
    ) -> Tensor:
        # Positions are the same in every row of the batch, which may have none.
        shared = upstream.build_linear_positions(index_dims, device=device).flatten(0, -2) if pos is None else pos[0]
        pos = shared.expand(batch_size, -1, -1) if pos is None else pos
        bands = torch.stack(
            [torch.linspace(1.0, size / 2, self.num_bands, device=pos.device) for size in self.max_resolution]
        )
        phase = math.pi * (shared[:, :, None] * bands).flatten(1)
        features = phase.sin() if self.sine_only else torch.cat([phase.sin(), phase.cos()], dim=-1)
        features = features.expand(batch_size, -1, -1)
        return (torch.cat([pos, features], dim=-1) if self.concat_pos else features).to(dtype)


class ToMePerceiverImagePreprocessor(upstream.PerceiverImagePreprocessor):
    """Upstream's image preprocessing.

    Modifications: shapes without NumPy, which breaks the graph of `torch.compile`; an image whose size does not fit
    learned positions is an error of one line.
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
        # Positions that were learned in one dimension are of a square image, as upstream's interpolation assumes.
        square = self.position_embeddings.num_dimensions == 1
        if math.prod(index_dims) != count or (square and index_dims != (side, side)):
            raise ValueError(
                f"inputs: an image of {' x '.join(map(str, index_dims))} positions; must be {side} x {side} "
                "(config.image_size), or another size with interpolate_pos_encoding=True"
            )


_TOME_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    upstream.PerceiverSelfAttention: ToMePerceiverSelfAttention,
    upstream.PerceiverAttention: ToMePerceiverAttention,
    upstream.PerceiverLayer: ToMePerceiverLayer,
    upstream.PerceiverEncoder: ToMePerceiverEncoder,
    upstream.PerceiverBasicDecoder: ToMePerceiverBasicDecoder,
    upstream.PerceiverFourierPositionEncoding: ToMePerceiverFourierPositionEncoding,
    upstream.PerceiverImagePreprocessor: ToMePerceiverImagePreprocessor,
}


def take_tome_classes(model: nn.Module, config: ToMePerceiverConfig) -> None:
    """Give the parts that upstream's constructors made the classes of this module, once, while the model is built.

    Upstream's constructors name their parts' classes themselves, in seven heads and four decoders; to build ours
    beside them would copy all of their arguments and keep them in step with every release. The classes of this module
    change behaviour only (no constructor, no attribute but `config` on attention), stand at the top level of it, and
    so pickle and copy as any other.
    """
    for module in model.modules():
        module.__class__ = _TOME_CLASSES.get(type(module), type(module))
        if isinstance(module, ToMePerceiverSelfAttention):
            module.config = config
