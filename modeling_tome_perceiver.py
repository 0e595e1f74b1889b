# SPDX-License-Identifier: Apache-2.0
"""Perceiver IO (Jaegle et al., 2022) that merges its latents while it runs (Bolya et al., 2023).

Every model class is a subclass of its upstream class in `transformers.models.perceiver.modeling_perceiver`, with the
same submodule names, so stock checkpoints load unchanged and `state_dict` keys stay upstream's. A forward pass runs the
encoder's cross-attention; in each layer attention, matching, the size-weighted merge and the MLP; then the decoder's
cross-attention. The parts are in `layers_tome_perceiver.py`.

Letters: B batch size, S inputs, M latents left, P decoder queries that are answered, C channels of a latent.
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

# `save_pretrained` copies the files imported here into a checkpoint, which must import only its own copies, as
# `layers_tome_perceiver.py` explains.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig
    from .layers_tome_perceiver import (
        ToMePerceiverModelOutput,
        WeighedLatents,
        latent_bias,
        merge_plan,
        use_tome_classes,
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
        use_tome_classes,
    )
    from merging_tome_perceiver import check_merge_method

# Imported at run time only on first use. transformers reads these lines and so copies the files to a checkpoint too.
if TYPE_CHECKING:
    from .cost_tome_perceiver import Merging
    from .frontier_tome_perceiver import Choice, Frontier

# `recompile_limit` of a compiled layer: above the number of graphs that one model needs, so that it never falls back to
# eager code.
MAX_COMPILED_GRAPHS = 256

# Keywords that tokenizers and Trainer pass to every model, and that a Perceiver does not use.
IGNORED_KEYWORDS = ("token_type_ids", "special_tokens_mask", "num_items_in_batch")


class ToMePerceiverPreTrainedModel(upstream.PerceiverPreTrainedModel):
    """Base class of every ToMe Perceiver; each model lists it before its upstream class.

    Modifications:
    - upstream's parts get the classes of `layers_tome_perceiver.py`
    - `model.r` can be set at any time, and a call can be given its own `r` or `flops_ratio`
    - `calibrate` measures cost against quality, `merge_to` and `merged` choose merging settings from the result, and
      `flops_ratio` computes their cost
    - an unknown keyword argument of `forward` is an error
    - `AutoModel` loads a checkpoint with its head, because upstream's bare model takes neither text nor images
    - the input embeddings of a text model are those of its tokens, and can be resized
    - `scaled_dot_product_attention` and activation checkpointing are supported
    """

    config_class = ToMePerceiverConfig
    _auto_class = "AutoModel"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["ToMePerceiverLayer"]
    # The heads take **kwargs but do not divide their loss by `num_items_in_batch`. Without this flag, Trainer assumes
    # that they do, and loss and gradients grow by the number of accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: ToMePerceiverConfig, *args: Any, **kwargs: Any) -> None:
        config.check_merging()
        check_merge_method(config.merge_method)
        # Upstream builds the parts, so names, shapes, initialisation and random numbers are the same as there. Its
        # classes do not support sdpa, so they are built with eager attention, and this class checks the requested
        # implementation afterwards.
        attn_implementation = config._attn_implementation
        config._attn_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        use_tome_classes(self, config)
        if type(self.base_model) is upstream.PerceiverModel:
            self.base_model.__class__ = ToMePerceiverModel
        config._attn_implementation = self._check_and_adjust_attn_implementation(
            attn_implementation, is_init_check=True
        )
        if hasattr(self, "num_labels"):
            config.check_labels()
        self._built_num_blocks = config.num_blocks

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as upstream does, with an `auto_map` for both `AutoModel` and the head's own Auto class."""
        code = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        named = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = named | {"AutoModel": code, self._auto_class: code}
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings of a text model (upstream returns the latents).

        Raises:
            NotImplementedError: for a model of other inputs.
        """
        return self._text_preprocessor().embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings of a text model; raises as `get_input_embeddings`."""
        self._text_preprocessor().embeddings = value

    def _text_preprocessor(self) -> upstream.PerceiverTextPreprocessor:
        preprocessor = self.base_model.input_preprocessor
        if not isinstance(preprocessor, upstream.PerceiverTextPreprocessor):
            raise NotImplementedError(f"input embeddings: {type(self).__name__} has none; use a text model")
        return preprocessor

    @property
    def r(self) -> int | list[int]:
        """Latents merged away in each layer: `config.r`, checked when it is set.

        Setting r on a wrapper has no effect. Set `wrapper.module.r` (DataParallel, DistributedDataParallel) or
        `peft_model.get_base_model().r`, or pass it in each call: `wrapper(**inputs, r=8)`.

        Raises:
            ValueError: if the value is out of range; the old value stays.
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
        """Load as upstream does, then merge to a budget if one is given; see `merge_to`."""
        loaded = super().from_pretrained(*args, **kwargs)
        if flops_ratio is not None or max_changed is not None:
            # With `output_loading_info`, upstream returns a pair.
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.merge_to(flops_ratio=flops_ratio, max_changed=max_changed)
        return loaded

    @property
    def unmerged(self) -> Merging:
        """Merging settings of the unmerged model, the baseline of all costs: nothing merges and no block is skipped."""
        num_blocks = (self.config.merge_frontier or {}).get("num_blocks", self._built_num_blocks)
        return _import_lazily("cost_tome_perceiver").Merging.of(self.config).by(0, num_blocks=num_blocks)

    def flops_ratio(self, input_shape: Any, r: int | list[int] | None = None, merging: Merging | None = None) -> float:
        """Return the FLOPs with merging, matching included, as a share of the unmerged model's FLOPs.

        Args:
            input_shape: shape of a batch of inputs, as for `cost_tome_perceiver.forward_cost`: `(1, 128)` for a text.
            r: count with this r in place of the config's merging settings, as in a call with `r`.
            merging: count with these settings in place of the config's, such as the `merging` of a frontier's row.

        Raises:
            ValueError: if the model does not take inputs of this shape, or if the merging settings are out of range.
        """
        cost = _import_lazily("cost_tome_perceiver")
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
        """Search for the merging settings that change the outputs least at each cost, and store them as a frontier.

        The frontier goes to `config.merge_frontier`. The merging settings of the model do not change.

        Args:
            samples: a few hundred unlabelled inputs that the model was not trained on, as keyword arguments of
                `forward`: one batch or several. The search uses a quarter of them; the others measure its result.
            seconds: stop the search after about this time and keep the best result so far, which then depends on the
                speed of the machine.
            options: `flops_ratios`, `schedules`, `merge_methods`, `merge_metrics`, `input_shape`; see
                `frontier_tome_perceiver.SearchOptions`.

        Returns:
            The frontier; `print` shows its rows.

        Raises:
            ValueError: if the samples or the options do not fit the model.
            FloatingPointError: if outputs are not finite.
        """
        return _import_lazily("frontier_tome_perceiver").calibrate(self, samples, seconds=seconds, **options)

    def merge_to(
        self,
        flops_ratio: float | None = None,
        latency_ratio: float | None = None,
        max_changed: float | None = None,
        samples: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]] | None = None,
        **options: Any,
    ) -> Choice:
        """Set the config to the frontier's best row within one budget of cost or quality; `save_pretrained` keeps it.

        Without a frontier, `calibrate` measures one on `samples` first. With neither a frontier nor samples, a FLOPs
        budget is met by a schedule that needs no data (schedule `floor`, method `leader` on keys).

        Args:
            flops_ratio: budget as a share of the unmerged model's FLOPs, above 0, up to 1; matching is included.
            latency_ratio: budget as a share of the unmerged model's time on this machine, for the first batch of
                `samples`.
            max_changed: largest share of inputs whose answer merging may change, at 95 % confidence for inputs of the
                same kind as the samples.
            samples: as for `calibrate`.
            options: as for `calibrate`.

        Returns:
            The chosen row, and the frontier that it is from if there is one.

        Raises:
            ValueError: if the budget cannot be met; the merging settings do not change.
            FloatingPointError: if outputs are not finite.
        """
        frontier = _import_lazily("frontier_tome_perceiver")
        choice = frontier.choose(self, flops_ratio, latency_ratio, max_changed, samples, **options)
        choice.chosen.merging.apply(self.config)
        return choice

    @contextmanager
    def merged(self, **budget: Any) -> Iterator[Choice]:
        """Merge as `merge_to` does inside a `with` block, and restore the merging settings after it.

        This changes the config, which all threads share; `model(**inputs, flops_ratio=0.5)` changes one call only.

        Args:
            budget: as for `merge_to`.
        """
        before = _import_lazily("cost_tome_perceiver").Merging.of(self.config)
        try:
            yield self.merge_to(**budget)
        finally:
            before.apply(self.config)

    def compile_repeated_blocks(self, **kwargs: Any) -> None:
        """Compile the self-attention layers in place; they share graphs that work for any number of latents.

        Unlike `model.compile()`, this does not compile again for another r. Parameter names, saving and loading do not
        change.

        Args:
            kwargs: arguments of `torch.compile`, with `dynamic=True` as the default. `dynamic=False` compiles a graph
                for each number of latents.

        Source: the method of the same name in diffusers' `ModelMixin`.
        """
        kwargs = {"dynamic": True} | kwargs
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            # The layers' code needs several graphs: for the first merge, later merges, no merge, one latent, training.
            kwargs = {"recompile_limit": MAX_COMPILED_GRAPHS} | kwargs
        for layer in self.base_model.encoder.self_attends:
            layer.compile(**kwargs)


def _import_lazily(name: str) -> Any:
    """Import a model file on first use, because loading and running a checkpoint does not need it."""
    return import_module(f".{name}", __package__) if __package__ else import_module(name)


class _HeadView:
    """View of a model with a head that calls a given function in place of its base model.

    Upstream's heads cannot pass keyword arguments to their base model. Every call makes its own view, so threads can
    call one model with different arguments.
    """

    def __init__(self, module: nn.Module, call_base: Callable[..., Any]) -> None:
        self._module, self._call_base = module, call_base

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _HeadView(value, self._call_base) if name == "perceiver" else value

    def __call__(self, **kwargs: Any) -> Any:
        return self._call_base(**kwargs)


def call_with_base(head: nn.Module, base: Callable[..., ToMePerceiverModelOutput], inputs: Mapping[str, Tensor]) -> Any:
    """Return the output of a model with a head, calling `base` in place of its base model."""
    return inspect.unwrap(type(head).forward)(_HeadView(head, base), **inputs)


def _add_merging_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Add two arguments to the `forward` of an upstream head, which set the merging of one call.

    They do not change the config. `r` (`int` or `list[int]`) replaces the config's `r`, `r_inflection`, `merge_groups`
    and `latent_groups`; `flops_ratio` (`float`) merges by the best row of `config.merge_frontier` within this share of
    the FLOPs. The new `forward` raises TypeError for unknown keyword arguments.
    """
    signature = inspect.signature(forward)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    known = frozenset(parameter.name for parameter in parameters)

    @wraps(forward)
    def forward_and_merge(
        self: Any, *args: Any, r: int | list[int] | None = None, flops_ratio: float | None = None, **kwargs: Any
    ) -> Any:
        _check_keywords(self, kwargs, known)
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        if r is not None or flops_ratio is not None:
            self = _HeadView(self, partial(self.perceiver, r=r, flops_ratio=flops_ratio))
        return forward(self, *args, **kwargs)

    # Trainer, pipelines and torch.export read the signature to find the arguments.
    added = inspect.signature(forward_and_merge, follow_wrapped=False).parameters
    signature = inspect.Signature([*parameters, added["r"], added["flops_ratio"], added["kwargs"]])
    forward_and_merge.__signature__ = signature  # type: ignore[attr-defined]
    return forward_and_merge


