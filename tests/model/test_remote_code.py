# SPDX-License-Identifier: Apache-2.0
"""Tests of the code in a saved folder: it loads in processes without this repository, and runs no other code.

Each child process has a working directory and an `HF_HOME` of its own. Starting one takes seconds, so each does all
that it can, and the tests look at what it reports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import PerceiverTokenizer

import modeling_tome_perceiver as tome
from tests.support.script_run import PROGRAMS
from tests.support.tiny_models import HEADS, IMAGE_HEADS, flat_logits, tiny_inputs, tiny_model

REPOSITORY = Path(tome.__file__).resolve().parent
MODULES = [
    "configuration_tome_perceiver",
    "cost_tome_perceiver",
    "frontier_tome_perceiver",
    "layers_tome_perceiver",
    "merging_tome_perceiver",
    "modeling_tome_perceiver",
]
AUTO_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    **dict.fromkeys(IMAGE_HEADS, "AutoModelForImageClassification"),
}
R_SAVED, R_SET = [3, 0, 2, 1, 0, 1], [0, 0, 4, 0, 0, 2]
TEXT = "a text of words"
# Interpreter that loads what this one saved, and saves it again for this one: `make test-oldest` and `make test-newest`
# set one with other versions of the libraries.
OTHER_PYTHON = os.environ.get("OTHER_PYTHON") or sys.executable
# The image processor that needs no torchvision has its own name since transformers 5.4.
PilImageProcessor = getattr(transformers, "PerceiverImageProcessorPil", None) or transformers.PerceiverImageProcessor

# Messages of transformers 4.57 about its slow tokenizers and image processors, which every model causes.
NOTICES_OF_4_57 = ("`use_fast` is set to `True`", "Using a slow image processor", "Device set to use")


def run_elsewhere(
    program: str, task: dict[str, Any], folder: Path, pythonpath: Path | None = None, python: str = sys.executable
) -> Path:
    """Run a program in a new process, in another folder and with an empty `HF_HOME`; return the path of its report."""
    folder.mkdir()
    task = task | dict(report=str(folder / "report"))
    shutil.copy(PROGRAMS / program, folder)
    (folder / "task.json").write_text(json.dumps(task))
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
    }
    environment = kept | dict(HF_HOME=str(folder / "hf_home"), HF_HUB_OFFLINE="1")
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([python, program, "task.json"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "report"


def assert_runs_from(folder: Path, names: list[str]) -> None:
    """Check that these classes come from the checkpoint's copy of the code, below the `HF_HOME` of that process."""
    assert names and all(name.startswith("transformers_modules.") for name in names), names
    assert (folder / "hf_home" / "modules" / "transformers_modules").is_dir()


