# SPDX-License-Identifier: Apache-2.0
"""Tests of export.py and of exported models: they agree with PyTorch in every runtime, at any batch size and length."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PerceiverTokenizer, pipeline

from experiments.errors import BadInput
from experiments.exported_model import (
    CONVERTERS,
    MODEL_FILES,
    ExportedModel,
    LogitsModule,
    check_exportable,
    export_model,
    load_runtime,
    order_keeping_operators,
)
from experiments.runs.export import REPORT_FILE, Parity, agrees, compare, cut_batches
from merging_tome_perceiver import EXPERIMENT_ONLY_METHODS, MERGE_METHODS
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.support.script_run import bad_input_line, call_script, run_script
from tests.support.tiny_matches import signed_basis_vectors
from tests.support.tiny_models import repeat_latents, tiny_inputs, tiny_model
from tests.support.tiny_texts import POSITIONS, write_glue

pytest.importorskip("onnxscript", reason="onnxscript is not installed: requirements-export.txt")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: requirements-export.txt")

SMALL = {"num_blocks": 1, "num_self_attends_per_block": 2}
METHODS = sorted(MERGE_METHODS.keys() - {*EXPERIMENT_ONLY_METHODS})


def require(runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: requirements-export.txt")
    if runtime == "pt2" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("AOTInductor needs a C++ compiler")


def text(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw tokens; the first row is half padding."""
    ids = torch.randint(6, 262, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def difference(model: Any, exported: ExportedModel, inputs: dict[str, Tensor]) -> float:
    """Return the largest difference between the logits of a model and of its export."""
    with torch.inference_mode():
        return float((LogitsModule(model)(*inputs.values()) - exported(**inputs).logits).abs().max())


class EveryMatch(nn.Module):
    """The matches of every method as one tensor of positions (B, 3 x methods, R or less)."""

    def forward(self, metric: Tensor) -> Tensor:
        rows = []
        for method in METHODS:
            match = MERGE_METHODS[method](metric, 3, None, 0.0)
            rows += [match.kept, match.merged, match.into]
        return torch.cat(rows, dim=1)


@pytest.fixture(scope="module")
def matches_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("matches") / "matches.onnx"
    program = torch.onnx.export(
        EveryMatch().eval(), (signed_basis_vectors(12, 2, 0),), dynamo=True, verbose=False, input_names=["metric"],
        dynamic_shapes=(({0: torch.export.Dim("batch")}),), custom_translation_table=order_keeping_operators(),
    )  # fmt: skip
    program.save(file)
    return file


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_every_method_breaks_ties_alike_in_each_runtime(matches_file, tmp_path, runtime):
    """Nearly all similarities are equal, so the match depends on the order of equal values alone."""
    require(runtime)
    file = tmp_path / MODEL_FILES[runtime]
    CONVERTERS[runtime, "float32"](Path(shutil.copy(matches_file, tmp_path / "whole.onnx")), file)
    run = load_runtime(file, runtime, "float32")
    for seed in range(30):
        metric = signed_basis_vectors(12, 2, seed)
        assert torch.equal(run({"metric": metric}), EveryMatch()(metric)), seed


@pytest.mark.parametrize("runtime, head", [("openvino", "ForSequenceClassification"), ("pt2", "ForMaskedLM")])
def test_batch_size_and_length_stay_open_and_equal_latents_agree(tmp_path, runtime, head):
    require(runtime)
    model = repeat_latents(tiny_model(head, torch.float32, r=3, **SMALL), [0] * 6 + [*range(1, 7)])
    export_model(model, text(2, 8), tmp_path, runtime)
    exported = ExportedModel.from_pretrained(tmp_path)
    for batch, length in ((1, 3), (3, 8), (8, 20), (1, 1)):
        assert difference(model, exported, text(batch, length, seed=batch)) < 1e-5


def test_images_and_fixed_groups_agree_and_int8_keeps_most_answers(tmp_path):
    head = "ForImageClassificationConvProcessing"
    model = tiny_model(head, torch.float32, **SMALL)
    model.config.merge_groups = [[index // 2 for index in range(12)], None]
    images = tiny_inputs(head, 24, torch.float32)
    for dtype in ("float32", "int8"):
        export_model(model, images, tmp_path / dtype, "onnx", dtype)
    assert difference(model, ExportedModel.from_pretrained(tmp_path / "float32"), images) < 1e-5
    parity = compare(model, ExportedModel.from_pretrained(tmp_path / "int8"), images)
    assert parity.equal_answers >= 0.75 and 0 < parity.largest_difference < 1
    size = {dtype: (tmp_path / dtype / "model.onnx").stat().st_size for dtype in ("float32", "int8")}
    assert size["int8"] < size["float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    options = SMALL | {"max_position_embeddings": POSITIONS, "num_labels": 2}
    model = tiny_model("ForSequenceClassification", torch.float32, **options)
    model.config.problem_type = "single_label_classification"
    model.save_pretrained(folder)
    PerceiverTokenizer(model_max_length=POSITIONS).save_pretrained(folder)
    return folder


def test_the_script_exports_compares_scores_and_times_and_a_pipeline_takes_the_result(checkpoint, tmp_path):
    data = write_glue(tmp_path / "data", "mrpc", labels=["LABEL_0", "LABEL_1"])
    given = ("--model_name_or_path", checkpoint, "--dataset_name", data, "--task_name", "mrpc", "--r", 3)
    result = run_script("export.py", *given, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["samples"] == "evaluation split" and report["evaluated_on"] == 18
    assert report["merging"]["r"] == 3 and report["flops_ratio"] < 1
    assert set(report["parity"]) == {"merged", "unmerged", "equal latents"}
    assert all(each["equal_answers"] == 1 and each["largest_difference"] < 1e-3 for each in report["parity"].values())
    assert report["scores"]["accuracy"]["change"] == 0
    assert [each["batch_size"] for each in report["times"]] == [1, 8]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "config.json", "README.md", REPORT_FILE} <= names
    assert not any((tmp_path / "out" / name).is_dir() for name in names)

    exported, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (ExportedModel, AutoTokenizer))
    answer = pipeline("text-classification", model=exported, tokenizer=tokenizer)("A text.")
    merged = ToMePerceiverForSequenceClassification.from_pretrained(checkpoint, r=3).eval()
    with torch.inference_mode():
        scores = merged(**tokenizer("A text.", return_tensors="pt")).logits.softmax(-1)
    assert answer[0]["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_without_parity_there_is_a_report_and_no_model(checkpoint, tmp_path, monkeypatch, capsys):
    """The samples are random here, since no data are given."""
    forward = ExportedModel.forward

    def wrong(self: ExportedModel, **inputs: Tensor) -> Any:
        output = forward(self, **inputs)
        output.logits = -output.logits
        return output

    monkeypatch.setattr(ExportedModel, "forward", wrong)
    with pytest.raises(SystemExit) as exit_info:
        call_script("export.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out")
    assert exit_info.value.code == 1
    assert "error: the exported model does not agree with PyTorch (merged" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [REPORT_FILE]
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["samples"] == "random" and report["parity"]["merged"]["equal_answers"] == 0


def test_samples_are_compared_once_at_three_batch_sizes_and_two_lengths():
    samples = text(48, 10)
    batches = [batch["input_ids"] for batch in cut_batches(samples)]
    assert {tuple(batch.shape) for batch in batches} == {(size, length) for size in (1, 3, 8) for length in (5, 10)}
    rows = torch.cat([nn.functional.pad(batch, (0, 10 - batch.shape[1]), value=-1) for batch in batches])
    assert torch.equal(torch.where(rows < 0, samples["input_ids"], rows), samples["input_ids"])


def test_which_parity_is_enough():
    assert agrees("merged", Parity(100, 1e-5, 1.0, 1.0), "float32")
    assert not agrees("merged", Parity(100, 2.0, 0.9, 1.0), "float32")
    assert not agrees("equal latents", Parity(100, 2.0, 1.0, 0.9), "float32")
    assert agrees("merged", Parity(100, 2.0, 0.0, 0.95), "int8")
    assert not agrees("unmerged", Parity(100, 2.0, 1.0, 0.8), "int8")


@pytest.mark.parametrize(
    "given, message",
    [
        (("--format", "tflite"), "--format tflite: choose from onnx, openvino, pt2"),
        (("--format", "openvino", "--dtype", "int8"), "--dtype int8: is not available for --format openvino"),
        (("--flops_ratio", 2), "--flops_ratio 2.0: must be"),
        (("--flops_ratio", 0.5, "--r", 2), "--r 2 and --flops_ratio 0.5: use one of them"),
        (("--r", "a"), "--r a: must be an integer"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(checkpoint, tmp_path, capsys, given, message):
    out = tmp_path / "out"
    line = bad_input_line(capsys, "export.py", "--model_name_or_path", checkpoint, *given, "--output_dir", out)
    assert message in line and not out.exists()


def test_an_output_folder_with_anything_else_in_it_is_refused(checkpoint, capsys):
    before = sorted(checkpoint.iterdir())
    line = bad_input_line(capsys, "export.py", "--model_name_or_path", checkpoint, "--output_dir", checkpoint)
    assert f"--output_dir {checkpoint}: holds" in line
    assert sorted(checkpoint.iterdir()) == before


def test_a_missing_package_is_named_with_the_command_that_installs_it(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = bad_input_line(capsys, "export.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "out")
    assert "onnxruntime is missing; use pip install -r requirements-export.txt" in line


def test_other_heads_and_methods_of_experiments_are_refused():
    with pytest.raises(BadInput, match="ToMePerceiverForOpticalFlow cannot be exported"):
        check_exportable(tiny_model("ForOpticalFlow"))
    with pytest.raises(BadInput, match="merge_method='prune': is for experiments only"):
        check_exportable(tiny_model("ForMaskedLM", r=2, merge_method="prune"))


def test_a_folder_without_an_export_is_no_exported_model(checkpoint):
    with pytest.raises(BadInput, match="holds no exported model"):
        ExportedModel.from_pretrained(checkpoint)