def _check_keywords(model: nn.Module, keywords: dict[str, Any], known: frozenset[str] = frozenset()) -> None:
    """Refuse unknown keyword arguments unless they are `None`; upstream ignores them without a message."""
    for name, value in keywords.items():
        if name not in known and name not in IGNORED_KEYWORDS and value is not None:
            raise TypeError(f"{name}: unknown argument; use the arguments of {type(model).__name__}.forward")


class ToMePerceiverModel(ToMePerceiverPreTrainedModel, upstream.PerceiverModel):
    """Upstream's `PerceiverModel`: encoder, with optional preprocessor, decoder and postprocessor.

    Modifications: merges latents by `config.r`, `config.merge_groups` and `config.latent_groups`; the decoder weights
    latents by their sizes; the output has `latent_sizes` and `latent_sources`.
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
            inputs: inputs of the preprocessor; without a preprocessor (B, S, d_model).
            attention_mask: padding mask (B, S), 1 or true for inputs to attend to and 0 or false for padding; or a bias
                to add to the attention scores, (B, 1, 1, S), in floating point.
            subsampled_output_points: as upstream, for multimodal autoencoding.
            output_attentions, output_hidden_states, interpolate_pos_encoding, return_dict: as upstream.
            output_latent_sources: also return `latent_sources`.
            r: latents to merge away in each layer in this call, in place of the config's `r`, `r_inflection`,
                `merge_groups` and `latent_groups`.
            flops_ratio: merge in this call by the best row of `config.merge_frontier` within this share of the FLOPs.

        Raises:
            ValueError: if the inputs exceed the model's positions, the mask does not fit them, or `r` or `flops_ratio`
                is out of range.
            TypeError: for an unknown keyword argument.
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
            # The same tuple as upstream, without sizes: upstream's heads and its users index it by position.
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
        """Return the logits and the attention weights of the decoder; `None` and `()` if the model has no decoder.

        Args:
            preprocessed: result of `preprocess`.
            latents: (B, M, C).
            sizes: (B, M), sizes of the latents; `None` for 1 each.
            output_points: as upstream, for multimodal autoencoding.
            positions: (B, P), positions of the decoder's queries to answer; `None` for all of them.
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
            longest = self.config.max_position_embeddings
            if inputs.shape[1] > longest:
                raise ValueError(
                    f"inputs: length is {inputs.shape[1]}; must be at most max_position_embeddings={longest}"
                )
        return self.input_preprocessor(inputs, interpolate_pos_encoding=interpolate_pos_encoding)


