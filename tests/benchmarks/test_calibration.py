# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/calibration.py, run on a tiny checkpoint: frontiers repeat, and broken bounds are counted."""

from __future__ import annotations

import json

from transformers import PerceiverImageProcessorPil

from configuration_tome_perceiver import ToMePerceiverConfig
from modeling_tome_perceiver import ToMePerceiverForImageClassificationConvProcessing
from tests.support.script_run import bad_input_line, call_script
from tests.support.tiny_images import LABELS, MODEL, write_images

SCRIPT = "benchmarks.calibration.py"


def test_a_report_of_time_and_promises(tmp_path):
    names = dict(enumerate(LABELS))
    config = ToMePerceiverConfig(**MODEL, id2label=names, label2id={name: index for index, name in names.items()})
    ToMePerceiverForImageClassificationConvProcessing(config).save_pretrained(tmp_path / "model")
    side = {"height": 16, "width": 16}
    PerceiverImageProcessorPil(do_center_crop=False, size=side).save_pretrained(tmp_path / "model")
    data = write_images(tmp_path / "data", {"train": 128, "validation": 200})
    call_script(
        SCRIPT, "--model_name_or_path", tmp_path / "model", "--dataset_name", data, "--use_cpu", "--samples", 64,
        "--searches", 2, "--draws", 20, "--max_changed", 0.2, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [row["equal"] for row in report["time"]] == [True] * 3
    assert [row["threads"] for row in report["time"]][2] == 1
    (promise,) = report["promise"]
    assert promise["draws"] == 20 and 0 <= promise["changed_mean"] <= promise["changed_largest"] <= 1
    assert promise["broken"] == 0 or promise["changed_largest"] > 0.2
    assert report["evaluated"] == 200 and "| share of FLOPs |" in (tmp_path / "out" / "calibration.md").read_text()


def test_no_samples_are_one_line(capsys):
    assert "--samples" in bad_input_line(capsys, SCRIPT, "--samples", 0, "--output_dir", "unused")
