# SPDX-License-Identifier: Apache-2.0
"""What is pushed to the Hub is the checkpoint that is on disk, in one commit, whatever the line between them does.

The real huggingface_hub talks HTTP to `loopback_hub`; only waiting is left out.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from huggingface_hub import HfApi

from experiments.errors import BadInput
from experiments.publishing import hub as hub_upload
from experiments.publishing.hub import (
    RETRY_WAITS,
    HubRepository,
    PushFailed,
    open_repository,
    push_checkpoint,
)
from experiments.publishing.tables import without_places
from tests.support.loopback_hub import LoopbackHub
from tests.support.loopback_repository import FINE_TOKEN, READ_TOKEN, USER, WRITE_TOKEN
from tests.support.script_run import PROGRAMS
from tests.support.tiny_models import flat_logits, spread_weights, tiny_inputs, tiny_model

ID = f"{USER}/model"
CHECKPOINT = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 40,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "modeling_tome_perceiver.py": b"# code\n",
    "README.md": b"---\nlicense: apache-2.0\n---\nA model.\n",
    "eval_results.json": b"",
}
AT_HOME = {
    "training_args.bin": b"pickled " + WRITE_TOKEN.encode(),
    "optimizer.pt": b"moments",
    "scheduler.pt": b"steps",
    "rng_state.pth": b"state",
    ".cache.json": b"{}",
    ".model.safetensors.partial": b"half",
    "model.safetensors.partial": b"half",
    "checkpoint-10/model.safetensors": b"older",
    "checkpoint-10/config.json": b"{}",
    "runs/events.out": b"losses",
}
LARGE = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@contextmanager
def constant(**values: object) -> Iterator[None]:
    """Change constants of huggingface_hub, and back before the Hub's own changes of them go back."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(huggingface_hub.constants, name, value)
        yield


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the module would have waited; what huggingface_hub would have waited is left out too."""
    waited: list[float] = []
    monkeypatch.setattr(hub_upload, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
    return waited


@pytest.fixture
def hub(tmp_path: Path, waits: list[float]) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, data in (CHECKPOINT | AT_HOME).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def repository(hub: LoopbackHub, folder: Path) -> HubRepository:
    return open_repository(None, folder, WRITE_TOKEN, None)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder: Path, model_id: str | None = None, token: str | None = WRITE_TOKEN) -> str:
    """The one line that says why no repository was opened."""
    with pytest.raises(BadInput) as error:
        open_repository(model_id, folder, token, None)
    assert len(str(error.value).splitlines()) == 1
    assert token is None or token not in str(error.value)
    return str(error.value)


def push_failure(repository: HubRepository, folder: Path) -> str:
    """The one line that says why a push failed, and what to do."""
    with pytest.raises(PushFailed) as error:
        push_checkpoint(repository, folder, "a push")
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert str(folder) in line and "--push_only" in line and repository.url in line and repository.token not in line
    return line


def test_without_a_token_nothing_is_opened(hub, folder):
    line = refusal(folder, token=None)
    for part in ("--push_to_hub", "hf auth login", "HF_TOKEN", "--hub_token"):
        assert part in line
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_nobodys", "hf_é", "hf_a\nb"])
def test_a_wrong_token_is_named(hub, folder, token):
    assert refusal(folder, token=token).startswith("--hub_token")
    assert not hub.asked("create")


@pytest.mark.parametrize("there", [False, True])
def test_a_token_that_may_only_read_is_named(hub, folder, there):
    """Before training, and also where the repository is there already: `create_repo` alone would take it."""
    if there:
        hub.add_repository(ID, {})
    assert refusal(folder, token=READ_TOKEN).startswith("--hub_token")
    assert not hub.asked("create")


def test_a_repository_of_others_is_refused(hub, folder):
    line = refusal(folder, "others/model")
    assert line.startswith("--hub_token") and "others/model" in line and "rights" in line


def test_a_token_for_one_repository_will_do(hub, folder):
    """It may create none, so the repository has to be there."""
    line = refusal(folder, token=FINE_TOKEN)
    assert line.startswith("--hub_token") and "may create no repositories" in line
    hub.add_repository(ID, {})
    push_checkpoint(open_repository("model", folder, FINE_TOKEN, None), folder, "a push")
    assert hub.files(ID) == CHECKPOINT


@pytest.mark.parametrize("model_id", ["a/b/c", "two words", "-dash", "a--b"])
def test_an_impossible_name_is_named(hub, folder, model_id):
    line = refusal(folder, model_id)
    assert line.startswith("--hub_model_id") and model_id in line
    assert hub.requests == []


def test_a_hub_out_of_reach_is_named(hub, folder):
    with constant(ENDPOINT="http://127.0.0.1:9"):
        line = refusal(folder)
    for part in ("--push_to_hub", "http://127.0.0.1:9", "--push_only"):
        assert part in line


def test_offline_mode_is_named(hub, folder):
    with constant(HF_HUB_OFFLINE=True):
        line = refusal(folder)
    assert "--push_to_hub" in line and "HF_HUB_OFFLINE" in line


@pytest.mark.parametrize("how", ["503", "page", "cut"])
@pytest.mark.parametrize("path", ["whoami", "create"])
def test_a_hub_that_fails_is_named(hub, folder, path, how):
    hub.fail(path, 1, how)
    line = refusal(folder)
    for part in ("--push_to_hub", hub.url, "--push_only"):
        assert part in line
    assert {"503": "503 Service Unavailable", "page": "JSON", "cut": "disconnected"}[how] in line


@pytest.mark.parametrize("model_id", [None, "model", ID])
def test_a_repository_has_the_name_that_was_asked_for(hub, folder, model_id):
    repository = open_repository(model_id, folder, WRITE_TOKEN, None)
    assert (repository.repo_id, repository.url) == (ID, f"{hub.url}/{ID}")
    assert not hub.repository(ID).private
    assert WRITE_TOKEN not in repr(repository)


def test_a_repository_is_private_where_asked_for(hub, folder):
    open_repository(None, folder, WRITE_TOKEN, private=True)
    assert hub.repository(ID).private


def test_the_token_is_that_of_the_environment_or_of_a_login(hub, folder, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(f"{WRITE_TOKEN}\n")
    assert open_repository(None, folder, None, None).token == WRITE_TOKEN
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert refusal(folder, token=None).startswith("--hub_token")
    assert open_repository(None, folder, f" {WRITE_TOKEN}\n", None).token == WRITE_TOKEN


def test_a_repository_that_is_there_is_opened_as_it_is(hub, folder):
    oid = hub.add_repository(ID, {"notes.txt": b"notes"})
    assert open_repository(None, folder, WRITE_TOKEN, None).repo_id == ID
    assert hub.repository(ID).branches["main"].oid == oid


def test_a_push_is_one_commit_of_the_checkpoint(hub, folder, repository):
    """With the bytes that are on disk, and nothing but a checkpoint."""
    before = on_disk(folder)
    url = push_checkpoint(repository, folder, "a push")
    (commit,) = hub.commits
    assert (commit.repo_id, commit.branch, commit.message) == (ID, "main", "a push")
    assert url == f"{hub.url}/{ID}/commit/{commit.oid}"
    assert hub.files(ID) == CHECKPOINT
    assert {name for name, file in commit.files.items() if file.large} == LARGE
    assert ".gitattributes" in commit.files
    assert on_disk(folder) == before == CHECKPOINT | AT_HOME


def test_of_what_is_on_this_machine_only_the_name_is_pushed(hub, folder, repository):
    """The folder keeps the place, by which the next run may ask for it."""
    written = {
        "arguments.json": {"model_name_or_path": str(folder), "dataset_name": "nyu-mll/glue", "seed": 1, "seeds": []},
        "sweep_results.json": {"source": {"argument": f"--train_file {folder / 'own data.csv'}"}, "rows": [{"r": [2]}]},
        "trainer_state.json": {"best_model_checkpoint": f"{folder}/checkpoint-10/", "log_history": [{"loss": 0.5}]},
    }
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value))
    before = on_disk(folder)
    for message in ("first", "second"):
        push_checkpoint(repository, folder, message)
    pushed = {name: json.loads(data) for name, data in hub.files(ID).items() if name in written}
    assert pushed == {
        "arguments.json": written["arguments.json"] | {"model_name_or_path": "model"},
        "sweep_results.json": {"source": {"argument": "--train_file own data.csv"}, "rows": [{"r": [2]}]},
        "trainer_state.json": {"best_model_checkpoint": "checkpoint-10", "log_history": [{"loss": 0.5}]},
    }
    assert len(hub.commits) == 1 and on_disk(folder) == before
    (folder / "arguments.json").write_text("{")
    with pytest.raises(BadInput, match=r"^--output_dir .*: arguments.json: "):
        push_checkpoint(repository, folder, "third")


@pytest.mark.parametrize(
    ("value", "pushed"),
    [
        ("nyu-mll/glue", "nyu-mll/glue"), ("deepmind/language-perceiver", "deepmind/language-perceiver"),
        ("outputs/here", "here"), ("outputs/gone/model", "model"), ("/home/me/data", "data"), ("~/data/", "data"),
        ("../data.csv", "data.csv"), ("./data", "data"), ("~", Path.home().name), ("outputs", "outputs"), ("", ""),
        ("num_latents=64,d_latents=32", "num_latents=64,d_latents=32"), ("http://127.0.0.1/a", "http://127.0.0.1/a"),
        ("--dataset_name nyu-mll/glue", "--dataset_name nyu-mll/glue"), ("two\nlines /a", "two\nlines /a"),
        (["/a/b", {"/x/y": "/a/c"}, 1.5, None], ["b", {"/x/y": "c"}, 1.5, None]),
    ],
)  # fmt: skip
def test_what_is_a_place_on_this_machine(tmp_path, monkeypatch, value, pushed):
    (tmp_path / "outputs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_places(value) == pushed


def test_what_stays_at_home_does_not_come_near_the_line(hub, folder, repository):
    """Not as a sample for the Hub to look at, either."""
    seen: list[bytes] = []
    answer = hub.answer
    hub.answer = lambda request: seen.append(request.body) or answer(request)
    push_checkpoint(repository, folder, "a push")
    sent = b"\n".join(seen)
    assert b"config.json" in sent
    for name in AT_HOME:
        assert Path(name).name in CHECKPOINT or f'"{Path(name).name}"'.encode() not in sent, name
    assert b"checkpoint-10" not in sent


def test_the_same_folder_twice_is_one_commit(hub, folder, repository):
    assert push_checkpoint(repository, folder, "first") == push_checkpoint(repository, folder, "second")
    assert [commit.message for commit in hub.commits] == ["first"]
    (folder / "config.json").write_bytes(b'{"r": 1}')
    push_checkpoint(repository, folder, "third")
    assert [commit.message for commit in hub.commits] == ["first", "third"]
    assert hub.files(ID) == CHECKPOINT | {"config.json": b'{"r": 1}'}


def test_weights_that_are_no_longer_there_go(hub, folder):
    """And with them arguments that someone else pushed; what is not a checkpoint's stays, and so do folders."""
    kept = {"notes.txt": b"notes", "logo.png": b"logo", "onnx/model.bin": b"weights", "old/model.safetensors": b"w"}
    stale = ["model.safetensors", "model-00003-of-00003.safetensors", "pytorch_model.bin", "training_args.bin"]
    stale += ["pytorch_model.bin.index.json"]
    hub.add_repository(ID, kept | dict.fromkeys(stale, b"stale") | {"config.json": b"older"})
    repository = open_repository(None, folder, WRITE_TOKEN, None)
    push_checkpoint(repository, folder, "a push")
    assert hub.files(ID) == CHECKPOINT | kept
    push_checkpoint(repository, folder, "again")
    assert len(hub.commits) == 1


