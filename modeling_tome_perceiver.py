# SPDX-License-Identifier: Apache-2.0
"""Perceiver IO (Jaegle et al., 2022) that merges its latents as it runs (Bolya et al., 2023).

Every class is a subclass of the one in `transformers.models.perceiver.modeling_perceiver` with the same submodule
names, so stock checkpoints load as they are and `state_dict` keys stay upstream's. Data flows one way: encoder
cross-attention -> for each layer attention, match, size-weighted merge, MLP -> decoder cross-attention.

Letters: B batch, S inputs, N latents, M latents left, Q decoder queries, H heads, C channels of a latent, D channels
of a head's keys.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.perceiver import modeling_perceiver as upstream

# A checkpoint carries the files named here. As in the module of the layers, only its own copies may answer.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig
    from .layers_tome_perceiver import (
        ToMePerceiverModelOutput,
        WeighedLatents,
        latent_bias,
        merge_plan,
        take_tome_classes,
    )
    from .merging_tome_perceiver import check_merge_method
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from layers_tome_perceiver import (
        ToMePerceiverModelOutput,
        WeighedLatents,
        latent_bias,
        merge_plan,
        take_tome_classes,
    )
    from merging_tome_perceiver import check_merge_method

# transformers also copies these two files because it reads these lines; they are imported when first needed.
if TYPE_CHECKING:
    from .cost_tome_perceiver import Merging
    from .frontier_tome_perceiver import Choice, Frontier

# More than all layers of a model could need, each for itself.
COMPILED_GRAPHS = 256

# What tokenizers and Trainer hand to any model, and a Perceiver has no use for.
WITHOUT_EFFECT = ("token_type_ids", "special_tokens_mask", "num_items_in_batch")


class ToMePerceiverPreTrainedModel(upstream.PerceiverPreTrainedModel):
    """Base of every ToMe Perceiver, before its upstream class in the order of bases.

    Modifications:
    - upstream's parts take the classes of `layers_tome_perceiver.py`
    - `r`, settable at any time, and an `r` or a `flops_ratio` for one call
    - `calibrate` measures cost against quality; `merge_to` and `merged` choose from the result; `flops_ratio` counts
    - a keyword that `forward` does not know is an error
    - a checkpoint loads by `AutoModel` too, as the head that it is: upstream's bare model takes no text and no images
    - the input embeddings of a text model are its tokens', and can be resized
    - `scaled_dot_product_attention` and activation checkpointing are supported
    """

    config_class = ToMePerceiverConfig
    _auto_class = "AutoModel"
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
        if hasattr(self, "num_labels"):
            config.check_labels()
        self._built_num_blocks = config.num_blocks

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Upstream's, with an `auto_map` for `AutoModel` and the head's own Auto class, whichever loaded the model."""
        code = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        named = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = named | {"AutoModel": code, self._auto_class: code}
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embeddings of a text model's tokens (upstream's are the latents, a parameter).

        Raises:
            NotImplementedError: for a model of anything else.
        """
        return self._text_preprocessor().embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """As `get_input_embeddings`."""
        self._text_preprocessor().embeddings = value

    def _text_preprocessor(self) -> upstream.PerceiverTextPreprocessor:
        preprocessor = self.base_model.input_preprocessor
        if not isinstance(preprocessor, upstream.PerceiverTextPreprocessor):
            raise NotImplementedError(f"input embeddings: {type(self).__name__} has none; must be a model of text")
        return preprocessor

    @property
    def r(self) -> int | list[int]:
        """Latents merged in each layer, as `config.r`; what is set is checked at once and is what gets saved.

        An r set on a wrapper has no effect. Set `wrapper.module.r` (DataParallel, DistributedDataParallel) or
        `peft_model.get_base_model().r`, or say it for each call: `wrapper(**inputs, r=8)`.

        Raises:
            ValueError: in one line naming the field, the value and what it must be; the old value stays.
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

    @classmethod
    def from_pretrained(
        cls, *args: Any, flops_ratio: float | None = None, max_changed: float | None = None, **kwargs: Any
    ) -> Any:
        """Upstream's, with a budget to merge to, as `merge_to` takes it."""
        loaded = super().from_pretrained(*args, **kwargs)
        if flops_ratio is not None or max_changed is not None:
            # With `output_loading_info` it is a pair.
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.merge_to(flops_ratio=flops_ratio, max_changed=max_changed)
        return loaded

    @property
    def unmerged(self) -> Merging:
        """The baseline of every share: nothing merges, and as many blocks run as before any budget."""
        num_blocks = (self.config.merge_frontier or {}).get("num_blocks", self._built_num_blocks)
        return _import("cost_tome_perceiver").Merging.of(self.config).by(0, num_blocks=num_blocks)

    def flops_ratio(self, input_shape: Any, r: int | list[int] | None = None, merging: Merging | None = None) -> float:
        """Return the share of the unmerged model's FLOPs that merging leaves, with the cost of its matching.

        Args:
            input_shape: of a batch of inputs, as `cost_tome_perceiver.forward_cost` takes it: `(1, 128)` for a text.
            r: counted in place of the config's merging, as the `r` of a call is.
            merging: counted in place of the config's merging, as `model.unmerged` or the `merging` of a frontier's row.

        Raises:
            ValueError: in one line, for a shape or merging settings that the model does not take.
        """
        cost = _import("cost_tome_perceiver")
        if merging is None:
            merging = cost.Merging.of(self.config)
        if r is not None:
            merging = merging.by(r)
        unmerged = self.unmerged.asked_of(self.config)
        return cost.FlopsShare(unmerged, input_shape, type(self).__name__)(merging)

    def calibrate(
        self,
        samples: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
        seconds: float | None = None,
        **options: Any,
    ) -> Frontier:
        """Measure how much merging changes the outputs at each cost, and keep the result in `config.merge_frontier`.

        Args:
            samples: a few hundred inputs without labels that the model was not trained on: what `forward` takes, a
                batch or several. A quarter of them chooses what merges; the others measure it.
            seconds: ends the search after about this time with the best it has; the result then depends on the clock.
            options: `flops_ratios`, `schedules`, `merge_methods`, `merge_metrics`, `input_shape`:
                `frontier_tome_perceiver.SearchOptions` describes them.

        Returns:
            The frontier; `print` shows its rows. What the model merges stays as it is.

        Raises:
            ValueError: in one line, for samples or options that cannot be searched with.
            FloatingPointError: for outputs that are not finite.
        """
        return _import("frontier_tome_perceiver").calibrate(self, samples, seconds=seconds, **options)

    def merge_to(
        self,
        flops_ratio: float | None = None,
        latency_ratio: float | None = None,
        max_changed: float | None = None,
        samples: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]] | None = None,
        **options: Any,
    ) -> Choice:
        """Merge by the frontier's best row within one budget, of cost or of quality; `save_pretrained` keeps it.

        Without a frontier it calibrates on `samples` first; without both, a share of the FLOPs is met by a schedule
        that needs no data (`floor`, by `leader` on keys).

        Args:
            flops_ratio: largest share of the unmerged model's FLOPs, above 0 up to 1, with the matching.
            latency_ratio: largest share of its time on this machine, for the first batch of `samples`.
            max_changed: largest share of inputs whose answer merging may change, at 95 % confidence for inputs like
                the samples.
            samples: as `calibrate` takes them.
            options: of `calibrate`.

        Returns:
            What was chosen and on what grounds.

        Raises:
            ValueError: in one line, for a budget that cannot be met; what merges stays.
            FloatingPointError: for outputs that are not finite.
        """
        frontier = _import("frontier_tome_perceiver")
        choice = frontier.choose(self, flops_ratio, latency_ratio, max_changed, samples, **options)
        choice.chosen.merging.apply(self.config)
        return choice

    @contextmanager
    def merged(self, **budget: Any) -> Iterator[Choice]:
        """Merge inside a `with` block as `merge_to` does, and restore the merging after it.

        It sets the config, which threads share; `model(**inputs, flops_ratio=0.5)` merges in one call alone.

        Args:
            budget: as `merge_to` takes it.
        """
        before = _import("cost_tome_perceiver").Merging.of(self.config)
        try:
            yield self.merge_to(**budget)
        finally:
            before.apply(self.config)

    def compile_repeated_blocks(self, **kwargs: Any) -> None:
        """Compile the self-attention layers, in place: one graph serves all of them, with any number of latents.

        `model.compile()` makes a new graph for another r. Names of parameters, saving and loading stay as they are.

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


def _import(name: str) -> Any:
    """Import a model file when it is first needed: loading and running a checkpoint does without it."""
    return import_module(f".{name}", __package__) if __package__ else import_module(name)


class _WithBase:
    """A view of a head for one call: it behaves as the head, but for the call of its base model.

    Upstream's heads hand none of their keywords to their base model. Each call has a view of its own, so threads that
    call one model with different arguments do not meet.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._call = module, call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _WithBase(value, self._call) if name == "perceiver" else value

    def __call__(self, **kwargs: Any) -> Any:
        return self._call(**kwargs)


