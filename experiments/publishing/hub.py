# SPDX-License-Identifier: Apache-2.0
"""Pushing a checkpoint that is complete on disk to the Hugging Face Hub: one commit, and repeatable.

`upload_folder` will not do: with hf_xet installed it may commit in several parts, and sends a commit again whose answer
was lost. `create_commit` makes one commit, never sends it twice by itself, and makes none where nothing has changed.
"""

from __future__ import annotations

import json
import logging
import re
import textwrap
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from experiments.errors import BadInput, Stopped, naming
from experiments.publishing.card import address_card

RETRY_WAITS = (2.0, 5.0, 15.0, 45.0)
"""Seconds before each further try of a push."""

STAYS_AT_HOME = (
    ".*",
    "*.partial",
    # The arguments, pickled, and among them the token.
    "training_args.bin",
    "optimizer*.pt",
    "optimizer*.bin",
    "scheduler*.pt",
    "scheduler*.bin",
    "scaler*.pt",
    "rng_state*",
    "random_states_*",
)
"""Files that are no part of a checkpoint to use, only of one to go on training."""

STALE = ("*.safetensors", "*.bin", "*.index.json")
"""Files in a repository that would be loaded beside, or instead of, the weights that are pushed."""

WITH_PLACES = ("arguments.json", "sweep_results.json", "trainer_state.json")
"""Files that say where on this machine something was; they are pushed without, see `placeless`."""

_FAILURES = (HTTPError, OSError, RuntimeError, ValueError)
"""What huggingface_hub and hf_xet raise. `HTTPError` is that of the client (httpx2), also of no answer at all."""

_log = logging.getLogger(__name__)


class PushFailed(Stopped):
    """A push that failed. The message says in one line why, where everything is, and how to push again."""


@dataclass(frozen=True)
class HubRepository:
    """A model repository that is there, and a token to write to it."""

    repo_id: str
    token: str = field(repr=False)
    url: str


