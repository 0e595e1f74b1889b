# SPDX-License-Identifier: Apache-2.0
"""Tests of examples/draw_merging.py, run on tiny checkpoints: pictures, and messages for bad input."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image as PilImage
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from tests.support.script_run import ROOT, bad_input_line, call_script, run_script
from tests.support.tiny_images import write_images
from tests.support.tiny_models import IMAGE_HEADS, TEXT_HEADS, stock_model, tiny_model

SCRIPT = ROOT / "examples" / "draw_merging.py"


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """Make the script importable as a module, for `call_script`."""
    spec = importlib.util.spec_from_file_location("draw_merging", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "draw_merging", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Write checkpoints of stock and our classes, named by their heads, a greyscale image file and two datasets."""
    folder = tmp_path_factory.mktemp("inputs")
    for head in ("ForMaskedLM", "ForOpticalFlow", "ForImageClassificationLearned"):
        stock_model(head, torch.float32).save_pretrained(folder / head)
    for head in ("ForSequenceClassification", *IMAGE_HEADS[1:]):
        tiny_model(head, torch.float32, r=1).save_pretrained(folder / head)
    for head in TEXT_HEADS:
        PerceiverTokenizer().save_pretrained(folder / head)
    for head in IMAGE_HEADS:
        side = {"height": 8, "width": 8} if head.endswith("Learned") else {"height": 16, "width": 12}
        PerceiverImageProcessorPil(do_center_crop=False, size=side).save_pretrained(folder / head)
    tiny_model("ForSequenceClassification", torch.float32).save_pretrained(folder / "bare")
    PilImage.linear_gradient("L").save(folder / "grey.png")
    write_images(folder / "images", {"test": 4})
    (folder / "texts").mkdir()
    texts = {"sentence": ["One.", "Two."], "other": ["Three.", "Four."], "label": [0, 1]}
    Dataset.from_dict(texts).to_parquet(folder / "texts" / "train.parquet")
    return folder


