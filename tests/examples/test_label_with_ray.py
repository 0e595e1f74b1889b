# SPDX-License-Identifier: Apache-2.0
"""Tests of examples/label_with_ray.py with two workers on this machine (`make test-ray`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest

pytest.importorskip("ray", reason="Ray has an environment of its own: make test-ray")

import numpy as np
import psutil
import pyarrow.dataset as arrow_dataset
import torch
from PIL import Image
from transformers import PerceiverImageProcessorPil, PerceiverTokenizer

from examples.classifier import Classifier
from tests.support.script_run import ROOT, isolated_environment
from tests.support.tiny_models import tiny_model
from tests.support.tiny_texts import write_table


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_model("ForSequenceClassification", torch.float32, max_position_embeddings=40).save_pretrained(folder)
    PerceiverTokenizer(model_max_length=40).save_pretrained(folder)
    return folder


def start(folder, *arguments):
    environment = os.environ | isolated_environment(folder / "home") | {"RAY_TMPDIR": "/tmp/ray-test"}
    command = [sys.executable, str(ROOT / "examples" / "label_with_ray.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def label(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def rows(output_dir):
    return arrow_dataset.dataset(output_dir / "labels").to_table().to_pylist()


def test_texts_get_the_answers_of_the_model_at_the_budget_and_bad_ones_an_error(tmp_path, text_checkpoint):
    texts = [letter * length for letter in "abc" for length in range(1, 30)] + ["", "x" * 100]
    (tmp_path / "data").mkdir()
    for part in range(3):
        write_table(
            tmp_path / "data" / f"{part}.parquet", {"text": texts[part::3], "id": [*range(len(texts))][part::3]}
        )
    common = ("--model_name_or_path", text_checkpoint, "--data", "data", "--flops_ratio", 0.9, "--batch_size", 8)
    code, out, err = label(tmp_path, *common, "--output_dir", "out")
    assert code == 0, err
    assert "87 inputs labelled, 2 could not be read" in out
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert sorted(found) == list(range(len(texts)))
    classifier = Classifier(str(text_checkpoint))
    classifier.model.merge_to(flops_ratio=0.9)
    for index, text in enumerate(texts):
        row = found[index]
        assert row["text"] == text
        if row["error"] is None:
            (expected,) = classifier.classify([classifier.read_text(text)])
            assert row["prediction"] == expected["label"] and row["score"] == pytest.approx(expected["score"], abs=1e-5)
        else:
            assert index >= len(texts) - 2 and row["prediction"] is None and row["score"] is None
    # The same command again does nothing; another one is refused.
    before = sorted(path.name for path in (tmp_path / "out" / "labels").iterdir())
    assert label(tmp_path, *common, "--output_dir", "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out" / "labels").iterdir()) == before
    code, _, err = label(tmp_path, *common[:5], 0.8, "--output_dir", "out")
    assert code == 2 and "holds labels of another command (budget" in err


def test_images_are_labelled_and_a_killed_run_goes_on_without_loss_or_repeats(tmp_path):
    tiny_model("ForImageClassificationConvProcessing", torch.float32, image_size=16).save_pretrained(tmp_path / "model")
    size = {"height": 16, "width": 16}
    PerceiverImageProcessorPil(do_center_crop=False, size=size).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(600):
        pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:100])
    command = ("--model_name_or_path", "model", "--data", "images", "--batch_size", 4, "--output_dir", "out")
    killed = start(tmp_path, *command)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("checkpoint/*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    driver = psutil.Process(killed.pid)
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    killed.wait()
    assert not json.loads((tmp_path / "out" / "arguments.json").read_text())["finished"]
    code, out, err = label(tmp_path, *command)
    assert code == 0, err
    assert "600 inputs labelled, 1 could not be read" in out
    names = [os.path.basename(row["path"]) for row in rows(tmp_path / "out")]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "images").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "nowhere"), "--data nowhere: "),
        (("--data", "data", "--text_columns", "sentence"), "has no column sentence; choose from text"),
        (("--data", "data", "--flops_ratio", 0.001), "flops_ratio=0.001 is out of reach"),
        (("--data", "data", "--workers", 0), "--workers 0: must be 1 or more"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path, text_checkpoint, arguments, words):
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "a.csv", {"text": ["a", "b"]})
    code, _, err = label(tmp_path, "--model_name_or_path", text_checkpoint, *arguments, "--output_dir", "out")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and words in errors[0]
