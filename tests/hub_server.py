"""A hub of one's own on this machine: as much of huggingface.co's HTTP interface as sending and fetching a model takes.

The client is huggingface_hub itself, which is led here by `HF_ENDPOINT` and has to be told `HF_HUB_DISABLE_XET=1`: of
the hub's ways of storing large files this has the older one, Git LFS. What is committed, it gives back.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 100_000  # bytes, from which on a file goes to LFS
TOKEN = "hf_of_the_tests"
USER = "me"


@dataclass
class Repository:
    """Its files, the large ones' names, and whether it is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(json.dumps([*self.commits, *sorted(self.files)]).encode()).hexdigest()


@dataclass
class Hub:
    """What it holds, what it was asked for, and on demand a refusal of everything that a pattern matches."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refused: str | None = None
    lock: Lock = field(default_factory=Lock)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers on a port of its own until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self.rfile)

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815 - names that http.server looks for

    def _answer(self, body: Any) -> None:
        path, content = unquote(urlsplit(self.path).path), self._body(body)
        asked = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.asked.append(asked)
            if self.hub.refused and re.search(self.hub.refused, asked):
                self._send(403, {"error": "You have no right to do this"})
            elif not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, {"error": "Invalid user token."})
            else:
                for pattern, answer in ROUTES.items():
                    if match := re.fullmatch(pattern, asked):
                        answer(self, content, *match.groups())
                        return
                self._send(404, {"error": f"no {asked}"}, {"X-Error-Code": "EntryNotFound"})

    def _body(self, file: Any) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(file.readline(), 16):
                parts.append(file.read(size))
                file.readline()
            file.readline()
            return b"".join(parts)
        return bytes(file.read(int(self.headers.get("Content-Length", 0))))

    def _send(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _found(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def whoami(self, _: bytes) -> None:
        self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(is_private)
        self._send(200, {"url": f"{self.hub.address}/{name}", "name": name})

    def valid_yaml(self, _: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        if self._found(name) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})

    def batch(self, body: bytes, _: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.address}/objects/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "not the bytes that were announced"})
            return
        self.hub.objects[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, name: str) -> None:
        """All of the files or none: a large one that was not sent before is refused."""
        repository = self._found(name)
        if repository is None:
            return
        files, large, gone = {}, set(), set()
        for entry in map(json.loads, body.splitlines()):
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
                large.add(value["path"])
            elif key == "deletedFile" and value["path"] in repository.files:
                gone.add(value["path"])
            elif key != "header":
                self._send(400, {"error": f"{value} cannot be committed"})
                return
        repository.files = {path: held for path, held in repository.files.items() if path not in gone} | files
        repository.large |= large
        repository.commits.append(hashlib.sha1(body).hexdigest())
        url = f"{self.hub.address}/{name}/commit/{repository.sha}"
        self._send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def information(self, _: bytes, name: str) -> None:
        repository = self._found(name)
        if repository is not None:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            self._send(200, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings})

    def tree(self, _: bytes, name: str) -> None:
        repository = self._found(name)
        if repository is not None:
            self._send(200, [_entry(path, content, repository) for path, content in sorted(repository.files.items())])

    def file(self, _: bytes, name: str, path: str) -> None:
        repository = self._found(name)
        if repository is None:
            return
        if path not in repository.files:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[path]
        headers = {"ETag": f'"{_mark(path, content, repository)}"', "X-Repo-Commit": repository.sha}
        self._send(200, content, headers)


ROUTES: dict[str, Callable[..., None]] = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.valid_yaml,
    "POST /api/models/([^/]+/[^/]+)/preupload/main": _Handler.preupload,
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /objects/([0-9a-f]+)": _Handler.store,
    "POST /api/models/([^/]+/[^/]+)/commit/main": _Handler.commit,
    "GET /api/models/([^/]+/[^/]+?)(?:/revision/[^/]+)?": _Handler.information,
    "GET /api/models/([^/]+/[^/]+)/tree/[^/]+": _Handler.tree,
    "(?:GET|HEAD) /([^/]+/[^/]+)/resolve/[^/]+/(.+)": _Handler.file,
}


def _mark(path: str, content: bytes, repository: Repository) -> str:
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha256(content).hexdigest() if path in repository.large else hashlib.sha1(blob).hexdigest()


def _entry(path: str, content: bytes, repository: Repository) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": _mark(path, content, repository),
    }
    if path in repository.large:
        entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry
