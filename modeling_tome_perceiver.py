# SPDX-License-Identifier: Apache-2.0
"""Perceiver IO (Jaegle et al., 2022) that merges its latents as it runs (Bolya et al., 2023).

Every class is a subclass of the one in `transformers.models.perceiver.modeling_perceiver` with the same submodule
names, so stock checkpoints load as they are and `state_dict` keys stay upstream's. Data flows one way: encoder
cross-attention -> for each layer attention, match, size-weighted merge, MLP -> decoder cross-attention.

Letters: B batch, S inputs, N latents, M latents left, Q decoder queries, H heads, C channels of a latent, D channels
of a head's keys.
"""

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
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions
from transformers.models.perceiver import modeling_perceiver as upstream
from transformers.pytorch_utils import apply_chunking_to_forward

# Inside a package (a Hub checkpoint's code) only the relative import may answer: a broken module there must not be
# replaced in silence by another copy on the path.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig  # type: ignore[import-not-found]
    from .merging_tome_perceiver import (  # type: ignore[import-not-found]
        MERGE_METHODS,
        Match,
        MergeMethod,
        check_merge_method,
        follow_latents,
        log_size_bias,
        match_groups,
        merge_latents,
        source_matrix,
    )
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from merging_tome_perceiver import (
        MERGE_METHODS,
        Match,
        MergeMethod,
        check_merge_method,
        follow_latents,
        log_size_bias,
        match_groups,
        merge_latents,
        source_matrix,
    )


@dataclass
class ToMePerceiverEncoderOutput(BaseModelOutputWithCrossAttentions):
    """Upstream's encoder output with what became of the latents.

    Args:
        latent_sizes: (B, M) in float32 how many of the N latents each one left stands for, or `None` if none merged.
        latent_sources: (B, M, N) of 0 and 1, if asked for.
    """

    latent_sizes: Tensor | None = None
    latent_sources: Tensor | None = None


@dataclass
class ToMePerceiverModelOutput(upstream.PerceiverModelOutput):
    """Upstream's model output with what became of the latents.

    Args:
        latent_sizes: (B, M) in float32 how many of the N latents each one left stands for; the rows sum to N.
        latent_sources: (B, M, N) of 0 and 1, which of the N latents each one left stands for; returned when
            `output_latent_sources=True`. It partitions the N latents and its row sums are the sizes (but for the
            latents that `merge_method="prune"` drops).
    """

    latent_sizes: Tensor | None = None
    latent_sources: Tensor | None = None


class AttentionOutput(NamedTuple):
    """What attention hands on: its output (B, Q, C), its keys (B, H, N, D) and, if asked for, its weights."""

    hidden_states: Tensor
    keys: Tensor
    weights: Tensor | None


class LayerOutput(NamedTuple):
    """What a layer hands on: latents (B, M, C), their sizes (B, M), the merge it did and, if asked for, its weights."""

    hidden_states: Tensor
    sizes: Tensor | None
    match: Match | None
    attention_weights: Tensor | None


class ToMePerceiverSelfAttention(upstream.PerceiverSelfAttention):
    """Upstream's multi-head attention.

    Modifications:
    - `scaled_dot_product_attention`, unless the weights are asked for or `attn_implementation="eager"`
    - an additive bias (B or 1, 1, 1, N) instead of a mask
    - also returns the keys, which are the metric of matching
    """

    def forward(
        self, hidden_states: Tensor, inputs: Tensor | None, bias: Tensor | None, output_attentions: bool
    ) -> AttentionOutput:
        hidden_states = self.layernorm1(hidden_states)
        inputs = hidden_states if inputs is None else self.layernorm2(inputs)
        queries = self.transpose_for_scores(self.query(hidden_states), self.qk_channels_per_head)
        keys = self.transpose_for_scores(self.key(inputs), self.qk_channels_per_head)
        values = self.transpose_for_scores(self.value(inputs), self.v_channels_per_head)
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":
            scores = queries @ keys.transpose(-1, -2) / math.sqrt(self.qk_channels_per_head)
            weights = self.dropout((scores if bias is None else scores + bias).softmax(dim=-1))
            context = weights @ values
        else:
            dropout = self.dropout.p if self.training else 0.0
            bias = None if bias is None else bias.to(queries.dtype)
            context = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, dropout_p=dropout)
        return AttentionOutput(context.transpose(1, 2).flatten(2), keys, weights if output_attentions else None)


