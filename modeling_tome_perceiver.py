# SPDX-License-Identifier: Apache-2.0
"""Perceiver IO (Jaegle et al., 2022) that merges its latents as it runs (Bolya et al., 2023).

Every class is a subclass of the one in `transformers.models.perceiver.modeling_perceiver` with the same submodule
names, so stock checkpoints load as they are and `state_dict` keys stay upstream's. Data flows one way: encoder
cross-attention -> for each layer attention, match, size-weighted merge, MLP -> decoder cross-attention.

Letters: B batch, S inputs, N latents, M latents left, Q decoder queries, H heads, C channels of a latent, D channels
of a head's keys.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.perceiver import modeling_perceiver as upstream

# As in the module of the layers, which says why.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig  # type: ignore[import-not-found]
    from .layers_tome_perceiver import latent_bias, take_tome_classes  # type: ignore[import-not-found]
    from .merging_tome_perceiver import check_merge_method  # type: ignore[import-not-found]
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from layers_tome_perceiver import latent_bias, take_tome_classes
    from merging_tome_perceiver import check_merge_method

# More than all layers of a model could need, each for itself.
COMPILED_GRAPHS = 256


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


class ToMePerceiverPreTrainedModel(upstream.PerceiverPreTrainedModel):
    """What every ToMe Perceiver has beyond its upstream class, which comes after this one in the order of bases.

    Modifications:
    - upstream's parts take the classes of `layers_tome_perceiver.py`
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
        take_tome_classes(self, config)
        if type(self.base_model) is upstream.PerceiverModel:
            self.base_model.__class__ = ToMePerceiverModel
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

    def compile_repeated_blocks(self, **kwargs: Any) -> None:
        """Compile the self-attention layers, in place: one graph serves all of them, with any number of latents.

        Where `model.compile()` makes a graph of all layers with their shapes, and a new one for another r, this makes
        one for each kind of layer that it meets: a first merge, later ones, none, one latent left. Names of parameters,
        saving and loading stay as they are.

        Args:
            kwargs: of `torch.compile`; by default `dynamic=True`. With `dynamic=False` every number of latents is
                compiled for itself.

        Source: the method of that name in diffusers' `ModelMixin`.
        """
        kwargs = {"dynamic": True} | kwargs
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            # Of one layer's code there are several graphs: the first merge, later ones, none; one latent; training.
            kwargs = {"recompile_limit": COMPILED_GRAPHS} | kwargs
        for layer in self.base_model.encoder.self_attends:
            layer.compile(**kwargs)


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
            ValueError: for inputs longer or larger than the model's positions, or a mask of another length.
        """
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict

        inputs, modality_sizes, inputs_without_pos = self._preprocess(inputs, interpolate_pos_encoding)
        encoded = self.encoder(
            self.embeddings(batch_size=inputs.shape[0]),
            inputs=inputs,
            bias=None if attention_mask is None else padding_bias(attention_mask, inputs),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_latent_sources=output_latent_sources,
        )
        latents, sizes = encoded.last_hidden_state, encoded.latent_sizes

        logits, decoder_attentions = None, ()
        if self.decoder is not None:
            query = self.decoder.decoder_query(
                inputs, modality_sizes, inputs_without_pos, subsampled_points=subsampled_output_points
            )
            bias = latent_bias(config, sizes, latents.dtype)
            decoded = self.decoder(query, latents, bias, output_attentions)
            logits = decoded.logits
            decoder_attentions = decoded.cross_attentions or ()
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
            outputs = (logits, latents, encoded.hidden_states, encoded.attentions, encoded.cross_attentions)
            return tuple(output for output in outputs if output is not None) + decoder_attentions
        return ToMePerceiverModelOutput(
            logits=logits,
            last_hidden_state=latents,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions + decoder_attentions if output_attentions else None,
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


def padding_bias(attention_mask: Tensor, inputs: Tensor) -> Tensor:
    """A padding mask as scores to add, (B, 1, 1, S), in the dtype of `inputs`.

    Args:
        attention_mask: (B, S), true or 1 where to attend; a mask of four dimensions is one already, boolean
            (true where to attend) or to be added.
        inputs: (B, S, C'), what the mask is for.

    Raises:
        ValueError: for a mask of another length than the inputs.
    """
    dtype = inputs.dtype
    if attention_mask.shape[-1] != inputs.shape[1]:
        raise ValueError(
            f"attention_mask: of shape {tuple(attention_mask.shape)}; allowed is a last dimension of "
            f"{inputs.shape[1]}, one entry for each input"
        )
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
