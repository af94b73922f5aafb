"""A Hugging Face hub that the real client (huggingface_hub 2.4, datasets 5.2, transformers 5.19) can download from.

Only what these ask for: what a branch stands for, the tree of a commit, its files. `requests` holds every request; one
that is not known here lands in `unknown`, which tests assert to be empty: that is how a newer client announces itself.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_token-of-the-stub-0123456789"


@dataclass
class Repository:
    files: dict[str, dict[str, bytes]]
    """Commit -> path -> content."""
    branches: dict[str, str]
    gated: bool = False
    broken: set[str] = field(default_factory=set)
    """Paths that the hub fails to deliver."""
    slow_s: float = 0.0
    """Before a file's content comes."""


class HubStub:
    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        """By kind (models, datasets, spaces) and name."""
        self.requests: list[str] = []
        """`METHOD path`, in order of arrival."""
        self.unknown: list[str] = []
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], *, kind: str = "models", branch: str = "main") -> str:
        """A repository, or another commit of one that is there; its commit, which the branch stands for from now on."""
        content = json.dumps([[path, data.hex()] for path, data in sorted(files.items())])
        commit = hashlib.sha1(f"{name}{content}".encode()).hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository(files={}, branches={}))
        repository.files[commit] = files
        repository.branches[branch] = commit
        return commit

    def downloaded(self) -> list[str]:
        """The files that were asked for with their content, in order."""
        found = (re.fullmatch(r"GET /(?:datasets/|spaces/)?[^/]+/[^/]+/resolve/[^/]+/(.+)", r) for r in self.requests)
        return [match[1] for match in found if match]

    # What the handler asks.

    def answer(self, method: str, target: str, body: bytes, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        url = urlsplit(target)
        path = unquote(url.path)
        self.requests.append(f"{method} {path}")
        if match := re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path
        ):
            kind, name, what, rest = match.groups()
        elif match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/(resolve)/(.+)", path):
            kind, name, what, rest = match.groups()
            kind = kind or "models"
        elif path == "/api/agent-harnesses":  # a list that the client may look itself up in
            return 200, {}, b"{}"
        else:
            self.unknown.append(f"{method} {target}")
            return 404, {}, b"{}"
        repository = self.repositories.get((kind, name))
        if repository is None:
            return _error(404, "RepoNotFound", f"no repository {name}")
        revision, _, file = (rest or "main").partition("/")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.files:
            return _error(404, "RevisionNotFound", f"no revision {revision}")
        files = repository.files[commit]
        if what == "resolve":
            if repository.gated and token != TOKEN:
                return _error(403 if token else 401, "GatedRepo", f"Access to {name} is restricted.")
            if file in repository.broken:
                return 403, {}, b"the stub does not give it"
            if file not in files:
                return _error(404, "EntryNotFound", f"no file {file}", commit)
            if method == "GET":
                time.sleep(repository.slow_s)
            return 200, {"ETag": f'"{_blob(files[file])}"', "X-Repo-Commit": commit}, files[file]
        if what == "tree":
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            return 200, {}, json.dumps(_tree(files, file, recursive=recursive)).encode()
        if what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            rows = [row for row in _tree(files, "", recursive=True) if row["path"] in asked]
            return 200, {}, json.dumps(rows).encode()
        card = {
            "_id": commit[:24],
            "id": name,
            "sha": commit,
            "private": False,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        return 200, {}, json.dumps(card).encode()


@contextmanager
def hub_stub() -> Iterator[HubStub]:
    stub = HubStub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, headers, content = stub.answer(self.command, self.path, body, token)
            ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if ranged and status == 200:
                start, end = int(ranged[1]), int(ranged[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                status, content = 206, content[start : end + 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reach(stub: HubStub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process asks the stub without a token and keeps what it gets under `home`; the client read its environment
    when it was imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, stub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)


def _error(status: int, code: str, message: str, commit: str | None = None) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return status, headers | ({"X-Repo-Commit": commit} if commit else {}), json.dumps({"error": message}).encode()


def _tree(files: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    rows: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            inner = prefix + "/".join(parts[:depth])
            rows.setdefault(inner, {"type": "directory", "path": inner, "oid": _blob(inner.encode()), "size": 0})
        rows[path] = {"type": "file", "path": path, "oid": _blob(content), "size": len(content)}
    return [row for path, row in rows.items() if recursive or "/" not in path.removeprefix(prefix)]


def _blob(content: bytes) -> str:
    """Git's name for a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