class ToMePerceiverAttention(upstream.PerceiverAttention):
    """Upstream's attention with output projection and residual.

    Modifications: passes the bias and hands on the keys.
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
        match_latents: Callable[[Tensor], Match] | None = None,
        inputs: Tensor | None = None,
        bias: Tensor | None = None,
        output_attentions: bool = False,
    ) -> LayerOutput:
        """
        Args:
            hidden_states: (B, N, C), or a decoder's queries (B, Q, C).
            sizes: (B, N), or `None` for 1 each.
            match_latents: from the keys (B, H, N, D) to what merges; `None` if nothing does.
            inputs: (B, S, C'), what cross-attention attends to; `None` for self-attention.
            bias: (B or 1, 1, 1, S) or (B, 1, 1, N), added to the scores.
            output_attentions: return the weights too.
        """
        attention = self.attention(hidden_states, inputs, bias, output_attentions)
        hidden_states, match = attention.hidden_states, None
        if match_latents is not None:
            match = match_latents(attention.keys.detach())
            hidden_states, sizes = merge_latents(hidden_states, sizes, match)
        hidden_states = hidden_states + apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
        )
        return LayerOutput(hidden_states, sizes, match, attention.weights)


class ToMePerceiverEncoder(upstream.PerceiverEncoder):
    """Upstream's encoder.

    Modifications: threads the sizes through the layers and gives each its merge. Layer modules are shared between
    blocks, so what a layer merges is an argument of its call, never a state of it.
    """

    def forward(
        self,
        hidden_states: Tensor,
        inputs: Tensor,
        bias: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        output_latent_sources: bool = False,
    ) -> ToMePerceiverEncoderOutput:
        """
        Args:
            hidden_states: (B, N, C), the latents.
            inputs: (B, S, C'), preprocessed.
            bias: (B, 1, 1, S), the padding mask as scores.
            output_attentions, output_hidden_states, output_latent_sources: return them too.
        """
        all_hidden_states, all_attentions, cross_attentions = [], [], []
        batch, num_latents = hidden_states.shape[:2]
        layer = self.cross_attention(hidden_states, inputs=inputs, bias=bias, output_attentions=output_attentions)
        hidden_states, sizes = layer.hidden_states, None
        cross_attentions.append(layer.attention_weights)
        # Where each of the first latents stands now.
        positions = torch.arange(num_latents, device=hidden_states.device).expand(batch, -1)
        for index, match_latents in enumerate(layer_matchers(self.config)):
            all_hidden_states.append(hidden_states)
            bias = None
            if sizes is not None and self.config.proportional_attention:
                bias = log_size_bias(sizes, hidden_states.dtype)
            module = self.self_attends[index % len(self.self_attends)]
            layer = module(hidden_states, sizes, match_latents, bias=bias, output_attentions=output_attentions)
            hidden_states, sizes = layer.hidden_states, layer.sizes
            all_attentions.append(layer.attention_weights)
            if output_latent_sources and layer.match is not None:
                positions = follow_latents(positions, layer.match)
            # As upstream: the state that ends a block stands twice, also as the one that starts the next.
            if (index + 1) % len(self.self_attends) == 0:
                all_hidden_states.append(hidden_states)
        return ToMePerceiverEncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            latent_sizes=sizes,
            latent_sources=source_matrix(positions, hidden_states.shape[1]) if output_latent_sources else None,
        )


def layer_matchers(config: ToMePerceiverConfig) -> list[Callable[[Tensor], Match] | None]:
    """For each of the L layers what decides its merge: from the keys (B, H, N, D) to a match, `None` for none.

    Matching at run time (`config.r`) and fixed groups (`config.merge_groups`) meet here and are one from here on.
    """
    if config.merge_groups is not None:
        return [None if groups is None else partial(_match_fixed, groups=groups) for groups in config.merge_groups]
    method = MERGE_METHODS[config.merge_method]
    return [partial(_match_by_keys, method=method, r=r) if r else None for r in config.merge_schedule]


def _match_by_keys(keys: Tensor, method: MergeMethod, r: int) -> Match:
    # The mean over heads is ToMe's metric (section 3, "token similarity").
    return method(keys.mean(dim=1), r)


def _match_fixed(keys: Tensor, groups: list[int]) -> Match:
    return match_groups(groups, keys.device)


class ToMePerceiverBasicDecoder(upstream.PerceiverBasicDecoder):
    """Upstream's cross-attention decoder.

    Modifications: a bias (B, 1, 1, M) on the scores, so that a merged latent counts as often as it stands for.
    Upstream drops every mask on the way here.
    """

    def forward(
        self, query: Tensor, z: Tensor, bias: Tensor | None = None, output_attentions: bool = False
    ) -> upstream.PerceiverDecoderOutput:
        layer = self.decoding_cross_attention(query, inputs=z, bias=bias, output_attentions=output_attentions)
        return upstream.PerceiverDecoderOutput(
            logits=self.final_layer(layer.hidden_states),
            cross_attentions=(layer.attention_weights,) if output_attentions else None,
        )


class ToMePerceiverClassificationDecoder(upstream.PerceiverClassificationDecoder):
    """Upstream's classification decoder. Modifications: passes the bias on."""

    def forward(
        self, query: Tensor, z: Tensor, bias: Tensor | None = None, output_attentions: bool = False
    ) -> upstream.PerceiverDecoderOutput:
        decoded = self.decoder(query, z, bias, output_attentions)
        decoded.logits = decoded.logits[:, 0, :]
        return decoded


class ToMePerceiverOpticalFlowDecoder(upstream.PerceiverOpticalFlowDecoder):
    """Upstream's optical flow decoder. Modifications: passes the bias on."""

    def forward(
        self, query: Tensor, z: Tensor, bias: Tensor | None = None, output_attentions: bool = False
    ) -> upstream.PerceiverDecoderOutput:
        decoded = self.decoder(query, z, bias, output_attentions)
        flow = decoded.logits / self.rescale_factor
        decoded.logits = flow.reshape(flow.shape[0], *self.output_image_shape, flow.shape[-1])
        return decoded


class ToMePerceiverMultimodalDecoder(upstream.PerceiverMultimodalDecoder):
    """Upstream's multimodal decoder. Modifications: passes the bias on."""

    def forward(
        self, query: Tensor, z: Tensor, bias: Tensor | None = None, output_attentions: bool = False
    ) -> upstream.PerceiverDecoderOutput:
        return self.decoder(query, z, bias, output_attentions)


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
        if pos is None:
            pos = upstream.build_linear_positions(index_dims, device=device).flatten(0, -2).expand(batch_size, -1, -1)
        bands = torch.stack(
            [torch.linspace(1.0, size / 2, self.num_bands, device=pos.device) for size in self.max_resolution]
        )
        # Positions are the same in every row of the batch.
        phase = math.pi * (pos[0, :, :, None] * bands).flatten(1)
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
            positions = self.position_embeddings(batch_size, interpolate_pos_encoding, index_dims)
        else:
            positions = self.position_embeddings(index_dims, batch_size, device=inputs.device, dtype=inputs.dtype)
        positions = self.positions_projection(positions)
        if not network_input_is_1d:
            positions = positions.unflatten(1, index_dims)
        elif positions.shape[1] != inputs.shape[1]:
            side = math.isqrt(positions.shape[1])
            raise ValueError(
                f"inputs: an image of {' x '.join(map(str, index_dims))} positions; allowed is {side} x {side} "
                f"(config.image_size), or another size with interpolate_pos_encoding=True"
            )
        if self.concat_or_add_pos == "add":
            return inputs + positions, inputs
        return torch.cat([inputs, positions], dim=-1), inputs


class ToMePerceiverPreTrainedModel(upstream.PerceiverPreTrainedModel):
    """What every ToMe Perceiver has beyond its upstream class, which comes after this one in the order of bases.

    Modifications:
    - upstream's parts take the classes of this module
    - `r`, settable at any time
    - `scaled_dot_product_attention` and activation checkpointing are supported
    """

    config_class = ToMePerceiverConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ToMePerceiverLayer"]
    # The heads take **kwargs and do not normalise their loss by `num_items_in_batch`; without this, Trainer believes
    # that they do and multiplies loss and gradients by the number of accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: ToMePerceiverConfig, *args: Any, **kwargs: Any) -> None:
        config.check_merging()
        check_merge_method(config.merge_method)
        # Upstream builds the parts, so that names, shapes, initialisation and use of random numbers are its own. Its
        # classes refuse sdpa, so they are built as eager and the question is put to this class.
        attn_implementation = config._attn_implementation
        config._attn_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        _take_tome_classes(self)
        config._attn_implementation = self._check_and_adjust_attn_implementation(
            attn_implementation, is_init_check=True
        )

    @property
    def r(self) -> int | list[int]:
        """Latents merged in each layer, as `config.r`; what is set is checked at once and is what gets saved.

        Raises:
            ValueError: in one line naming the field, the value and what is allowed; the old value stays.
        """
        return self.config.r

    @r.setter
    def r(self, r: int | list[int]) -> None:
        before, self.config.r = self.config.r, r
        try:
            self.config.check_merging()
        except ValueError:
            self.config.r = before
            raise


class ToMePerceiverModel(ToMePerceiverPreTrainedModel, upstream.PerceiverModel):
    """Upstream's `PerceiverModel`: preprocessor, encoder, decoder, postprocessor, each but the encoder optional.

    Modifications: merges by `config.r` or `config.merge_groups`; the decoder's attention weighs latents by their
    sizes; the output has `latent_sizes` and `latent_sources`.
    """

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        subsampled_output_points: dict[str, Tensor] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        output_latent_sources: bool = False,
        **kwargs: Any,
    ) -> tuple | ToMePerceiverModelOutput:
        """
        Args:
            inputs: what the preprocessor takes; without one (B, S, d_model).
            attention_mask: (B, S) of 1 (attend) and 0 (padding), boolean or a number; or scores to add,
                (B, 1, 1, S), in floating point.
            subsampled_output_points: for multimodal autoencoding, as upstream.
            output_attentions, output_hidden_states, interpolate_pos_encoding, return_dict: as upstream.
            output_latent_sources: return `latent_sources` too.

        Raises:
            ValueError: for inputs longer or larger than the model's positions.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict

        inputs, modality_sizes, inputs_without_pos = self._preprocess(inputs, interpolate_pos_encoding)
        encoded = self.encoder(
            self.embeddings(batch_size=inputs.shape[0]),
            inputs=inputs,
            bias=None if attention_mask is None else padding_bias(attention_mask, inputs.dtype),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_latent_sources=output_latent_sources,
        )
        latents, sizes, cross_attentions = encoded.last_hidden_state, encoded.latent_sizes, encoded.cross_attentions

        logits = None
        if self.decoder is not None:
            query = self.decoder.decoder_query(
                inputs, modality_sizes, inputs_without_pos, subsampled_points=subsampled_output_points
            )
            bias = None
            if sizes is not None and config.proportional_attention:
                bias = log_size_bias(sizes, latents.dtype)
            decoded = self.decoder(query, latents, bias, output_attentions)
            logits = decoded.logits
            if output_attentions:
                cross_attentions = cross_attentions + decoded.cross_attentions
            if self.output_postprocessor is not None:
                if subsampled_output_points is not None:
                    modality_sizes = {
                        "audio": subsampled_output_points["audio"].shape[0],
                        "image": subsampled_output_points["image"].shape[0],
                        "label": 1,
                    }
                logits = self.output_postprocessor(logits, modality_sizes=modality_sizes)

        if not return_dict:
            # Upstream's tuple: its heads, and whoever counts its places, know nothing of sizes.
            outputs = (logits, latents, encoded.hidden_states, encoded.attentions, cross_attentions)
            return tuple(output for output in outputs if output is not None)
        return ToMePerceiverModelOutput(
            logits=logits,
            last_hidden_state=latents,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=cross_attentions,
            latent_sizes=latents.new_ones(latents.shape[:2], dtype=torch.float32) if sizes is None else sizes,
            latent_sources=encoded.latent_sources,
        )

    def _preprocess(self, inputs: Any, interpolate_pos_encoding: bool) -> tuple[Tensor, Any, Any]:
        """The encoder's inputs (B, S, C'), the sizes of the modalities, and the inputs without positions."""
        if self.input_preprocessor is None:
            if inputs.shape[-1] != self.config.d_model:
                raise ValueError(
                    f"inputs: last dimension is {inputs.shape[-1]}; allowed is config.d_model = {self.config.d_model}"
                )
            return inputs, None, None
        if isinstance(self.input_preprocessor, upstream.PerceiverTextPreprocessor):
            allowed = self.config.max_position_embeddings
            if inputs.shape[1] > allowed:
                raise ValueError(
                    f"inputs: a text of {inputs.shape[1]} positions; allowed are at most "
                    f"config.max_position_embeddings = {allowed}"
                )
        return self.input_preprocessor(inputs, interpolate_pos_encoding=interpolate_pos_encoding)


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A padding mask as scores to add, (B, 1, 1, S).

    Args:
        attention_mask: (B, S), true or 1 where to attend; a mask of four dimensions is one already, boolean
            (true where to attend) or to be added.
        dtype: of the scores.
    """
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return attention_mask.to(dtype)
    keep = attention_mask.bool() if attention_mask.dim() == 4 else attention_mask[:, None, None, :].bool()
    # The smallest number rather than -inf: a row that is all padding gives a mean and not NaN, as upstream.
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


