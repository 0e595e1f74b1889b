# SPDX-License-Identifier: Apache-2.0
"""Merging settings of a model and what they cost: FLOPs in closed form, time, schedules that meet a share of the FLOPs.

No model is built to count. Matrix products and convolutions count, 2 FLOPs for each multiply-add, as in
`torch.utils.flop_counter`; norms, activations, softmax, embeddings, sorting and the merge itself do not. Channel counts
follow the constructors of `transformers.models.perceiver.modeling_perceiver` (Jaegle et al., 2022).

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

# As in the module of the layers, which says why.
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
# Widths set by upstream's constructors: the queries and keys of the masked language model's decoder, and the Fourier
# positions of images (`_fourier_channels` of 64 bands, 2 dimensions).
RGB_CHANNELS, MASKED_LM_QK_CHANNELS, IMAGE_POSITIONS = 3, 8 * 32, 2 * (2 * 64 + 1)

InputShape = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one forward pass, for the whole batch, by where they are spent.

    Every row counts as the first one does, as in upstream's models. Ours project the queries that all rows repeat
    (latents before the first input is read, learned positions of a decoder) for the first row only.

    Attributes:
        preprocessing: convolutions and projections before the encoder.
        cross_attention: the encoder's cross-attention layer with its MLP.
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

        Compare it with the GFLOPs printed in "Token Merging Perceiver", which are this count and 5 FLOPs for each
        element of a layer norm, to within 0.02 GFLOPs.
        """
        return self.preprocessing + self.cross_attention + sum(self.self_attention) + self.decoder

    @property
    def total_with_matching(self) -> int:
        """FLOPs of everything that runs: what `FlopCounterMode` counts under eager attention for a batch of one."""
        return self.total + sum(self.matching)


def forward_cost(
    config: ToMePerceiverConfig,
    input_shape: InputShape,
    architecture: str | None = None,
    output_points: Mapping[str, int] | None = None,
) -> ForwardCost:
    """Count the FLOPs of one forward pass.

    Args:
        config: of the model, with its merging settings.
        input_shape: of the model's `inputs`: text (B, S), images (B, 3, height, width), optical flow
            (B, 2, 27, height, width), base model (B, S, d_model); for multimodal autoencoding by modality: `"audio"`
            (B, A, 1), `"image"` (B, T, 3, height, width) and `"label"` (B, K).
        architecture: name of a model class, stock or ours; by default the one in `config.architectures`.
        output_points: for multimodal autoencoding, how many points of `"audio"` and of `"image"` are decoded (the
            lengths of `subsampled_output_points`).

    Raises:
        ValueError: in one line, for an unknown architecture or merging method, or a wrong input shape.
    """
    return FlopsShare(config, input_shape, architecture, output_points).count(*_counted(config))


class Queries(NamedTuple):
    """Queries of a decoder, and the widths of its attention; `None` for upstream's default."""

    number: int
    channels: int
    qk_channels: int | None = None
    v_channels: int | None = None


class Ends(NamedTuple):
    """Parts of an architecture before and after the latents, for inputs of one shape.

    Attributes:
        batch: B.
        inputs, input_channels: S, and their width as the encoder reads them.
        preprocessing: FLOPs before the encoder, of one row.
        decoder: queries of the decoder; `None` without one.
        after: FLOPs after the decoder's layer, of one row.
    """

    batch: int
    inputs: int
    input_channels: int
    preprocessing: int = 0
    decoder: Queries | None = None
    after: int = 0


class LayerWidths(NamedTuple):
    """Channels of a layer of attention and MLP. Heads divide them, which leaves the FLOPs as they are."""

    queries: int
    keys: int
    qk: int
    v: int
    widening_factor: int

    @classmethod
    def of(
        cls, queries: int, keys: int, widening_factor: int, qk: int | None, v: int | None, default: int
    ) -> LayerWidths:
        """Fill in upstream's defaults: keys are `default` wide, values as wide as keys."""
        qk = default if qk is None else qk
        return cls(queries, keys, qk, qk if v is None else v, widening_factor)

    @classmethod
    def of_self_attention(cls, config: ToMePerceiverConfig) -> LayerWidths:
        d, factor = config.d_latents, config.self_attention_widening_factor
        return cls.of(d, d, factor, config.qk_channels, config.v_channels, d)