def test_a_folder_without_a_checkpoint_takes_nothing_out_of_a_repository(hub, folder, repository):
    push_checkpoint(repository, folder, "a push")
    asked = len(hub.requests)
    with pytest.raises(BadInput, match=r"^--output_dir .*checkpoint-20"):
        push_checkpoint(repository, folder / "checkpoint-20", "a push")
    assert len(hub.requests) == asked
    assert hub.files(ID) == CHECKPOINT


STEPS = {
    "head": "GET /api/models/.*/revision/main",
    "card": "POST /api/validate-yaml",
    "modes": "POST .*/preupload/main",
    "batch": "POST .*/objects/batch",
    "upload": "PUT /large/",
    "verify": "POST .*/objects/verify",
    "commit": "POST .*/commit/main",
}


@pytest.mark.parametrize("how", ["503", "cut", "answer_lost"])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_on_the_way_is_survived(hub, folder, repository, step, how):
    """Also a lost answer to the commit: there is never a second commit."""
    hub.fail(STEPS[step], 1, how)
    url = push_checkpoint(repository, folder, "a push")
    (commit,) = hub.commits
    assert url.endswith(commit.oid)
    assert hub.files(ID) == CHECKPOINT
    assert len(hub.failed) == 1


@pytest.mark.parametrize("how", ["503", "cut"])
@pytest.mark.parametrize("step", STEPS)
def test_as_many_failures_as_there_are_tries_left_are_survived(hub, folder, repository, waits, step, how):
    """Beyond the six tries that huggingface_hub itself makes of some requests, and none of others."""
    own_tries = {"modes": 6, "batch": 6, "upload": 6, "verify": 6}.get(step, 1)
    # Two large files are uploaded side by side, and each of them is tried.
    side_by_side = 2 if step in ("upload", "verify") else 1
    hub.fail(STEPS[step], own_tries * side_by_side * len(RETRY_WAITS), how)
    push_checkpoint(repository, folder, "a push")
    assert tuple(waits) == RETRY_WAITS
    assert len(hub.commits) == 1
    assert hub.files(ID) == CHECKPOINT


