"""A stand-in for the Hugging Face hub on this machine, with connections that break on request."""

import contextlib
import hashlib
import http.server
import itertools
import json
import os
import re
import socket
import struct
import threading
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import close_session

COMMIT = "7" * 40


def point_to(url, monkeypatch):
    """Lets huggingface_hub ask the stand-in, whatever the environment says."""
    monkeypatch.setattr(constants, "ENDPOINT", url)  # HF_ENDPOINT was read at import
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()


class Request(NamedTuple):
    method: str
    path: str  # in the address, such as /xai-org/grok-1/resolve/main/ckpt-0/tensor00000_000
    range: str | None  # such as "bytes=1000-"
    token: str | None


class Hub:
    """Serves the files under `folder`, read at each request, as `repo`, at any revision.

    with Hub(folder) as hub:
        hub.cut["ckpt-0/tensor00001_000"] = 5000
        subprocess.run(..., env={**os.environ, **hub.environment})
        assert hub.ranges("ckpt-0/tensor00001_000") == [None, "bytes=5000-"]

    As on the real hub, a file's address redirects to a store under another host name, and only the
    redirect tells sha256 and commit.

    url: for HF_ENDPOINT; `environment` holds it and what else a subprocess needs
    requests: all that came, in order
    cut: {file: N}: the connection breaks before byte N of the file, whenever it gets there
    cut_once: likewise, the first time only
    reset: likewise, the first time only, by a TCP reset rather than an early end
    stall: likewise, but the connection stays open and nothing comes, until the hub is closed
    plain: files in git rather than LFS: no sha256 and no redirect

    And as no hub should:

    endless: files that are followed by zeros, without an end; "*" for errors and redirects
    drip: {file: "header" or "body"}, sent a byte at a time, slowly; "*" for all else
    encoding: {file: Content-Encoding}; "*" for all else
    listing: sent in place of the real one
    """

    def __init__(self, folder, repo: str = "xai-org/grok-1"):
        self.folder, self.repo = Path(folder), repo
        self.requests: list[Request] = []
        self.cut: dict[str, int] = {}
        self.cut_once: dict[str, int] = {}
        self.reset: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.plain: set[str] = set()
        self.endless: set[str] = set()
        self.drip: dict[str, str] = {}
        self.encoding: dict[str, str] = {}
        self.listing: bytes | None = None
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.store = f"http://localhost:{self.server.server_port}/store"
        self.environment = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def ranges(self, file: str) -> list[str | None]:
        """The Range of each request for the bytes of a file; None for all of it."""
        asked = [request for request in self.requests if request.method == "GET"]
        if file not in self.plain:
            asked = [request for request in asked if request.path.startswith("/store/")]
        return [request.range for request in asked if request.path.endswith(f"/{file}")]

    def files(self) -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    shift = 0  # of the bytes sent, from those asked for

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        asked = self.headers["Range"], self.headers["Authorization"]
        self.hub.requests.append(Request(self.command, path, *asked))
        repo = re.escape(self.hub.repo)
        if match := re.fullmatch(rf"/api/models/{repo}(/revision/[^/]+)?", path):
            self._list("blobs" in self.path)
        elif (match := re.fullmatch(rf"/{repo}/resolve/[^/]+/(.+)", path)) and self._has(match[1]):
            self._resolve(match[1])
        elif (match := re.fullmatch(r"/store/(.+)", path)) and self._has(match[1]):
            self._send_file(match[1])
        else:
            known = path.startswith((f"/{self.hub.repo}/", "/store/"))
            code = "EntryNotFound" if known else "RepoNotFound"
            self._answer(404, {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _has(self, file: str) -> bool:
        return file in self.hub.files()

    def _list(self, sizes: bool):
        siblings = []
        for file in self.hub.files():
            content = (self.hub.folder / file).read_bytes()
            entry = {"rfilename": file}
            if sizes:
                entry |= {"size": len(content), "blobId": _git(content)}
            if sizes and file not in self.hub.plain:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(entry)
        about = {"id": self.hub.repo, "modelId": self.hub.repo, "sha": COMMIT, "siblings": siblings}
        body = json.dumps(about).encode() if self.hub.listing is None else self.hub.listing
        self._answer(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, file: str):
        content = (self.hub.folder / file).read_bytes()
        if file in self.hub.plain:
            self._send_file(file, {"ETag": f'"{_git(content)}"', "X-Repo-Commit": COMMIT})
            return
        headers = {
            "Location": f"{self.hub.store}/{urllib.parse.quote(file)}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self._answer(302, headers)

    def _send_file(self, file: str, headers=None):
        content = (self.hub.folder / file).read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(match[1]) + self.shift if match else 0
        if match and start >= len(content):
            self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = {"ETag": '"store"', "Accept-Ranges": "bytes", **(headers or {})}
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stalls = file in self.hub.stall
        ends = [len(content), self.hub.cut.get(file), self.hub.stall.get(file)]
        reset = None
        if self.command == "GET":
            reset = self.hub.reset.pop(file, None)
            ends += [reset, self.hub.cut_once.pop(file, None)]
        end = min(end for end in ends if end is not None)
        body = content[start:]
        self._answer(206 if match else 200, headers, body, max(end - start, 0), file)
        if stalls:
            self.hub.closing.wait()
        if reset is not None:
            self.wfile.flush()
            self.hub.closing.wait(0.3)  # what the other side has not read yet is lost with a reset
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())

    def _answer(self, status, headers: dict, body: bytes = b"", count=None, file: str = "*"):
        drip = self.hub.drip.get(file)
        endless = file in self.hub.endless and (file != "*" or status >= 300)
        if encoding := self.hub.encoding.get(file):
            headers = {**headers, "Content-Encoding": encoding}
        self.send_response(status)
        if drip == "header":
            self.flush_headers()
            self._drip(b"X-Slow: ")
        for name, value in headers.items():
            self.send_header(name, value)
        if not endless:  # it ends with the connection
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if drip:
            self._drip(body)
        self.wfile.write(body[:count])
        while endless and not self.hub.closing.is_set():
            self.wfile.write(bytes(1 << 16))

    def _drip(self, start: bytes):
        for i in itertools.count():
            self.wfile.write(start[i : i + 1] or b"0")
            self.wfile.flush()
            if self.hub.closing.wait(0.02):
                break

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the other side has had enough
            super().handle()

    def log_message(self, *_):
        pass


def _git(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