def open_repository(model_id: str | None, output_dir: Path, token: str | None, private: bool | None) -> HubRepository:
    """Make sure, before hours of training, that there will be where to push to; create the repository if need be.

    Args:
        model_id: of the repository, with or without an owner; by default the name of `output_dir`.
        output_dir: what is going to be pushed.
        token: by default that of HF_TOKEN or of `hf auth login`.
        private: whether a repository that has to be created is private; by default what its owner has set.

    Raises:
        BadInput: no token, one that may not write, an impossible name, or a Hub that cannot be reached.
    """
    name = output_dir.resolve().name if model_id is None else model_id
    with naming("--hub_model_id", HFValidationError):
        validate_repo_id(name)
    token = token.strip() if token else get_token()
    if not token:
        raise BadInput(
            "--push_to_hub: there is no token; log in with `hf auth login`, or set HF_TOKEN, or give --hub_token"
        )
    if not all("!" <= character <= "~" for character in token):
        raise BadInput("--hub_token: this is no token, it has characters in it that no token has")
    api = HfApi(token=token)
    later = "without --push_to_hub everything stays on disk, for --push_only to push later"
    try:
        user = api.whoami()
        # create_repo takes a read token where the repository exists already, and only the push would fail.
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise BadInput("--hub_token: this token may only read; a push takes one with write permission")
        owned = name if "/" in name else f"{user['name']}/{name}"
        url = api.create_repo(owned, private=private, exist_ok=True)
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, _reason(error)
        if status == 401:
            raise BadInput(f"--hub_token: {api.endpoint} does not take this token ({reason})") from error
        if status == 403:
            raise BadInput(f"--hub_token: this token may not write to {name} ({reason})") from error
        if status in (400, 404, 409, 422):
            raise BadInput(f"--hub_model_id {name}: {reason}") from error
        raise BadInput(f"--push_to_hub: {api.endpoint} fails ({reason}); {later}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise BadInput(f"--push_to_hub: cannot reach {api.endpoint} ({_reason(error)}); {later}") from error
    return HubRepository(url.repo_id, token, str(url))


def push_checkpoint(repository: HubRepository, folder: Path, message: str, revision: str = "main") -> str:
    """Make the repository hold the checkpoint in a folder, in one commit, or in none where it holds it already.

    Its card is made to show how to load it from there, and of what was on this machine only the name goes. Weights in
    the repository that are not in the folder go. What passes by itself is tried again, see `RETRY_WAITS`.

    Args:
        repository: from `open_repository`.
        folder: with the checkpoint; only files right in it are pushed, and none that `STAYS_AT_HOME`.
        message: of the commit.
        revision: branch to push to; created if need be.

    Returns:
        The commit's URL.

    Raises:
        PushFailed: the folder has all that it had, and pushing again does what is left to do.
        BadInput: there is no checkpoint in the folder, or one of `WITH_PLACES` is no JSON.
    """
    # Or else a wrong folder would take the weights out of the repository.
    if not (folder / "config.json").is_file():
        raise BadInput(f"--output_dir {folder}: holds no config.json, so no checkpoint to push")
    address_card(folder, repository.repo_id)
    waits = iter(RETRY_WAITS)
    while True:
        try:
            return _commit(repository, folder, message, revision)
        except _FAILURES as error:
            wait = next(waits, None)
            if wait is None or not _passes(error):
                raise PushFailed(
                    f"pushing to {repository.url} failed ({_reason(error)}). Everything is in {folder}: "
                    "the same command with --push_only repeats only the push."
                ) from error
            _log.warning("Pushing failed (%s), trying again in %g seconds.", _reason(error), wait)
            time.sleep(wait)


def files_to_push(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint, by name: those right in the folder that do not stay at home."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not any(fnmatchcase(path.name, pattern) for pattern in STAYS_AT_HOME)
    }


def content_to_push(path: Path) -> Path | bytes:
    """What of a file is pushed: itself, or with names in place of where things were on this machine.

    Raises:
        BadInput: for a file that should be JSON and is not.
    """
    if path.name not in WITH_PLACES:
        return path
    with naming(f"--output_dir {path.parent}: {path.name}", ValueError):
        written = json.loads(path.read_text(encoding="utf-8"))
    pushed = placeless(written)
    return path if pushed == written else (json.dumps(pushed, indent=2) + "\n").encode()


def placeless(value: Any) -> Any:
    """A JSON value in which whatever is a place on this machine is its last name; Hub ids stay.

    A relative path of two parts that is not there is taken for a Hub id.
    """
    if isinstance(value, dict):
        return {name: placeless(each) for name, each in value.items()}
    if isinstance(value, list):
        return [placeless(each) for each in value]
    if not isinstance(value, str) or "\n" in value:
        return value
    if re.match(r"--\w+ ", value):  # an argument with its value
        name, _, given = value.partition(" ")
        return f"{name} {placeless(given)}"
    parts = value.split("/")
    here = parts[0] in ("", ".", "..", "~") or len(parts) > 2 or "/" in value and Path(value).exists()
    if not value or not here or "://" in value:
        return value
    named = [part for part in parts if part not in ("", ".", "..", "~")]
    return named[-1] if named else Path(value).expanduser().resolve().name


def _commit(repository: HubRepository, folder: Path, message: str, revision: str) -> str:
    """One try. What it does follows from what the repository holds by now, so that it may come after any other."""
    api = HfApi(token=repository.token)
    if revision != "main":
        api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repository.repo_id, revision=revision)
    files = files_to_push(folder)
    stale = [
        file.rfilename
        for file in head.siblings or []
        # "*" stands for "/" too, and a folder in the repository is none of ours.
        if "/" not in file.rfilename
        and file.rfilename not in files
        and any(fnmatchcase(file.rfilename, pattern) for pattern in STALE)
    ]
    commit = api.create_commit(
        repository.repo_id,
        [
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
            *(CommitOperationAdd(name, content_to_push(path)) for name, path in files.items()),
        ],
        commit_message=message,
        revision=revision,
        # The Hub refuses (412) where another commit came first, such as that of a try whose answer was lost.
        parent_commit=head.sha,
    )
    return commit.commit_url


def _passes(error: BaseException) -> bool:
    """Whether it may be gone at the next try."""
    error = _origin(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 429) or error.response.status_code >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # hf_xet raises ConnectionError. A failing gateway's page, where JSON was due, is a JSONDecodeError.
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError))


def _origin(error: BaseException) -> BaseException:
    """The upload of a file hides what went wrong behind a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """In one line; in the Hub's own words where there are any."""
    error = _origin(error)
    text = str(error)
    if isinstance(error, HfHubHTTPError):
        text = f"{error.response.status_code} {error.response.reason_phrase}"
        if error.server_message:
            text += f": {error.server_message}"
    elif isinstance(error, json.JSONDecodeError):
        text = "what came back is not the Hub's JSON"
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