def padding_bias(attention_mask: Tensor, inputs: Tensor) -> Tensor:
    """Return a padding mask as a bias on the attention scores, (B, 1, 1, S), in the dtype of `inputs`.

    Args:
        attention_mask: (B, S) or (B, 1, 1, S), true or 1 where to attend. Floating-point values with four dimensions
            are a bias already.
        inputs: (B, S, C'), the inputs that the mask is for.

    Raises:
        ValueError: if the mask's number of dimensions, number of rows or length does not fit the inputs.
    """
    dtype, (rows, length, _) = inputs.dtype, inputs.shape
    # A mask with one row would broadcast to the whole batch, so it is refused too.
    if attention_mask.dim() not in (2, 4) or attention_mask.shape[0] != rows or attention_mask.shape[-1] != length:
        raise ValueError(
            f"attention_mask: has shape {tuple(attention_mask.shape)}; must have ({rows}, {length}) or "
            f"({rows}, 1, 1, {length}), one entry per input"
        )
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return attention_mask.to(dtype)
    keep = attention_mask.bool() if attention_mask.dim() == 4 else attention_mask[:, None, None, :].bool()
    # The lowest finite number in place of -inf, as upstream: a row with only padding then gives the mean of the values,
    # not NaN.
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)


class ToMePerceiverForSequenceClassification(ToMePerceiverPreTrainedModel, upstream.PerceiverForSequenceClassification):
    """Upstream's text classification. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""

    _auto_class = "AutoModelForSequenceClassification"
    forward = _add_merging_arguments(upstream.PerceiverForSequenceClassification.forward)


@wraps(upstream.PerceiverForMaskedLM.forward)
def _forward_checking_labels(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """Call upstream's forward, and raise a one-line error for labels of the wrong length."""
    try:
        return upstream.PerceiverForMaskedLM.forward(self, *args, labels=labels, **kwargs)
    except ValueError as error:
        if labels is None or "target batch_size" not in str(error):
            raise
        raise ValueError(
            f"labels: have shape {tuple(labels.shape)}; must have a label for each of the model's "
            f"{self.config.max_position_embeddings} positions, -100 where the loss ignores it"
        ) from error


