"""A stand-in of W&B's API on the loopback: answers what wandb 0.31 sends in a run, and keeps what it is told."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlparse

ENTITY = "tester"
KEY = "k" * 40
MANIFEST = "wandb_manifest.json"

Manner = Literal["well", "errors", "silent"]
"""How the server answers: as it should, with status 500, or never."""


@dataclass
class StoredRun:
    """One run, as the server knows it.

    Args:
        id: W&B's own, as in the address.
        fields: The newest value of every argument of `upsertBucket`: `displayName`, `groupName`, `jobType`, `tags`.
        config: Less W&B's own part.
        history: Rows in the order of their steps.
        summary: The newest.
        exit_code: None until the run has ended.
        files: By name.
    """

    id: str
    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """What W&B shows beside the name."""
        return {None: "running", 0: "finished"}.get(self.exit_code, "failed")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, less W&B's own keys."""
        return [without_own_keys(row) for _, row in sorted(self.history.items())]

    def logged(self) -> set[str]:
        """Every key of the history."""
        return {key for row in self.rows for key in row}


@dataclass
class StoredArtifact:
    """An artifact with its files, by name."""

    name: str
    type: str
    run: str
    committed: bool = False
    files: dict[str, bytes] = field(default_factory=dict)


def without_own_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is not W&B's own: `_step`, `_runtime`, `_timestamp`, `_wandb`."""
    return {key: value for key, value in values.items() if not key.startswith("_")}


