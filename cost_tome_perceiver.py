# SPDX-License-Identifier: Apache-2.0
"""Merging settings of a model and their cost: closed-form FLOPs, measured time, schedules within a FLOPs budget.

FLOPs are computed from the config, without building a model. Matrix products and convolutions count, 2 FLOPs for each
multiply-add, as in `torch.utils.flop_counter`; norms, activations, softmax, embeddings, sorting and the averaging of
merged latents do not. Channel counts follow the constructors of `transformers.models.perceiver.modeling_perceiver`
(Jaegle et al., 2022). The models, the frontier, the scripts and the benchmarks use this module.

Letters: B batch, S inputs of the encoder, L self-attention layers, N latents that reach a layer, M latents that leave
it, Q decoder queries, T frames, A audio samples, K labels.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

# layers_tome_perceiver.py explains the two ways to import.
try:
    from .configuration_tome_perceiver import UNMERGED, ToMePerceiverConfig
    from .merging_tome_perceiver import check_merge_method, matching_flops, product_flops
except ImportError:
    if __package__:
        raise
    from configuration_tome_perceiver import UNMERGED, ToMePerceiverConfig
    from merging_tome_perceiver import check_merge_method, matching_flops, product_flops

MULTIMODAL = "PerceiverForMultimodalAutoencoding"
ARCHITECTURES = (
    "PerceiverModel",
    "PerceiverForSequenceClassification",
    "PerceiverForMaskedLM",
    "PerceiverForImageClassificationLearned",
    "PerceiverForImageClassificationFourier",
    "PerceiverForImageClassificationConvProcessing",
    "PerceiverForOpticalFlow",
    MULTIMODAL,
)
# Widths that upstream's constructors fix: queries and keys of the masked language model's decoder, and Fourier
# position encodings of images (`_fourier_channels` with 64 bands and 2 dimensions).
RGB_CHANNELS, MASKED_LM_QK_CHANNELS, IMAGE_POSITION_CHANNELS = 3, 8 * 32, 2 * (2 * 64 + 1)

InputShape = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one forward pass for the whole batch, by part of the model.

    Each row of the batch costs the same, as in upstream's models. Our models need slightly fewer FLOPs: they project
    queries that are equal in all rows (learned latents, learned positions of a decoder) once for the batch.

    Attributes:
        preprocessing: convolutions and projections before the encoder.
        cross_attention: the encoder's cross-attention layer with its MLP.
        self_attention: one number for each of the L layers, in running order: attention on N latents, MLP on M.
        matching: one number for each of the L layers: the similarities that decide which latents merge; 0 if none do.
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

        The GFLOPs printed in "Token Merging Perceiver" equal this count plus 5 FLOPs for each element of a layer norm,
        to within 0.02 GFLOPs.
        """
        return self.preprocessing + self.cross_attention + sum(self.self_attention) + self.decoder

    @property
    def total_with_matching(self) -> int:
        """FLOPs with the matching; `FlopCounterMode` counts the same with eager attention and a batch of one."""
        return self.total + sum(self.matching)


def forward_cost(
    config: ToMePerceiverConfig,
    input_shape: InputShape,
    architecture: str | None = None,
    output_points: Mapping[str, int] | None = None,
) -> ForwardCost:
    """Count the FLOPs of one forward pass.

    Args:
        config: config of the model, with its merging settings.
        input_shape: shape of the model's `inputs`: text (B, S), images (B, 3, height, width), optical flow
            (B, 2, 27, height, width), base model (B, S, d_model); for multimodal autoencoding a dict of shapes:
            `"audio"` (B, A, 1), `"image"` (B, T, 3, height, width) and `"label"` (B, K).
        architecture: name of a model class, stock or ours; by default the one in `config.architectures`.
        output_points: for multimodal autoencoding only: number of decoded points of `"audio"` and of `"image"`, the
            lengths of `subsampled_output_points`.

    Raises:
        ValueError: for an unknown architecture or merging method, or a wrong input shape.
    """
    return FlopsShare(config, input_shape, architecture, output_points).count(*_count_arguments(config))


class Queries(NamedTuple):
    """Number of a decoder's queries, and widths of its attention; `None` means upstream's default."""

    number: int
    channels: int
    qk_channels: int | None = None
    v_channels: int | None = None