class ToMePerceiverForMaskedLM(ToMePerceiverPreTrainedModel, upstream.PerceiverForMaskedLM):
    """Upstream's masked language model. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""

    _auto_class = "AutoModelForMaskedLM"
    # The output layer gets the embedding module as an argument; accelerate must not move its offloaded weights.
    _skip_keys_device_placement = ["embedding_layer"]
    forward = _add_merging_arguments(_forward_checking_labels)

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as upstream does, and resize the bias of the output too; it starts at 0 for a new token."""
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
    forward = _add_merging_arguments(upstream.PerceiverForImageClassificationLearned.forward)


class ToMePerceiverForImageClassificationFourier(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationFourier
):
    """Upstream's image classification with Fourier positions. Modifications: see `ToMePerceiverPreTrainedModel`."""

    _auto_class = "AutoModelForImageClassification"
    forward = _add_merging_arguments(upstream.PerceiverForImageClassificationFourier.forward)


class ToMePerceiverForImageClassificationConvProcessing(
    ToMePerceiverPreTrainedModel, upstream.PerceiverForImageClassificationConvProcessing
):
    """Upstream's image classification with a convolution first. Modifications: see `ToMePerceiverPreTrainedModel`."""

    _auto_class = "AutoModelForImageClassification"
    forward = _add_merging_arguments(upstream.PerceiverForImageClassificationConvProcessing.forward)


class ToMePerceiverForOpticalFlow(ToMePerceiverPreTrainedModel, upstream.PerceiverForOpticalFlow):
    """Upstream's optical flow. Modifications: see `ToMePerceiverPreTrainedModel` and `ToMePerceiverModel`."""

    forward = _add_merging_arguments(upstream.PerceiverForOpticalFlow.forward)


class ToMePerceiverForMultimodalAutoencoding(ToMePerceiverPreTrainedModel, upstream.PerceiverForMultimodalAutoencoding):
    """Upstream's multimodal autoencoding. Modifications: see `ToMePerceiverPreTrainedModel`."""

    forward = _add_merging_arguments(upstream.PerceiverForMultimodalAutoencoding.forward)
