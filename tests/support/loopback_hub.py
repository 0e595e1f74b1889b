# SPDX-License-Identifier: Apache-2.0
"""In-memory Hugging Face Hub on 127.0.0.1, for tests with the real clients: huggingface_hub and transformers.

It has one user with three tokens: one that may write, one that may only read, and a fine-grained one that may write to
existing repositories only. Errors have the status and the `X-Error-Code` of the real Hub. Two things are simpler here:
large files come from this server and not from separate storage, and there is no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import yaml

USER = "someone"
WRITE_TOKEN, READ_TOKEN, FINE_TOKEN = "hf_loopbackwrite", "hf_loopbackread", "hf_loopbackfine"
ROLES = {WRITE_TOKEN: "write", READ_TOKEN: "read", FINE_TOKEN: "fineGrained"}
LARGE_FILES = (".safetensors", ".bin", ".pt", ".h5")
ID = r"(?P<id>[^/]+/[^/]+?)"
API_PATH = rf"/api/models/{ID}(/(?P<action>revision|tree|preupload|commit|branch)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
FILE_PATH = rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
LARGE_FILE_PATH = rf"/{ID}\.git/info/lfs/objects/(?P<action>batch|verify)"


@dataclass(frozen=True)
class StoredFile:
    """Content of a file in a commit, and whether it was uploaded as a large file."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's blob hash of any other."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit, with all files of its branch."""

    repo_id: str
    branch: str
    message: str
    oid: str
    files: dict[str, StoredFile] = field(repr=False)


@dataclass
class Repository:
    """A model repository."""

    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    by_oid: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """Return the newest commit of a branch, or the commit with an oid."""
        commit = self.branches.get(revision) or self.by_oid.get(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


@dataclass
class Answer:
    """HTTP answer; `body` is sent as JSON unless it is bytes."""

    status: int
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """Error answer, with the `X-Error-Code` that clients read."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


@dataclass
class Fault:
    """Order to fail requests: which ones, how many more, and how they fail."""

    pattern: str
    times: int
    how: str