@cache  # A search asks for few numbers of latents, many times each.
def _layer_flops(widths: LayerWidths, queries: int, keys: int, mlp_rows: int) -> int:
    """FLOPs of multi-head attention with its output projection, and of the MLP, which may run on fewer rows."""
    projections = product_flops(queries, widths.queries, widths.qk) + product_flops(queries, widths.v, widths.queries)
    projections += product_flops(keys, widths.keys, widths.qk + widths.v)
    scores_and_values = product_flops(queries, keys, widths.qk + widths.v)
    mlp = 2 * product_flops(mlp_rows, widths.queries, widths.widening_factor * widths.queries)
    return projections + scores_and_values + mlp


def self_attention_layer_flops(config: ToMePerceiverConfig, before: int, after: int) -> int:
    """FLOPs of a layer that N = `before` latents reach and M = `after` leave: they merge before the MLP."""
    return _layer_flops(LayerWidths.of_self_attention(config), before, before, after)


def _counted(config: ToMePerceiverConfig) -> tuple[list[int], str | None, str]:
    """Return what `FlopsShare.count` takes: latents reaching each layer and left at last, method and metric."""
    method = None if config.merge_groups is not None else config.merge_method
    return [config.latents_at_start, *config.latents_per_layer], method, config.merge_metric


def _ends(
    config: ToMePerceiverConfig, shape: InputShape, architecture: str | None, points: Mapping[str, int] | None = None
) -> Ends:
    if architecture is None:
        if not config.architectures:
            raise ValueError("architecture=None: config.architectures names none either; give a model class's name")
        architecture = config.architectures[0]
    # Our classes are called as the stock ones, with a prefix.
    name = architecture.removeprefix("ToMe")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
    if name == MULTIMODAL:
        return _multimodal_ends(config, shape, points)
    if isinstance(shape, Mapping):
        raise ValueError(f"input_shape: must be a list of sizes for {name}; shapes by modality are for {MULTIMODAL}")
    if name == "PerceiverForOpticalFlow":
        return _optical_flow_ends(shape)
    ends = _image_ends(name, shape) if "Image" in name else _text_ends(config, name, shape)
    if "Classification" in name:
        # One query, projected to the labels.
        after = product_flops(1, config.d_latents, _num_labels(config))
        return ends._replace(decoder=Queries(1, config.d_latents), after=after)
    return ends


def _text_ends(config: ToMePerceiverConfig, name: str, shape: Sequence[int]) -> Ends:
    channels = config.d_model
    if name == "PerceiverModel":
        batch, inputs, _ = _sizes(shape, "B", "S", channels)
        return Ends(batch, inputs, channels)
    batch, inputs = _sizes(shape, "B", "S")
    if name == "PerceiverForSequenceClassification":
        return Ends(batch, inputs, channels)
    # Every position is decoded, whatever the length of the text.
    queries = Queries(config.max_position_embeddings, channels, MASKED_LM_QK_CHANNELS, channels)
    after = product_flops(queries.number, channels, config.vocab_size)
    return Ends(batch, inputs, channels, decoder=queries, after=after)


