# SPDX-License-Identifier: Apache-2.0
"""Push a checkpoint that is complete on disk to the Hugging Face Hub: one commit, and repeatable.

`upload_folder` commits in several parts where hf_xet is installed, and repeats a commit whose answer was lost.
`create_commit` makes one commit, never sends it twice, and makes none if nothing has changed.
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
from typing import ClassVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.constants import HF_HUB_DISABLE_XET, HF_XET_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from experiments.errors import BadInput, Stopped, naming
from experiments.files import check_writable
from experiments.publishing.card import set_card_repository
from experiments.publishing.tables import without_local_paths

BRANCH_PATTERN = r"(?!.*\.\.)\w[\w./-]*(?<![./])"
# Seconds before each further try of a push.
RETRY_WAITS = (2.0, 5.0, 15.0, 45.0)
# Files that are needed to resume training only, half-written files, and training_args.bin, which holds the token.
NOT_PUSHED = (
    ".*", "*.partial", "training_args.bin", "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scheduler*.bin",
    "scaler*.pt", "rng_state*", "random_states_*",
)  # fmt: skip
# Weights in a repository that would be loaded beside, or instead of, those that are pushed.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
# Files with paths of this machine, which are pushed without them.
FILES_WITH_PATHS = ("arguments.json", "sweep_results.json", "trainer_state.json")

_log = logging.getLogger(__name__)


class PushFailed(Stopped):
    """A push that failed. The message says in one line why, where everything is, and how to push again."""


@dataclass
class HubArguments:
    """Pushing to the Hub, at the end of a run: one commit for each checkpoint, which is on disk by then."""

    _argument_group_name: ClassVar[str] = "pushing to the Hub"

    push_only: bool = field(
        default=False,
        metadata={"help": "Push what an earlier run left in --output_dir, and do nothing else."},
    )


@dataclass(frozen=True)
class HubRepository:
    """An existing model repository, and a token to write to it."""

    repo_id: str
    token: str = field(repr=False)
    url: str


def open_to_push(training: TrainingArguments, token: str | None) -> HubRepository:
    """Check that the repository to push to can be written to, before any work is done; create it if it does not exist.

    Args:
        training: `hub_model_id`, by default the name of `output_dir`, `hub_token`, `hub_private_repo`, by default as
            its owner has set, `hub_revision`, `hub_strategy`.
        token: used if there is no `hub_token`; by default that of HF_TOKEN or of `hf auth login`.

    Raises:
        BadInput: for no token, one that cannot write, an invalid name, or a Hub that cannot be reached.
    """
    _check_arguments(training)
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    with naming("--hub_model_id", HFValidationError):
        validate_repo_id(name)
    token = (training.hub_token or token or "").strip() or get_token()
    if not token:
        raise BadInput("--push_to_hub: found no token; use `hf auth login`, HF_TOKEN or --hub_token")
    if not all("!" <= character <= "~" for character in token):
        raise BadInput("--hub_token: contains characters that no token has")
    api = HfApi(token=token)
    later = "run without --push_to_hub and push later with --push_only"
    try:
        user = api.whoami()
        # create_repo accepts a read token if the repository exists; only the push would fail.
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise BadInput("--hub_token: can only read; use a token with write permission")
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


def _check_arguments(training: TrainingArguments) -> None:
    """Check the arguments that need no Hub, and that xet can write to its cache."""
    if training.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
        raise BadInput(
            f"--hub_strategy {training.hub_strategy.value}: use 'end'; checkpoints to resume from stay on disk"
        )
    revision = training.hub_revision
    if revision is not None and not re.fullmatch(BRANCH_PATTERN, revision):
        raise BadInput(f"--hub_revision {revision}: a branch is named by letters, digits, '.', '_', '-' and '/'")
    if not HF_HUB_DISABLE_XET:  # xet cuts uploads into pieces in its cache
        check_writable(f"HF_XET_CACHE={HF_XET_CACHE}", Path(HF_XET_CACHE))


def push_checkpoint(repository: HubRepository, folder: Path, message: str, revision: str = "main") -> str:
    """Make a repository hold the checkpoint in a folder, by one commit, or by none if it holds it already.

    The card is changed to load the checkpoint from the repository, and paths of this machine are left out. Weights in
    the repository that are not in the folder are deleted. Failures that may pass are tried again after `RETRY_WAITS`.

    Args:
        repository: from `open_to_push`.
        folder: with the checkpoint; its subfolders and the files of `NOT_PUSHED` are not pushed.
        message: of the commit.
        revision: branch to push to, created if it does not exist.

    Returns:
        The commit's URL.

    Raises:
        PushFailed: the folder is unchanged, and pushing again does what is left to do.
        BadInput: if the folder holds no checkpoint, or one of `FILES_WITH_PATHS` is not JSON.
    """
    # Otherwise a wrong folder would delete the weights of the repository.
    if not (folder / "config.json").is_file():
        raise BadInput(f"--output_dir {folder}: holds no config.json, so no checkpoint to push")
    set_card_repository(folder, repository.repo_id)
    waits = iter(RETRY_WAITS)
    while True:
        try:
            return _commit(repository, folder, message, revision)
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # of huggingface_hub, httpx and hf_xet
            wait = next(waits, None)
            if wait is None or not _is_temporary(error):
                raise PushFailed(
                    f"pushing to {repository.url} failed ({_reason(error)}). Everything is in {folder}: "
                    "the same command with --push_only repeats only the push."
                ) from error
            _log.warning("Pushing failed (%s), trying again in %g seconds.", _reason(error), wait)
            time.sleep(wait)


def _commit(repository: HubRepository, folder: Path, message: str, revision: str) -> str:
    """Try once to commit the difference between the folder and what the repository holds now."""
    api = HfApi(token=repository.token)
    if revision != "main":
        api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repository.repo_id, revision=revision)
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not _matches(path, NOT_PUSHED)}
    # Folders of the repository are left alone, and so "*", which matches "/" too, must not see them.
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
        # The Hub refuses (412) if another commit came first, such as that of a try whose answer was lost.
        parent_commit=head.sha,
    )
    return commit.commit_url


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _content(path: Path) -> Path | bytes:
    """Return the content to push of a file: the file, or bytes without the paths of this machine."""
    if path.name not in FILES_WITH_PATHS:
        return path
    with naming(f"--output_dir {path.parent}: {path.name}", ValueError):
        written = json.loads(path.read_text(encoding="utf-8"))
    pushed = without_local_paths(written)
    return path if pushed == written else (json.dumps(pushed, indent=2) + "\n").encode()


def _is_temporary(error: BaseException) -> bool:
    """Return whether a failure may be gone at the next try."""
    error = _root_failure(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 412, 429) or error.response.status_code >= 500
    # hf_xet raises ConnectionError; the HTML page of a failing gateway is a JSONDecodeError.
    passing = (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)
    return isinstance(error, passing) and not isinstance(error, OfflineModeIsEnabled)


def _root_failure(error: BaseException) -> BaseException:
    """Return the failure behind the RuntimeError that the upload of a file raises."""
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
        text = "the answer is not the Hub's JSON"
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
