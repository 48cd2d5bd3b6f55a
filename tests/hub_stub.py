"""A small Hugging Face hub on this machine: its HTTP interface as far as a download needs it, and its bad days."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gguf")  # kept with LFS: redirected, with a SHA-256; others have git's SHA-1


@dataclass
class Hub:
    """What the hub holds, how it misbehaves, and what it was asked; faults by file name, used up one a request."""

    files: dict[str, bytes]
    repository: str = "owner/name"
    commit: str = COMMIT
    gated: bool = False
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # of an entry in the listing
    served: dict[str, bytes] = field(default_factory=dict)  # other bytes than those that are listed
    cuts: dict[str, list[int]] = field(default_factory=dict)  # the connection ends after so many bytes
    resets: bool = False  # a cut is a reset, not an end
    stall: threading.Event | None = None  # at a cut the connection stays open without a byte until this is set
    statuses: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    cdn: str = ""  # another host, which large files are redirected to
    told: list[tuple[str, str]] = field(default_factory=list)  # host and Authorization of every request
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    endpoint: str = ""

    def fetched(self) -> list[tuple[str, str]]:
        """File and Range of every request that handed out content."""
        return [(path, span) for method, path, span in self.asked if method == "GET" and not path.startswith("/")]

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_digest(data)}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
        return entry | self.changes.get(name, {})

    def answer(self, handler: Handler) -> None:
        path = unquote(urlsplit(handler.path).path)
        span = handler.headers.get("Range", "")
        self.told.append((handler.headers["Host"].split(":")[0], handler.headers.get("Authorization", "")))
        if match := re.fullmatch(rf"/api/models/{self.repository}(?:/revision/(.*))?", path):
            self.asked.append((handler.command, path, span))
            if match[1] not in (None, "main", "v1", self.commit):
                return handler.reply(404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [self.entry(name) for name in self.files]
            document = {"id": self.repository, "sha": self.commit, "gated": self.gated, "siblings": siblings}
            return handler.reply(200, {"Content-Type": "application/json"}, json.dumps(document).encode())
        match = re.fullmatch(rf"/{self.repository}/resolve/(?:{self.commit}|main|v1)/(.*)", path)
        name = match[1] if match else path.removeprefix("/cdn/")
        if name not in self.files:
            self.asked.append((handler.command, path, span))
            return handler.reply(401 if path.startswith("/api/models/") else 404, {"X-Error-Code": "RepoNotFound"})
        if match and self.gated:
            return handler.reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        if match and name.endswith(LARGE):
            data = self.files[name]
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return handler.reply(302, linked | {"X-Repo-Commit": self.commit, "Location": f"{self.cdn}/cdn/{name}"})
        self.asked.append((handler.command, name, span))
        return self.hand_out(handler, name, span)

    def hand_out(self, handler: Handler, name: str, span: str) -> None:
        if self.statuses.get(name):
            return handler.reply(self.statuses[name].pop(0))
        data = self.served.get(name, self.files[name])
        headers = {"ETag": f'"{git_digest(data)}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.ranges else 0
        if start and start >= len(data):
            return handler.reply(416, {"Content-Range": f"bytes */{len(data)}"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.cuts[name].pop(0) if self.cuts.get(name) else None
        return handler.reply(206 if start else 200, headers, data[start:], cut)


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Hands every request to the hub of its server."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets; the second must not wait for the first

    def do_GET(self) -> None:
        self.hub.answer(self)

    do_HEAD = do_GET  # noqa: N815

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", cut: int | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is None:
            return
        self.wfile.flush()
        if self.hub.stall is not None:
            self.hub.stall.wait(30)
        if self.hub.resets:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Says nothing about clients that go away: the tests make them."""

    daemon_threads = True

    def handle_error(self, *_arguments: object) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, reachable at its `endpoint` until the block ends."""
    handler = type("OneHub", (Handler,), {"hub": hub})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            if hub.stall is not None:
                hub.stall.set()
            server.shutdown()
            thread.join()


def point_client_at(hub: Hub, cache: Any, monkeypatch: Any) -> None:
    """Make this process's hub client ask the stub, and keep what it fetches in a cache of the test's own."""
    from huggingface_hub import close_session, constants

    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def environment_for(hub: Hub, cache: Any) -> dict[str, str]:
    """The same for a process of its own."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