def _image_ends(name: str, shape: Sequence[int]) -> Ends:
    batch, _, height, width = _sizes(shape, "B", RGB_CHANNELS, "height", "width")
    pixels = height * width
    if name == "PerceiverForImageClassificationFourier":
        return Ends(batch, pixels, RGB_CHANNELS + IMAGE_POSITIONS)
    if name == "PerceiverForImageClassificationLearned":
        channels, positions = 256, 256
        preprocessing = product_flops(pixels, RGB_CHANNELS, channels) + product_flops(pixels, channels, positions)
        return Ends(batch, pixels, channels + positions, preprocessing)
    # A 7 x 7 convolution, padded so that only its stride of 2 shrinks the image; then 3 x 3 pooling without padding.
    channels, convolved = 64, [math.ceil(side / 2) for side in (height, width)]
    pooled = [(side - 3) // 2 + 1 for side in convolved]
    preprocessing = product_flops(math.prod(convolved), 7**2 * RGB_CHANNELS, channels)
    return Ends(batch, math.prod(pooled), channels + IMAGE_POSITIONS, preprocessing)


def _optical_flow_ends(shape: Sequence[int]) -> Ends:
    # Two RGB frames in patches of 3 x 3 pixels, projected to 64 channels.
    frames, patch_channels, projected = 2, 9 * RGB_CHANNELS, 64
    batch, _, _, height, width = _sizes(shape, "B", frames, patch_channels, "height", "width")
    inputs, channels = height * width, projected + IMAGE_POSITIONS
    preprocessing = product_flops(inputs, frames * patch_channels, projected)
    # The encoder's inputs are the decoder's queries; each is projected to the two components of the flow.
    return Ends(batch, inputs, channels, preprocessing, Queries(inputs, channels), product_flops(inputs, channels, 2))


def _multimodal_ends(config: ToMePerceiverConfig, shapes: InputShape, output_points: Mapping[str, int] | None) -> Ends:
    if not isinstance(shapes, Mapping) or set(shapes) != {"audio", "image", "label"}:
        raise ValueError(f"input_shape={shapes!r}: {MULTIMODAL} takes a shape for 'audio', 'image' and 'label'")
    if output_points is None or set(output_points) != {"audio", "image"}:
        raise ValueError(f"output_points={output_points!r}: {MULTIMODAL} takes a number for 'audio' and 'image'")
    batch, samples, _ = _sizes(shapes["audio"], "B", "A", 1)
    _, frames, _, height, width = _sizes(shapes["image"], batch, "T", RGB_CHANNELS, "height", "width")
    _, labels = _sizes(shapes["label"], batch, _num_labels(config))

    # Video comes in blocks of 4 x 4 pixels. Modalities are padded to the widest of them and `padding` channels more.
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
    return Ends(batch, inputs, input_channels, decoder=queries, after=after)


def _num_labels(config: ToMePerceiverConfig) -> int:
    return config.num_labels or 0  # `None` for a config whose labels were taken away


def _fourier_channels(bands: int, dimensions: int) -> int:
    """Sine and cosine for each band and dimension, and the position itself."""
    return (2 * bands + 1) * dimensions


def _sizes(shape: Sequence[int], *expected: int | str) -> tuple[int, ...]:
    """Return `shape`, checked to have the expected number of sizes, and the sizes expected as numbers."""
    if len(shape) != len(expected) or any(
        isinstance(wanted, int) and size != wanted for size, wanted in zip(shape, expected, strict=True)
    ):
        raise ValueError(f"input_shape={tuple(shape)}: must be ({', '.join(map(str, expected))})")
    return tuple(shape)


def interleaved_seconds(
    run: Callable[[Any], object], variants: Sequence[Any], rounds: int, bar: tqdm | None = None
) -> list[list[float]]:
    """Return the seconds of each variant in each of several alternating rounds, after a round of warm-up.

    A machine that is slower for a while slows all variants of a round, so only ratios within a round are meaningful.

    Args:
        run: called with a variant, which runs once in every round; each round starts with another one.
        variants: to compare.
        rounds: number of rounds that count.
        bar: is updated after each round.
    """
    # Kernels on a GPU run after the call that starts them.
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    for round_index in range(rounds + 1):
        taken = [0.0] * len(variants)
        for offset in range(len(variants)):
            index = (round_index + offset) % len(variants)
            wait()
            start = time.perf_counter()
            run(variants[index])
            wait()
            taken[index] = time.perf_counter() - start
        seconds.append(taken)
        if bar is not None:
            bar.update()
    return seconds[1:]


@dataclass(frozen=True)
class Merging:
    """Merging settings of a model, with the number of weight-shared blocks it runs; each a field of its config."""

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
        """Return settings with which nothing merges and all blocks of the config run."""
        return cls.of(config).by(0)

    def by(self, r: int | list[int], **changed: Any) -> Merging:
        """Return the same settings with another r, no groups, and other fields where `changed` names them."""
        return replace(self, **{**UNMERGED, "r": r, **changed})

    def apply(self, config: ToMePerceiverConfig) -> None:
        """Set the fields on a config.

        Raises:
            ValueError: naming the field and its value; the config stays as it was.
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
        """Set the fields inside the block, as `apply` does, and restore them after it."""
        before = Merging.of(config)
        self.apply(config)
        try:
            yield
        finally:
            before.apply(config)

    def asked_of(self, config: ToMePerceiverConfig) -> ToMePerceiverConfig:
        """Return a copy of a config with these settings."""
        asked = copy.copy(config)
        self.apply(asked)
        return asked

    def merges(self, config: ToMePerceiverConfig) -> bool:
        """Return whether a model that runs all blocks of `config` changes with these settings."""
        latents_left = self.asked_of(config).latents_per_layer[-1]
        return self.num_blocks != config.num_blocks or latents_left < config.num_latents

    @property
    def key(self) -> str:
        """The settings as a string, for files and caches."""
        return json.dumps(asdict(self), sort_keys=True)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Run the block in evaluation mode without gradients, then restore the merging and the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    with Merging.of(model.config).applied(model.config), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


class FlopsShare:
    """FLOPs of forward passes on inputs of one shape, by default as a share of the unmerged model's.

    Args:
        config: of the unmerged model; its merging settings have no effect.
        input_shape, architecture, output_points: as `forward_cost` takes them.
    """

    def __init__(
        self,
        config: ToMePerceiverConfig,
        input_shape: InputShape,
        architecture: str | None = None,
        output_points: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self.input_shape = Merging.none(config).asked_of(config), input_shape
        self._ends = ends = _ends(config, input_shape, architecture, output_points)
        keys_decide, latents = config.cross_attention_shape_for_attention == "kv", config.d_latents
        self._layer = LayerWidths.of_self_attention(config)
        self._encoder = LayerWidths.of(
            latents,
            ends.input_channels,
            config.cross_attention_widening_factor,
            config.qk_channels,
            config.v_channels,
            default=ends.input_channels if keys_decide else latents,
        )
        if (queries := ends.decoder) is not None:
            default = latents if keys_decide else queries.channels
            widths = queries.qk_channels, queries.v_channels, default
            self._decoder = LayerWidths.of(queries.channels, latents, 1, *widths)
        heads = config.num_self_attention_heads
        # Width of the metric: the keys or values of one head, or the latents.
        self._metrics = {"key": self._layer.qk // heads, "value": self._layer.v // heads, "hidden": latents}
        self.unmerged_flops = self.count(*_counted(self.config)).total / ends.batch

    def __call__(self, merging: Merging) -> float:
        """Return the share of one setting."""
        return self.of(*_counted(merging.asked_of(self.config)))

    def of(self, reaching: Sequence[int], method: str | None, metric: str) -> float:
        """Return the share for given numbers of latents, as `count` takes them."""
        return self.count(reaching, method, metric).total_with_matching / self._ends.batch / self.unmerged_flops

    def count(self, reaching: Sequence[int], method: str | None, metric: str) -> ForwardCost:
        """Count the FLOPs for given numbers of latents.

        Args:
            reaching: L + 1 numbers: latents that read the inputs, then those left after each layer that runs.
            method, metric: of matching; `None` as the method for fixed groups, which match nothing.

        Raises:
            ValueError: if the FLOPs of the method are not known.
        """
        ends, layers, decoder = self._ends, list(pairwise(reaching)), 0
        if ends.decoder is not None:
            queries = ends.decoder.number
            decoder = _layer_flops(self._decoder, queries, reaching[-1], queries) + ends.after
        batch, channels = ends.batch, self._metrics[metric]
        return ForwardCost(
            preprocessing=batch * ends.preprocessing,
            cross_attention=batch * _layer_flops(self._encoder, reaching[0], ends.inputs, reaching[0]),
            self_attention=tuple(batch * _layer_flops(self._layer, n, n, m) for n, m in layers),
            matching=tuple(
                0 if method is None or n == m else batch * matching_flops(method, n, channels) for n, m in layers
            ),
            decoder=batch * decoder,
        )


DEFAULT_SCHEDULE = "floor"
SCHEDULES: dict[str, Callable[[int, int, float], list[float]]] = {
    # The same number in every layer, as in the source paper.
    "constant": lambda n, layers, strength: [n - strength * n / 2 * (layer + 1) for layer in range(layers)],
    # Twice the mean number in the first layer, falling to none in the last (Bolya et al., 2023, appendix D).
    "linear": lambda n, layers, strength: [
        n - strength * n * (layer + 1) * (1 - layer / 2 / max(layers - 1, 1)) for layer in range(layers)
    ],
    # As many as possible from the first layer on, down to a number that then stays.
    "floor": lambda n, layers, strength: [n ** (1 - strength)] * layers,
    # The same share of the remaining latents in every layer.
    "geometric": lambda n, layers, strength: [n * (1 - strength / 2) ** (layer + 1) for layer in range(layers)],
    # The same share at the first layer and after each third of the others: three matchings only.
    "staged": lambda n, layers, strength: [
        n * (1 - strength / 2) ** (1 + layer * 3 // layers) for layer in range(layers)
    ],
}
"""From N, L and a strength in [0, 1] to the latents left after each of the L layers, not yet whole numbers."""
SKIP_BLOCKS = "skip_blocks"
"""A control: nothing merges, and weight-shared blocks run fewer times."""


def latents_left(config: ToMePerceiverConfig, name: str, strength: float) -> Sequence[float]:
    """Return the latents left after each layer that runs, by a schedule of `SCHEDULES` or `SKIP_BLOCKS`."""
    if name != SKIP_BLOCKS:
        return SCHEDULES[name](config.num_latents, config.num_self_attention_layers, strength)
    num_blocks = max(1, round(config.num_blocks * (1 - strength)))
    return [config.num_latents] * (num_blocks * config.num_self_attends_per_block)


def whole_schedule(latents: int, left_after: Sequence[float], min_latents: int = 1) -> list[int]:
    """Return the latents to remove in each layer so that about `left_after` are left.

    At least `min_latents` are left, and at least half of what reaches a layer.
    """
    removed, left = [], latents
    for wanted in left_after:
        removed.append(max(0, min(left - max(min_latents, round(wanted)), left // 2)))
        left -= removed[-1]
    return removed


def merging_at(config: ToMePerceiverConfig, name: str, strength: float, base: Merging | None = None) -> Merging:
    """Return the settings of a schedule at a strength in [0, 1]: at 0 nothing merges, at 1 as much as it allows.

    Args:
        config: of the model; its own merging has no effect.
        name: of the schedule, in `SCHEDULES` or `SKIP_BLOCKS`.
        strength: from 0 to 1.
        base: the other settings; by default those of the config.
    """
    settings, left = base or Merging.none(config), latents_left(config, name, strength)
    removed = whole_schedule(config.num_latents, left, settings.min_latents)
    return settings.by(removed, num_blocks=len(left) // config.num_self_attends_per_block)


def merging_within(
    config: ToMePerceiverConfig, name: str, flops_ratio: float, share: FlopsShare, base: Merging | None = None
) -> Merging:
    """Return the settings of a schedule at the least strength that costs at most a share of the FLOPs.

    Args:
        config, name, base: as for `merging_at`.
        flops_ratio, share: of the unmerged model's FLOPs.

    Raises:
        ValueError: in one line, if the schedule does not reach it.
    """
    found = weakest(lambda strength: merging_at(config, name, strength, base), flops_ratio, share)
    if found is None:
        raise out_of_reach(flops_ratio, share(merging_at(config, name, 1.0, base)), f"schedule {name}")
    return found


def weakest(at: Callable[[float], Any], ratio: float, share: Callable[[Any], float]) -> Any:
    """Return `at(strength)` for the least strength in [0, 1] that costs at most `ratio`; `None` if 1 costs more.

    Args:
        at: settings or a candidate by strength, whose cost falls as the strength rises.
        ratio: share of the unmerged model's cost.
        share: cost of what `at` returns.
    """
    if share(at(0.0)) <= ratio:
        return at(0.0)
    if share(at(1.0)) > ratio:
        return None
    weak, strong = 0.0, 1.0
    # Fine enough to tell two numbers of latents apart.
    for _ in range(20):
        middle = (weak + strong) / 2
        weak, strong = (weak, middle) if share(at(middle)) <= ratio else (middle, strong)
    return at(strong)


def out_of_reach(flops_ratio: float, least: float, what: str) -> ValueError:
    """Return the error for a share of the FLOPs below the least that `what` reaches."""
    return ValueError(f"flops_ratio={flops_ratio} is out of reach: {what} reaches {least:.3f} at best")