class LoopbackHub:
    """The Hub server and its repositories; `with LoopbackHub() as hub` runs it.

    Attributes:
        url: its endpoint.
        requests: "METHOD /path" of all requests.
        failed: requests that failed because of `fail`.
        bodies: bodies of all requests.
        commits: commits made by clients, in order.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.failed: list[str] = []
        self.bodies: list[bytes] = []
        self.commits: list[Commit] = []
        self._repositories: dict[str, Repository] = {}
        self._arrived: dict[str, bytes] = {}
        self._large: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._number = 0
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repository(self, repo_id: str, files: dict[str, bytes], **settings: bool) -> Repository:
        """Create a repository with one commit."""
        repository = self._repositories[repo_id] = Repository(repo_id, **settings)
        stored = {name: StoredFile(data, name.endswith(LARGE_FILES)) for name, data in files.items()}
        self._store(repository, "main", "initial commit", stored)
        return repository

    def repository(self, repo_id: str) -> Repository:
        return self._repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository, without `.gitattributes`, which every new repository has."""
        files = self.repository(repo_id).at(revision).files
        return {name: file.data for name, file in files.items() if name != ".gitattributes"}

    def fail(self, pattern: str, times: int, how: str) -> None:
        """Make the next `times` requests fail, counting those whose "METHOD /path" matches a regular expression.

        Args:
            pattern: the expression; the path is percent-encoded as it was sent, without its query.
            times: number of requests to fail.
            how: "429", "500", "503": this status. "silent": no answer until the client leaves. "page": an HTML page
                with status 200, as from a captive portal. "cut": the connection ends midway through the request.
                "answer_lost": the request is carried out, and the connection ends without an answer.
        """
        assert how in ("429", "500", "503", "silent", "page", "cut", "answer_lost"), how
        self._faults.append(Fault(pattern, times, how))

    def mend(self) -> None:
        """Stop failing requests."""
        self._faults.clear()

    def environment(self, home: Path) -> dict[str, str]:
        """Return environment variables for a process that uses this Hub."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHON")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        return kept | dict(
            HF_ENDPOINT=self.url,
            HF_HOME=str(home),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
            OMP_NUM_THREADS="1",
        )

    @contextmanager
    def in_this_process(self, home: Path) -> Iterator[None]:
        """Use this Hub for `HfApi` and uploads in this process; transformers keeps the endpoint of its import."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in dict(
                ENDPOINT=self.url,
                HF_HUB_OFFLINE=False,
                HF_HUB_DISABLE_XET=True,
                HF_TOKEN_PATH=str(home / "token"),
                HF_STORED_TOKENS_PATH=str(home / "stored_tokens"),
            ).items():
                patch.setattr(huggingface_hub.constants, name, value)
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
                patch.delenv(name, raising=False)
            patch.setenv("NO_PROXY", "127.0.0.1")
            # The client keeps its connections and the environment of its creation.
            huggingface_hub.utils.close_session()
            yield
            huggingface_hub.utils.close_session()

    def fault(self, request: str) -> str | None:
        """Return how this request must fail, if at all, and count it."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    self.failed.append(request)
                    return fault.how
        return None

    def answer(self, method: str, path: str, token: str, body: bytes) -> Answer:
        """Carry out a request."""
        with self._lock:
            self.bodies.append(body)
            try:
                if match := re.fullmatch(r"/large/([0-9a-f]{64})/(\d+)", path):
                    return self._take_large_file(body, match[1], int(match[2]))
                if token and token not in ROLES:
                    raise Refused(401, None, "Invalid credentials in Authorization header")
                return self._answer(method, path, ROLES.get(token), body)
            except Refused as refused:
                return refused.answer

    def _answer(self, method: str, path: str, role: str | None, body: bytes) -> Answer:
        if path == "/api/whoami-v2":
            if role is None:
                raise Refused(401, None, "Invalid username or password.")
            token = dict(displayName="loopback", role=role)
            return Answer(200, dict(type="user", name=USER, orgs=[], auth=dict(type="access_token", accessToken=token)))
        if path == "/api/repos/create":
            return self._create(json.loads(body), role)
        if path == "/api/validate-yaml":
            return _check_card(json.loads(body)["content"])
        patterns = (LARGE_FILE_PATH, FILE_PATH, API_PATH)
        match = next(filter(None, (re.fullmatch(pattern, path) for pattern in patterns)), None)
        if match is None or unquote(match["id"]) not in self._repositories:
            # The Hub does not tell anonymous users which names are taken.
            raise Refused(404 if role else 401, "RepoNotFound", "Repository not found")
        repository, parts = self._repositories[unquote(match["id"])], match.groupdict()
        revision, name = unquote(parts.get("revision") or "main"), unquote(parts.get("path") or "")
        if match.re.pattern == FILE_PATH:
            return _serve_file(repository, role, revision, name)
        if method == "POST":
            _check_write(repository.id, role)
        match method, parts["action"]:
            case "GET", None | "revision":
                return _describe(repository, revision)
            case "GET", "tree":
                files = {} if name else repository.at(revision).files
                return Answer(200, [dict(type="file", path=each, size=len(file.data)) for each, file in files.items()])
            case "POST", "batch":
                return self._promise_large_files(path, json.loads(body))
            case "POST", "verify":
                return self._verify(**json.loads(body))
            case "POST", "preupload":
                return _upload_modes(repository.at(revision), json.loads(body)["files"])
            case "POST", "branch":
                if revision in repository.branches:
                    raise Refused(409, None, f"Reference already exists: {revision}")
                repository.branches[revision] = repository.at("main")
                return Answer(200)
            case "POST", "commit":
                return self._commit(repository, revision, body)
        raise Refused(404, None, "Sorry, we can't find the page you are looking for.")

    def _create(self, asked: dict[str, Any], role: str | None) -> Answer:
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        _check_write(repo_id, role)
        if role == "fineGrained":
            raise Refused(403, None, "This token may create no repositories.")
        if repo_id in self._repositories:
            return Answer(409, dict(error="You already created this model repo", url=f"{self.url}/{repo_id}"))
        attributes = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.add_repository(repo_id, attributes, private=asked.get("visibility") == "private")
        return Answer(200, dict(url=f"{self.url}/{repo_id}", name=repo_id))

    def _promise_large_files(self, path: str, asked: dict[str, Any]) -> Answer:
        answers = [dict(oid=each["oid"], size=each["size"]) for each in asked["objects"]]
        for answer in answers:
            if answer["oid"] not in self._large:
                upload = dict(href=f"{self.url}/large/{answer['oid']}/{answer['size']}")
                verify = dict(href=self.url + path.removesuffix("batch") + "verify")
                answer["actions"] = dict(upload=upload, verify=verify)
        return Answer(200, dict(transfer="basic", objects=answers))

    def _take_large_file(self, data: bytes, oid: str, size: int) -> Answer:
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, None, "These are not the bytes that were promised.")
        self._arrived[oid] = data
        return Answer(200)

    def _verify(self, oid: str, size: int) -> Answer:
        if len(self._arrived.get(oid, b"")) != size:
            raise Refused(404, None, "This file has not been uploaded.")
        self._large[oid] = self._arrived[oid]
        return Answer(200)

    def _commit(self, repository: Repository, branch: str, body: bytes) -> Answer:
        head = repository.at(branch)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = StoredFile(base64.b64decode(value["content"]), large=False)
                case "lfsFile":
                    if value["oid"] not in self._large:
                        raise Refused(400, None, f"The large file of {value['path']} has not been uploaded.")
                    files[value["path"]] = StoredFile(self._large[value["oid"]], large=True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        commit = self._store(repository, branch, header["summary"], files)
        self.commits.append(commit)
        url = f"{self.url}/{repository.id}/commit/{commit.oid}"
        return Answer(200, dict(success=True, commitOid=commit.oid, commitUrl=url))

    def _store(self, repository: Repository, branch: str, message: str, files: dict[str, StoredFile]) -> Commit:
        self._number += 1
        oid = hashlib.sha1(f"{self.url} {self._number}".encode()).hexdigest()
        commit = Commit(repository.id, branch, message, oid, files)
        repository.by_oid[oid] = repository.branches[branch] = commit
        return commit


def _check_write(repo_id: str, role: str | None) -> None:
    if role is None:
        raise Refused(401, None, "Invalid username or password.")
    if role == "read":
        raise Refused(403, None, "You must use a write token to do this.")
    if not repo_id.startswith(f"{USER}/"):
        raise Refused(403, None, f"You don't have the rights to write to {repo_id}")


def _check_card(text: str) -> Answer:
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        yaml.safe_load(match[1] if match else "")
    except yaml.YAMLError as error:
        return Answer(400, dict(errors=[dict(message=str(error))], warnings=[]))
    return Answer(200, dict(errors=[], warnings=[]))


def _describe(repository: Repository, revision: str) -> Answer:
    head = repository.at(revision)
    names = [dict(rfilename=name) for name in sorted(head.files)]
    return Answer(200, dict(id=repository.id, sha=head.oid, private=repository.private, siblings=names, tags=[]))


def _upload_modes(head: Commit, asked: list[dict[str, Any]]) -> Answer:
    files = []
    for path in (file["path"] for file in asked):
        mode = "lfs" if path.endswith(LARGE_FILES) else "regular"
        present = {"oid": head.files[path].oid} if path in head.files else {}
        files.append(dict(path=path, uploadMode=mode, shouldIgnore=False, **present))
    return Answer(200, dict(commitOid=head.oid, files=files))


def _serve_file(repository: Repository, role: str | None, revision: str, path: str) -> Answer:
    if repository.gated:
        raise Refused(403 if role else 401, "GatedRepo", f"Access to model {repository.id} is restricted.")
    commit = repository.at(revision)
    if path not in commit.files:
        raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.oid})
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}
    if file.large:
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
    return Answer(200, file.data, headers)


class Handler(BaseHTTPRequestHandler):
    """HTTP handler of `hub`."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    # With Nagle's algorithm, the body of an answer waits until the header is acknowledged.
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has left
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        fault = self.hub.fault(f"{self.command} {path}")
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self._body()
        if fault == "silent":
            self.rfile.read(1)
            self.close_connection = True
            return
        if fault is not None and (fault == "page" or fault.isdigit()):
            # Not JSON, as an answer of a gateway in between.
            status = 200 if fault == "page" else int(fault)
            self._send(Answer(status, b"<html>Not the Hub</html>", {"Content-Type": "text/html"}))
            return
        answer = self.hub.answer(
            self.command, path, self.headers.get("Authorization", "").removeprefix("Bearer "), body
        )
        if fault == "answer_lost":
            self.close_connection = True
            return
        self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer) -> None:
        body, headers = answer.body, dict(answer.headers)
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(answer.status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
