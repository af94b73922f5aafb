"""A W&B server that the real client (0.31) can log in to, stream to, upload to and resume from; it keeps every byte.

It proves what the client sends, not what W&B makes of it. An operation it does not know lands in `unknown`, which tests
assert to be empty: that is how a newer client announces itself.
"""

import base64
import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "team"
KEY = "0123456789abcdef0123456789abcdef01234567"


CUT = -1
"""A fault: the connection ends without an answer."""


@dataclass
class Run:
    id: str
    project: str
    sent: dict[str, Any] = field(default_factory=dict)
    """The variables of UpsertBucket: groupName, jobType, tags, displayName, …"""
    config: dict[str, Any] = field(default_factory=dict)
    streamed: dict[str, dict[int, str]] = field(default_factory=dict)
    """File stream: file -> line number -> line."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def storage_id(self) -> str:
        return f"storage-{self.id}"

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.streamed.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.streamed.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    def table(self, key: str) -> dict[str, Any]:
        """The table's last version: columns and data."""
        return json.loads(self.files[self.summary[key]["path"]])


class Stub:
    """Runs by id, artifacts by id. `fault(method, path, operation)` may answer with a status instead."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: dict[str, dict[str, Any]] = {}
        """Reports."""
        self.received: list[bytes] = []
        self.unknown: list[str] = []
        self.fault: Callable[[str, str, str], int | None] = lambda method, path, operation: None
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                stub._answer(self)

            do_PUT = do_GET = do_POST

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, address: Any) -> None:
                """A client that is killed or gives up cuts its connections; that is no error here."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Stub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = _body(request)
        path = unquote(request.path)
        said = json.loads(body) if path == "/graphql" else {}
        match = re.search(r"(?:mutation|query)\s+(\w+)", said.get("query", ""))
        operation = match[1] if match else ""
        headers = "\n".join(f"{name}: {value}" for name, value in request.headers.items() if name != "Authorization")
        expected = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
        with self.lock:
            fault = self.fault(request.command, path, operation)
        if fault == CUT:
            request.close_connection = True
            request.connection.close()
            return
        with self.lock:
            self.received.append(f"{request.command} {path}\n{headers}\n".encode() + body)
            status, answer = fault or 200, {}
            if status == 200 and request.command == "POST" and request.headers.get("Authorization") != expected:
                status = 401
            if status == 200:
                answer = self._carry_out(path, operation, said.get("variables") or {}, body)
        out = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(out)))
        request.end_headers()
        request.wfile.write(out)

    def _carry_out(self, path: str, operation: str, variables: dict[str, Any], body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            run = self.runs[path.split("/")[-2]]
            message = json.loads(body)
            for name, part in (message.get("files") or {}).items():
                run.streamed.setdefault(name, {}).update(enumerate(part["content"], part["offset"]))
            if message.get("complete"):
                run.exit_code = message["exitcode"]
            return {"limits": {}}
        if path.startswith("/upload/"):
            _, _, kind, owner, name = path.split("/", 4)
            files = self.runs[owner].files if kind == "run" else self.artifacts[owner]["files"]
            files[name] = body
            return {}
        carry_out = getattr(self, operation, None) if path == "/graphql" else None
        if carry_out is None:
            self.unknown.append(operation or path)
            return {"errors": [{"message": f"the stub does not know {operation or path}"}]}
        return {"data": carry_out(variables)}

    # GraphQL operations, under the names that the client gives them.

    def Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "E", "name": ENTITY}
        viewer = {"id": "U", "entity": ENTITY, "username": "user", "email": "u@example.org", "flags": "{}"}
        return {"viewer": viewer | {"userEntity": entity, "teams": {"edges": [{"node": entity}]}}}

    def ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def OrganizationCoreWeaveOrganizationID(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        if v.get("name"):
            run = self.runs.setdefault(v["name"], Run(v["name"], v["project"]))
        else:
            run = next(run for run in self.runs.values() if run.storage_id == v["id"])
        run.sent |= {key: value for key, value in v.items() if value is not None}
        if v.get("config"):
            run.config = json.loads(v["config"])
        bucket = {"id": run.storage_id, "name": run.id, "displayName": run.sent.get("displayName"), "sweepName": None}
        bucket |= {"config": json.dumps(run.config), "historyLineCount": len(run.history), "project": _project(run)}
        return {"upsertBucket": {"bucket": bucket, "inserted": "config" not in run.sent}}

    def RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        if run is None:
            return {"model": {"id": "P", "name": v["project"], "entity": {"id": "E", "name": ENTITY}, "bucket": None}}
        events = run.streamed.get("wandb-events.jsonl", {})
        bucket = {
            "id": run.storage_id,
            "name": run.id,
            "displayName": run.sent.get("displayName"),
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps({"t": 1}),
            "logLineCount": len(run.streamed.get("output.log", {})),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(events),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": json.dumps([events[max(events)]] if events else []),
            "tags": run.sent.get("tags") or [],
            "notes": None,
        }
        return {"model": _project(run) | {"bucket": bucket}}

    def RunStoppedStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/run/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": self.runs[v["run"]].storage_id, "uploadHeaders": [], "files": files}}

    def ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        key = f"A{len(self.artifacts)}"
        self.artifacts[key] = {"input": v["input"], "state": "PENDING", "files": {}}
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": key, "state": "PENDING", "artifactSequence": sequence}}}

    def CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "F", "uploadUrl": f"{self.url}/upload/artifact/{v['artifactID']}/{v['name']}"}
        manifest = {"id": f"M{v['artifactID']}", "file": file | {"uploadHeaders": []}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": f"{file['artifactID']}/{file['name']}",
                "uploadUrl": f"{self.url}/upload/artifact/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in v["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[v["artifactID"]]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": artifact["input"]["digest"]}}}

    def ArtifactByID(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[v["id"]]
        given = artifact["input"]
        project = {"id": "P", "internalId": "P", "name": given["projectName"], "entity": {"name": ENTITY}}
        sequence = {"__typename": "ArtifactSequence", "name": given["artifactCollectionName"], "project": project}
        return {
            "artifact": {
                "__typename": "Artifact",
                "id": v["id"],
                "artifactSequence": sequence,
                "versionIndex": 0,
                "artifactType": {"name": given["artifactTypeName"]},
                "description": None,
                "metadata": "{}",
                "ttlDurationSeconds": -1,
                "ttlIsInherited": True,
                "tags": [],
                "historyStep": None,
                "state": artifact["state"],
                "size": 0,
                "digest": given["digest"],
                "commitHash": given["digest"],
                "fileCount": 1,
                "createdAt": "2026-01-01T00:00:00",
                "updatedAt": "2026-01-01T00:00:00",
                "aliases": [],
            }
        }

    # What wandb-workspaces sends.

    def _project_node(self, name: str) -> dict[str, Any]:
        return {
            "__typename": "Project",
            "id": "P",
            "internalId": "I",
            "name": name,
            "entityName": ENTITY,
            "createdAt": "2026-01-01T00:00:00",
            "isBenchmark": False,
            "user": None,
            "description": None,
            "access": "ENTITY_READ",
            "views": None,
        }

    def GetProjects(self, v: dict[str, Any]) -> dict[str, Any]:
        edges = [{"node": self._project_node(name)} for name in sorted({run.project for run in self.runs.values()})]
        return {"models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": edges}}

    def CreateProject(self, v: dict[str, Any]) -> dict[str, Any]:
        node = self._project_node(v["input"]["name"])
        return {"result": {"project": node, "model": node, "inserted": True}}

    def upsertView(self, v: dict[str, Any]) -> dict[str, Any]:
        key = v.get("id") or f"V{len(self.views):03}"
        view = self.views.setdefault(key, {"tokens": []})
        view |= {name: value for name, value in v.items() if name != "id"}
        return {"upsertView": {"inserted": not v.get("id"), "view": self._view(key) | {"type": v["type"]}}}

    def SpecificReport(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"view": self._view(v["reportId"])}

    def _view(self, key: str) -> dict[str, Any]:
        view = self.views[key]
        project = {"id": "1", "name": view["projectName"], "entityName": view["entityName"]}
        kept = {name: view[name] for name in ("name", "displayName", "description", "spec")}
        return kept | {
            "id": key,
            "project": project,
            "updatedAt": "2026-01-01T00:00:00",
            "createdAt": "2026-01-01T00:00:00",
        }

    def ViewAccessTokens(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"view": {"accessTokens": self.views[v["reportId"]]["tokens"]}}

    def createAccessToken(self, v: dict[str, Any]) -> dict[str, Any]:
        projects = [{"entityName": one["entityName"], "name": one["projectName"]} for one in v["projects"]]
        token = {"token": f"public-{v['viewId']}", "type": "PUBLIC", "revokedAt": None, "projects": projects}
        self.views[v["viewId"]]["tokens"].append(token)
        return {"createAccessToken": {"accessToken": token}}

    def revokeAccessToken(self, v: dict[str, Any]) -> dict[str, Any]:
        for token in (one for view in self.views.values() for one in view["tokens"] if one["token"] == v["token"]):
            token["revokedAt"] = "2026-01-01T00:00:00"
        return {"revokeAccessToken": {"success": True}}


def _project(run: Run) -> dict[str, Any]:
    return {"id": "P", "name": run.project, "entity": {"id": "E", "name": ENTITY}}


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
    else:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    return gzip.decompress(body) if request.headers.get("Content-Encoding") == "gzip" else body
