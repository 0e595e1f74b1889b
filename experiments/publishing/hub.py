# SPDX-License-Identifier: Apache-2.0
"""Push a checkpoint from its folder to the Hugging Face Hub in one commit; pushing again is safe.

This uses `create_commit`, which makes one commit, never sends it twice, and makes none if nothing has changed.
`upload_folder` would make several commits where hf_xet is installed, and repeat a commit whose answer was lost.
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
from typing import Any, ClassVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.constants import HF_HUB_DISABLE_XET, HF_XET_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import set_client_factory, validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from experiments.errors import BadInput, Stopped, naming
from experiments.files import check_writable, read_json
from experiments.publishing.card import set_card_repository
from experiments.publishing.tables import without_local_paths
from merging_tome_perceiver import EXPERIMENT_ONLY_METHODS

BRANCH_PATTERN = r"(?!.*\.\.)\w[\w./-]*(?<![./])"
# Seconds to wait before each retry of a push, and after which no retry begins.
RETRY_WAITS = (2.0, 5.0, 15.0, 45.0)
RETRY_SECONDS = 300.0
# Seconds without an answer after which a request fails; huggingface_hub would wait for ever. Commits take longest.
ANSWER_SECONDS = 60.0
# Not pushed: hidden and half-written files, training_args.bin, which is a pickle, and files for resuming training.
NOT_PUSHED = (
    ".*", "*.partial", "training_args.bin", "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scheduler*.bin",
    "scaler*.pt", "rng_state*", "random_states_*",
)  # fmt: skip
# Weights that are deleted in the repository if the folder lacks them: they could be loaded instead of the new ones.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
# Files in which local paths are shortened before a push.
FILES_WITH_PATHS = ("arguments.json", "sweep_results.json", "trainer_state.json")

_log = logging.getLogger(__name__)


class PushFailed(Stopped):
    """A failed push; the message says why, where the files are and how to push again."""


@dataclass
class HubArguments:
    """Pushes at the end of a run, once everything is on disk: one commit for each checkpoint."""

    _argument_group_name: ClassVar[str] = "pushing to the Hub"

    push_only: bool = field(
        default=False,
        metadata={"help": "Only push the checkpoints that an earlier run saved in --output_dir."},
    )
    token: str | None = field(default=None, init=False, repr=False)
    """Value of `--hub_token`, which `RunArguments.parse` moves here from the arguments that Trainer saves."""


@dataclass(frozen=True)
class HubRepository:
    """An existing model repository and a token with write access."""

    repo_id: str
    token: str = field(repr=False)
    url: str


def open_to_push(training: TrainingArguments, token: str | None) -> HubRepository:
    """Check, before any work is done, that the repository is writable; create it if it does not exist.

    Args:
        training: arguments `hub_model_id` (default: the name of `output_dir`), `hub_token`, `hub_private_repo`
            (default: the owner's setting), `hub_revision` and `hub_strategy`.
        token: used without `hub_token`; by default from HF_TOKEN or `hf auth login`.

    Raises:
        BadInput: for a missing or read-only token, an invalid name, or a Hub that cannot be reached.
    """
    _check_arguments(training)
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    with naming("--hub_model_id", HFValidationError):
        validate_repo_id(name)
    token = (training.hub_token or token or "").strip() or get_token()
    if not token:
        raise BadInput("--push_to_hub: found no token; use `hf auth login`, HF_TOKEN or --hub_token")
    if not all("!" <= character <= "~" for character in token):
        raise BadInput("--hub_token: contains spaces or characters outside printable ASCII; copy the token again")
    api = _open_api(token)
    later = "run without --push_to_hub and push later with --push_only"
    try:
        user = api.whoami()
        # With a read-only token, create_repo succeeds on an existing repository and only the push would fail.
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise BadInput("--hub_token: is read-only; use a token with write permission")
        url = api.create_repo(
            name if "/" in name else f"{user['name']}/{name}", private=training.hub_private_repo, exist_ok=True
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise BadInput(f"--hub_token: {api.endpoint} refuses it for {name} ({_reason(error)})") from error
        if error.response.status_code in (400, 404, 409, 422):
            raise BadInput(f"--hub_model_id {name}: {_reason(error)}") from error
        raise BadInput(f"--push_to_hub: {api.endpoint} fails ({_reason(error)}); {later}") from error
    except (HTTPError, OSError, ValueError) as error:
        raise BadInput(f"--push_to_hub: cannot reach {api.endpoint} ({_reason(error)}); {later}") from error
    return HubRepository(url.repo_id, token, str(url))


def _open_api(token: str) -> HfApi:
    """Return the API of the Hub; its requests fail after `ANSWER_SECONDS` without an answer."""

    def create_client() -> Any:
        client = default_client_factory()
        client.timeout = ANSWER_SECONDS
        return client

    # A session would lose its timeout when huggingface_hub replaces it after a failed connection.
    set_client_factory(create_client)
    return HfApi(token=token)


def _check_arguments(training: TrainingArguments) -> None:
    """Check the arguments without contacting the Hub, and that the cache of hf_xet is writable."""
    if training.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
        raise BadInput(
            f"--hub_strategy {training.hub_strategy.value}: use 'end'; checkpoints for resuming are not pushed"
        )
    revision = training.hub_revision
    if revision is not None and not re.fullmatch(BRANCH_PATTERN, revision):
        raise BadInput(f"--hub_revision {revision}: must consist of letters, digits, '.', '_', '-' and '/'")
    if not HF_HUB_DISABLE_XET:  # hf_xet splits uploads into chunks in its cache
        check_writable(f"HF_XET_CACHE={HF_XET_CACHE}", Path(HF_XET_CACHE))


def push_checkpoint(repository: HubRepository, folder: Path, message: str, revision: str = "main") -> str:
    """Push the checkpoint in a folder in one commit, or in none if the repository already holds it.

    The example code of the folder's card is changed to load from the repository, and local paths are shortened in what
    is pushed. Weights in the repository that the folder lacks are deleted. Temporary failures are retried after
    `RETRY_WAITS`, within `RETRY_SECONDS`.

    Args:
        repository: repository from `open_to_push`.
        folder: folder of the checkpoint; its subfolders and the files of `NOT_PUSHED` are not pushed.
        message: commit message.
        revision: branch to push to, created if it does not exist.

    Returns:
        The commit's URL.

    Raises:
        PushFailed: if the push fails; pushing again is safe.
        BadInput: if the folder holds no checkpoint, one that merges by a method of experiments, or one of
            `FILES_WITH_PATHS` is not JSON.
    """
    # Pushing a wrong folder, one without weights, would delete the weights in the repository.
    if not (folder / "config.json").is_file():
        raise BadInput(f"--output_dir {folder}: holds no config.json; use a folder with a checkpoint")
    _check_method(folder)
    set_card_repository(folder, repository.repo_id)
    waits, started = iter(RETRY_WAITS), time.monotonic()
    while True:
        try:
            return _commit(repository, folder, message, revision)
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # raised by huggingface_hub, httpx and hf_xet
            wait = next(waits, None)
            if wait is None or not _is_temporary(error) or time.monotonic() - started > RETRY_SECONDS:
                raise PushFailed(
                    f"pushing to {repository.url} failed ({_reason(error)}). All files are in {folder}; "
                    "use the same command with --push_only to push them again."
                ) from error
            _log.warning("Pushing failed (%s); retrying in %g seconds.", _reason(error), wait)
            time.sleep(wait)


def _check_method(folder: Path) -> None:
    """Refuse a checkpoint that no one could load from the Hub, since its merging method is not in the model files."""
    config = read_json(folder / "config.json")
    method = config.get("merge_method") if isinstance(config, dict) else None
    if method in EXPERIMENT_ONLY_METHODS:
        raise BadInput(
            f"--output_dir {folder}: merge_method={method} is for experiments only; its checkpoint loads in this "
            "repository only, so it is not pushed"
        )


def _commit(repository: HubRepository, folder: Path, message: str, revision: str) -> str:
    """Commit the difference between the folder and the repository, without retries."""
    api = _open_api(repository.token)
    if revision != "main":
        api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
    # Without its own timeout, this request would have none.
    head = api.model_info(repository.repo_id, revision=revision, timeout=ANSWER_SECONDS)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not _matches(path, NOT_PUSHED)}
    # Only top-level files are compared: "*" would also match "/", and subfolders stay as they are.
    present = [file.rfilename for file in head.siblings or [] if "/" not in file.rfilename]
    stale = [name for name in present if name not in files and _matches(Path(name), WEIGHT_FILES)]
    commit = api.create_commit(
        repository.repo_id,
        [
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
            *(CommitOperationAdd(name, _content(path)) for name, path in files.items()),
        ],
        commit_message=message,
        revision=revision,
        # The Hub refuses the commit (412) if another came first, such as an earlier try whose answer was lost.
        parent_commit=head.sha,
    )
    return commit.commit_url


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _content(path: Path) -> Path | bytes:
    """Return what to push for a file: its path, or its content with local paths shortened."""
    if path.name not in FILES_WITH_PATHS:
        return path
    with naming(f"--output_dir {path.parent}: {path.name}", ValueError):
        written = json.loads(path.read_text(encoding="utf-8"))
    pushed = without_local_paths(written)
    return path if pushed == written else (json.dumps(pushed, indent=2) + "\n").encode()


def _is_temporary(error: BaseException) -> bool:
    """Return whether a retry may succeed."""
    error = _root_failure(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 429) or error.response.status_code >= 500
    # hf_xet raises ConnectionError; the HTML page of a failing gateway causes a JSONDecodeError.
    temporary = (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return isinstance(error, temporary) and not isinstance(error, OfflineModeIsEnabled)


def _root_failure(error: BaseException) -> BaseException:
    """Return the cause of the RuntimeError in which an upload wraps its failure."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Describe a failure in one line, in the Hub's own words if there are any."""
    error = _root_failure(error)
    text = str(error)
    if isinstance(error, HfHubHTTPError):
        text = f"{error.response.status_code} {error.response.reason_phrase}"
        if error.server_message:
            text += f": {error.server_message}"
    elif isinstance(error, json.JSONDecodeError):
        text = "the Hub did not answer in JSON"
    elif "timed out" in text:
        text = f"no answer within {ANSWER_SECONDS:g} seconds"
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
