# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a forward pass in closed form, from a config and the shape of the inputs; no model is built.

Counted are matrix products and convolutions, 2 FLOPs for each multiply-add, as `torch.utils.flop_counter` counts them;
norms, activations, softmax, embeddings, sorting and the merge itself are not products and count nothing. Channel
counts follow the constructors of `transformers.models.perceiver.modeling_perceiver` (Jaegle et al., 2022).

Letters: B batch, S inputs of the encoder, L self-attention layers, N latents that reach a layer, M latents that leave
it, Q decoder queries, T frames, A audio samples, K labels. All figures but those of `ForwardCost` are for one row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tqdm.auto import tqdm

# As in the module of the layers, which says why.
try:
    from .configuration_tome_perceiver import ToMePerceiverConfig  # type: ignore[import-not-found]
    from .merging_tome_perceiver import matching_flops, product_flops  # type: ignore[import-not-found]
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import ToMePerceiverConfig
    from merging_tome_perceiver import matching_flops, product_flops

RGB_CHANNELS = 3
# Perceiver IO's image models (upstream's constructors of the heads).
LEARNED_IMAGE_CHANNELS = LEARNED_POSITION_CHANNELS = 256
CONV_CHANNELS, CONV_KERNEL, CONV_STRIDE = 64, 7, 2
POOL_KERNEL, POOL_STRIDE = 3, 2
IMAGE_BANDS = 64
# Masked language model.
MASKED_LM_QK_CHANNELS = 8 * 32
# Optical flow: 3 x 3 patches of two RGB frames.
FLOW_PATCH_CHANNELS, FLOW_INPUT_CHANNELS, FLOW_OUTPUT_CHANNELS = 54, 64, 2
# Multimodal autoencoding.
VIDEO_BANDS, VIDEO_BLOCK, AUDIO_BANDS = 32, 4, 192
INPUT_PADDING, QUERY_PADDING = 4, 2


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one forward pass, for the whole batch, by where they are spent.

    Every row counts as the first one does, as in upstream's models. Ours project the queries that all rows repeat
    (latents before the first input is read, learned positions of a decoder) for the first row only.

    Attributes:
        preprocessing: convolutions and projections before the encoder.
        cross_attention: the encoder's cross-attention layer with its MLP; the only part that grows with S, but for
            the preprocessing and the decoder of models with an output for each input.
        self_attention: each of the L layers in the order in which they run: attention on N latents, MLP on M.
        matching: the similarities by which each of the L layers finds what merges; 0 where nothing is matched.
        decoder: the decoder's cross-attention layer and everything after it.
    """

    preprocessing: int
    cross_attention: int
    self_attention: tuple[int, ...]
    matching: tuple[int, ...]
    decoder: int

    @property
    def total(self) -> int:
        """FLOPs of the model's own products, without the matching.

        The figure to compare with the GFLOPs that "Token Merging Perceiver" prints. They are this count and 5 FLOPs
        for each element of a layer norm besides, to within 0.02 GFLOPs; the matching would not fit in between.
        """
        return self.preprocessing + self.cross_attention + sum(self.self_attention) + self.decoder

    @property
    def total_with_matching(self) -> int:
        """FLOPs of everything that runs: what `FlopCounterMode` counts under eager attention for a batch of one."""
        return self.total + sum(self.matching)


def forward_cost(
    config: ToMePerceiverConfig,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]],
    architecture: str | None = None,
    output_points: Mapping[str, int] | None = None,
) -> ForwardCost:
    """FLOPs of one forward pass.

    Args:
        config: a model's, with its merging settings; `merge_schedule` says how many latents reach each layer.
        input_shape: of the model's `inputs`: text (B, S), images (B, 3, height, width), optical flow
            (B, 2, 27, height, width), base model (B, S, d_model); for multimodal autoencoding by modality: `"audio"`
            (B, A, 1), `"image"` (B, T, 3, height, width) and `"label"` (B, K).
        architecture: name of a model class, stock or ours; by default the one in `config.architectures`.
        output_points: for multimodal autoencoding, how many points of `"audio"` and of `"image"` are decoded (the
            lengths of `subsampled_output_points`).

    Raises:
        ValueError: for an architecture, an input shape or a merging method that is not known here, in one line naming
            the value and what is allowed.
    """
    name = _architecture_name(config, architecture)
    if name == MULTIMODAL:
        batch, ends = _multimodal_ends(config, input_shape, output_points)
    else:
        if isinstance(input_shape, Mapping):
            raise ValueError(f"input_shape: shapes by modality are for {MULTIMODAL} only, not for {name}")
        batch, ends = _ENDS[name](config, input_shape)

    reaching = [config.latents_at_start, *config.latents_per_layer]
    layers = list(pairwise(reaching))
    cross_attention = cross_attention_layer_flops(
        config,
        queries=reaching[0],
        keys=ends.inputs,
        query_channels=config.d_latents,
        key_channels=ends.input_channels,
        qk_channels=config.qk_channels,
        v_channels=config.v_channels,
        widening_factor=config.cross_attention_widening_factor,
    )
    decoder = 0 if ends.decoder is None else decoder_flops(config, ends.decoder, keys=reaching[-1])
    return ForwardCost(
        preprocessing=batch * ends.preprocessing,
        cross_attention=batch * cross_attention,
        self_attention=tuple(batch * self_attention_layer_flops(config, before, after) for before, after in layers),
        matching=tuple(batch * layer_matching_flops(config, before, after) for before, after in layers),
        decoder=batch * decoder,
    )


def convolution_flops(positions: int, kernel_size: int, in_channels: int, out_channels: int) -> int:
    """A convolution with a square kernel: at each output position a product with the whole kernel."""
    return product_flops(positions, kernel_size**2 * in_channels, out_channels)


def attention_flops(
    queries: int, keys: int, query_channels: int, key_channels: int, qk_channels: int, v_channels: int
) -> int:
    """Multi-head attention with its output projection. Heads divide the channels and so leave the count as it is."""
    projections = (
        product_flops(queries, query_channels, qk_channels)
        + product_flops(keys, key_channels, qk_channels)
        + product_flops(keys, key_channels, v_channels)
    )
    scores = product_flops(queries, qk_channels, keys)
    weighted_values = product_flops(queries, keys, v_channels)
    return projections + scores + weighted_values + product_flops(queries, v_channels, query_channels)


def mlp_flops(rows: int, channels: int, widening_factor: int) -> int:
    """The two linear layers after attention."""
    hidden = widening_factor * channels
    return product_flops(rows, channels, hidden) + product_flops(rows, hidden, channels)


def self_attention_layer_flops(config: ToMePerceiverConfig, before: int, after: int) -> int:
    """A layer that N = `before` latents reach and M = `after` leave: they merge between attention and the MLP."""
    channels = config.d_latents
    qk_channels, v_channels = _attention_channels(config.qk_channels, config.v_channels, channels)
    attention = attention_flops(before, before, channels, channels, qk_channels, v_channels)
    return attention + mlp_flops(after, channels, config.self_attention_widening_factor)


def cross_attention_layer_flops(
    config: ToMePerceiverConfig,
    queries: int,
    keys: int,
    query_channels: int,
    key_channels: int,
    qk_channels: int | None,
    v_channels: int | None,
    widening_factor: int,
) -> int:
    """A layer whose queries attend to something else, in the encoder or in a decoder."""
    # Upstream lets the config choose the default width only where nothing else does.
    like_keys = config.cross_attention_shape_for_attention == "kv"
    qk_channels, v_channels = _attention_channels(
        qk_channels, v_channels, default=key_channels if like_keys else query_channels
    )
    attention = attention_flops(queries, keys, query_channels, key_channels, qk_channels, v_channels)
    return attention + mlp_flops(queries, query_channels, widening_factor)


def layer_matching_flops(config: ToMePerceiverConfig, before: int, after: int) -> int:
    """What a layer spends on finding what merges.

    Raises:
        ValueError: if the FLOPs of `config.merge_method` are not known.
    """
    if before == after or config.merge_groups is not None:
        return 0
    return matching_flops(config.merge_method, before, metric_channels(config))


def metric_channels(config: ToMePerceiverConfig) -> int:
    """Channels of what the matching compares: of one head's keys or values, or of a latent."""
    qk_channels, v_channels = _attention_channels(config.qk_channels, config.v_channels, config.d_latents)
    heads = config.num_self_attention_heads
    return {"key": qk_channels // heads, "value": v_channels // heads, "hidden": config.d_latents}[config.merge_metric]


@dataclass(frozen=True)
class Decoder:
    """A decoder's cross-attention layer.

    Attributes:
        queries, query_channels: Q and their width.
        after: FLOPs of what follows the layer.
        qk_channels, v_channels: as upstream's constructor takes them.
    """

    queries: int
    query_channels: int
    after: int
    qk_channels: int | None = None
    v_channels: int | None = None


@dataclass(frozen=True)
class Ends:
    """What an architecture has before and after the latents, for one row of the batch.

    Attributes:
        inputs, input_channels: S and their width, as the encoder sees them.
        preprocessing: FLOPs before the encoder.
        decoder: `None` if there is none.
    """

    inputs: int
    input_channels: int
    preprocessing: int = 0
    decoder: Decoder | None = None


def decoder_flops(config: ToMePerceiverConfig, decoder: Decoder, keys: int) -> int:
    """A decoder that attends to `keys` latents, and what follows it."""
    layer = cross_attention_layer_flops(
        config,
        queries=decoder.queries,
        keys=keys,
        query_channels=decoder.query_channels,
        key_channels=config.d_latents,
        qk_channels=decoder.qk_channels,
        v_channels=decoder.v_channels,
        widening_factor=1,
    )
    return layer + decoder.after


def _base_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    batch, inputs, _ = _sizes(shape, "B", "S", config.d_model)
    return batch, Ends(inputs, config.d_model)


def _sequence_classification_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    batch, inputs = _sizes(shape, "B", "S")
    return batch, Ends(inputs, config.d_model, decoder=_classification_decoder(config))


def _masked_lm_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    batch, inputs = _sizes(shape, "B", "S")
    # Every position is decoded, whatever the length of the text.
    queries = config.max_position_embeddings
    decoder = Decoder(
        queries,
        query_channels=config.d_model,
        qk_channels=MASKED_LM_QK_CHANNELS,
        v_channels=config.d_model,
        after=product_flops(queries, config.d_model, config.vocab_size),
    )
    return batch, Ends(inputs, config.d_model, decoder=decoder)


def _learned_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    batch, _, height, width = _sizes(shape, "B", RGB_CHANNELS, "height", "width")
    inputs = height * width
    return batch, Ends(
        inputs,
        LEARNED_IMAGE_CHANNELS + LEARNED_POSITION_CHANNELS,
        preprocessing=convolution_flops(inputs, 1, RGB_CHANNELS, LEARNED_IMAGE_CHANNELS)
        + product_flops(inputs, LEARNED_IMAGE_CHANNELS, LEARNED_POSITION_CHANNELS),
        decoder=_classification_decoder(config),
    )


def _fourier_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    batch, _, height, width = _sizes(shape, "B", RGB_CHANNELS, "height", "width")
    channels = RGB_CHANNELS + _fourier_channels(IMAGE_BANDS, dimensions=2)
    return batch, Ends(height * width, channels, decoder=_classification_decoder(config))


def _conv_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    batch, _, *image = _sizes(shape, "B", RGB_CHANNELS, "height", "width")
    # The convolution is padded so that only its stride shrinks the image; the pooling is not padded.
    convolved = [math.ceil(side / CONV_STRIDE) for side in image]
    pooled = [(side - POOL_KERNEL) // POOL_STRIDE + 1 for side in convolved]
    return batch, Ends(
        math.prod(pooled),
        CONV_CHANNELS + _fourier_channels(IMAGE_BANDS, dimensions=2),
        preprocessing=convolution_flops(math.prod(convolved), CONV_KERNEL, RGB_CHANNELS, CONV_CHANNELS),
        decoder=_classification_decoder(config),
    )


def _optical_flow_ends(config: ToMePerceiverConfig, shape: Sequence[int]) -> tuple[int, Ends]:
    frames = 2
    batch, _, _, height, width = _sizes(shape, "B", frames, FLOW_PATCH_CHANNELS // frames, "height", "width")
    inputs = height * width
    channels = FLOW_INPUT_CHANNELS + _fourier_channels(IMAGE_BANDS, dimensions=2)
    return batch, Ends(
        inputs,
        channels,
        preprocessing=product_flops(inputs, FLOW_PATCH_CHANNELS, FLOW_INPUT_CHANNELS),
        # The decoder asks with the encoder's inputs.
        decoder=Decoder(inputs, channels, after=product_flops(inputs, channels, FLOW_OUTPUT_CHANNELS)),
    )


def _multimodal_ends(
    config: ToMePerceiverConfig,
    shapes: Sequence[int] | Mapping[str, Sequence[int]],
    output_points: Mapping[str, int] | None,
) -> tuple[int, Ends]:
    if not isinstance(shapes, Mapping) or set(shapes) != {"audio", "image", "label"}:
        raise ValueError(f"input_shape = {shapes!r}: {MULTIMODAL} takes a shape for 'audio', 'image' and 'label'")
    if output_points is None or set(output_points) != {"audio", "image"}:
        raise ValueError(f"output_points = {output_points!r}: {MULTIMODAL} takes a number for 'audio' and 'image'")
    batch, samples, _ = _sizes(shapes["audio"], "B", "A", 1)
    _, frames, _, height, width = _sizes(shapes["image"], batch, "T", RGB_CHANNELS, "height", "width")
    _, labels = _sizes(shapes["label"], batch, _num_labels(config))

    audio_positions = _fourier_channels(AUDIO_BANDS, dimensions=1)
    video_positions = _fourier_channels(VIDEO_BANDS, dimensions=3)
    input_channels = max(
        config.samples_per_patch + audio_positions, RGB_CHANNELS * VIDEO_BLOCK**2 + video_positions, labels
    )
    inputs = samples // config.samples_per_patch + frames * (height // VIDEO_BLOCK) * (width // VIDEO_BLOCK) + 1

    audio, video, label = output_points["audio"], output_points["image"], 1
    queries = audio + video + label
    query_channels = QUERY_PADDING + max(audio_positions, video_positions, config._label_trainable_num_channels)
    outputs = config.output_num_channels
    after = (
        product_flops(queries, query_channels, outputs)
        + product_flops(audio, outputs, config.samples_per_patch)
        + product_flops(video, outputs, RGB_CHANNELS)
        + product_flops(label, outputs, labels)
    )
    return batch, Ends(inputs, INPUT_PADDING + input_channels, decoder=Decoder(queries, query_channels, after))


MULTIMODAL = "PerceiverForMultimodalAutoencoding"

_ENDS: dict[str, Callable[[ToMePerceiverConfig, Sequence[int]], tuple[int, Ends]]] = {
    "PerceiverModel": _base_ends,
    "PerceiverForSequenceClassification": _sequence_classification_ends,
    "PerceiverForMaskedLM": _masked_lm_ends,
    "PerceiverForImageClassificationLearned": _learned_ends,
    "PerceiverForImageClassificationFourier": _fourier_ends,
    "PerceiverForImageClassificationConvProcessing": _conv_ends,
    "PerceiverForOpticalFlow": _optical_flow_ends,
}
"""For each stock architecture: B and what it has around the latents, from a config and the shape of the inputs."""


def _classification_decoder(config: ToMePerceiverConfig) -> Decoder:
    """One query, projected to the labels."""
    return Decoder(1, config.d_latents, after=product_flops(1, config.d_latents, _num_labels(config)))


def _num_labels(config: ToMePerceiverConfig) -> int:
    return config.num_labels or 0  # `None` for a config whose labels were taken away


def _fourier_channels(bands: int, dimensions: int) -> int:
    """Sine and cosine for each band and dimension, and the position itself."""
    return (2 * bands + 1) * dimensions


def _attention_channels(qk_channels: int | None, v_channels: int | None, default: int) -> tuple[int, int]:
    """Upstream's defaults: keys are as wide as told or as `default`, values as told or as the keys."""
    qk_channels = default if qk_channels is None else qk_channels
    return qk_channels, qk_channels if v_channels is None else v_channels


def _architecture_name(config: ToMePerceiverConfig, architecture: str | None) -> str:
    """The stock name of an architecture: ours differ by their prefix alone."""
    if architecture is None:
        if not config.architectures:
            raise ValueError("architecture = None: config.architectures names none either; give a model class's name")
        architecture = config.architectures[0]
    name = architecture.removeprefix("ToMe")
    if name not in (*_ENDS, MULTIMODAL):
        raise ValueError(f"architecture = {architecture!r}: allowed are {', '.join((*_ENDS, MULTIMODAL))}")
    return name


def _sizes(shape: Sequence[int], *allowed: int | str) -> tuple[int, ...]:
    """`shape` once it is found to have the sizes that are given as numbers and as many as there are letters."""
    fits = len(shape) == len(allowed) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(shape, allowed, strict=True)
    )
    if not fits:
        raise ValueError(f"input_shape = {tuple(shape)}: allowed is ({', '.join(map(str, allowed))})")
    return tuple(shape)


def interleaved_seconds(
    run: Callable[[Any], object], variants: Sequence[Any], rounds: int, bar: tqdm | None = None
) -> list[list[float]]:
    """Time variants in alternating rounds: seconds of each in each round. A first round is not counted.

    What slows a machine for a while slows all variants of a round, so their ratios within a round are what counts.

    Args:
        run: called with a variant, which runs once in every round; each round starts with another one.
        variants: what to compare.
        rounds: that are counted.
        bar: is updated after each round.
    """
    seconds = []
    for round_index in range(rounds + 1):
        taken = [0.0] * len(variants)
        for offset in range(len(variants)):
            index = (round_index + offset) % len(variants)
            _wait_for_device()
            start = time.perf_counter()
            run(variants[index])
            _wait_for_device()
            taken[index] = time.perf_counter() - start
        seconds.append(taken)
        if bar is not None:
            bar.update()
    return seconds[1:]


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
