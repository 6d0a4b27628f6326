"""A Hugging Face hub's HTTP interface over commits in memory: as much of it as publishing and reading a file need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class FakeHub:
    """``with FakeHub() as hub``: ``hub.url`` is its HF_ENDPOINT. One repository, whatever its name.

    refuse: the status that every commit is answered with, instead of made; missing: there is no repository yet.
    """

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {"0" * 40: {}}
        self.head, self.tags, self.created = "0" * 40, dict[str, str](), list[dict[str, Any]]()
        self.refuse: int | None = None
        self.missing = False
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def files(self, revision: str) -> Files | None:
        named = {"main": self.head, **self.tags}.get(revision, revision)
        return self.commits.get(named)

    def commit(self, lines: list[dict[str, Any]]) -> str:
        files = dict(self.commits[self.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.head = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._say(200, {"type": "user", "name": "somebody", "orgs": [{"name": "org"}]})
        if path.endswith("/auth-check/write") and self.hub.refuse:
            return self._say(self.hub.refuse, {"error": "refused"})
        if self.hub.missing:
            return self._missing("RepoNotFound")
        if found := re.fullmatch(r"/[\w./-]+/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        if path.endswith("/refs"):
            with self.hub.lock:
                tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in self.hub.tags.items()]
            return self._say(200, {"branches": [], "converts": [], "tags": tags})
        if "/tree/" in path:
            files = self.hub.files("main") or {}
            return self._say(200, [{"type": "file", "path": p, "oid": "1", "size": len(d)} for p, d in files.items()])
        return self._say(200, {"id": "org/name", "sha": self.hub.head, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            if path == "/api/repos/create":
                self.hub.created.append(json.loads(body))
                return self._say(200 if len(self.hub.created) == 1 else 409, {"url": f"{self.hub.url}/org/support-bot"})
            if "/preupload/" in path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                return self._say(200, {"files": modes})
            if "/commit/" in path:
                if self.hub.refuse:
                    return self._say(self.hub.refuse, {"error": "refused"})
                oid = self.hub.commit([json.loads(line) for line in body.splitlines()])
                return self._say(
                    200,
                    {"commitUrl": f"{self.hub.url}/org/support-bot/commit/{oid}", "commitOid": oid, "success": True},
                )
            return self._tag(path.rpartition("/")[2], json.loads(body)["tag"])

    def _tag(self, revision: str, tag: str) -> None:
        if tag in self.hub.tags:
            return self._say(409, {"error": "Reference already exists"})
        self.hub.tags[tag] = revision
        return self._say(200, {})

    def _file(self, revision: str, name: str) -> None:
        data = (self.hub.files(revision) or {}).get(name)
        if data is None:
            self._missing("EntryNotFound")
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.hub.tags.get(revision, self.hub.head))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _say(self, status: int, what: object) -> None:
        data = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Not on stderr."""
