# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on 127.0.0.1, in memory, for the real clients: huggingface_hub, transformers, datasets.

It has one user, with a token that may write, one that may only read, and a fine-grained one that may write to what is
there and create nothing. What a client is not served by it is answered
as the Hub answers (status, `X-Error-Code`), as far as these clients tell the answers apart. Two things are simpler:
large files come from here and not from a storage that one is sent on to, and there is no Xet.
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
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from tests.support.loopback_repository import (
    LARGE_FILES,
    USER,
    Answer,
    Commit,
    Refused,
    Repository,
    Request,
    StoredFile,
    check_card,
    check_write,
    describe,
    describe_file,
    list_tree,
    role_of,
    serve_file,
    upload_modes,
)

REPOSITORY_PATH = (
    r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+(/[^/]+)??)"
    r"(/(?P<action>revision|tree|paths-info|preupload|commit|branch|refs)(/(?P<revision>[^/]+)(/(?P<path>.+))?)?)?"
)
FILE_PATH = r"/(?P<datasets>datasets/)?(?P<id>[^/]+(/[^/]+)??)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
LARGE_FILE_PATH = r"/(?P<datasets>datasets/)?(?P<id>[^/]+(/[^/]+)?)\.git/info/lfs/objects/(?P<action>batch|verify)"


@dataclass
class Fault:
    """What is to go wrong, and how many times yet."""

    pattern: str
    times: int
    how: str