class ToMePerceiverForSequenceClassification(ToMePerceiverPreTrainedModel, upstream.PerceiverForSequenceClassification):
    """Upstream's text classification. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""


class ToMePerceiverForMaskedLM(ToMePerceiverPreTrainedModel, upstream.PerceiverForMaskedLM):
    """Upstream's masked language model. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""


class ToMePerceiverForImageClassificationLearned(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationLearned
):
    """Upstream's image classification with learned positions. Modifications: see `ToMePerceiverPreTrainedModel`."""


class ToMePerceiverForImageClassificationFourier(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationFourier
):
    """Upstream's image classification with Fourier positions. Modifications: see `ToMePerceiverPreTrainedModel`."""


class ToMePerceiverForImageClassificationConvProcessing(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationConvProcessing
):
    """Upstream's image classification with a convolution first. Modifications: see `ToMePerceiverPreTrainedModel`."""


class ToMePerceiverForOpticalFlow(ToMePerceiverPreTrainedModel, upstream.PerceiverForOpticalFlow):
    """Upstream's optical flow. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""


class ToMePerceiverForMultimodalAutoencoding(ToMePerceiverPreTrainedModel, upstream.PerceiverForMultimodalAutoencoding):
    """Upstream's multimodal autoencoding. Modifications: see `ToMePerceiverPreTrainedModel`."""


