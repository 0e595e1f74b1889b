# SPDX-License-Identifier: Apache-2.0
"""Tests of space/app.py on tiny checkpoints: the comparison, the page over HTTP, messages for bad input.

Gradio is in an environment of its own, so `make test` runs this file with `.venv/space/bin/python`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image as PilImage
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from tests.support.script_run import ROOT, run_script
from tests.support.tiny_models import stock_model, tiny_model

pytest.importorskip("gradio", reason="in .venv/space only")
gradio_client = pytest.importorskip("gradio_client")

IMAGE_MODEL, TEXT_MODEL, MASKED_MODEL = (
    "ForImageClassificationConvProcessing",
    "ForSequenceClassification",
    "ForMaskedLM",
)
SENTENCES = {TEXT_MODEL: "A né€d.", MASKED_MODEL: "A [MASK]."}


@pytest.fixture(scope="module", autouse=True)
def space_on_path():
    """Put the folder on sys.path, so that its modules import each other by name, as on a Space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "space"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write checkpoints named by their heads, one of stock and one with merging in its config, and an image file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_model(IMAGE_MODEL, torch.float32, num_labels=10).save_pretrained(folder / IMAGE_MODEL)
    size = {"height": 16, "width": 12}
    PerceiverImageProcessorPil(do_center_crop=False, size=size).save_pretrained(folder / IMAGE_MODEL)
    tiny_model(TEXT_MODEL, torch.float32, r=1).save_pretrained(folder / TEXT_MODEL)
    stock_model(MASKED_MODEL, torch.float32).save_pretrained(folder / MASKED_MODEL)
    for head in (TEXT_MODEL, MASKED_MODEL):
        PerceiverTokenizer().save_pretrained(folder / head)
    stock_model("ForOpticalFlow", torch.float32).save_pretrained(folder / "ForOpticalFlow")
    PilImage.linear_gradient("L").save(folder / "grey.png")
    return folder


@pytest.fixture(scope="module")
def checkpoints(folder, space_on_path):
    from comparison import Checkpoint

    return {head: Checkpoint(str(folder / head)) for head in (IMAGE_MODEL, TEXT_MODEL, MASKED_MODEL)}


def given_for(folder: Path, head: str) -> PilImage.Image | str:
    return PilImage.open(folder / "grey.png") if head == IMAGE_MODEL else SENTENCES[head]


def choices(page) -> list[str]:
    """Return the choices of the page for how much to merge."""
    (found,) = [block.choices for block in page.blocks.values() if hasattr(block, "choices")]
    return [name for name, _ in found]


@pytest.mark.parametrize("head", [IMAGE_MODEL, TEXT_MODEL, MASKED_MODEL])
def test_unmerged_and_merged_are_compared(checkpoints, folder, head):
    checkpoint, given = checkpoints[head], given_for(folder, head)
    before, merging = checkpoint.config.to_dict(), checkpoint.model.unmerged
    nothing = checkpoint.compare(given, merging)
    assert nothing.unmerged.predictions == nothing.merged.predictions and nothing.merged.flops_ratio == 1
    comparison = checkpoint.compare(given, merging.by(2))
    assert (comparison.unmerged.latents_left, comparison.merged.latents_left) == (12, 1)
    assert comparison.merged.flops_ratio < 1 and comparison.rounds >= 3
    assert comparison.unmerged.milliseconds > 0 and comparison.speedup > 0
    with torch.no_grad():
        logits = checkpoint.model(**checkpoint.encoded(given), r=2).logits
    if head != MASKED_MODEL:
        assert comparison.merged.predictions[0][0] == checkpoint.config.id2label[int(logits[0].argmax())]
    assert checkpoint.picture(given, merging.by(2)).size[0] > 300
    assert checkpoint.config.to_dict() == before


@pytest.mark.parametrize("head", [IMAGE_MODEL, TEXT_MODEL])
def test_a_budget_is_kept_to_for_this_input(checkpoints, folder, head):
    from comparison import UnusableInput

    checkpoint, given = checkpoints[head], given_for(folder, head)
    least = checkpoint.smallest_budget(given)
    assert 0 < least < 1
    for share in (least, 1.0):
        assert checkpoint.compare(given, checkpoint.within(share, given)).merged.flops_ratio <= share
    with pytest.raises(UnusableInput, match="down to 1%"):
        checkpoint.within(0.01, given)


