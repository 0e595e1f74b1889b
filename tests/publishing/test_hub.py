# SPDX-License-Identifier: Apache-2.0
"""Tests of pushing to the Hub: one commit with the checkpoint on disk, also if connections fail.

The real huggingface_hub talks HTTP to `loopback_hub`; only waiting is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from huggingface_hub import HfApi
from transformers import TrainingArguments

from experiments.errors import BadInput
from experiments.publishing import hub as hub_upload
from experiments.publishing.hub import RETRY_WAITS, HubRepository, PushFailed, open_to_push, push_checkpoint
from tests.support.loopback_hub import FINE_TOKEN, READ_TOKEN, USER, WRITE_TOKEN, LoopbackHub

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
NOT_PUSHED = {
    "training_args.bin": b"pickled " + WRITE_TOKEN.encode(),
    "optimizer.pt": b"moments",
    "scheduler.pt": b"steps",
    "rng_state.pth": b"state",
    ".cache.json": b"{}",
    ".model.safetensors.partial": b"half",
    "model.safetensors.partial": b"half",
    "checkpoint-10/model.safetensors": b"older",
    "runs/events.out": b"losses",
}


def open_repository(model_id: str | None, folder: Path, token: str | None, private: bool | None) -> HubRepository:
    arguments = {"hub_model_id": model_id, "hub_token": token, "hub_private_repo": private, "push_to_hub": True}
    return open_to_push(TrainingArguments(output_dir=str(folder), **arguments), None)


@contextmanager
def constant(**values: object) -> Iterator[None]:
    """Change constants of huggingface_hub while the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(huggingface_hub.constants, name, value)
        yield


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds that a push would have waited; nothing waits, also not in huggingface_hub."""
    waited: list[float] = []
    monkeypatch.setattr(hub_upload, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
    return waited


@pytest.fixture
def hub(tmp_path: Path, waits: list[float]) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, data in (CHECKPOINT | NOT_PUSHED).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def repository(hub: LoopbackHub, folder: Path) -> HubRepository:
    return open_repository(None, folder, WRITE_TOKEN, None)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(folder: Path, model_id: str | None = None, token: str | None = WRITE_TOKEN) -> str:
    """Return the error message for a repository that cannot be opened."""
    with pytest.raises(BadInput) as error:
        open_repository(model_id, folder, token, None)
    assert len(str(error.value).splitlines()) == 1 and (token is None or token not in str(error.value))
    return str(error.value)


def push_failure(repository: HubRepository, folder: Path) -> str:
    """Return the error message of a failed push."""
    with pytest.raises(PushFailed) as error:
        push_checkpoint(repository, folder, "a push")
    line = str(error.value)
    assert len(line.splitlines()) == 1 and repository.url in line and repository.token not in line
    assert str(folder) in line and "--push_only" in line
    return line


def test_without_a_token_nothing_is_opened(hub, folder):
    line = refusal(folder, token=None)
    assert all(part in line for part in ("--push_to_hub", "hf auth login", "HF_TOKEN", "--hub_token"))
    assert hub.requests == []


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("token", ["hf_nobodys", "hf_é", "hf_a\nb", READ_TOKEN])
def test_a_token_that_cannot_write_is_named_before_training(hub, folder, token, exists):
    """Also if the repository exists: then `create_repo` alone accepts the token."""
    if exists:
        hub.add_repository(ID, {})
    assert refusal(folder, token=token).startswith("--hub_token")
    assert not any("create" in request for request in hub.requests)


def test_a_repository_of_others_is_refused(hub, folder):
    line = refusal(folder, "others/model")
    assert line.startswith("--hub_token") and "others/model" in line and "rights" in line


def test_a_fine_grained_token_pushes_to_its_repository(hub, folder):
    assert refusal(folder, token=FINE_TOKEN).startswith("--hub_token")
    hub.add_repository(ID, {})
    push_checkpoint(open_repository("model", folder, FINE_TOKEN, None), folder, "a push")
    assert hub.files(ID) == CHECKPOINT


@pytest.mark.parametrize("model_id", ["a/b/c", "two words", "-dash", "a--b"])
def test_an_impossible_name_is_named(hub, folder, model_id):
    line = refusal(folder, model_id)
    assert line.startswith("--hub_model_id") and model_id in line and hub.requests == []


@pytest.mark.parametrize(
    ("changed", "says"), [({"ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9"), ({"HF_HUB_OFFLINE": True}, "OFFLINE")]
)
def test_a_hub_out_of_reach_is_named(hub, folder, changed, says):
    with constant(**changed):
        line = refusal(folder)
    assert all(part in line for part in ("--push_to_hub", "--push_only", says))


@pytest.mark.parametrize(("how", "says"), [("503", "503"), ("page", "JSON"), ("cut", "disconnected")])
@pytest.mark.parametrize("path", ["whoami", "create"])
def test_a_hub_that_fails_is_named(hub, folder, path, how, says):
    hub.fail(path, 1, how)
    line = refusal(folder)
    assert all(part in line for part in ("--push_to_hub", "--push_only", hub.url, says))


@pytest.mark.parametrize("private", [None, True])
@pytest.mark.parametrize("model_id", [None, "model", ID])
def test_a_repository_is_created_as_asked(hub, folder, model_id, private):
    repository = open_repository(model_id, folder, WRITE_TOKEN, private)
    assert (repository.repo_id, repository.url) == (ID, f"{hub.url}/{ID}")
    assert hub.repository(ID).private == bool(private) and WRITE_TOKEN not in repr(repository)


def test_the_token_is_that_of_the_environment_or_of_a_login(hub, folder, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(f"{WRITE_TOKEN}\n")
    assert open_repository(None, folder, None, None).token == WRITE_TOKEN
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert refusal(folder, token=None).startswith("--hub_token")
    assert open_repository(None, folder, f" {WRITE_TOKEN}\n", None).token == WRITE_TOKEN


def test_a_push_is_one_commit_of_the_checkpoint(hub, folder, repository):
    """The commit holds the bytes on disk, and no request names any other file."""
    before = on_disk(folder)
    url = push_checkpoint(repository, folder, "a push")
    (commit,) = hub.commits
    assert (commit.repo_id, commit.branch, commit.message) == (ID, "main", "a push")
    assert url == f"{hub.url}/{ID}/commit/{commit.oid}"
    assert hub.files(ID) == CHECKPOINT and ".gitattributes" in commit.files
    assert {name for name, file in commit.files.items() if file.large} == {name for name in CHECKPOINT if "000" in name}
    assert on_disk(folder) == before
    sent = b"\n".join(hub.bodies)
    assert b'"config.json"' in sent and b"checkpoint-10" not in sent
    assert not any(f'"{Path(name).name}"'.encode() in sent for name in NOT_PUSHED)


def test_of_places_on_this_machine_only_the_name_is_pushed(hub, folder, repository):
    """The folder keeps the full path, which the next run needs."""
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


def test_the_same_folder_twice_is_one_commit(hub, folder, repository):
    assert push_checkpoint(repository, folder, "first") == push_checkpoint(repository, folder, "second")
    (folder / "config.json").write_bytes(b'{"r": 1}')
    push_checkpoint(repository, folder, "third")
    assert [commit.message for commit in hub.commits] == ["first", "third"]
    assert hub.files(ID) == CHECKPOINT | {"config.json": b'{"r": 1}'}


def test_stale_weights_are_deleted(hub, folder):
    """Pickled arguments are deleted too; other files and folders stay."""
    kept = {"notes.txt": b"notes", "logo.png": b"logo", "onnx/model.bin": b"weights", "old/model.safetensors": b"w"}
    stale = ["model.safetensors", "model-00003-of-00003.safetensors", "pytorch_model.bin", "training_args.bin"]
    stale += ["pytorch_model.bin.index.json"]
    hub.add_repository(ID, kept | dict.fromkeys(stale, b"stale") | {"config.json": b"older"})
    for _ in range(2):
        push_checkpoint(open_repository(None, folder, WRITE_TOKEN, None), folder, "a push")
    assert hub.files(ID) == CHECKPOINT | kept and len(hub.commits) == 1


def test_a_folder_without_a_checkpoint_deletes_nothing(hub, folder, repository):
    push_checkpoint(repository, folder, "a push")
    with pytest.raises(BadInput, match=r"^--output_dir .*checkpoint-20"):
        push_checkpoint(repository, folder / "checkpoint-20", "a push")
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
    """Also if the answer to the commit is lost: there is never a second commit."""
    hub.fail(STEPS[step], 1, how)
    url = push_checkpoint(repository, folder, "a push")
    (commit,) = hub.commits
    assert url.endswith(commit.oid) and hub.files(ID) == CHECKPOINT and len(hub.failed) == 1


@pytest.mark.parametrize("step", ["head", "commit"])
def test_all_tries_are_used(hub, folder, repository, waits, step):
    hub.fail(STEPS[step], len(RETRY_WAITS), "503")
    push_checkpoint(repository, folder, "a push")
    assert tuple(waits) == RETRY_WAITS == tuple(sorted(waits))
    assert len(hub.commits) == 1 and hub.files(ID) == CHECKPOINT


@pytest.mark.parametrize("how", ["503", "cut"])
@pytest.mark.parametrize("step", ["head", "upload", "commit"])
def test_a_push_that_fails_at_last_changes_nothing_and_can_be_repeated(hub, folder, repository, waits, step, how):
    before = on_disk(folder)
    hub.fail(STEPS[step], 1000, how)
    line = push_failure(repository, folder)
    assert (how == "cut" or "503" in line) and tuple(waits) == RETRY_WAITS
    assert hub.commits == [] and hub.files(ID) == {} and on_disk(folder) == before
    hub.mend()
    push_checkpoint(repository, folder, "a push")
    assert len(hub.commits) == 1 and hub.files(ID) == CHECKPOINT


def test_a_hub_that_never_answers_is_given_up(hub, folder, repository, monkeypatch):
    """Also after huggingface_hub has replaced its connection."""
    monkeypatch.setattr(hub_upload, "ANSWER_SECONDS", 0.2)
    for request in ("head", "commit"):
        hub.fail(STEPS[request], 1000, "silent")
        assert "no answer within 0.2 seconds" in push_failure(repository, folder)
        hub.mend()
    hub.fail("GET /api/whoami-v2", 1000, "silent")
    assert "no answer within 0.2 seconds" in refusal(folder)
    assert hub.commits == []


@pytest.mark.parametrize("how", ["429", "500"])
def test_a_busy_hub_is_asked_again(hub, folder, repository, how):
    hub.fail(STEPS["modes"], 3, how)
    push_checkpoint(repository, folder, "a push")
    assert len(hub.commits) == 1 and len(hub.failed) == 3


def test_a_failure_that_does_not_pass_is_said_at_once(hub, folder, repository, waits):
    for repo_id, token, says in (
        (ID, READ_TOKEN, "403 Forbidden"),
        (ID, "hf_no", "401 Unauthorized"),
        (f"{USER}/gone", WRITE_TOKEN, "404 Not Found"),
    ):
        assert says in push_failure(HubRepository(repo_id, token, repository.url), folder)
    (folder / "README.md").write_bytes(b"---\nlicense: [\n---\n")
    assert "Invalid metadata in README.md" in push_failure(repository, folder)
    with constant(HF_HUB_OFFLINE=True):
        assert "HF_HUB_OFFLINE" in push_failure(repository, folder)
    assert waits == [] and hub.commits == []


def test_a_failure_of_hf_xet_is_survived(hub, folder, repository, waits, monkeypatch):
    """hf_xet raises ConnectionError; its uploads cannot go through the loopback Hub."""
    failures = [ConnectionError("Network error: Request middleware error")]

    class Xet(HfApi):
        def preupload_lfs_files(self, *arguments: Any, **keywords: Any) -> None:
            if failures:
                raise failures.pop()
            super().preupload_lfs_files(*arguments, **keywords)

    monkeypatch.setattr(hub_upload, "HfApi", Xet)
    push_checkpoint(repository, folder, "a push")
    assert waits == list(RETRY_WAITS[:1]) and hub.files(ID) == CHECKPOINT


def test_a_commit_that_came_in_between_is_built_upon(hub, folder, repository, waits, monkeypatch):
    """For example the commit of an earlier try, which the Hub finished after a gateway timed out."""

    class Interrupted(HfApi):
        def model_info(self, *arguments: Any, **keywords: Any) -> Any:
            head = super().model_info(*arguments, **keywords)
            if not hub.commits:
                self.upload_file(path_or_fileobj=b"w", path_in_repo="model.safetensors", repo_id=ID)
            return head

    monkeypatch.setattr(hub_upload, "HfApi", Interrupted)
    push_checkpoint(repository, folder, "a push")
    assert len(hub.commits) == 2 and waits == list(RETRY_WAITS[:1]) and hub.files(ID) == CHECKPOINT


def test_a_branch_leaves_main_as_it_is(hub, folder, repository):
    push_checkpoint(repository, folder, "to main")
    hub.fail("POST .*/branch/", 1, "answer_lost")
    for r in (1, 1, 2):
        (folder / "config.json").write_bytes(b'{"r": %d}' % r)
        push_checkpoint(repository, folder, f"r = {r}", revision="tries/1")
    assert [(commit.branch, commit.message) for commit in hub.commits] == [
        ("main", "to main"), ("tries/1", "r = 1"), ("tries/1", "r = 2"),
    ]  # fmt: skip
    assert hub.files(ID) == CHECKPOINT and hub.files(ID, "tries/1") == CHECKPOINT | {"config.json": b'{"r": 2}'}