def assert_drawn(path: Path) -> None:
    with PilImage.open(path) as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").tobytes())) > 100
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_script_draws_images_of_a_dataset(inputs, tmp_path):
    picture = tmp_path / "new" / "picture.png"
    result = run_script(
        "examples/draw_merging.py", "--model_name_or_path", inputs / "ForImageClassificationConvProcessing",
        "--dataset_name", inputs / "images", "--num_examples", 2, "--output_file", picture,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{picture}\n"
    assert_drawn(picture)


@pytest.mark.parametrize("head", [*TEXT_HEADS, *IMAGE_HEADS])
def test_every_class_is_drawn(inputs, tmp_path, capsys, head):
    given = ("--texts", "A né€d.", "A text longer than there is room for.") if head in TEXT_HEADS else ("--images",)
    files = () if head in TEXT_HEADS else (inputs / "grey.png",)
    call_script(
        "draw_merging.py", "--model_name_or_path", inputs / head, "--r", "2,1,0,0,0,1", *given, *files,
        "--output_file", tmp_path / "picture.png",
    )  # fmt: skip
    assert_drawn(tmp_path / "picture.png")
    # Nothing else is printed, above all no question whether to run the checkpoint's code.
    assert capsys.readouterr().out == f"{tmp_path / 'picture.png'}\n"


def test_texts_of_a_dataset_are_drawn(inputs, tmp_path):
    call_script(
        "draw_merging.py", "--model_name_or_path", inputs / "ForMaskedLM", "--dataset_name", inputs / "texts",
        "--column_name", "other", "--output_file", tmp_path / "picture.png",
    )  # fmt: skip
    assert_drawn(tmp_path / "picture.png")


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForImageClassificationConvProcessing"])
@pytest.mark.parametrize("searched", [True, False])
def test_a_budget_decides_what_is_drawn(inputs, tmp_path, script, monkeypatch, capsys, head, searched):
    """With a dataset, a search on more rows than are drawn; for own inputs, the schedule 'floor'."""
    titles, sampled = [], []
    draw, choose = script.draw_merging, script.MergeArguments.choose

    def chosen(merging, model, samples, shape):
        sampled.append(sum(script.batch_shape(batch)[0] for batch in samples.take(3, 2)))
        sampled.append(merging.schedule)
        return choose(merging, model, samples, shape)

    monkeypatch.setattr(script.MergeArguments, "choose", chosen)
    monkeypatch.setattr(
        script, "draw_merging", lambda title, *rest: titles.append((title, rest[0])) or draw(title, *rest)
    )
    data = {
        (True, True): ("--dataset_name", inputs / "texts", "--column_name", "other", "--num_examples", 1),
        (True, False): ("--dataset_name", inputs / "images", "--num_examples", 1),
        (False, True): ("--texts", "a text"),
        (False, False): ("--images", inputs / "grey.png"),
    }[searched, head == "ForMaskedLM"]
    call_script(
        "draw_merging.py", "--model_name_or_path", inputs / head, *data, "--flops_ratio", 0.9,
        "--output_file", tmp_path / "picture.png",
    )  # fmt: skip
    assert_drawn(tmp_path / "picture.png")
    ((title, latents),) = titles
    assert min(latents) < latents[0] and "0 of" not in title
    assert sampled == ([2 if head == "ForMaskedLM" else 3, "search"] if searched else [1, "floor"])
    out = capsys.readouterr()
    assert out.out == f"{tmp_path / 'picture.png'}\n" and "of the FLOPs" in out.err


IMAGE_MODEL, TEXT_MODEL = "ForImageClassificationConvProcessing", "ForSequenceClassification"


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (TEXT_MODEL, (), "no inputs: use exactly one of --images, --texts and --dataset_name"),
        (TEXT_MODEL, ("--texts", "a", "--images", "grey.png"), "--images and --texts: use exactly one"),
        (TEXT_MODEL, ("--images", "grey.png"), "a model for text (ToMePerceiverForSequenceClassification)"),
        (IMAGE_MODEL, ("--texts", "a"), "a model for images (ToMePerceiverForImageClassificationConvProcessing)"),
        (TEXT_MODEL, ("--texts", ""), "--texts '': must not be empty"),
        (TEXT_MODEL, ("--texts", "a", "--max_length", "2"), "--max_length 2: must be 3"),
        (TEXT_MODEL, ("--texts", "a", "--split", "test"), "--split test: needs --dataset_name"),
        (TEXT_MODEL, ("--texts", "a", "--r", "1,2"), "r=[1, 2]: must be"),
        (TEXT_MODEL, ("--texts", "a", "--flops_ratio", "0.9", "--merge_method", "groups"), "--merge_method groups: "),
        (TEXT_MODEL, ("--texts", "a", "--max_changed", "0.1"), "--max_changed 0.1: needs --dataset_name"),
        (TEXT_MODEL, ("--texts", "a", "--output_file", "picture.jpg"), "--output_file picture.jpg: must"),
        ("nowhere", ("--texts", "a"), "--model_name_or_path nowhere: "),
        ("bare", ("--texts", "a"), "tokenizer of --model_name_or_path bare: "),
        ("ForOpticalFlow", ("--texts", "a"), "has architecture PerceiverForOpticalFlow; choose"),
        (IMAGE_MODEL, ("--images", "missing.png"), "missing.png: [Errno 2] No such file"),
        (IMAGE_MODEL, ("--images", "texts/train.parquet"), "cannot identify image file"),
        (IMAGE_MODEL, ("--dataset_name", "missing"), "--dataset_name missing: "),
        (IMAGE_MODEL, ("--dataset_name", "images", "--split", "dev"), "--split dev: is no split of"),
        (IMAGE_MODEL, ("--dataset_name", "images", "--num_examples", "0"), "--num_examples 0: must be 1"),
        (IMAGE_MODEL, ("--dataset_name", "images", "--column_name", "label"), "--column_name label: must"),
        (
            IMAGE_MODEL,
            ("--dataset_name", "texts"),
            "--column_name None: must be one of the columns of texts with images",
        ),
        (TEXT_MODEL, ("--dataset_name", "texts"), "with texts: ['sentence', 'other']"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(inputs, tmp_path, monkeypatch, capsys, model, arguments, says):
    monkeypatch.chdir(inputs)
    output = tmp_path / "new" / "picture.png"
    line = bad_input_line(capsys, "draw_merging.py", "--model_name_or_path", model, "--output_file", output, *arguments)
    assert says in line
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_a_size_that_the_model_cannot_read_is_bad_input(inputs, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model("ForImageClassificationLearned", torch.float32).save_pretrained(model)
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 9, "width": 8}).save_pretrained(model)
    line = bad_input_line(
        capsys, "draw_merging.py", "--model_name_or_path", model, "--images", inputs / "grey.png",
        "--output_file", tmp_path / "picture.png",
    )  # fmt: skip
    assert "9 x 8 positions" in line and "must be 8 x 8" in line
    assert not (tmp_path / "picture.png").exists()