class OuterLayers(NamedTuple):
    """Layers of an architecture before and after the latents, for inputs of one shape.

    Attributes:
        batch: B.
        inputs, input_channels: S, and the width of each input when the encoder reads it.
        preprocessing: FLOPs before the encoder, for one row.
        decoder: queries of the decoder; `None` for a model without a decoder.
        after: FLOPs after the decoder's cross-attention layer, for one row.
    """

    batch: int
    inputs: int
    input_channels: int
    preprocessing: int = 0
    decoder: Queries | None = None
    after: int = 0


class LayerWidths(NamedTuple):
    """Channel counts of one attention layer with its MLP. The number of heads does not change the FLOPs."""

    queries: int
    keys: int
    qk: int
    v: int
    widening_factor: int

    @classmethod
    def with_defaults(
        cls, queries: int, keys: int, widening_factor: int, qk: int | None, v: int | None, default: int
    ) -> LayerWidths:
        """Fill in upstream's defaults: keys have `default` channels, values as many as keys."""
        qk = default if qk is None else qk
        return cls(queries, keys, qk, qk if v is None else v, widening_factor)

    @classmethod
    def of_self_attention(cls, config: ToMePerceiverConfig) -> LayerWidths:
        d, factor = config.d_latents, config.self_attention_widening_factor
        return cls.with_defaults(d, d, factor, config.qk_channels, config.v_channels, d)


@cache  # A search counts the same few numbers of latents many times.
def _layer_flops(widths: LayerWidths, queries: int, keys: int, mlp_rows: int) -> int:
    """Count the FLOPs of attention with its output projection, and of the MLP, which may run on fewer latents."""
    projections = product_flops(queries, widths.queries, widths.qk) + product_flops(queries, widths.v, widths.queries)
    projections += product_flops(keys, widths.keys, widths.qk + widths.v)
    scores_and_values = product_flops(queries, keys, widths.qk + widths.v)
    mlp = 2 * product_flops(mlp_rows, widths.queries, widths.widening_factor * widths.queries)
    return projections + scores_and_values + mlp


def self_attention_layer_flops(config: ToMePerceiverConfig, before: int, after: int) -> int:
    """Count the FLOPs of a layer that merges N = `before` latents into M = `after` between attention and MLP."""
    return _layer_flops(LayerWidths.of_self_attention(config), before, before, after)


def _count_arguments(config: ToMePerceiverConfig) -> tuple[list[int], str | None, str]:
    """Return the arguments of `FlopsShare.count` for a config."""
    method = None if config.merge_groups is not None else config.merge_method
    return [config.latents_at_start, *config.latents_per_layer], method, config.merge_metric


def _outer_layers(
    config: ToMePerceiverConfig, shape: InputShape, architecture: str | None, points: Mapping[str, int] | None = None
) -> OuterLayers:
    if architecture is None:
        if not config.architectures:
            raise ValueError("architecture=None: config.architectures is empty too; give the name of a model class")
        architecture = config.architectures[0]
    # Our classes have the names of the stock ones, with a prefix.
    name = architecture.removeprefix("ToMe")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
    if name == MULTIMODAL:
        return _multimodal_outer_layers(config, shape, points)
    if isinstance(shape, Mapping):
        raise ValueError(f"input_shape: must be one shape for {name}; only {MULTIMODAL} takes a dict of shapes")
    if name == "PerceiverForOpticalFlow":
        return _optical_flow_outer_layers(shape)
    outer = _image_outer_layers(name, shape) if "Image" in name else _text_outer_layers(config, name, shape)
    if "Classification" in name:
        # The decoder has one query, whose output is projected to the labels.
        after = product_flops(1, config.d_latents, _num_labels(config))
        return outer._replace(decoder=Queries(1, config.d_latents), after=after)
    return outer