class Checkpoints:
    """Saved folders of every head, of a text and an image pipeline, and the outputs of their models in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = {head: tiny_inputs(head, dtype=torch.float32) for head in HEADS}
        self.models = {head: tiny_model(head, torch.float32, r=R_SAVED) for head in HEADS}
        (root / "inputs").mkdir()
        for head in HEADS:
            self.models[head].save_pretrained(root / "saved" / head)
            torch.save(self.inputs[head], root / "inputs" / f"{head}.pt")
        self.tokenizer = PerceiverTokenizer()
        self.processor = PilImageProcessor(do_center_crop=False, size=dict(height=8, width=8))
        pixels = np.random.default_rng(0).integers(0, 256, (11, 9, 3), dtype=np.uint8)
        self.picture = Image.fromarray(pixels)
        self.picture.save(root / "picture.png")
        for name, head, beside in (
            ("text", "ForSequenceClassification", self.tokenizer),
            ("image", "ForImageClassificationLearned", self.processor),
        ):
            self.models[head].save_pretrained(root / "saved" / name)
            beside.save_pretrained(root / "saved" / name)

    def task(self, saved: str, **more: Any) -> dict[str, Any]:
        folder = self.root / saved
        return dict(
            folders={head: str(folder / head) for head in HEADS},
            auto_classes=AUTO_CLASSES,
            inputs=str(self.root / "inputs"),
            text=str(folder / "text"),
            image=str(folder / "image"),
            words=TEXT,
            picture=str(self.root / "picture.png"),
            modules=MODULES,
            **more,
        )

    @torch.no_grad()
    def logits(self, head: str, r: list[int]) -> torch.Tensor:
        self.models[head].r = r
        return flat_logits(self.models[head](**self.inputs[head]))

    @torch.no_grad()
    def scores(self, name: str, r: list[int]) -> dict[str, float]:
        """Return the expected scores of a pipeline, computed in this process."""
        if name == "text":
            model, inputs = self.models["ForSequenceClassification"], self.tokenizer(TEXT, return_tensors="pt")
        else:
            model = self.models["ForImageClassificationLearned"]
            inputs = self.processor(self.picture, return_tensors="pt")
        model.r = r
        scores = model(**inputs).logits[0].softmax(dim=0)
        return {model.config.id2label[i]: float(score) for i, score in enumerate(scores)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def first_load(checkpoints: Checkpoints) -> dict[str, Any]:
    """Load every folder in a child process, which sets r and saves again."""
    task = checkpoints.task("saved", set_r=R_SET, resaved=str(checkpoints.root / "resaved"))
    return torch.load(run_elsewhere("load_checkpoints.py", task, checkpoints.root / "first", python=OTHER_PYTHON))


@pytest.fixture(scope="module")
def second_load(checkpoints: Checkpoints, first_load: dict[str, Any]) -> dict[str, Any]:
    """Load what the first child process saved in another one."""
    return torch.load(run_elsewhere("load_checkpoints.py", checkpoints.task("resaved"), checkpoints.root / "second"))


def auto_map(head: str) -> dict[str, str]:
    code = f"modeling_tome_perceiver.ToMePerceiver{head}"
    config = "configuration_tome_perceiver.ToMePerceiverConfig"
    return {"AutoConfig": config, "AutoModel": code, AUTO_CLASSES.get(head, "AutoModel"): code}


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_folder_carries_its_code(head: str, checkpoints: Checkpoints) -> None:
    folder = checkpoints.root / "saved" / head
    for module in MODULES:
        assert (folder / f"{module}.py").read_bytes() == (REPOSITORY / f"{module}.py").read_bytes()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map(head)


def check_load(report: dict[str, Any], folder: Path, checkpoints: Checkpoints, head: str, r: list[int]) -> None:
    entry = report[head]
    assert entry["model_class"].endswith(f".modeling_tome_perceiver.ToMePerceiver{head}")
    assert entry["config_class"].endswith(".configuration_tome_perceiver.ToMePerceiverConfig")
    assert_runs_from(folder, [entry["config_class"], entry["model_class"]])
    assert all(Path(file).is_relative_to(folder / "hf_home") for file in entry["files"])
    assert entry["amiss"] == {}
    assert entry["auto_model_class"] == f"ToMePerceiver{head}"
    torch.testing.assert_close(entry["auto_model_logits"], entry["logits"])
    assert entry["auto_map"] == auto_map(head) and entry["auto_model_files"] == MODULES
    # `merge_to` needs nothing but the checkpoint's own files.
    assert ("merged_to" in entry) == (head not in ("Model", "ForMultimodalAutoencoding"))
    assert "merged_to" not in entry or 0 < entry["merged_to"]["share"] <= 0.999
    assert entry["config_r"] == entry["r"] == entry["schedule"] == r
    torch.testing.assert_close(entry["logits"], checkpoints.logits(head, r), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_auto_classes_load_a_folder_elsewhere(head, checkpoints, first_load):
    """Schedule and logits are those of the saved model, and r can be set."""
    check_load(first_load, checkpoints.root / "first", checkpoints, head, R_SAVED)
    expected = checkpoints.logits(head, R_SET)
    torch.testing.assert_close(first_load[head]["logits_set"], expected, rtol=1e-4, atol=1e-5)
    assert first_load[head]["logits"].shape != expected.shape or (first_load[head]["logits"] != expected).any()


@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_elsewhere_loads_again(head, checkpoints, second_load):
    """It has the r that the other process set, and still carries its code."""
    check_load(second_load, checkpoints.root / "second", checkpoints, head, R_SET)
    for module in MODULES:
        saved, resaved = (checkpoints.root / name / head / f"{module}.py" for name in ("saved", "resaved"))
        assert resaved.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("name", ["text", "image"])
def test_pipelines_run_a_folder_elsewhere(name, checkpoints, first_load, second_load):
    for report, folder, r in ((first_load, "first", R_SAVED), (second_load, "second", R_SET)):
        assert_runs_from(checkpoints.root / folder, [report[name]["model_class"]])
        assert report[name]["r"] == r
        # Pillow 10 resizes images slightly differently than Pillow 13.
        tolerance = 0.01 if name == "image" and "OTHER_PYTHON" in os.environ else 1e-4
        assert report[name]["scores"] == pytest.approx(checkpoints.scores(name, r), rel=tolerance)
        assert len(report[name]["scores"]) == 3
    assert first_load[name]["scores"] != second_load[name]["scores"]


def test_tokenizers_and_processors_load_without_a_question_or_a_warning(checkpoints):
    """AutoTokenizer reads the config first, which must not ask for `trust_remote_code`."""
    report = json.loads(
        run_elsewhere("load_what_makes_inputs.py", checkpoints.task("saved"), checkpoints.root / "quiet").read_text()
    )
    assert [message for message in report["said"] if not message.startswith(NOTICES_OF_4_57)] == []
    tokenizer, processor = "PerceiverTokenizer", PilImageProcessor.__name__
    assert report["loaded"] == [tokenizer] * 3 + [processor] * 2 + [tokenizer, processor]


def test_no_copy_outside_the_checkpoint_was_imported(first_load, second_load):
    assert first_load["outside"] == second_load["outside"] == []


def test_a_broken_module_fails_with_its_own_error(checkpoints):
    """Also if a good copy of the module is on the path: no other code silently replaces the checkpoint's."""
    breaks = {
        "raises": 'raise RuntimeError("broken on purpose")\n',
        "imports what is not there": "from torch import no_such_name\n",
        "lacks a name": "def merge_latents():\n    pass\n",
    }
    saved = checkpoints.root / "saved" / "ForSequenceClassification"
    folders = {"whole": saved}
    for number, (name, text) in enumerate(breaks.items()):
        folders[name] = shutil.copytree(saved, checkpoints.root / f"broken_{number}")
        (folders[name] / "merging_tome_perceiver.py").write_text(text)
    # A method of the experiments, which the copy on the path could register.
    folders["control"] = shutil.copytree(saved, checkpoints.root / "control")
    config = json.loads((saved / "config.json").read_text())
    (folders["control"] / "config.json").write_text(json.dumps({**config, "merge_method": "prune"}))
    task = dict(folders={name: str(folder) for name, folder in folders.items()})
    report = json.loads(
        run_elsewhere("load_broken_checkpoints.py", task, checkpoints.root / "broken", REPOSITORY).read_text()
    )
    assert report["whole"]["loaded"].startswith("transformers_modules.")
    assert report["control"]["error"] == "ValueError"
    assert "merge_method='prune' is for experiments only" in report["control"]["message"]
    assert (report["raises"]["error"], report["raises"]["message"]) == ("RuntimeError", "broken on purpose")
    for name, missing in (("imports what is not there", "no_such_name"), ("lacks a name", "cannot import name")):
        assert report[name]["error"] == "ImportError"
        assert missing in report[name]["message"]
        assert "transformers_modules" in report[name]["trace"]
