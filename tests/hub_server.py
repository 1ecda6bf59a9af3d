"""A Hugging Face hub on loopback: the few endpoints that its client asks for one small model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_token_of_the_owner"
_GATED, _PRIVATE = "owner/gated", "owner/private"


class Hub:
    """Repositories with branches of files; every commit is kept under its hash."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = ""

    def create(self, name: str) -> None:
        self.commits.setdefault(name, {"0" * 40: {}})
        self.branches.setdefault(name, {"main": "0" * 40})

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch's."""
        self.create(name)
        known = {**self.commits[name][self.branches[name][branch]], **files}
        content = b"".join(path.encode() + data for path, data in sorted(known.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits[name][commit] = known
        self.branches[name][branch] = commit
        return commit

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[name][self.branches[name][branch]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST  # noqa: N815  (http.server calls it so)

    def answer(self, body: bytes) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path))
        for pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None:
                action(self, body, *found.groups())
                return
        self.send(404, {"error": f"the stub has no {self.command} {path}"})

    def send(self, status: int, data: Any = None, **headers: str) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data or {}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def known(self, name: str) -> bool:
        """Whether the repository may be seen; else the answer is given, as the hub does."""
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name == _GATED:
            self.send(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        elif name == _PRIVATE and not authorised:
            self.send(401, X_Error_Message="Invalid username or password.")
        elif name not in self.hub.commits:
            self.send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        else:
            return True
        return False

    def authorised(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send(401, {"error": "Invalid username or password."})
        return False

    # -- endpoints --------------------------------------------------------------------------------

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        if not self.known(name):
            return
        commit = self.hub.branches[name].get(revision, revision)
        files = self.hub.commits[name].get(commit)
        if files is None:
            self.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif file not in files:
            code = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            self.send(404, **code, X_Repo_Commit=commit)
        else:
            etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            self.send(200, files[file], X_Repo_Commit=commit, ETag=etag)

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if not self.known(name):
            return
        commit = self.hub.branches[name].get(revision or "main", revision)
        if commit not in self.hub.commits[name]:
            self.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return
        siblings = [{"rfilename": file} for file in self.hub.commits[name][commit]]
        self.send(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def create(self, body: bytes) -> None:
        if self.authorised():
            wanted = json.loads(body)
            name = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
            status = 409 if name in self.hub.commits else 200
            self.hub.create(name)
            self.send(status, {"url": f"{self.hub.endpoint}/{name}"})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        if self.known(name):
            known = self.hub.branches[name]
            status = 409 if branch in known else 200
            known.setdefault(branch, known["main"])
            self.send(status)

    def preupload(self, body: bytes, name: str, _: str) -> None:
        if self.known(name):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self.known(name):
            objects = [
                {
                    **{"oid": file["oid"], "size": file["size"]},
                    "actions": {"upload": {"href": f"{self.hub.endpoint}/storage/{file['oid']}"}},
                }
                for file in json.loads(body)["objects"]
            ]
            self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        self.hub.uploads[oid] = body
        self.send(200)

    def commit(self, body: bytes, name: str, branch: str) -> None:
        if not self.known(name):
            return
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.commit(name, files, branch)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.send(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def validate(self, _: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def whoami(self, _: bytes) -> None:
        if self.authorised():
            self.send(200, {"type": "user", "name": "owner", "orgs": []})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (rf"/api/models/{_NAME}", _Handler.info),
    (rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/storage/(\w+)", _Handler.store),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (r"/api/whoami-v2", _Handler.whoami),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on loopback while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