@pytest.mark.parametrize("how", ["503", "cut"])
@pytest.mark.parametrize("step", STEPS)
def test_one_failure_too_many_is_said_and_the_next_push_goes_on(hub, folder, repository, waits, step, how):
    before = on_disk(folder)
    hub.fail(STEPS[step], 1000, how)
    line = push_failure(repository, folder)
    assert how == "cut" or step == "card" or "503" in line
    assert tuple(waits) == RETRY_WAITS == tuple(sorted(waits)) and len(waits) == 4
    assert hub.commits == [] and hub.files(ID) == {}
    assert on_disk(folder) == before
    hub.mend()
    push_checkpoint(repository, folder, "a push")
    assert len(hub.commits) == 1
    assert hub.files(ID) == CHECKPOINT


def test_what_does_not_pass_is_said_at_once(hub, folder, repository, waits):
    assert "403 Forbidden: You must use a write token" in push_failure(
        HubRepository(ID, READ_TOKEN, repository.url), folder
    )
    assert "401 Unauthorized: Invalid credentials" in push_failure(HubRepository(ID, "hf_no", repository.url), folder)
    assert "404 Not Found: Repository not found" in push_failure(
        HubRepository(f"{USER}/gone", WRITE_TOKEN, repository.url), folder
    )
    (folder / "README.md").write_bytes(b"---\nlicense: [\n---\n")
    line = push_failure(repository, folder)
    assert "Invalid metadata in README.md" in line and "expected the node content" in line
    with constant(HF_HUB_OFFLINE=True):
        assert "HF_HUB_OFFLINE" in push_failure(repository, folder)
    assert waits == [] and hub.commits == []


