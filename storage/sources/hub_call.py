"""One operation on a repository of a Hub: requests are tried again, redirects followed by hand, bytes checked as they come."""

import hashlib
import logging
import re
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol
from urllib.parse import quote

import httpx2
from huggingface_hub import hf_hub_url

from storage.errors import (
    DigestMismatch,
    GatedRepo,
    HubError,
    HubUnavailable,
    NotAnAdapter,
    RepoNotFound,
    RevisionNotFound,
    TokenRefused,
)
from storage.sources.hub_snapshot import HubFile, HubRef

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_INFO_MAX_BYTES = 32 * 2**20
_PAUSE_MAX_S = 30.0
_REDIRECTS_MAX = 5


class Patience(Protocol):
    """What a call needs to know of the Hub that it asks, and of how patiently."""

    @property
    def url(self) -> str: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def deadline_s(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def backoff_s(self) -> float: ...
    @property
    def sleep(self) -> Callable[[float], None]: ...
    @property
    def jitter(self) -> Callable[[], float]: ...


@cache
def tls() -> ssl.SSLContext:
    # Reading the certificates takes 70 ms, most of a small request; the context knows nothing of callers.
    return httpx2.create_ssl_context()


@dataclass
class Call:
    """One operation on one repository: its connection, and what is left of its time and retries."""

    hub: Patience
    ref: HubRef
    client: httpx2.Client
    has_token: bool
    ends_at: float
    failures: int = 0

    def again(self) -> "Call":
        """The same connection for one more operation, with all of its time and retries."""
        return replace(self, ends_at=time.monotonic() + self.hub.deadline_s, failures=0)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Swallow a failure that may pass, after a pause, so that the loop around tries again."""
        try:
            yield
        except Passing as failure:
            self._pause(failure)
        except httpx2.RequestError as failure:
            # The class alone: the library's own text may quote a signed URL.
            self._pause(Passing(f"the connection failed ({type(failure).__name__})"))

    def _pause(self, failure: "Passing") -> None:
        self.failures += 1
        if self.failures > self.hub.retries:
            raise self.unavailable(f"{failure.reason}, at attempt {self.failures}") from None
        backoff_s = min(self.hub.backoff_s * 2 ** (self.failures - 1), _PAUSE_MAX_S)
        pause_s = max(failure.wait_s, backoff_s * (1 + self.hub.jitter()) / 2)
        if time.monotonic() + pause_s >= self.ends_at:
            raise self.late(failure.reason) from None
        log.debug("hub %s: %s; trying again in %.2f s", self.ref.repo, failure.reason, pause_s)
        self.hub.sleep(pause_s)

    @contextmanager
    def answer(
        self, method: str, url: str, *, start: int = 0, stop: int | None = None, leave_hub: bool = True
    ) -> Iterator["Answer"]:
        """The successful answer to one request, redirects followed. Raises Passing or the HubError it means.

        start: first byte wanted.  stop: the one after the last, if not the file's end.  leave_hub: whether to follow a redirect
        to storage on another origin.
        """
        last = "" if stop is None else stop - 1
        range_header = {"range": f"bytes={start}-{last}"} if start or stop is not None else {}
        timeout_s = min(self.hub.timeout_s, max(self.ends_at - time.monotonic(), 0.001))
        request = self.client.build_request(method, url, headers=range_header, timeout=timeout_s)
        answer = self._follow(request, leave_hub=leave_hub)
        with closing(answer.response):
            self._require_success(answer.response)
            yield answer

    def _follow(self, request: httpx2.Request, *, leave_hub: bool) -> "Answer":
        # By hand: the library's way reads the body of every redirect, which may have no end. It still builds the next
        # request, and so drops Authorization where the origin changes.
        from_hub = httpx2.Headers()
        for _ in range(_REDIRECTS_MAX):
            response = self.client.send(request, stream=True, follow_redirects=False)
            from_hub = response.headers if self._is_hub(response.url) else from_hub
            following = response.next_request
            if following is None or not (leave_hub or self._is_hub(following.url)):
                return Answer(response, from_hub)
            response.close()
            request = following
        raise self.unavailable("it redirects in circles")

    def _is_hub(self, url: httpx2.URL) -> bool:
        return url.origin == httpx2.URL(self.hub.url).origin

    def _require_success(self, response: httpx2.Response) -> None:
        """The body of a refusal is never read: it may have no end."""
        if response.status_code < 400:
            return
        # Storage refuses once its signed URL is old; asking the Hub again brings a new one.
        if response.status_code in _PASSING_STATUS or not self._is_hub(response.url):
            raise Passing(f"it answered {response.status_code}", wait_s=_retry_after_s(response))
        raise self._refusal(response)

    def _refusal(self, response: httpx2.Response) -> HubError:
        repo, status = self.ref.repo, response.status_code
        match response.headers.get("x-error-code"):
            case "GatedRepo":
                return GatedRepo(repo)
            case "RevisionNotFound":
                return RevisionNotFound(repo, self.ref.revision)
            case "EntryNotFound":
                return NotAnAdapter(repo, response.url.path.rpartition("/")[2])
            case None if status in {401, 403} and self.has_token:
                return TokenRefused(repo)
            case "RepoNotFound" | None if status in {401, 403, 404}:
                return RepoNotFound(repo)
        return self.unavailable(f"it answered {status}")

    def body(self, response: httpx2.Response) -> Iterator[bytes]:
        # Without a chunk size: a slow trickle must show here byte by byte, not collect until the chunk is full.
        for chunk in response.iter_raw():
            if time.monotonic() >= self.ends_at:
                raise self.late("the body came too slowly")
            yield chunk

    def unavailable(self, reason: str) -> HubUnavailable:
        return HubUnavailable(self.ref.repo, reason)

    def late(self, reason: str) -> HubUnavailable:
        return self.unavailable(f"{reason}; not done within the {self.hub.deadline_s:g} s allowed")


@dataclass(frozen=True)
class Answer:
    """`response` is the last of a chain of redirects; `from_hub` are the headers of the last one the Hub itself sent."""

    response: httpx2.Response
    from_hub: httpx2.Headers


@dataclass(eq=False)
class Passing(Exception):
    """A failure that the next attempt may not meet. `wait_s`: the least pause the server asks for."""

    reason: str
    wait_s: float = 0.0


class RangesIgnored(Exception):
    """The server sends whole files, whatever part of them is asked for."""


def info(call: Call) -> bytes:
    """What the Hub says of the repository at the call's revision."""
    url = f"{call.hub.url}/api/{call.ref.kind}/{call.ref.repo}/revision/{quote(call.ref.revision, safe='')}?blobs=true"
    while True:
        text = bytearray()
        with call.attempt(), call.answer("GET", url) as answer:
            for chunk in call.body(answer.response):
                text += chunk
                if len(text) > _INFO_MAX_BYTES:
                    raise call.unavailable("its description of the repository is too long")
            return bytes(text)


def head(call: Call, path: str) -> None:
    """Returns if the Hub lets this caller read the file."""
    # Not on to storage: whom the Hub sends there, it has let in.
    url = _url(call, path)
    while True:
        with call.attempt(), call.answer("HEAD", url, leave_hub=False) as answer:
            return _require_commit(call, answer, path)


def content(call: Call, file: HubFile, on_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    """The bytes of the file, each once and in order, whatever cuts lie between."""
    url, reached, done = _url(call, file.path), 0, False
    etag: str | None = None
    while not done:
        with call.attempt(), call.answer("GET", url, start=reached) as answer:
            _require_commit(call, answer, file.path)
            etag = _require_same(call, etag, answer)
            for chunk in _beyond(call, reached, answer.response, file):
                reached += len(chunk)
                yield chunk
                if on_bytes is not None:
                    on_bytes(reached)
            if reached < file.size_bytes:
                raise Passing("the body was cut short")
            done = True
        # A reset after the last byte took nothing away.
        done = done or 0 < file.size_bytes == reached


def part(call: Call, file: HubFile, start: int, stop: int, etags: dict[str, str]) -> Iterator[bytes]:
    """Bytes `start` to `stop` of the file, each once and in order. etags: path -> what earlier answers gave, kept up to date.

    Raises RangesIgnored.
    """
    url, reached = _url(call, file.path), start
    while reached < stop:
        with call.attempt(), call.answer("GET", url, start=reached, stop=stop) as answer:
            _require_commit(call, answer, file.path)
            etags[file.path] = _require_same(call, etags.get(file.path), answer)
            if answer.response.status_code != 206:
                raise RangesIgnored
            for chunk in _beyond(call, reached, answer.response, file):
                reached += len(chunk)
                if reached > stop:
                    raise call.unavailable(f"it sent more of {file.path} than was asked for")
                yield chunk
            if reached < stop:
                raise Passing("the body was cut short")


def _beyond(call: Call, reached: int, response: httpx2.Response, file: HubFile) -> Iterator[bytes]:
    """What the answer adds to the first `reached` bytes; a server that knows no ranges begins again at 0."""
    position, size_bytes = _extent(response)
    if size_bytes not in {None, file.size_bytes}:
        raise call.unavailable(f"{file.path} has {size_bytes} bytes where {file.size_bytes} were announced")
    if position > reached:
        raise Passing("another range came than was asked for")
    for chunk in call.body(response):
        fresh = chunk[max(reached - position, 0) :]
        position += len(chunk)
        if position > file.size_bytes:
            raise call.unavailable(f"{file.path} is longer than the {file.size_bytes} bytes announced")
        if fresh:
            yield fresh


def _extent(response: httpx2.Response) -> tuple[int, int | None]:
    """Where the body starts in the file, and the size of the whole file if the answer tells."""
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if match is None:
            raise Passing("it sent a range without saying which")
        return int(match[1]), int(match[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if _NUMBER.fullmatch(length) else None


def _require_commit(call: Call, answer: Answer, path: str) -> None:
    # A missing header is refused too: a login page also answers 200.
    if answer.from_hub.get("x-repo-commit") != call.ref.revision:
        raise call.unavailable(f"it answered for {path} at another commit than {call.ref.revision}")


def _require_same(call: Call, before: str | None, answer: Answer) -> str:
    """The ETag the Hub gives now, which is only compared, never believed. Raises HubUnavailable if it changed."""
    now = answer.from_hub.get("x-linked-etag") or answer.from_hub.get("etag") or ""
    # A cache on the way may weaken a tag without a change to the file.
    now = now.removeprefix("W/")
    if before is not None and now != before:
        raise call.unavailable("the file changed while it was read")
    return now


def verified(chunks: Iterator[bytes], file: HubFile) -> Generator[bytes, None, None]:
    """The same chunks. Raises DigestMismatch after the last if git knows the file by another hash."""
    if file.git_sha1 is None:
        # Then there is a sha256, which the store checks.
        yield from chunks
        return
    hasher = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    for chunk in chunks:
        hasher.update(chunk)
        yield chunk
    if hasher.hexdigest() != file.git_sha1:
        raise DigestMismatch(f"git-sha1:{file.git_sha1}", f"git-sha1:{hasher.hexdigest()}")


def _url(call: Call, path: str) -> str:
    kind = call.ref.kind.removesuffix("s")
    return hf_hub_url(call.ref.repo, path, repo_type=kind, revision=call.ref.revision, endpoint=call.hub.url)


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if _NUMBER.fullmatch(text) else 0.0