_TOME_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    upstream.PerceiverSelfAttention: ToMePerceiverSelfAttention,
    upstream.PerceiverAttention: ToMePerceiverAttention,
    upstream.PerceiverLayer: ToMePerceiverLayer,
    upstream.PerceiverEncoder: ToMePerceiverEncoder,
    upstream.PerceiverModel: ToMePerceiverModel,
    upstream.PerceiverBasicDecoder: ToMePerceiverBasicDecoder,
    upstream.PerceiverClassificationDecoder: ToMePerceiverClassificationDecoder,
    upstream.PerceiverOpticalFlowDecoder: ToMePerceiverOpticalFlowDecoder,
    upstream.PerceiverMultimodalDecoder: ToMePerceiverMultimodalDecoder,
    upstream.PerceiverFourierPositionEncoding: ToMePerceiverFourierPositionEncoding,
    upstream.PerceiverImagePreprocessor: ToMePerceiverImagePreprocessor,
}


def _take_tome_classes(model: nn.Module) -> None:
    """Give the parts that upstream's constructors made the classes of this module, once, while the model is built.

    Upstream's constructors name their parts' classes themselves, in seven heads and four decoders; to build ours
    beside them would copy all of their arguments and keep them in step with every release. The classes of this module
    change behaviour only (no constructor, no attribute but `config` on attention), stand at the top level of it, and
    so pickle and copy as any other.
    """
    for module in model.modules():
        module.__class__ = _TOME_CLASSES.get(type(module), type(module))
        if isinstance(module, ToMePerceiverSelfAttention):
            module.config = model.config


for _model_class, _auto_class in (
    (ToMePerceiverModel, "AutoModel"),
    (ToMePerceiverForSequenceClassification, "AutoModelForSequenceClassification"),
    (ToMePerceiverForMaskedLM, "AutoModelForMaskedLM"),
    (ToMePerceiverForImageClassificationLearned, "AutoModelForImageClassification"),
    (ToMePerceiverForImageClassificationFourier, "AutoModelForImageClassification"),
    (ToMePerceiverForImageClassificationConvProcessing, "AutoModelForImageClassification"),
    (ToMePerceiverForOpticalFlow, "AutoModel"),
    (ToMePerceiverForMultimodalAutoencoding, "AutoModel"),
):
    _model_class.register_for_auto_class(_auto_class)
