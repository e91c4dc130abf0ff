"""A Hub on 127.0.0.1 that speaks the real protocol, with a storage host of its own and faults on request.

    with HubServer() as hub:
        commit = hub.add_repo("org/name", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"..."})
        hub.fail("adapter_model.safetensors", "cut", at=100)         # the next body ends after 100 bytes
        hf_hub_download("org/name", "adapter_config.json", endpoint=hub.endpoint, cache_dir=tmp_path)
        hub.requests("GET", "/resolve/")                              # what was asked, with headers

LFS files are answered by a 302 to `hub.cdn`: other host name, other port, no check of tokens.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LFS = ("*.safetensors", "*.bin", "*.pt", "*.parquet", "*.gguf")
API = "api"


@dataclass(frozen=True)
class Seen:
    """One request as it arrived. `host`: "hub" or "cdn"; header names in lower case."""

    host: str
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What goes wrong with the file `where` (or with the model info, where="api") for the next `times` answers.

    cut         the body ends cleanly for TCP after `at` bytes           reset     a TCP reset after `at` bytes
    corrupt     the byte at `at` is another; the size stays              trickle   the body comes at `per_s` bytes a second
    status      the Hub answers `code` (`headers` may add Retry-After)   cdn       storage answers `code`
    no_range    storage and Hub ignore Range and send everything         extra     the body has more bytes than announced
    etag        the Hub's ETag is `value`                                commit    X-Repo-Commit is `value`
    body        the answer is `value`                                    stall     nothing is answered at all for `at` seconds
    """

    where: str
    kind: str
    times: float = 1
    at: int = 0
    code: int = 503
    per_s: int = 50
    value: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    private: bool
    gated: bool
    readers: frozenset[str]
    lfs: tuple[str, ...]
    card: Mapping[str, Any]
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class HubServer:
    """See the module. `tokens`: those the Hub knows; others are answered 401."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: set[str] = set()
        self.moved: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.cookie: str | None = None
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), partial(handler, self)) for handler in (_HubHandler, _CdnHandler)]

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._servers[1].server_address[1]}"

    def add_repo(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        refs: Sequence[str] = ("main",),
        private: bool = False,
        gated: bool = False,
        readers: Sequence[str] = (),
        lfs: Sequence[str] = LFS,
        card: Mapping[str, Any] | None = None,
    ) -> str:
        """A new commit of exactly `files`, to which `refs` point from now on; returns its 40 digits.

        name: `org/name` of a model, `datasets/org/name` of a dataset.
        readers: tokens that may read a private or gated repository.
        """
        repo = self.repos.setdefault(name, Repo(private, gated, frozenset(readers), tuple(lfs), card or {}))
        self.tokens.update(readers)
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs.update(dict.fromkeys(refs, commit))
        return commit

    def fail(self, where: str, kind: str, **rest: Any) -> Fault:
        fault = Fault(where, kind, **rest)
        self._faults.append(fault)
        return fault

    def take(self, where: str, *kinds: str) -> Fault | None:
        """The first such fault that is still due; counts it."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.kind in kinds and fnmatch(where, fault.where):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str = "*", part: str = "", *, host: str = "*") -> list[Seen]:
        return [s for s in self.seen if fnmatch(s.method, method) and part in s.path and fnmatch(s.host, host)]

    def blob(self, sha256: str) -> tuple[str, bytes]:
        """Path and bytes of the LFS file of that hash."""
        for repo in self.repos.values():
            for files in repo.commits.values():
                for path, data in files.items():
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return path, data
        raise KeyError(sha256)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are the point of many tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host = "hub"

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.seen.append(Seen(self.host, self.command, self.path, headers))
        with suppress(ConnectionError):
            self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def head(self, code: int, headers: Mapping[str, str], *, length: int = 0) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.hub.cookie is not None:
            self.send_header("Set-Cookie", self.hub.cookie)
        self.end_headers()

    def send_file(self, path: str, data: bytes, headers: Mapping[str, str]) -> None:
        """200, or 206/416 where a Range is asked for, spoiled by the fault that is due."""
        fault = None if self.command == "HEAD" else self.hub.take(path, "cut", "reset", "corrupt", "trickle", "no_range", "extra")
        kind = None if fault is None else fault.kind
        if fault is not None and kind == "corrupt":
            data = data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
        if kind == "extra":
            data += b"more"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or kind == "no_range":
            self.head(200, {"Accept-Ranges": "bytes", **headers}, length=len(data))
            self.send_body(data, fault)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if start >= len(data):
            self.head(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        part = data[start : end + 1]
        self.head(
            206, {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{end}/{len(data)}", **headers}, length=len(part)
        )
        self.send_body(part, fault)

    def send_body(self, data: bytes, fault: Fault | None) -> None:
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind in {"cut", "reset"}:
            self.wfile.write(data[: fault.at])
            self.hang_up(reset=fault.kind == "reset")
        elif fault is not None and fault.kind == "trickle":
            self.trickle(data, 1 / fault.per_s)
        else:
            self.wfile.write(data)

    def trickle(self, data: bytes, pause_s: float) -> None:
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            time.sleep(pause_s)

    def hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # A reset drops what the peer has not read yet, so let it read. With this linger, close() sends RST, not FIN;
            # the socket closes only when the reader made from it does.
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


class _CdnHandler(_Handler):
    host = "cdn"

    def answer(self) -> None:
        path, data = self.hub.blob(urlsplit(self.path).path.rpartition("/")[2])
        if fault := self.hub.take(path, "cdn"):
            self.head(fault.code, fault.headers)
            return
        self.send_file(path, data, {"ETag": '"cdn"'})


class _HubHandler(_Handler):
    def answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "models", org, name, *rest]:
                self.on_repo(f"{org}/{name}", rest or ["revision", "main"])
            case ["api", "datasets", org, name, *rest]:
                self.on_repo(f"datasets/{org}/{name}", rest or ["revision", "main"])
            case ["datasets", org, name, "resolve", *rest]:
                self.on_repo(f"datasets/{org}/{name}", ["resolve", *rest])
            case [org, name, "resolve", *rest]:
                self.on_repo(f"{org}/{name}", ["resolve", *rest])
            case _:
                self.refuse(404, "")

    def on_repo(self, name: str, rest: Sequence[str]) -> None:
        if name in self.hub.moved:
            self.head(307, {"Location": self.path.replace(name, self.hub.moved[name], 1)})
            return
        repo, token = self.hub.repos.get(name), self.token()
        if token is not None and token not in self.hub.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token not in repo.readers):
            self.refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        else:
            self.on_revision(name, repo, rest)

    def on_revision(self, name: str, repo: Repo, rest: Sequence[str]) -> None:
        kind, revision, *path = rest
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif kind == "resolve":
            self.resolve(repo, commit, "/".join(path))
        elif kind == "tree":
            self.send_json([_tree_entry(repo, path, data) for path, data in repo.commits[commit].items()])
        else:
            self.send_json(_model_info(name, repo, commit))

    def resolve(self, repo: Repo, commit: str, path: str) -> None:
        if repo.gated and self.token() not in repo.readers:
            self.refuse(401 if self.token() is None else 403, "GatedRepo", "Access to this model is restricted")
            return
        data = repo.commits[commit].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif not self.spoiled(path):
            self.send_entry(repo, commit, path, data)

    def send_entry(self, repo: Repo, commit: str, path: str, data: bytes) -> None:
        etag, other = self.hub.take(path, "etag"), self.hub.take(path, "commit")
        headers = {"X-Repo-Commit": commit if other is None else other.value}
        headers["ETag"] = f'"{_git_sha1(data)}"' if etag is None else etag.value
        if not _is_lfs(repo, path):
            self.send_file(path, data, headers)
            return
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-ETag": f'"{sha256}"' if etag is None else etag.value, "X-Linked-Size": str(len(data))}
        self.head(302, {**headers, "Location": f"{self.hub.cdn}/blobs/{sha256}?signature=secret-of-storage"})

    def spoiled(self, where: str) -> bool:
        if self.command == "HEAD":
            return False
        if fault := self.hub.take(where, "stall"):
            time.sleep(fault.at)
        if fault := self.hub.take(where, "status"):
            self.head(fault.code, fault.headers)
        return fault is not None

    def send_json(self, value: object) -> None:
        if self.spoiled(API):
            return
        fault = self.hub.take(API, "body")
        text = json.dumps(value).encode() if fault is None else fault.value.encode()
        self.send_file(API, text, {"Content-Type": "application/json"})

    def refuse(self, code: int, error: str, message: str = "Not found") -> None:
        self.head(code, {"X-Error-Message": message} | ({"X-Error-Code": error} if error else {}))

    def token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None


def _model_info(name: str, repo: Repo, commit: str) -> dict[str, Any]:
    siblings = [_sibling(repo, path, data) for path, data in repo.commits[commit].items()]
    gated = "manual" if repo.gated else False
    return {"id": name, "sha": commit, "private": repo.private, "gated": gated, "siblings": siblings, "cardData": dict(repo.card)}


def _sibling(repo: Repo, path: str, data: bytes) -> dict[str, Any]:
    entry = {"rfilename": path, "size": len(data), "blobId": _git_sha1(data)}
    if _is_lfs(repo, path):
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _tree_entry(repo: Repo, path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_sha1(data)}
    if _is_lfs(repo, path):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _is_lfs(repo: Repo, path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in repo.lfs)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
