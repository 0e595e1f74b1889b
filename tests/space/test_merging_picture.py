# SPDX-License-Identifier: Apache-2.0
"""Tests of pictures of merging: attention maps of the latents left, and positions in the image."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as PilImage
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from space.merging_picture import (
    ImageExample,
    PixelGrid,
    Reading,
    TextExample,
    draw_merging,
    pixel_grid,
    read_input,
    token_labels,
    visible_pixels,
)
from tests.support.tiny_merges import AT_START
from tests.support.tiny_models import (
    IMAGE_HEADS,
    NUM_LATENTS,
    TEXT_HEADS,
    repeat_latents,
    run,
    take_row,
    tiny_inputs,
    tiny_model,
)

HEADS = [*TEXT_HEADS, *IMAGE_HEADS]


def one_input(head: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return pixel values or token ids, a batch of one, and their attention mask."""
    inputs = take_row(tiny_inputs(head), 0)
    return inputs.get("pixel_values", inputs.get("input_ids")), inputs.get("attention_mask")


def direct_cross_attention(model, inputs: torch.Tensor) -> torch.Tensor:
    """Compute (N, S), the mean over heads of softmax(q k / sqrt(D)), from the weights."""
    base = model.base_model
    preprocessed = base.input_preprocessor(inputs)[0]
    attention = base.encoder.cross_attention.attention.self
    queries = attention.query(attention.layernorm1(base.embeddings.latents))
    keys = attention.key(attention.layernorm2(preprocessed[0]))
    heads = [
        (head_queries @ head_keys.T / head_keys.shape[1] ** 0.5).softmax(dim=-1)
        for head_queries, head_keys in zip(
            queries.chunk(attention.num_heads, dim=-1), keys.chunk(attention.num_heads, dim=-1), strict=True
        )
    ]
    return sum(heads) / len(heads)


@pytest.mark.parametrize("head", HEADS)
def test_learned_latents_of_a_group_read_as_one(head):
    """The latents of a group are equal, so the group attends as each of them does."""
    model, (inputs, mask) = repeat_latents(tiny_model(head, latent_groups=AT_START), AT_START), one_input(head)
    reading = read_input(model, inputs, mask)
    first = [AT_START.index(group) for group in range(9)]
    torch.testing.assert_close(torch.tensor(reading.maps), direct_cross_attention(model, inputs).float()[first])
    assert reading.sizes.tolist() == [AT_START.count(group) for group in range(9)]


@pytest.mark.parametrize("r", [0, 1])
@pytest.mark.parametrize("head", HEADS)
def test_a_latent_left_reads_the_mean_of_its_sources(head, r):
    model, (inputs, mask) = tiny_model(head, r=r), one_input(head)
    reading = read_input(model, inputs, mask)
    unmerged = direct_cross_attention(model, inputs).float()
    sources = run(model, take_row(tiny_inputs(head), 0)).base.latent_sources[0]
    assert len(reading.sizes) == len(sources) == NUM_LATENTS // (1 + r) and reading.sizes.sum() == NUM_LATENTS
    for row, size, source in zip(reading.maps, reading.sizes, sources, strict=True):
        torch.testing.assert_close(torch.tensor(row), unmerged[source.bool()].mean(dim=0))
        assert size == source.sum()
    torch.testing.assert_close(reading.maps.sum(axis=1), torch.ones(len(sources)).numpy())


def test_padding_is_left_out():
    model, (inputs, mask) = tiny_model("ForMaskedLM", r=1), one_input("ForMaskedLM")
    padded = read_input(model, torch.nn.functional.pad(inputs, (0, 4)), torch.nn.functional.pad(mask, (0, 4)))
    reading = read_input(model, inputs, mask)
    assert padded.maps.shape == reading.maps.shape
    torch.testing.assert_close(padded.maps, reading.maps)
    assert padded.sizes.tolist() == reading.sizes.tolist()


def test_prune_says_what_it_dropped():
    model, (inputs, mask) = tiny_model("ForMaskedLM", r=1, merge_method="prune"), one_input("ForMaskedLM")
    reading = read_input(model, inputs, mask)
    assert reading.summary(shown=6) == f"6 latents left of {NUM_LATENTS}, 6 dropped"