class WandbServer:
    """Listens on a free port while it is used as a context.

    Args:
        manner: How it answers.
        after_start: How it answers once a run has been opened; None: as before.
    """

    def __init__(self, manner: Manner = "well", after_start: Manner | None = None) -> None:
        self.manner = manner
        self.after_start = after_start
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: dict[str, StoredArtifact] = {}
        self.views: list[dict[str, Any]] = []
        self.not_understood: list[str] = []
        self.asked = 0
        self._released = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> WandbServer:
        self._http = _QuietServer(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process of its own talk to this server, and to no other."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and content of the answer; a server that never answers returns when it is shut down."""
        with self._lock:
            self.asked += 1
        if self.manner == "silent":
            self._released.wait()
        if self.manner != "well":
            return 500, {"error": "this server answers nothing else"}
        with self._lock:
            return self._route(method, path, body)

    def _route(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = [unquote(part) for part in urlparse(path).path.strip("/").split("/")]
        if parts == ["graphql"]:
            return 200, self._graphql(json.loads(body))
        if parts[0] == "files" and parts[-1] == "file_stream":
            return 200, self._file_stream(self.runs[parts[3]], json.loads(body))
        if parts[0] == "upload" and method == "PUT":
            files = self.runs[parts[2]].files if parts[1] == "run" else self.artifacts[parts[2]].files
            files["/".join(parts[3:])] = body
            return 200, {}
        if parts[0] != "sdk":  # W&B's counts of how it is used
            self.not_understood.append(f"{method} {path}")
        return 404, {}

    def _graphql(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name = request.get("operationName") or _NAME.search(request["query"])[1]  # type: ignore[index]
        operation = _OPERATIONS.get(name)
        if operation is None:
            self.not_understood.append(json.dumps(request))
            return {"data": None, "errors": [{"message": f"{name} is not understood"}]}
        found = operation(self, request.get("variables") or {})
        if operation is _upsert_bucket:
            self.manner = self.after_start or self.manner
        return {"data": found}

    def _file_stream(self, run: StoredRun, told: Mapping[str, Any]) -> dict[str, Any]:
        files = told.get("files") or {}
        if history := files.get("wandb-history.jsonl"):
            for number, line in enumerate(history["content"], history["offset"]):
                run.history[number] = json.loads(line)
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if told.get("complete"):
            run.exit_code = told["exitcode"]
        return {}


# What is asked by GraphQL ------------------------------------------------------------------------------

_NAME = re.compile(r"(?:query|mutation)\s+(\w+)")
_Operation = Callable[[WandbServer, Mapping[str, Any]], dict[str, Any]]


def _upsert_bucket(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    inserted = told["name"] not in server.runs
    run = server.runs.setdefault(told["name"], StoredRun(told["name"]))
    run.fields |= {key: value for key, value in told.items() if value is not None}
    if told.get("config"):
        values = {key: item["value"] for key, item in json.loads(told["config"]).items()}
        run.config = without_own_keys(values)
    project = {"id": "project", "name": told["project"], "entity": {"id": "entity", "name": ENTITY}}
    bucket = {
        "id": base64.b64encode(f"Run:v1:{run.id}".encode()).decode(),
        "name": run.id,
        "displayName": run.fields["displayName"],
        "description": None,
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "sweepName": None,
        "project": project,
        "historyLineCount": len(run.history),
    }
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def _run_resume_status(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    """Answer what the server has of a run that is to go on; no bucket where it knows none of that name."""
    run = server.runs.get(told["name"])
    bucket = run and {
        "name": run.id,
        "displayName": run.fields["displayName"],
        "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history),
        "historyTail": json.dumps([json.dumps(row) for _, row in sorted(run.history.items())][-1:]),
        "eventsLineCount": 0,
        "eventsTail": "[]",
        "logLineCount": 0,
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "tags": run.fields.get("tags") or [],
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),
    }
    return {"model": {"name": told["project"], "entity": {"name": ENTITY}, "bucket": bucket}}


def _create_run_files(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    files = [{"name": name, "uploadUrl": f"{server.url}/upload/run/{told['run']}/{name}"} for name in told["files"]]
    return {"createRunFiles": {"runID": told["run"], "uploadHeaders": [], "files": files}}


def _viewer(_: WandbServer, __: Mapping[str, Any]) -> dict[str, Any]:
    person = {"id": "user", "entity": ENTITY, "username": ENTITY, "email": "tester@example.com", "flags": "{}"}
    return {"viewer": {**person, "teams": {"edges": []}}}


def _upsert_view(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    server.views.append({**told, "spec": json.loads(told["spec"])})
    return {"upsertView": {"view": {"id": "view", "name": told["name"]}, "inserted": True}}


def _create_artifact(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    wanted = told["input"]
    identity = f"artifact-{len(server.artifacts)}"
    name, kind, run = (wanted[key] for key in ("artifactCollectionName", "artifactTypeName", "runName"))
    server.artifacts[identity] = StoredArtifact(name, kind, run)
    artifact = {"id": identity, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
    return {"createArtifact": {"artifact": artifact}}


def _create_artifact_files(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    nodes = []
    for wanted in told["input"]["artifactFiles"]:
        artifact, name = wanted["artifactID"], wanted["name"]
        node = {
            "storagePath": f"{artifact}/{name}",
            "uploadUrl": f"{server.url}/upload/artifact/{artifact}/{name}",
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": artifact},
        }
        nodes.append({"node": node})
    return {"createArtifactFiles": {"files": {"edges": nodes}}}


def _artifact_manifest(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    """Answer both mutations of a manifest; the second, under the manifest's id, asks where to upload it."""
    artifact = told.get("artifactID") or told["artifactManifestID"].removeprefix("manifest-of-")
    url = f"{server.url}/upload/artifact/{artifact}/{MANIFEST}"
    manifest = {"id": f"manifest-of-{artifact}", "file": {"id": "file", "uploadUrl": url, "uploadHeaders": []}}
    return {name: {"artifactManifest": manifest} for name in ("createArtifactManifest", "updateArtifactManifest")}


def _commit_artifact(server: WandbServer, told: Mapping[str, Any]) -> dict[str, Any]:
    artifact = server.artifacts[told["artifactID"]]
    artifact.committed = True
    return {"commitArtifact": {"artifact": {"id": told["artifactID"], "digest": ""}}}


_OPERATIONS: dict[str, _Operation] = {
    "ServerFeaturesQuery": lambda *_: {"serverInfo": {"features": []}},
    "ArtifactType": lambda *_: {"project": {"artifact": None}},
    "CreateArtifact": _create_artifact,
    "CreateArtifactFiles": _create_artifact_files,
    "CreateArtifactManifest": _artifact_manifest,
    "UpdateArtifactManifest": _artifact_manifest,
    "CommitArtifact": _commit_artifact,
    "UpsertBucket": _upsert_bucket,
    "RunResumeStatus": _run_resume_status,
    "CreateRunFiles": _create_run_files,
    "OrganizationCoreWeaveOrganizationID": lambda *_: {"entity": {"organization": None}},
    "Viewer": _viewer,
    "GetDefaultEntity": _viewer,
    "UpsertView2": _upsert_view,
}


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up, as wandb does when it ends; all else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler_of(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            status, content = server.answer(self.command, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _respond  # noqa: N815 - the names that http.server looks for

    return Handler