def _text_outer_layers(config: ToMePerceiverConfig, name: str, shape: Sequence[int]) -> OuterLayers:
    channels = config.d_model
    if name == "PerceiverModel":
        batch, inputs, _ = _sizes(shape, "B", "S", channels)
        return OuterLayers(batch, inputs, channels)
    batch, inputs = _sizes(shape, "B", "S")
    if name == "PerceiverForSequenceClassification":
        return OuterLayers(batch, inputs, channels)
    # The model decodes all its positions, also for shorter texts.
    queries = Queries(config.max_position_embeddings, channels, MASKED_LM_QK_CHANNELS, channels)
    after = product_flops(queries.number, channels, config.vocab_size)
    return OuterLayers(batch, inputs, channels, decoder=queries, after=after)


def _image_outer_layers(name: str, shape: Sequence[int]) -> OuterLayers:
    batch, _, height, width = _sizes(shape, "B", RGB_CHANNELS, "height", "width")
    pixels = height * width
    if name == "PerceiverForImageClassificationFourier":
        return OuterLayers(batch, pixels, RGB_CHANNELS + IMAGE_POSITION_CHANNELS)
    if name == "PerceiverForImageClassificationLearned":
        channels, positions = 256, 256
        preprocessing = product_flops(pixels, RGB_CHANNELS, channels) + product_flops(pixels, channels, positions)
        return OuterLayers(batch, pixels, channels + positions, preprocessing)
    # A 7 x 7 convolution with stride 2 and padding halves each side (rounded up); 3 x 3 pooling has no padding.
    channels, convolved = 64, [math.ceil(side / 2) for side in (height, width)]
    pooled = [(side - 3) // 2 + 1 for side in convolved]
    preprocessing = product_flops(math.prod(convolved), 7**2 * RGB_CHANNELS, channels)
    return OuterLayers(batch, math.prod(pooled), channels + IMAGE_POSITION_CHANNELS, preprocessing)


def _optical_flow_outer_layers(shape: Sequence[int]) -> OuterLayers:
    # Two RGB frames in patches of 3 x 3 pixels, projected to 64 channels.
    frames, patch_channels, projected = 2, 9 * RGB_CHANNELS, 64
    batch, _, _, height, width = _sizes(shape, "B", frames, patch_channels, "height", "width")
    inputs, channels = height * width, projected + IMAGE_POSITION_CHANNELS
    preprocessing = product_flops(inputs, frames * patch_channels, projected)
    # The encoder's inputs are also the decoder's queries; each output is projected to the two components of the flow.
    return OuterLayers(
        batch, inputs, channels, preprocessing, Queries(inputs, channels), product_flops(inputs, channels, 2)
    )


def _multimodal_outer_layers(
    config: ToMePerceiverConfig, shapes: InputShape, output_points: Mapping[str, int] | None
) -> OuterLayers:
    if not isinstance(shapes, Mapping) or set(shapes) != {"audio", "image", "label"}:
        raise ValueError(f"input_shape={shapes!r}: must be a dict with the shapes of 'audio', 'image' and 'label'")
    if output_points is None or set(output_points) != {"audio", "image"}:
        raise ValueError(
            f"output_points={output_points!r}: must be a dict with the numbers of points of 'audio' and 'image'"
        )
    batch, samples, _ = _sizes(shapes["audio"], "B", "A", 1)
    _, frames, _, height, width = _sizes(shapes["image"], batch, "T", RGB_CHANNELS, "height", "width")
    _, labels = _sizes(shapes["label"], batch, _num_labels(config))

    # Video is read in blocks of 4 x 4 pixels. All modalities are padded to the widest one plus the padding channels.
    block, input_padding, query_padding = 4, 4, 2
    audio_positions, video_positions = _fourier_channels(192, dimensions=1), _fourier_channels(32, dimensions=3)
    patch = config.samples_per_patch
    input_channels = max(patch + audio_positions, RGB_CHANNELS * block**2 + video_positions, labels) + input_padding
    inputs = samples // patch + frames * (height // block) * (width // block) + 1

    audio, video, label = output_points["audio"], output_points["image"], 1
    query_channels = max(audio_positions, video_positions, config._label_trainable_num_channels) + query_padding
    queries, outputs = Queries(audio + video + label, query_channels), config.output_num_channels
    after = product_flops(queries.number, query_channels, outputs) + sum(
        product_flops(points, outputs, channels)
        for points, channels in ((audio, patch), (video, RGB_CHANNELS), (label, labels))
    )
    return OuterLayers(batch, inputs, input_channels, decoder=queries, after=after)


def _num_labels(config: ToMePerceiverConfig) -> int:
    return config.num_labels or 0  # A config whose labels were removed has `None`.


def _fourier_channels(bands: int, dimensions: int) -> int:
    """Count the channels of a Fourier encoding: sine and cosine for each band, and the position, in each dimension."""
    return (2 * bands + 1) * dimensions


def _sizes(shape: Sequence[int], *expected: int | str) -> tuple[int, ...]:
    """Check the length of `shape`, and the sizes that `expected` gives as numbers; return it as a tuple."""
    if len(shape) != len(expected) or any(
        isinstance(fixed, int) and size != fixed for size, fixed in zip(shape, expected, strict=True)
    ):
        raise ValueError(f"input_shape={tuple(shape)}: must be ({', '.join(map(str, expected))})")
    return tuple(shape)


def interleaved_seconds(
    run: Callable[[Any], object], variants: Sequence[Any], rounds: int, bar: tqdm | None = None
) -> list[list[float]]:
    """Time variants in turns and return the seconds of each, by round; a warm-up round is not returned.

    Compare variants only within a round: when the machine is slow for a while, all variants of that round are slow.

    Args:
        run: runs one variant; called once for each variant in each round, and each round starts with another variant.
        variants: values to call `run` with.
        rounds: number of rounds that are returned.
        bar: progress bar to update after each round.
    """
    # A GPU runs kernels asynchronously, so the clock has to wait for them.
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    for round_index in range(rounds + 1):
        round_seconds = [0.0] * len(variants)
        for offset in range(len(variants)):
            index = (round_index + offset) % len(variants)
            wait()
            start = time.perf_counter()
            run(variants[index])
            wait()
            round_seconds[index] = time.perf_counter() - start
        seconds.append(round_seconds)
        if bar is not None:
            bar.update()
    return seconds[1:]


@dataclass(frozen=True)
class Merging:
    """Merging settings of a model, with the number of weight-shared blocks that run; each is a field of its config."""

    r: int | list[int]
    r_inflection: float
    min_latents: int
    proportional_attention: bool
    merge_method: str
    merge_metric: str
    merge_groups: list[list[int] | None] | None
    latent_groups: list[int] | None
    num_blocks: int

    @classmethod
    def of(cls, config: ToMePerceiverConfig) -> Merging:
        """Return the settings of a config."""
        return cls(**{field.name: copy.deepcopy(getattr(config, field.name)) for field in fields(cls)})

    @classmethod
    def none(cls, config: ToMePerceiverConfig) -> Merging:
        """Return the settings of the unmerged model: no latents merge and all blocks of the config run."""
        return cls.of(config).by(0)

    def by(self, r: int | list[int], **changed: Any) -> Merging:
        """Return a copy with this r, no inflection and no groups, and then with the fields in `changed` replaced."""
        return replace(self, **{**UNMERGED, "r": r, **changed})

    def apply(self, config: ToMePerceiverConfig) -> None:
        """Write the settings into a config.

        Raises:
            ValueError: for an invalid field, which it names; the config is unchanged.
        """
        before = {field.name: getattr(config, field.name) for field in fields(self)}
        try:
            for name, value in asdict(self).items():
                setattr(config, name, value)
            config.check_merging()
            check_merge_method(config.merge_method)
        except ValueError:
            for name, value in before.items():
                setattr(config, name, value)
            raise

    @contextmanager
    def applied(self, config: ToMePerceiverConfig) -> Iterator[None]:
        """Apply the settings to a config inside the block, and restore its own after it."""
        before = Merging.of(config)
        self.apply(config)
        try:
            yield
        finally:
            before.apply(config)

    def asked_of(self, config: ToMePerceiverConfig) -> ToMePerceiverConfig:
        """Return a copy of a config with these settings."""
        changed = copy.copy(config)
        self.apply(changed)
        return changed

    def merges(self, config: ToMePerceiverConfig) -> bool:
        """Return whether these settings merge latents or run fewer blocks than `config`."""
        latents_left = self.asked_of(config).latents_per_layer[-1]
        return self.num_blocks != config.num_blocks or latents_left < config.num_latents

    @property
    def key(self) -> str:
        """Settings as a JSON string, to compare them in files and caches."""
        return json.dumps(asdict(self), sort_keys=True)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Run the block in evaluation mode without gradients, then restore merging settings and training modes."""
    modes = [(module, module.training) for module in model.modules()]
    with Merging.of(model.config).applied(model.config), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


class FlopsShare:
    """FLOPs of merging settings on inputs of one shape, as a share of the unmerged model's FLOPs.

    Args:
        config: config of the model; its merging settings are ignored.
        input_shape, architecture, output_points: as in `forward_cost`.
    """

    def __init__(
        self,
        config: ToMePerceiverConfig,
        input_shape: InputShape,
        architecture: str | None = None,
        output_points: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.input_shape = Merging.none(config).asked_of(config), input_shape
        self._outer_layers = outer = _outer_layers(config, input_shape, architecture, output_points)
        widths_follow_keys, latents = config.cross_attention_shape_for_attention == "kv", config.d_latents
        self._layer = LayerWidths.of_self_attention(config)
        self._encoder = LayerWidths.with_defaults(
            latents,
            outer.input_channels,
            config.cross_attention_widening_factor,
            config.qk_channels,
            config.v_channels,
            default=outer.input_channels if widths_follow_keys else latents,
        )
        if (queries := outer.decoder) is not None:
            default = latents if widths_follow_keys else queries.channels
            widths = queries.qk_channels, queries.v_channels, default
            self._decoder = LayerWidths.with_defaults(queries.channels, latents, 1, *widths)
        heads = config.num_self_attention_heads
        # Channels that the matching compares: the keys or values of one head, or whole latents.
        self._metrics = {"key": self._layer.qk // heads, "value": self._layer.v // heads, "hidden": latents}
        self.unmerged_flops = self.count(*_count_arguments(self.config)).total / outer.batch

    def __call__(self, merging: Merging) -> float:
        """Return the share of the unmerged FLOPs, with the matching, that these settings cost."""
        return self.for_latents(*_count_arguments(merging.asked_of(self.config)))

    def for_latents(self, reaching: Sequence[int], method: str | None, metric: str) -> float:
        """Return the share of the unmerged FLOPs, with the matching, for numbers of latents as in `count`."""
        return self.count(reaching, method, metric).total_with_matching / self._outer_layers.batch / self.unmerged_flops

    def count(self, reaching: Sequence[int], method: str | None, metric: str) -> ForwardCost:
        """Count the FLOPs for given numbers of latents.

        Args:
            reaching: L + 1 numbers: latents that read the inputs, then latents left after each layer that runs.
            method, metric: matching method and similarity metric; `None` as the method for fixed groups.

        Raises:
            ValueError: for a matching method registered without its FLOPs.
        """
        outer, layers, decoder = self._outer_layers, list(pairwise(reaching)), 0
        if outer.decoder is not None:
            queries = outer.decoder.number
            decoder = _layer_flops(self._decoder, queries, reaching[-1], queries) + outer.after
        batch, channels = outer.batch, self._metrics[metric]
        return ForwardCost(
            preprocessing=batch * outer.preprocessing,
            cross_attention=batch * _layer_flops(self._encoder, reaching[0], outer.inputs, reaching[0]),
            self_attention=tuple(batch * _layer_flops(self._layer, n, n, m) for n, m in layers),
            matching=tuple(
                0 if method is None or n == m else batch * matching_flops(method, n, channels) for n, m in layers
            ),
            decoder=batch * decoder,
        )


DEFAULT_SCHEDULE = "floor"
SCHEDULES: dict[str, Callable[[int, int, float], list[float]]] = {
    # Remove the same number in every layer, as in the source paper.
    "constant": lambda n, layers, strength: [n - strength * n / 2 * (layer + 1) for layer in range(layers)],
    # Remove twice the mean number in the first layer, falling to none in the last (Bolya et al., 2023, appendix D).
    "linear": lambda n, layers, strength: [
        n - strength * n * (layer + 1) * (1 - layer / 2 / max(layers - 1, 1)) for layer in range(layers)
    ],
    # Remove as many as possible from the first layer on, until a fixed number is left.
    "floor": lambda n, layers, strength: [n ** (1 - strength)] * layers,
    # Remove the same share of the remaining latents in every layer.
    "geometric": lambda n, layers, strength: [n * (1 - strength / 2) ** (layer + 1) for layer in range(layers)],
    # Remove the same share at the start of each third of the layers: only three layers match.
    "staged": lambda n, layers, strength: [
        n * (1 - strength / 2) ** (1 + layer * 3 // layers) for layer in range(layers)
    ],
}
"""Schedules by name: functions of N, L and a strength in [0, 1] that return the latents left after each layer.

The numbers need not be integers; `round_schedule` rounds them.
"""
SKIP_BLOCKS = "skip_blocks"
"""Control experiment in place of a schedule: nothing merges, but fewer weight-shared blocks run."""


def latents_left(config: ToMePerceiverConfig, name: str, strength: float) -> Sequence[float]:
    """Return the latents left after each layer that runs, for a name in `SCHEDULES` or `SKIP_BLOCKS`."""
    if name != SKIP_BLOCKS:
        return SCHEDULES[name](config.num_latents, config.num_self_attention_layers, strength)
    num_blocks = max(1, round(config.num_blocks * (1 - strength)))
    return [config.num_latents] * (num_blocks * config.num_self_attends_per_block)


def round_schedule(latents: int, left_after: Sequence[float], min_latents: int = 1) -> list[int]:
    """Return the whole number of latents to remove in each layer so that about `left_after` are left.

    Each layer keeps at least `min_latents`, and at least half of the latents that reach it.
    """
    removed, left = [], latents
    for wanted in left_after:
        removed.append(max(0, min(left - max(min_latents, round(wanted)), left // 2)))
        left -= removed[-1]
    return removed


def merging_at(config: ToMePerceiverConfig, name: str, strength: float, base: Merging | None = None) -> Merging:
    """Return the settings of a schedule at a strength in [0, 1]: at 0 nothing merges, at 1 as much as possible.

    Args:
        config: config of the model; its own schedule is ignored.
        name: name in `SCHEDULES` or `SKIP_BLOCKS`.
        strength: from 0 to 1.
        base: settings other than the schedule; by default those of the config.
    """
    settings, left = base or Merging.none(config), latents_left(config, name, strength)
    removed = round_schedule(config.num_latents, left, settings.min_latents)
    return settings.by(removed, num_blocks=len(left) // config.num_self_attends_per_block)


def merging_within(
    config: ToMePerceiverConfig, name: str, flops_ratio: float, share: FlopsShare, base: Merging | None = None
) -> Merging:
    """Return the settings of a schedule at the least strength that meets a FLOPs budget.

    Args:
        config, name, base: as in `merging_at`.
        flops_ratio: budget, as a share of the unmerged model's FLOPs.
        share: returns the cost of settings as a share of the unmerged model's FLOPs.

    Raises:
        ValueError: if the schedule costs more even at full strength.
    """
    found = weakest_within(lambda strength: merging_at(config, name, strength, base), flops_ratio, share)
    if found is None:
        raise out_of_reach_error(flops_ratio, share(merging_at(config, name, 1.0, base)), f"schedule {name}")
    return found


def weakest_within(make: Callable[[float], Any], ratio: float, share: Callable[[Any], float]) -> Any:
    """Return `make(strength)` for the least strength in [0, 1] whose cost is at most `ratio`, or `None`.

    Args:
        make: makes settings or a candidate from a strength; its cost falls as the strength rises.
        ratio: largest share of the unmerged model's cost.
        share: returns the cost of a result of `make`, as a share of the unmerged model's cost.
    """
    if share(make(0.0)) <= ratio:
        return make(0.0)
    if share(make(1.0)) > ratio:
        return None
    weak, strong = 0.0, 1.0
    # After 20 halvings, strengths are close enough that the numbers of latents no longer change.
    for _ in range(20):
        middle = (weak + strong) / 2
        weak, strong = (weak, middle) if share(make(middle)) <= ratio else (middle, strong)
    return make(strong)


def out_of_reach_error(flops_ratio: float, least: float, subject: str) -> ValueError:
    """Return the error for a FLOPs budget below the least share that `subject`, such as a schedule, reaches."""
    return ValueError(f"flops_ratio={flops_ratio} is out of reach: {subject} reaches {least:.3f} at best")