@pytest.mark.parametrize(
    ("head", "size", "grid"),
    [
        ("ForImageClassificationLearned", (8, 8), PixelGrid(8, 8, 1, 0)),
        ("ForImageClassificationFourier", (6, 10), PixelGrid(6, 10, 1, 0)),
        # Not 40 / 4, because pooling needs three outputs of the convolution for each of its own.
        ("ForImageClassificationConvProcessing", (40, 24), PixelGrid(9, 5, 4, 2)),
    ],
)
def test_grid_has_a_cell_for_each_position(head, size, grid):
    model, pixels = tiny_model(head), torch.randn(1, 3, *size, dtype=torch.float64)
    assert pixel_grid(model, pixels) == grid
    assert read_input(model, pixels).maps.shape[1] == grid.rows * grid.columns


@pytest.mark.parametrize("head", IMAGE_HEADS)
def test_a_position_stands_in_the_middle_of_the_pixels_that_it_sees(head):
    model = tiny_model(head, image_size=24)
    pixels = torch.randn(1, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    grid, row, column = pixel_grid(model, pixels.detach()), 2, 1
    features = model.base_model.input_preprocessor(pixels)[0]
    features[0, row * grid.columns + column].sum().backward()
    seen_rows, seen_columns = pixels.grad[0].abs().sum(dim=0).nonzero().T.tolist()
    assert (min(seen_rows) + max(seen_rows)) / 2 == grid.start + row * grid.step
    # Receptive fields are cut at the left edge of the image; only the right end is whole.
    reach = max(seen_rows) - (grid.start + row * grid.step)
    assert max(seen_columns) - reach == grid.start + column * grid.step
    left, right, bottom, top = grid.extent
    assert (right - left, bottom - top) == (grid.columns * grid.step, grid.rows * grid.step)


def test_largest_latents_come_first():
    maps = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.0], [0.1, 0.7, 1.0]]).numpy()
    reading = Reading(maps, sizes=torch.tensor([1, 4, 1]).numpy(), num_latents=6, prediction="cat")
    assert reading.readers.tolist() == [0, 2, 2]
    assert reading.order.tolist() == [1, 2, 0]
    assert reading.summary(shown=2) == "predicted cat, 3 latents left of 6, 2 of them shown"


@pytest.mark.parametrize("left", [1, 2, 30])
def test_any_number_of_latents_can_be_drawn(tmp_path, left):
    maps = torch.rand(left, 6).softmax(dim=-1).numpy()
    reading = Reading(maps, torch.ones(left, dtype=torch.int64).numpy(), left, None)
    examples = [
        ImageExample("a wide image", torch.rand(2, 3, 3).numpy(), PixelGrid(2, 3, 1, 0), reading),
        TextExample("$a$ text", ["[CLS]", "$", "a", "$", "\\", "[SEP]"], reading),
    ]
    draw_merging("a title", [left, left], examples).savefig(tmp_path / "picture.png")
    with PilImage.open(tmp_path / "picture.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 100


def test_the_image_shown_is_the_one_that_the_model_sees():
    image = PilImage.linear_gradient("L").convert("RGB").resize((12, 12))
    processor = PerceiverImageProcessorPil(do_center_crop=False, do_resize=False)
    shown = visible_pixels(processor(image, return_tensors="np")["pixel_values"][0], processor)
    assert abs(shown * 255 - image).max() < 1e-3


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a b\n", ["[CLS]", "a", "␣", "b", "↵", "[SEP]"]),
        ("né€", ["[CLS]", "n", "é", "", "€", "", "", "[SEP]"]),
        ("😀!", ["[CLS]", "😀", "", "", "", "!", "[SEP]"]),
    ],
)
def test_every_byte_has_a_label(text, labels):
    """Also the bytes of a character that is cut in two."""
    tokenizer = PerceiverTokenizer()
    assert token_labels(tokenizer, tokenizer(text)["input_ids"]) == labels
    assert len(token_labels(tokenizer, tokenizer("n€", truncation=True, max_length=5)["input_ids"])) == 5
