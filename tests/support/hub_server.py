"""A model hub on a local port, with the part of the Hugging Face hub's HTTP that downloads use."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants, file_download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LFS = (".gguf", ".safetensors")  # files whose ETag is their SHA-256, and which are redirected to


@dataclass
class Hub:
    """Repositories with one commit, the branch main."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by repository and path
    gated: set[str] = field(default_factory=set)  # repositories whose files need the token
    refused: set[str] = field(default_factory=set)  # gated ones to which the token's account has no access
    token: str = "hf_good"
    cuts: dict[str, list[int]] = field(default_factory=dict)  # by path: bytes after which each download is cut off
    requests: list[tuple[str, str, Message]] = field(default_factory=list)  # method, path, headers
    url: str = ""

    def downloads(self) -> list[tuple[str, str]]:
        """Path and Range header of each download of a large file, in order."""
        return [
            (path.split("/", 4)[4], headers.get("Range", ""))
            for method, path, headers in self.requests
            if method == "GET" and path.startswith("/content/")
        ]


@contextmanager
def hub_and_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process downloads from, into the folder `cache`."""
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10)
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))  # between attempts
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
        close_session()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A running hub, empty at first; HF_ENDPOINT is its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
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

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers))
        parts = path.strip("/").split("/")
        is_api, is_content = parts[:2] == ["api", "models"], parts[0] == "content"
        parts = parts[2:] if is_api else parts[1:] if is_content else parts
        repo, rest = "/".join(parts[:2]), parts[2:]
        revision = rest[1] if len(rest) > 1 and not is_content else "main"
        if self.headers.get("Authorization") not in (None, f"Bearer {self.hub.token}"):
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif repo not in self.hub.files:
            self._fail(401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._fail(404, "RevisionNotFound", "Invalid rev id")
        elif is_api:
            self._send_listing(repo, is_tree=rest[:1] == ["tree"])
        elif is_content:
            self._send_file(repo, "/".join(rest))
        else:
            self._resolve(repo, "/".join(rest[2:]))

    def _send_listing(self, repo: str, *, is_tree: bool) -> None:
        files = self.hub.files[repo].items()
        if is_tree:
            body: Any = [
                {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
                | ({"lfs": {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}} if _is_lfs(path) else {})
                for path, data in files
            ]
        else:
            siblings = [{"rfilename": path, "size": len(data), "blobId": _git_id(data)} for path, data in files]
            body = {"id": repo, "sha": COMMIT, "siblings": siblings, "gated": repo in self.hub.gated}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, path: str) -> None:
        data = self.hub.files[repo].get(path)
        if repo in self.hub.refused or (repo in self.hub.gated and "Authorization" not in self.headers):
            self._fail(
                403 if "Authorization" in self.headers else 401, "GatedRepo", f"Access to model {repo} is restricted"
            )
        elif data is None:
            self._fail(404, "EntryNotFound", "Entry not found")
        elif _is_lfs(path):  # the content is on another host
            location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/content/{repo}/{path}"
            linked = {"X-Linked-Etag": f'"{_etag(path, data)}"', "X-Linked-Size": str(len(data))}
            self._send(302, b"", linked | {"Location": location, "X-Repo-Commit": COMMIT})
        else:
            self._send_file(repo, path)

    def _send_file(self, repo: str, path: str) -> None:
        data = self.hub.files[repo][path]
        headers = {"ETag": f'"{_etag(path, data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cuts.get(path) if self.command == "GET" else None
        cut = cuts.pop(0) if cuts else None
        self._send(206 if start else 200, data[start:], headers, cut)

    def _fail(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _is_lfs(path: str) -> bool:
    return path.endswith(_LFS)


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else _git_id(data)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
