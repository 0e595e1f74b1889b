# SPDX-License-Identifier: Apache-2.0
"""Draw the positions of an input that each latent left at the end attends to.

Latents read the input once, in the encoder's cross-attention, and merge afterwards. So the attention of a merged latent
is the mean over its sources, the latents that merged into it. Used by the Space and by examples/draw_merging.py;
imports nothing of the repository, because the Space has only this folder.

Letters: B batch, H heads, S positions of the input (pixels, bytes or tokens), N latents, M latents left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from PIL import Image as PilImage
from torch import Tensor
from transformers import BaseImageProcessor, PerceiverTokenizer, PreTrainedModel
from transformers.image_utils import load_image

# Most latents to draw for one input: each is a panel of an image, or a row of a text.
IMAGE_PANELS, TEXT_ROWS = 12, 24
LATENT_COLORS = np.array([matplotlib.colormaps["tab20"](index)[:3] for index in (*range(0, 20, 2), 1, 5)])
LATENT_COLORS[7] = (1.0, 1.0, 0.2)  # The map's own colour is grey, as are latents that are not shown.
OTHER_COLOR = np.full(3, 0.55)
# From transparent to opaque, so that the image stays visible where a latent reads little.
READING_COLORS = LinearSegmentedColormap.from_list(
    "reading", [(1.0, 0.9, 0.0, 0.0), (1.0, 0.65, 0.0, 0.45), (0.95, 0.2, 0.0, 0.8), (0.6, 0.0, 0.15, 0.95)]
)
# Quantile of the attention that gets the strongest colour; with the maximum, a few cells would make all others pale.
SHOWN_QUANTILE = 0.995
# Visible characters to draw for whitespace.
VISIBLE_WHITESPACE = {" ": "␣", "\n": "↵", "\t": "→", "\r": "↵"}


@dataclass(frozen=True)
class Reading:
    """Attention of the latents left at the end to the positions of one input.

    Attributes:
        maps: (M, S) attention; each row sums to one.
        sizes: (M,) number of latents merged into each.
        num_latents: N.
        prediction: name of the predicted class; `None` for a model without single-label classes.
    """

    maps: np.ndarray
    sizes: np.ndarray
    num_latents: int
    prediction: str | None

    @property
    def readers(self) -> np.ndarray:
        """Index of the latent with the most attention to each position, (S,)."""
        return self.maps.argmax(axis=0)

    @property
    def order(self) -> np.ndarray:
        """Indices of the latents, (M,), largest first; ties go to the latent that reads more positions most."""
        positions_read = np.bincount(self.readers, minlength=len(self.sizes))
        return np.lexsort((-positions_read, -self.sizes))

    def summary(self, shown: int) -> str:
        """Summarise the prediction, and give the number of latents and of those drawn (`shown`)."""
        left = len(self.sizes)
        parts = [] if self.prediction is None else [f"predicted {self.prediction}"]
        parts.append(f"{left} latent{'s' * (left > 1)} left of {self.num_latents}")
        dropped = self.num_latents - int(self.sizes.sum())
        if dropped:
            parts.append(f"{dropped} dropped")
        if shown < left:
            parts.append(f"{shown} of them shown")
        return ", ".join(parts)


@torch.no_grad()
def read_input(model: PreTrainedModel, inputs: Tensor, attention_mask: Tensor | None = None) -> Reading:
    """Run a model on one input and return the attention of the latents left.

    Args:
        model: text classifier, image classifier or masked language model, in evaluation mode.
        inputs: a batch of one: pixel values (1, 3, height, width) or token ids (1, S).
        attention_mask: (1, S), 1 for tokens and 0 for padding, which is left out.
    """
    # Only the base model returns the sources of the latents.
    output = model.base_model(
        inputs=inputs,
        attention_mask=attention_mask,
        output_attentions=True,
        output_latent_sources=True,
        return_dict=True,
    )
    # The encoder's cross-attention comes first, the decoder's last.
    attention, sources = output.cross_attentions[0][0].float().mean(dim=0), output.latent_sources[0].float()
    if model.config.latent_groups is not None:
        # Learned latents of a group merge before they read, so they share one row of attention.
        attention = attention[model.config.latent_groups]
    sizes = sources.sum(dim=-1)
    maps = sources @ attention / sizes[:, None]
    if attention_mask is not None:
        maps = maps[:, attention_mask[0].bool()]
    config, prediction = model.config, None
    one_label = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
    if one_label and "Classification" in type(model).__name__:
        prediction = str(config.id2label[int(output.logits[0].argmax())])
    return Reading(maps.numpy(), sizes.long().numpy(), config.num_latents, prediction)


@dataclass(frozen=True)
class PixelGrid:
    """Grid of the model's positions in the pixels of an image.

    Attributes:
        rows, columns: numbers of positions; rows * columns = S.
        step: distance from one position to the next, in pixels.
        start: pixel in the middle of the first position.
    """

    rows: int
    columns: int
    step: int
    start: int

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top edge in pixels, for matplotlib's `extent`."""
        first = self.start - self.step / 2
        return first, first + self.columns * self.step, first + self.rows * self.step, first