class LoopbackHub:
    """The Hub and all it holds; `with LoopbackHub() as hub` runs it.

    Attributes:
        url: its endpoint.
        requests: all that came, as (method, path).
        failed: "METHOD /path" of those that were let go wrong.
        commits: all commits that clients made, the first one first.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.failed: list[str] = []
        self.commits: list[Commit] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._arrived: dict[str, bytes] = {}
        self._large: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._number = 0
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repository(self, repo_id: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> str:
        """Put a repository here, with one commit; its oid comes back."""
        repository = Repository(repo_id, kind, private)
        self._repositories[kind, repo_id] = repository
        stored = {name: StoredFile(data, name.endswith(LARGE_FILES)) for name, data in files.items()}
        return self._store(repository, "main", "initial commit", stored).oid

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self._repositories[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a model repository but for the one that it came with."""
        files = self.repository(repo_id).at(revision).files
        return {name: file.data for name, file in files.items() if name != ".gitattributes"}

    def gate(self, repo_id: str, kind: str = "model") -> None:
        """Let nobody but its owner have the files of a repository."""
        self.repository(repo_id, kind).gated = True

    def fail(self, pattern: str, times: int, how: str) -> None:
        """Let requests go wrong whose "METHOD /path" has a match of the pattern.

        Args:
            pattern: a regular expression; the path is as it was sent, quoted, and without a query.
            times: how many of them.
            how: "503": that status. "page": a page as a hotel's network has it, with status 200. "cut": the connection
                ends midway through the request. "answer_lost": the request is done and the connection ends without an
                answer.
        """
        assert how in ("503", "page", "cut", "answer_lost"), how
        self._faults.append(Fault(pattern, times, how))

    def mend(self) -> None:
        """Let nothing go wrong any more."""
        self._faults.clear()

    def asked(self, pattern: str) -> int:
        """How many requests came whose "METHOD /path" has a match of the pattern."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path in self.requests)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose Hub this is."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHON")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(foreign) and not name.lower().endswith("_proxy")
        }
        return kept | dict(
            HF_ENDPOINT=self.url,
            HF_HOME=str(home),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
            OMP_NUM_THREADS="1",
            **({"HF_TOKEN": token} if token else {}),
        )

    @contextmanager
    def in_this_process(self, home: Path) -> Iterator[pytest.MonkeyPatch]:
        """Make this the Hub of the huggingface_hub in this process, which read its environment long ago.

        Uploads and `HfApi` follow; transformers has copied the endpoint elsewhere and takes a process of its own.
        """
        constants = huggingface_hub.constants
        with pytest.MonkeyPatch.context() as patch:
            for name, value in dict(
                ENDPOINT=self.url,
                HF_HUB_OFFLINE=False,
                HF_HUB_DISABLE_XET=True,
                HF_TOKEN_PATH=str(home / "token"),
                HF_STORED_TOKENS_PATH=str(home / "stored_tokens"),
            ).items():
                patch.setattr(constants, name, value)
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
                patch.delenv(name, raising=False)
            patch.setenv("NO_PROXY", "127.0.0.1")
            # The client was made for another environment, and keeps connections open.
            huggingface_hub.utils.close_session()
            yield patch
            huggingface_hub.utils.close_session()

    def fault(self, request: str) -> str | None:
        """What goes wrong with this request; asking counts."""
        with self._lock:
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    self.failed.append(request)
                    return fault.how
        return None

    def answer(self, request: Request) -> Answer:
        """Do what a request asks for."""
        with self._lock:
            try:
                return self._answer(request)
            except Refused as refused:
                return refused.answer

    def _answer(self, request: Request) -> Answer:
        if match := re.fullmatch(r"/large/([0-9a-f]{64})/(\d+)", request.path):
            return self._take_large_file(request, match[1], int(match[2]))
        role = role_of(request)
        if request.path == "/api/whoami-v2":
            if role is None:
                raise Refused(401, None, "Invalid username or password.")
            token = dict(displayName="loopback", role=role)
            return Answer(200, dict(type="user", name=USER, orgs=[], auth=dict(type="access_token", accessToken=token)))
        if request.path == "/api/repos/create":
            return self._create(request, role)
        if request.path == "/api/validate-yaml":
            return check_card(request.json["content"])
        if match := re.fullmatch(LARGE_FILE_PATH, request.path):
            repository = self._find("dataset" if match["datasets"] else "model", match["id"], role)
            check_write(repository, role)
            return self._promise_large_files(request) if match["action"] == "batch" else self._verify(request)
        if match := re.fullmatch(FILE_PATH, request.path):
            repository = self._find("dataset" if match["datasets"] else "model", match["id"], role)
            return serve_file(repository, role, unquote(match["revision"]), unquote(match["path"]))
        if match := re.fullmatch(REPOSITORY_PATH, request.path):
            repository = self._find(match["kind"], match["id"], role)
            revision, path = unquote(match["revision"] or "main"), unquote(match["path"] or "")
            if request.method == "POST" and match["action"] != "paths-info":
                check_write(repository, role)
            match request.method, match["action"]:
                case "GET", None | "revision":
                    return describe(repository, revision)
                case "GET", "tree":
                    return list_tree(repository, revision, path, request.query)
                case "GET", "refs":
                    branches = [
                        dict(name=name, ref=f"refs/heads/{name}", targetCommit=head.oid)
                        for name, head in repository.branches.items()
                    ]
                    return Answer(200, dict(branches=branches, tags=[], converts=[]))
                case "POST", "paths-info":
                    wanted = parse_qs(request.body.decode()).get("paths", [])
                    files = repository.at(revision).files
                    return Answer(200, [describe_file(name, files[name]) for name in wanted if name in files])
                case "POST", "preupload":
                    return upload_modes(repository, revision, request)
                case "POST", "branch":
                    if revision in repository.branches:
                        raise Refused(409, None, f"Reference already exists: {revision}")
                    repository.branches[revision] = repository.at(request.json.get("startingPoint", "main"))
                    return Answer(200)
                case "POST", "commit":
                    return self._commit(repository, revision, request)
        raise Refused(404, None, "Sorry, we can't find the page you are looking for.")

    def _find(self, kind: str, repo_id: str, role: str | None) -> Repository:
        repository = self._repositories.get((kind, unquote(repo_id)))
        if repository is None or (repository.private and role is None):
            # The Hub does not tell strangers which names are taken.
            if role is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def _create(self, request: Request, role: str | None) -> Answer:
        name, owner = request.json["name"], request.json.get("organization") or USER
        kind = request.json.get("type", "model")
        check_write(Repository(f"{owner}/{name}", kind), role)
        if role == "fineGrained":
            raise Refused(403, None, "This token may create no repositories.")
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{owner}/{name}"
        if (kind, f"{owner}/{name}") in self._repositories:
            return Answer(409, dict(error=f"You already created this {kind} repo", url=url))
        files = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.add_repository(f"{owner}/{name}", files, kind, request.json.get("visibility") == "private")
        return Answer(200, dict(url=url, name=f"{owner}/{name}"))

    def _promise_large_files(self, request: Request) -> Answer:
        verify = dict(href=self.url + request.path.removesuffix("batch") + "verify")
        answers = []
        for asked in request.json["objects"]:
            answer = dict(oid=asked["oid"], size=asked["size"])
            if asked["oid"] not in self._large:
                upload = dict(href=f"{self.url}/large/{asked['oid']}/{asked['size']}")
                answer["actions"] = dict(upload=upload, verify=verify)
            answers.append(answer)
        return Answer(200, dict(transfer="basic", objects=answers))

    def _take_large_file(self, request: Request, oid: str, size: int) -> Answer:
        if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != oid:
            raise Refused(400, None, "These are not the bytes that were promised.")
        self._arrived[oid] = request.body
        return Answer(200)

    def _verify(self, request: Request) -> Answer:
        oid, size = request.json["oid"], request.json["size"]
        if len(self._arrived.get(oid, b"")) != size:
            raise Refused(404, None, "This file has not been uploaded.")
        self._large[oid] = self._arrived[oid]
        return Answer(200)

    def _commit(self, repository: Repository, branch: str, request: Request) -> Answer:
        if branch not in repository.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repository.branches[branch].oid) != repository.branches[branch].oid:
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.branches[branch].files)
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
                    if value["path"] not in files:
                        raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                    del files[value["path"]]
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


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Or else the body of an answer waits for the acknowledgement of its head.
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            # A client that has left.
            try:
                super().handle_one_request()
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            hub.requests.append((self.command, url.path))
            fault = hub.fault(f"{self.command} {url.path}")
            if fault == "cut":
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                return
            request = Request(self.command, url.path, parse_qs(url.query), self.headers, self._body())
            if fault in ("503", "page"):
                # As a gateway does it, and not the Hub: no JSON.
                status = 503 if fault == "503" else 200
                self._send(Answer(status, b"<html>Not the Hub</html>", {"Content-Type": "text/html"}))
                return
            answer = hub.answer(request)
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
            headers = dict(answer.headers)
            body = answer.body
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
                headers["Content-Type"] = "application/json"
            self.send_response(answer.status, HTTPStatus(answer.status).phrase)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