def call_with_base(head: nn.Module, base: Callable[..., ToMePerceiverModelOutput], inputs: Mapping[str, Tensor]) -> Any:
    """Return a head's output with `base` called in place of its base model."""
    return inspect.unwrap(type(head).forward)(_WithBase(head, base), **inputs)


def _merging_in_each_call(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of an upstream head.

    Modifications: two arguments merge in this call alone and leave the config as it is: `r` (`int` or `list[int]`), in
    the place of the config's `r`, `r_inflection`, `merge_groups` and `latent_groups`, or `flops_ratio` (`float`), by
    the best row of `config.merge_frontier` within it. An unknown keyword is a TypeError.
    """
    parameters = [each for each in inspect.signature(forward).parameters.values() if each.kind != each.VAR_KEYWORD]
    known = frozenset(each.name for each in parameters)

    @wraps(forward)
    def forward_and_merge(
        self: Any, *args: Any, r: int | list[int] | None = None, flops_ratio: float | None = None, **kwargs: Any
    ) -> Any:
        _check_keywords(self, kwargs, known)
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        if r is not None or flops_ratio is not None:
            self = _WithBase(self, partial(self.perceiver, r=r, flops_ratio=flops_ratio))
        return forward(self, *args, **kwargs)

    # Trainer, pipelines and torch.export read the signature.
    own = inspect.signature(forward_and_merge, follow_wrapped=False).parameters
    signature = inspect.Signature([*parameters, own["r"], own["flops_ratio"], own["kwargs"]])
    forward_and_merge.__signature__ = signature  # type: ignore[attr-defined]
    return forward_and_merge


def _check_keywords(model: nn.Module, keywords: dict[str, Any], known: frozenset[str] = frozenset()) -> None:
    """Refuse what upstream swallows: keywords that it does not know, unless they are `None`."""
    for name, value in keywords.items():
        if name not in known and name not in WITHOUT_EFFECT and value is not None:
            raise TypeError(f"{name}: no argument of {type(model).__name__}; its forward names all it takes")


class ToMePerceiverModel(ToMePerceiverPreTrainedModel, upstream.PerceiverModel):
    """Upstream's `PerceiverModel`: preprocessor, encoder, decoder, postprocessor, each but the encoder optional.

    Modifications: merges by `config.r`, `config.merge_groups` and `config.latent_groups`; the decoder
    weighs latents by their sizes; the output has `latent_sizes` and `latent_sources`.
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
        r: int | list[int] | None = None,
        flops_ratio: float | None = None,
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
            r: merges so in this call, in the place of the config's `r`, `r_inflection`, `merge_groups` and
                `latent_groups`.
            flops_ratio: merges in this call by the best row of `config.merge_frontier` within this share.

        Raises:
            ValueError: for inputs longer or larger than the model's positions, a mask of another shape, or an r out of
                its range.
            TypeError: for any other keyword.
        """
        _check_keywords(self, kwargs)
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_dict = config.return_dict if return_dict is None else return_dict

        preprocessed = self.preprocess(inputs, interpolate_pos_encoding)
        result = self.encoder(
            self.embeddings(batch_size=preprocessed[0].shape[0]),
            inputs=preprocessed[0],
            bias=None if attention_mask is None else padding_bias(attention_mask, preprocessed[0]),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_latent_sources=output_latent_sources,
            plan=merge_plan(config, r, flops_ratio),
        )
        latents, sizes = result.last_hidden_state, result.latent_sizes
        logits, decoder_attentions = self.decode(
            preprocessed, latents, sizes, subsampled_output_points, output_attentions=output_attentions
        )
        if not return_dict:
            # Upstream's tuple: its heads, and whoever counts its places, know nothing of sizes.
            outputs = (logits, latents, result.hidden_states, result.attentions, result.cross_attentions)
            return tuple(output for output in outputs if output is not None) + decoder_attentions
        return ToMePerceiverModelOutput(
            logits=logits,
            last_hidden_state=latents,
            hidden_states=result.hidden_states,
            attentions=result.attentions,
            cross_attentions=result.cross_attentions + decoder_attentions if output_attentions else None,
            latent_sizes=latents.new_ones(latents.shape[:2], dtype=torch.float32) if sizes is None else sizes,
            latent_sources=result.latent_sources,
        )

    def decode(
        self,
        preprocessed: tuple[Tensor, Any, Any],
        latents: Tensor,
        sizes: Tensor | None,
        output_points: dict[str, Tensor] | None = None,
        positions: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Any, tuple]:
        """Return the logits and the attention weights of the decoder, or `None` and `()` without one.

        Args:
            preprocessed: as `preprocess` returns it.
            latents, sizes: (B, M, C) and (B, M), or `None` for 1 each.
            output_points: for multimodal autoencoding, as upstream.
            positions: (B, P) of the decoder's queries that are answered; `None` for all of them.
        """
        if self.decoder is None:
            return None, ()
        inputs, modality_sizes, inputs_without_pos = preprocessed
        query = self.decoder.decoder_query(inputs, modality_sizes, inputs_without_pos, subsampled_points=output_points)
        if positions is not None:
            query = query.gather(1, positions[..., None].expand(-1, -1, query.shape[-1]))
        weighed = WeighedLatents(latents, latent_bias(self.config, sizes, latents.dtype))
        decoded = self.decoder(query, weighed, output_attentions=output_attentions)
        logits = decoded.logits
        if self.output_postprocessor is not None:
            if output_points is not None:
                modality_sizes = {name: output_points[name].shape[0] for name in ("audio", "image")} | {"label": 1}
            logits = self.output_postprocessor(logits, modality_sizes=modality_sizes)
        return logits, decoded.cross_attentions or ()

    def preprocess(self, inputs: Any, interpolate_pos_encoding: bool = False) -> tuple[Tensor, Any, Any]:
        """Return the encoder's inputs (B, S, C'), the sizes of the modalities, and the inputs without positions."""
        if self.input_preprocessor is None:
            if inputs.shape[-1] != self.config.d_model:
                raise ValueError(f"inputs: last dimension is {inputs.shape[-1]}; must be d_model={self.config.d_model}")
            return inputs, None, None
        if isinstance(self.input_preprocessor, upstream.PerceiverTextPreprocessor):
            most = self.config.max_position_embeddings
            if inputs.shape[1] > most:
                raise ValueError(f"inputs: {inputs.shape[1]} long; must be max_position_embeddings={most} or less")
        return self.input_preprocessor(inputs, interpolate_pos_encoding=interpolate_pos_encoding)


def padding_bias(attention_mask: Tensor, inputs: Tensor) -> Tensor:
    """A padding mask as scores to add, (B, 1, 1, S), in the dtype of `inputs`.

    Args:
        attention_mask: (B, S), true or 1 where to attend; a mask of four dimensions is one already, boolean
            (true where to attend) or to be added.
        inputs: (B, S, C'), what the mask is for.

    Raises:
        ValueError: for a mask of another length than the inputs, of other dimensions, or of another number of rows.
    """
    dtype, (rows, length, _) = inputs.dtype, inputs.shape
    # A single row would be taken for every row's.
    if attention_mask.dim() not in (2, 4) or attention_mask.shape[0] != rows or attention_mask.shape[-1] != length:
        raise ValueError(
            f"attention_mask: has shape {tuple(attention_mask.shape)}; must have ({rows}, {length}) or "
            f"({rows}, 1, 1, {length}), one entry for each input"
        )
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return attention_mask.to(dtype)
    keep = attention_mask.bool() if attention_mask.dim() == 4 else attention_mask[:, None, None, :].bool()
    # The smallest number rather than -inf: a row that is all padding gives a mean and not NaN, as upstream.
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


class ToMePerceiverForSequenceClassification(ToMePerceiverPreTrainedModel, upstream.PerceiverForSequenceClassification):
    """Upstream's text classification. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""

    _auto_class = "AutoModelForSequenceClassification"
    forward = _merging_in_each_call(upstream.PerceiverForSequenceClassification.forward)


@wraps(upstream.PerceiverForMaskedLM.forward)
def _forward_naming_labels(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """Upstream's, with an error of one line for labels of another length."""
    try:
        return upstream.PerceiverForMaskedLM.forward(self, *args, labels=labels, **kwargs)
    except ValueError as error:
        if labels is None or "target batch_size" not in str(error):
            raise
        raise ValueError(
            f"labels: have shape {tuple(labels.shape)}; must have a label for each of the model's "
            f"{self.config.max_position_embeddings} positions, -100 where nothing is asked"
        ) from error


class ToMePerceiverForMaskedLM(ToMePerceiverPreTrainedModel, upstream.PerceiverForMaskedLM):
    """Upstream's masked language model. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""

    _auto_class = "AutoModelForMaskedLM"
    forward = _merging_in_each_call(_forward_naming_labels)

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Upstream's, with the output's bias, which is 0 for a new token as it is at first for any."""
        embeddings = super()._resize_token_embeddings(*args, **kwargs)
        decoder, tokens = self.embedding_decoder, embeddings.num_embeddings
        if tokens != decoder.vocab_size:
            bias = decoder.bias.data.new_zeros(tokens)
            kept = min(tokens, decoder.vocab_size)
            bias[:kept] = decoder.bias.data[:kept]
            decoder.bias.data, decoder.bias.grad, decoder.vocab_size = bias, None, tokens
        return embeddings


class ToMePerceiverForImageClassificationLearned(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationLearned
):
    """Upstream's image classification with learned positions. Modifications: see `ToMePerceiverPreTrainedModel`."""

    _auto_class = "AutoModelForImageClassification"
    forward = _merging_in_each_call(upstream.PerceiverForImageClassificationLearned.forward)


class ToMePerceiverForImageClassificationFourier(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationFourier
):
    """Upstream's image classification with Fourier positions. Modifications: see `ToMePerceiverPreTrainedModel`."""

    _auto_class = "AutoModelForImageClassification"
    forward = _merging_in_each_call(upstream.PerceiverForImageClassificationFourier.forward)


class ToMePerceiverForImageClassificationConvProcessing(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationConvProcessing
):
    """Upstream's image classification with a convolution first. Modifications: see `ToMePerceiverPreTrainedModel`."""

    _auto_class = "AutoModelForImageClassification"
    forward = _merging_in_each_call(upstream.PerceiverForImageClassificationConvProcessing.forward)


class ToMePerceiverForOpticalFlow(ToMePerceiverPreTrainedModel, upstream.PerceiverForOpticalFlow):
    """Upstream's optical flow. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""

    forward = _merging_in_each_call(upstream.PerceiverForOpticalFlow.forward)


class ToMePerceiverForMultimodalAutoencoding(ToMePerceiverPreTrainedModel, upstream.PerceiverForMultimodalAutoencoding):
    """Upstream's multimodal autoencoding. Modifications: see `ToMePerceiverPreTrainedModel`."""

    forward = _merging_in_each_call(upstream.PerceiverForMultimodalAutoencoding.forward)