@torch.no_grad()
def pixel_grid(model: PreTrainedModel, pixel_values: Tensor) -> PixelGrid:
    """Return the grid of positions of an image classifier for pixel values (1, 3, height, width).

    Raises:
        ValueError: for an image of a size that the model cannot read.
    """
    preprocessor = model.base_model.input_preprocessor
    features, _, _ = preprocessor(pixel_values, network_input_is_1d=False)
    rows, columns = features.shape[1:3]
    if preprocessor.prep_type != "conv":
        return PixelGrid(rows, columns, step=preprocessor.spatial_downsample, start=0)
    # The convolution is padded, so its outputs are centred on pixels. The pooling is not padded and ignores the last
    # pixels of a side that is a multiple of 4: 40 pixels make 9 positions and not 10.
    conv, pool = preprocessor.convnet.conv, preprocessor.convnet.max_pool
    stride = conv.stride[0]
    return PixelGrid(rows, columns, step=stride * pool.stride, start=stride * (pool.kernel_size - 1) // 2)


class Example(Protocol):
    """Drawing of one input, with its width and height in inches."""

    @property
    def size(self) -> tuple[float, float]: ...

    def draw(self, figure: Any) -> None: ...


@dataclass(frozen=True)
class ImageExample:
    """Image as the model sees it, pixels (height, width, 3) from 0 to 1, and the attention to it."""

    name: str
    pixels: np.ndarray
    grid: PixelGrid
    reading: Reading

    @property
    def size(self) -> tuple[float, float]:
        height, width = self.pixels.shape[:2]
        return 1.62 * (1 + self._columns) + 1.0, 2 * (1.62 * min(2.0, height / width) + 0.25) + 0.4

    @property
    def _shown(self) -> np.ndarray:
        return self.reading.order[:IMAGE_PANELS]

    @property
    def _columns(self) -> int:
        # With fewer columns the title does not fit.
        return max(3, (len(self._shown) + 1) // 2)

    def draw(self, figure: Any) -> None:
        """Draw two panels on the left, the image and the latent that reads each position most; then one per latent."""
        reading, shown = self.reading, self._shown
        figure.suptitle(f"{self.name}: {reading.summary(len(shown))}", fontsize=11, parse_math=False)
        axes = figure.subplots(2, 1 + self._columns)
        for panel in axes.flat:
            panel.set(xticks=[], yticks=[])
            panel.set_visible(False)
        self._panel(axes[0, 0], self.pixels, "what the model sees", "black")

        colors = np.tile(OTHER_COLOR, (len(reading.sizes), 1))
        colors[shown] = LATENT_COLORS[: len(shown)]
        painted = colors[reading.readers].reshape(self.grid.rows, self.grid.columns, 3)
        grey = 0.25 + 0.65 * self.pixels.mean(axis=-1)
        self._panel(axes[1, 0], grey, "latent that reads most", "black")
        if set(reading.readers) - set(shown):
            axes[1, 0].set_xlabel("grey: a latent not shown", fontsize=8)
        axes[1, 0].imshow(painted, alpha=0.75, extent=self.grid.extent, interpolation="nearest")
        self._whole_image(axes[1, 0])

        scale = _attention_scale(reading.maps[shown])
        panels = axes[:, 1:].flat
        for latent, panel in zip(shown, panels, strict=False):
            size = reading.sizes[latent]
            self._panel(panel, grey, f"size {size}", colors[latent])
            cells = reading.maps[latent].reshape(self.grid.rows, self.grid.columns)
            picture = panel.imshow(
                cells, cmap=READING_COLORS, norm=scale, extent=self.grid.extent, interpolation="bilinear"
            )
            self._whole_image(panel)
        _attention_bar(figure, picture, axes, "attention to a position")

    def _panel(self, panel: Any, image: np.ndarray, title: str, color: Any) -> None:
        panel.set_visible(True)
        panel.imshow(image, cmap="gray", vmin=0, vmax=1)
        panel.set_title(title, fontsize=9, pad=6)
        for side in panel.spines.values():
            side.set(color=color, linewidth=1 if isinstance(color, str) else 4)

    def _whole_image(self, panel: Any) -> None:
        height, width = self.pixels.shape[:2]
        panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


@dataclass(frozen=True)
class TextExample:
    """Beginning of a text, labels of its S tokens, and the attention to them."""

    name: str
    tokens: Sequence[str]
    reading: Reading

    @property
    def size(self) -> tuple[float, float]:
        return max(9.0, 0.14 * len(self.tokens) + 2.5), 0.19 * len(self._shown) + 1.3

    @property
    def _shown(self) -> np.ndarray:
        return self.reading.order[:TEXT_ROWS]

    def draw(self, figure: Any) -> None:
        """Draw a row for each latent and a column for each token."""
        reading, shown = self.reading, self._shown
        figure.suptitle(f"{self.name}\n{reading.summary(len(shown))}", fontsize=10, parse_math=False)
        panel = figure.subplots()
        maps = reading.maps[shown]
        scale = _attention_scale(maps)
        picture = panel.imshow(maps, cmap="Blues", norm=scale, aspect="auto", interpolation="nearest")
        # A dot marks the row that reads a token most; tokens read most by a latent not shown get none.
        rows = {latent: row for row, latent in enumerate(shown)}
        most = [(column, rows[latent]) for column, latent in enumerate(reading.readers) if latent in rows]
        if most:
            panel.scatter(*zip(*most, strict=True), s=9, color="tab:red")
            panel.set_xlabel("red dot: the latent that reads the token most", fontsize=8)
        panel.set_yticks(range(len(shown)), [f"size {size}" for size in reading.sizes[shown]], fontsize=8)
        labels = panel.set_xticks(range(len(self.tokens)), self.tokens, fontsize=9)
        for tick in labels:
            tick.label1.set(parse_math=False, rotation=90 if len(tick.label1.get_text()) > 1 else 0)
        panel.tick_params(length=0)
        _attention_bar(figure, picture, panel, "attention")


def image_example(
    model: PreTrainedModel, processor: BaseImageProcessor, name: str, image: PilImage.Image
) -> ImageExample:
    """Run an image classifier on an image and return the drawing of its attention.

    Raises:
        ValueError: for an image of a size that the model cannot read.
    """
    pixel_values = processor(load_image(image), return_tensors="pt")["pixel_values"]
    grid = pixel_grid(model, pixel_values)
    return ImageExample(name, visible_pixels(pixel_values[0].numpy(), processor), grid, read_input(model, pixel_values))


def text_example(model: PreTrainedModel, tokenizer: Any, text: str, max_length: int) -> TextExample:
    """Run a model on a text, cut to `max_length` tokens or the model's positions, and return the drawing."""
    longest = min(max_length, model.config.max_position_embeddings)
    # A single text needs no padding.
    encoded = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
    reading = read_input(model, encoded["input_ids"], encoded["attention_mask"])
    return TextExample(shortened(text), token_labels(tokenizer, encoded["input_ids"][0].tolist()), reading)


def visible_pixels(pixel_values: np.ndarray, processor: BaseImageProcessor) -> np.ndarray:
    """Undo the normalisation of pixel values (3, height, width); return (height, width, 3) from 0 to 1."""
    pixels = pixel_values.transpose(1, 2, 0)
    if getattr(processor, "do_normalize", False):
        pixels = pixels * np.array(processor.image_std) + np.array(processor.image_mean)
    return pixels.clip(0, 1)


def token_labels(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return a label for each token; bytes are labelled with their characters."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if isinstance(tokenizer, PerceiverTokenizer):
        tokens = byte_characters(tokens)
    return ["".join(VISIBLE_WHITESPACE.get(character, character) for character in token) for token in tokens]


def byte_characters(tokens: list[str]) -> list[str]:
    """Decode byte tokens, `chr(byte)`, as UTF-8: label the first byte of a character with it, the others with ""."""
    labels = list(tokens)
    for index, token in enumerate(tokens):
        first = ord(token) if len(token) == 1 else 0
        # In UTF-8 the first byte of a character encodes its number of bytes.
        length = 1 + (first >= 0xC2) + (first >= 0xE0) + (first >= 0xF0)
        byte_tokens = tokens[index : index + length]
        if 1 < length == len(byte_tokens) and all(len(token) == 1 for token in byte_tokens):
            character = bytes(map(ord, byte_tokens)).decode("utf-8", errors="replace")
            labels[index : index + length] = [character[0], *[""] * (length - 1)]
    return labels


def shortened(text: str, length: int = 70) -> str:
    """Return a text on one line, cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def draw_merging(title: str, latents_per_layer: Sequence[int], examples: Sequence[Example]) -> Figure:
    """Draw the number of latents at the start and after each layer, and the examples below it."""
    head_height = 1.9
    width = max(example.size[0] for example in examples)
    heights = [head_height, *(example.size[1] for example in examples)]
    # pyplot keeps every figure in memory and is not thread-safe, so the figure is made without it.
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_latents_left(parts[0], title, latents_per_layer)
    for part, example in zip(parts[1:], examples, strict=True):
        example.draw(part)
    return figure


def _draw_latents_left(figure: Any, title: str, latents_per_layer: Sequence[int]) -> None:
    figure.suptitle(title, fontsize=13, parse_math=False)
    panel = figure.subplots()
    layers = range(len(latents_per_layer))
    bars = panel.bar(layers, latents_per_layer, color="tab:blue", width=0.7)
    panel.bar_label(bars, fontsize=8, padding=1)
    panel.set_xticks(layers, ["start", *map(str, layers[1:])], fontsize=8)
    panel.set(xlabel="after self-attention layer", ylabel="latents left", ylim=(0, 1.22 * max(latents_per_layer)))
    panel.tick_params(axis="y", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _attention_scale(maps: np.ndarray) -> Any:
    # The square root keeps weak attention visible: a large latent spreads over all positions of its sources.
    return PowerNorm(0.5, vmin=0, vmax=np.quantile(maps, SHOWN_QUANTILE))


def _attention_bar(figure: Any, picture: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(picture, ax=axes, extend="max", fraction=0.04, pad=0.01)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