def test_a_failure_of_hf_xet_is_survived(hub, folder, repository, waits, monkeypatch):
    """It raises ConnectionError, by a path that these tests cannot go."""
    failures = [ConnectionError("Network error: Request middleware error")]

    class Xet(HfApi):
        def preupload_lfs_files(self, *arguments: Any, **keywords: Any) -> None:
            if failures:
                raise failures.pop()
            super().preupload_lfs_files(*arguments, **keywords)

    monkeypatch.setattr(hub_upload, "HfApi", Xet)
    push_checkpoint(repository, folder, "a push")
    assert failures == [] and waits == list(RETRY_WAITS[:1])
    assert hub.files(ID) == CHECKPOINT


def test_a_commit_that_came_in_between_is_built_upon(hub, folder, repository, waits, monkeypatch):
    """As that of an earlier try that a gateway gave up on, and the Hub did not."""

    class Interrupted(HfApi):
        def model_info(self, *arguments: Any, **keywords: Any) -> Any:
            head = super().model_info(*arguments, **keywords)
            if not hub.commits:
                self.upload_file(path_or_fileobj=b"w", path_in_repo="model.safetensors", repo_id=ID)
            return head

    monkeypatch.setattr(hub_upload, "HfApi", Interrupted)
    push_checkpoint(repository, folder, "a push")
    assert len(hub.commits) == 2 and waits == list(RETRY_WAITS[:1])
    assert hub.files(ID) == CHECKPOINT


