# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises: what the model files import and do, and that secrets and names stay where they belong."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from experiments.errors import BadInput
from experiments.escaping import hide_tokens, printable, spreadsheet_cell
from experiments.publishing.hub import HubRepository, push_checkpoint
from modeling_tome_perceiver import ToMePerceiverForSequenceClassification
from tests.model.test_remote_code import MODULES, run_elsewhere
from tests.support.script_run import ROOT, run_script
from tests.support.tiny_models import tiny_model
from tests.support.tiny_texts import write_model_config, write_table

TOKENS = {"--token": "hf_oneSecretToken1", "--hub_token": "hf_twoSecretToken2", "HF_TOKEN": "hf_threeSecretToken3"}
# Names that a shell, a terminal, Markdown, HTML, YAML, a spreadsheet, matplotlib or a path would take for more.
HOSTILE = (
    "=1+cmd|' /C calc'!A0",
    "../../up",
    "<script>alert(1)</script>",
    "\x1b[2Jx",
    "$x^$ --- a: b",
    "[a](http://b)",
)


def imported_packages(path: Path) -> set[str]:
    """Return the packages that a file imports anywhere, by absolute imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_model_files_import_only_what_pyproject_lists(module):
    outside = imported_packages(ROOT / f"{module}.py") - set(sys.stdlib_module_names) - set(MODULES)
    assert outside <= {"torch", "transformers", "huggingface_hub", "packaging", "tqdm"}


@pytest.mark.parametrize("module", MODULES)
def test_model_files_cannot_start_programs_or_connections(module):
    forbidden = {
        "subprocess",
        "socket",
        "ctypes",
        "pickle",
        "marshal",
        "shutil",
        "urllib",
        "http",
        "requests",
        "tempfile",
    }
    assert not imported_packages(ROOT / f"{module}.py") & forbidden
    calls = {
        node.func.id for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }  # fmt: skip
    assert not calls & {"eval", "exec", "compile", "__import__", "open"}


def test_a_loaded_checkpoint_uses_no_network_no_process_and_writes_nothing(tmp_path):
    """Except the copies of its code that transformers keeps below HF_HOME."""
    folder = tmp_path / "saved"
    tiny_model("ForSequenceClassification", torch.float32).save_pretrained(folder)
    report = json.loads(run_elsewhere("load_and_audit.py", {"folder": str(folder)}, tmp_path / "audit").read_text())
    assert report["code"].startswith("transformers_modules.") and report["changed"]
    assert report["network"] == report["processes"] == []
    below_home = [path.startswith(str(tmp_path / "audit" / "hf_home")) for path in report["writes"]]
    assert below_home and all(below_home), report["writes"]


def test_importing_the_model_files_writes_and_starts_nothing(tmp_path):
    program = (
        "import sys; import torch, transformers.models.perceiver.modeling_perceiver, tqdm.auto\n"
        "events = []\n"
        "def watch(event, arguments):\n"
        "    writes = event == 'open' and isinstance(arguments[2], int) and arguments[2] & 0o103\n"
        "    reads = event.startswith(('os.list', 'os.scan'))\n"
        "    if writes or event.startswith(('socket.', 'subprocess.', 'os.')) and not reads:\n"
        "        events.append((event, str(arguments)))\n"
        "sys.addaudithook(watch)\n"
        f"import {', '.join(MODULES)}\n"
        "assert not events, events\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_the_space_trusts_code_by_itself():
    """The Space shows the checkpoint that its owner names. Scripts pass on `--trust_remote_code`, false by default."""
    trusting = set()
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if not isinstance(node, ast.Call) or name.startswith("tests/"):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            value = given.get("trust_remote_code")
            if isinstance(value, ast.Constant) and value.value is not False:
                trusting.add(name)
            assert "weights_only" not in given, f"{name} changes how pickles are read"
    assert trusting <= {"space/comparison.py"}


class _Pickled:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_place_of_weights_does_not_run(tmp_path, name):
    tiny_model("ForSequenceClassification", torch.float32).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    with (tmp_path / "saved" / name).open("wb") as file:
        pickle.dump(_Pickled(tmp_path / "ran"), file)
    with pytest.raises(Exception, match=r"(?i)weights|header|safetensors"):
        ToMePerceiverForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train, predict and write a card on data with hostile names, with three tokens; return folder and result."""
    folder = tmp_path_factory.mktemp("hostile")
    labels = list(HOSTILE)
    columns = {"text": ["aaa", "bbb", "ccc", "abc", "bca", "cab"] * 3, "label": labels * 3}
    data = folder / "<b>$x^$ data"
    data.mkdir()
    for name in ("train", "validation", "test"):
        write_table(data / f"{name}.csv", columns)
    arguments = [
        "--config_name", write_model_config(folder), "--do_train", "--do_eval", "--do_predict", "--use_cpu", "--r", 1,
        "--max_steps", 2, "--per_device_train_batch_size", 6, "--save_strategy", "steps", "--save_steps", 1,
        "--token", TOKENS["--token"], "--hub_token", TOKENS["--hub_token"], "--output_dir", "out",
    ]  # fmt: skip
    for name in ("train", "validation", "test"):
        arguments += [f"--{name}_file", data / f"{name}.csv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKENS["HF_TOKEN"])
        return folder, data, run_script("run_glue.py", *arguments, cwd=folder)


def test_tokens_are_in_no_file_and_no_output(run):
    folder, _, result = run
    assert result.returncode == 0, result.stderr[-2000:]
    assert (folder / "out" / "checkpoint-2" / "training_args.bin").exists()
    for token in TOKENS.values():
        assert token not in result.stdout + result.stderr
        holding = [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        assert holding == []


def test_hostile_names_stay_inside_the_output_folder_and_the_card(run):
    folder, data, result = run
    assert {path.name for path in folder.iterdir()} == {"out", data.name, "config.json"}
    assert "\x1b[2J" not in result.stdout + result.stderr
    card = (folder / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-classification"
    assert not re.search(r"(?<!\\)<(script|b)>|\x1b|(?<!\\)\[a\]\(http", card)


def test_predicted_names_are_no_formulas(run):
    (file,) = (run[0] / "out").glob("predict_results_*.txt")
    assert not any(
        cell.lstrip('"').startswith("=") for line in file.read_text().splitlines() for cell in line.split("\t")
    )


@pytest.mark.parametrize("cell", [*HOSTILE[1:], "-0.5", "+1e3", 3, None, "good", ""])
def test_other_cells_stay_as_they_are(cell):
    assert spreadsheet_cell(cell) == cell


def test_formulas_get_an_apostrophe():
    assert [spreadsheet_cell(cell) for cell in ("=1", "@a", "-x", "+y", "\tz")] == ["'=1", "'@a", "'-x", "'+y", "'\tz"]


def test_tokens_are_hidden_in_messages_of_libraries(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_glue.py", "--token", "plain-secret", "--hub_token=other-secret"])
    monkeypatch.setenv("HF_TOKEN", "third-secret")
    text = "Illegal header b'Bearer plain-secret', other-secret, third-secret, hf_" + "a" * 34
    assert hide_tokens(text) == "Illegal header b'Bearer ...', ..., ..., ..."


def test_control_characters_are_escaped():
    assert printable("é \x1b[31m\n\u202eb\ud800") == r"é \x1b[31m\n\u202eb\ud800"


@pytest.mark.parametrize("method", ["random", "prune", "energy", "size_penalty"])
def test_a_checkpoint_that_others_cannot_load_is_not_pushed(tmp_path, method):
    (tmp_path / "config.json").write_text(json.dumps({"merge_method": method}))
    with pytest.raises(BadInput, match=rf"--output_dir .*merge_method={method} is for experiments only"):
        push_checkpoint(HubRepository("me/model", "token", "url"), tmp_path, "message")
