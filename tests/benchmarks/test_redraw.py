# SPDX-License-Identifier: Apache-2.0
"""benchmarks/redraw.py draws what the figures beside a picture say, and measures nothing."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from benchmarks import redraw
from experiments.errors import BadInput
from tests.support.script_run import ROOT, run_script

RESULTS = ROOT / "docs" / "results"


def test_every_picture_below_a_folder_is_drawn_anew(tmp_path):
    """From figures of today's form and of older ones, and nothing else is touched."""
    for name in ("fashion_mnist", "budgets/128_ward", "scaling", "throughput/batch_1"):
        shutil.copytree(RESULTS / name, tmp_path / name)
    pictures = [path for path in tmp_path.rglob("*.png") if path.name in redraw.DRAW]
    for picture in pictures:
        picture.write_bytes(b"old")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in pictures}
    result = run_script("benchmarks/redraw.py", tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == sorted(map(str, pictures)) and len(pictures) == 4
    for picture in pictures:
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in pictures}


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="^folders .*: must have a sweep.png or a scaling.png or "):
        redraw.main([str(tmp_path)])
    (tmp_path / "sweep.png").touch()
    merged = {"name": "r=4", "gflops": 0.7, "latents_left": 4, "flops_ratio": 0.7}
    (tmp_path / "sweep_results.json").write_text(json.dumps({"rows": [merged], "metric": "accuracy"}))
    with pytest.raises(BadInput, match="the first row .* merges; use a sweep that begins unmerged"):
        redraw.main([str(tmp_path)])