def test_a_branch_leaves_main_as_it_is(hub, folder, repository):
    push_checkpoint(repository, folder, "to main")
    (folder / "config.json").write_bytes(b'{"r": 1}')
    hub.fail("POST .*/branch/", 1, "answer_lost")
    for _ in range(2):
        push_checkpoint(repository, folder, "to a branch", revision="tries/1")
    assert hub.files(ID, "tries/1") == CHECKPOINT | {"config.json": b'{"r": 1}'}
    (folder / "config.json").write_bytes(b'{"r": 2}')
    push_checkpoint(repository, folder, "to a branch again", revision="tries/1")
    assert [(commit.branch, commit.message) for commit in hub.commits] == [
        ("main", "to main"),
        ("tries/1", "to a branch"),
        ("tries/1", "to a branch again"),
    ]
    assert hub.files(ID) == CHECKPOINT
    assert hub.files(ID, "tries/1") == CHECKPOINT | {"config.json": b'{"r": 2}'}


def test_a_pushed_model_is_the_model_elsewhere(hub, tmp_path):
    """By the commit that it was pushed in, also after another push; and what may not be loaded is said."""
    models = [tiny_model("ForSequenceClassification", r=2) for _ in range(2)]
    spread_weights(models[1], seed=1)
    inputs = tiny_inputs("ForSequenceClassification")
    expected, oids = [], []
    repository = open_repository("model", tmp_path, WRITE_TOKEN, None)
    for model in models:
        model.save_pretrained(tmp_path / "model")
        oids.append(push_checkpoint(repository, tmp_path / "model", "a push").rpartition("/")[2])
        with torch.no_grad():
            expected.append(flat_logits(model(**inputs)))
    assert len(hub.commits) == 2 and (expected[0] != expected[1]).all()

    hub.add_repository("others/gated", {"config.json": b"{}"})
    hub.add_repository("others/gated-data", {"README.md": b"", "data.csv": b"a\n1\n"}, kind="dataset")
    hub.gate("others/gated")
    hub.gate("others/gated-data", "dataset")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save(inputs, elsewhere / "inputs.pt")
    task = dict(
        id=ID,
        revisions=[*oids, "main"],
        inputs=str(elsewhere / "inputs.pt"),
        models=["others/gated", "others/missing"],
        datasets=["others/gated-data", "others/missing-data"],
        report=str(elsewhere / "report.pt"),
    )
    (elsewhere / "task.json").write_text(json.dumps(task))
    shutil.copy(PROGRAMS / "load_revisions.py", elsewhere)
    done = subprocess.run(
        [sys.executable, "load_revisions.py", "task.json"],
        cwd=elsewhere,
        env=hub.environment(elsewhere / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = torch.load(elsewhere / "report.pt")
    for revision, logits in zip([*oids, "main"], [*expected, expected[1]], strict=True):
        torch.testing.assert_close(report["logits"][revision], logits, rtol=1e-6, atol=1e-6)
        assert re.fullmatch(
            r"transformers_modules\..*\.modeling_tome_perceiver\.ToMePerceiverForSequenceClassification",
            report["classes"][revision],
        )
        assert Path(report["files"][revision]).is_relative_to(elsewhere / "home")
    first_lines = {name: message.splitlines()[0] for name, (_, message) in report["errors"].items()}
    print(first_lines)
    assert "OSError" in report["errors"]["others/gated"][0] and "OSError" in report["errors"]["others/missing"][0]
    assert first_lines["others/gated"] == "You are trying to access a gated repo."
    assert first_lines["others/missing"].startswith("others/missing is not a local folder and is not a valid model")
    assert first_lines["others/gated-data"].startswith("Dataset 'others/gated-data' is a gated dataset on the Hub.")
    assert first_lines["others/missing-data"].startswith("Dataset 'others/missing-data' doesn't exist on the Hub")