def test_where_no_budget_can_be_kept_to_only_r_is_offered(tmp_path):
    from app import BY_R, build_page
    from comparison import Checkpoint

    # Reading 64 pixels costs nearly all FLOPs of this model, so merging saves too little for a budget.
    tiny_model("ForImageClassificationLearned", torch.float32, num_labels=10).save_pretrained(tmp_path)
    PerceiverImageProcessorPil(do_center_crop=False, size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert choices(build_page(Checkpoint(str(tmp_path)), None, "a model")) == [BY_R]


def test_a_checkpoint_with_a_frontier_is_moved_along_it(tmp_path):
    """Each row shows its cost and its share of changed answers, and its merging is applied."""
    from app import BY_FRONTIER, build_page
    from comparison import Checkpoint

    model = tiny_model(TEXT_MODEL, torch.float32).eval()
    rows = model.calibrate([{"input_ids": torch.randint(0, 100, (4, 9))} for _ in range(10)]).rows
    model.save_pretrained(tmp_path)
    PerceiverTokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert [checkpoint.at_row(number + 1).r for number in range(len(rows))] == [row.merging.r for row in rows]
    assert checkpoint.at_row(99) == checkpoint.at_row(len(rows)) and checkpoint.at_row(0) == checkpoint.at_row(1)
    assert "of the answers changed, at most" in checkpoint.describe_row(1)
    assert checkpoint.compare("A text.", checkpoint.at_row(len(rows))).merged.flops_ratio < 1
    assert choices(build_page(checkpoint, None, "a model"))[0] == BY_FRONTIER


def test_settings_that_a_checkpoint_was_saved_with_are_known(checkpoints):
    assert checkpoints[TEXT_MODEL].saved.r == 1 and checkpoints[IMAGE_MODEL].saved is None


def test_a_gap_is_asked_for_and_filled(checkpoints):
    from comparison import UnusableInput

    checkpoint = checkpoints[MASKED_MODEL]
    with pytest.raises(UnusableInput, match=r"Write \[MASK\]"):
        checkpoint.encoded("No gap.")
    encoded = checkpoint.encoded("a[MASK]b[MASK]")
    with torch.no_grad():
        best = checkpoint.model(**encoded, r=0).logits[0].argmax(dim=-1)
    gaps = encoded["input_ids"][0] == checkpoint.processor.mask_token_id
    found = checkpoint.compare("a[MASK]b[MASK]", checkpoint.model.unmerged).unmerged.predictions
    expected = [checkpoint.processor.decode([token]) for token in best[: len(gaps)][gaps].tolist()]
    assert [name for name, _ in found] == expected


def test_input_is_not_taken_for_markup():
    from app import comparison_html, note_html
    from comparison import Comparison, Side

    sides = [Side([("<b>", 0.75), ("b", 0.25)], 2.0, share, 3) for share in (1.0, 0.5)]
    page = comparison_html(Comparison(*sides, speedup=1.5, rounds=5, latents=12))
    assert ">&lt;b&gt;<" in page and "Same prediction with 50% of the computation, 1.50 times as fast." in page
    assert "&lt;i&gt;" in note_html("<i>")


@pytest.fixture(params=[IMAGE_MODEL, TEXT_MODEL])
def server(request, folder, tmp_path):
    """Serve the page from a folder outside the repository; return the head and the address."""
    copied = tmp_path / "space"
    copied.mkdir()
    for name in ("app.py", "comparison.py", "merging_picture.py"):
        (copied / name).write_text((ROOT / "space" / name).read_text())
    (copied / "checkpoint").symlink_to(folder / request.param)
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=copied,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if address := re.match(r"open (http\S+)", line):
                yield request.param, address[1]
                break
        else:
            pytest.fail("".join(lines))
    finally:
        # Programs that a background shell starts ignore Ctrl-C.
        process.terminate()
        process.wait(timeout=30)


def test_a_client_moves_the_slider(server, folder):
    head, address = server
    client = gradio_client.Client(address, verbose=False)
    given = gradio_client.handle_file(folder / "grey.png") if head == IMAGE_MODEL else SENTENCES[head]
    shown, picture = client.predict(given, "Share of the computation", 1.0, 1, api_name="/compare")
    assert "Nothing merges" in shown
    shown, picture = client.predict(given, "Latents per layer", 1.0, 1, api_name="/compare")
    assert "6 of 12" in shown and "12 of 12" in shown and " ms" in shown
    with PilImage.open(picture) as image:
        assert len(set(image.convert("L").tobytes())) > 100
    if head == TEXT_MODEL:
        shown, _ = client.predict(" ", "Latents per layer", 1.0, 1, api_name="/compare")
        assert "Type a sentence" in shown


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("nowhere", (), "--model_name_or_path "),
        ("ForOpticalFlow", (), "is a PerceiverForOpticalFlow; must be"),
        (IMAGE_MODEL, ("--examples", "missing.png"), "--examples missing.png: "),
        (IMAGE_MODEL, ("--prot", "1"), "--prot"),
        (None, (), "--model_name_or_path: is missing"),
    ],
)
def test_bad_arguments_are_one_line(folder, model, arguments, says):
    named = () if model is None else ("--model_name_or_path", folder / model)
    result = run_script("space/app.py", *named, *arguments)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0] and "Traceback" not in result.stderr, result.stderr
