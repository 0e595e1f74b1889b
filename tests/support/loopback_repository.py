# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hub in `tests/support/loopback_hub.py`: what they hold, and what is answered of them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

USER = "someone"
WRITE_TOKEN, READ_TOKEN, FINE_TOKEN = "hf_loopbackwrite", "hf_loopbackread", "hf_loopbackfine"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read", FINE_TOKEN: "fineGrained"}
LARGE_FILES = (".safetensors", ".bin", ".pt", ".h5", ".parquet")


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit, and whether it came as a large one."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The SHA-256 of a large file, git's name of another."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit, with all files that the branch has after it."""

    repo_id: str
    branch: str
    message: str
    oid: str
    files: dict[str, StoredFile] = field(repr=False)


@dataclass
class Repository:
    """A model or dataset repository."""

    id: str
    kind: str
    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    by_oid: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit of a branch or of an oid."""
        commit = self.branches.get(revision) or self.by_oid.get(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


@dataclass
class Request:
    """A request, its path still quoted."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """An answer; `body` is JSON unless it is bytes."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """An answer that is an error, with the code that clients look at."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


def role_of(request: Request) -> str | None:
    """What the token of a request may do; None without one."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if token and token not in ROLES:
        raise Refused(401, None, "Invalid credentials in Authorization header")
    return ROLES.get(token)


def check_write(repository: Repository, role: str | None) -> None:
    if role is None:
        raise Refused(401, None, "Invalid username or password.")
    if role == "read":
        raise Refused(403, None, "You must use a write token to do this.")
    if not repository.id.startswith(f"{USER}/"):
        raise Refused(403, None, f"You don't have the rights to write to {repository.id}")


def check_card(text: str) -> Answer:
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        yaml.safe_load(match[1] if match else "")
    except yaml.YAMLError as error:
        return Answer(400, dict(errors=[dict(message=str(error))], warnings=[]))
    return Answer(200, dict(errors=[], warnings=[]))


def describe(repository: Repository, revision: str) -> Answer:
    head = repository.at(revision)
    info = dict(
        _id=head.oid[:24],
        id=repository.id,
        modelId=repository.id,
        sha=head.oid,
        private=repository.private,
        gated="manual" if repository.gated else False,
        siblings=[dict(rfilename=name) for name in sorted(head.files)],
        tags=[],
    )
    return Answer(200, info)


def describe_file(name: str, file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = dict(type="file", path=name, size=len(file.data), oid=file.oid)
    if file.large:
        entry["lfs"] = dict(oid=file.oid, size=len(file.data), pointerSize=134)
    return entry


def list_tree(repository: Repository, revision: str, path: str, query: dict[str, list[str]]) -> Answer:
    files = repository.at(revision).files
    below = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
    if path and not below:
        raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
    start = len(path) + 1 if path else 0
    entries = {}
    for name, file in sorted(below.items()):
        for end in [at.start() for at in re.finditer("/", name[start:])]:
            folder = name[: start + end]
            entries[folder] = dict(type="directory", path=folder, oid="0" * 40, size=0)
        entries[name] = describe_file(name, file)
    if query.get("recursive", ["false"])[0].lower() != "true":
        entries = {name: entry for name, entry in entries.items() if "/" not in name[start:]}
    return Answer(200, list(entries.values()))


def upload_modes(repository: Repository, revision: str, request: Request) -> Answer:
    head = repository.at(revision)
    files = [
        dict(
            path=file["path"],
            uploadMode="lfs" if file["path"].endswith(LARGE_FILES) else "regular",
            shouldIgnore=False,
            **({"oid": head.files[file["path"]].oid} if file["path"] in head.files else {}),
        )
        for file in request.json["files"]
    ]
    return Answer(200, dict(commitOid=head.oid, files=files))


def serve_file(repository: Repository, role: str | None, revision: str, path: str) -> Answer:
    if repository.gated and not (role is not None and repository.id.startswith(f"{USER}/")):
        message = f"Access to {repository.kind} {repository.id} is restricted."
        raise Refused(401 if role is None else 403, "GatedRepo", message)
    commit = repository.at(revision)
    if path not in commit.files:
        refused = Refused(404, "EntryNotFound", "Entry not found")
        refused.answer.headers["X-Repo-Commit"] = commit.oid
        raise refused
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    if file.large:
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
    return Answer(200, file.data, headers)
