"""Files from a Hugging Face Hub: a reference becomes a pinned snapshot or listing, and its files become verified blobs.

Why not `hf_hub_download`, measured on huggingface_hub 2.4: it does not notice same-size corruption, a hostile ETag makes
it write outside its cache, a kill leaves `.incomplete` files behind, it retries neither a TCP reset nor a 503 on GET, and
it knows no overall deadline. So the library gives the URLs, headers and naming rules, and the bytes stream straight into
the blob store, which verifies them and writes all or nothing. Nothing a server says ever becomes a path.

Why not its session and `model_info` either: the session belongs to the whole process, keeps cookies (which would carry
one caller's login into the next caller's request) and may be closed by another thread; `model_info` reads an answer of
any length for any time. Each operation here has a client of its own. Xet is never used: the plain URL serves every file.

Time: `deadline_s` bounds one whole operation, retries and slow bodies included. The clock is read between two reads, and
a single read waits `timeout_s` at most, so an operation ends by `deadline_s + timeout_s`; only a Hub that drips its very
headers can stretch that, up to the 100 kB of headers the library takes.
"""

import hashlib
import logging
import random
import re
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from urllib.parse import quote

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily, which mypy cannot see

from storage.blobs import BlobStore
from storage.digest import Descriptor
from storage.errors import (
    BlobTooLarge,
    DigestMismatch,
    GatedRepo,
    HubError,
    HubUnavailable,
    NotAnAdapter,
    RepoNotFound,
    RevisionNotFound,
    TokenRefused,
)
from storage.sources.hub_snapshot import WEIGHTS, HubFile, HubListing, HubRef, HubSnapshot, read_listing, read_snapshot

__all__ = ["PUBLIC_HUB", "Hub", "HubFile", "HubListing", "HubRef", "HubSnapshot"]

log = logging.getLogger(__name__)

PUBLIC_HUB = "https://huggingface.co"

_TOKEN = re.compile(r"[!-~]+")
_NUMBER = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_INFO_MAX_BYTES = 32 * 2**20
_PAUSE_MAX_S = 30.0
_REDIRECTS_MAX = 5


@dataclass(frozen=True)
class Hub:
    """A Hub and how patiently it is asked. `token`: the operator's, used where a caller passes none of its own.

    `backoff_s`: the first pause; later ones double, up to 30 s. `jitter`: draws from [0, 1).
    """

    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    _: KW_ONLY
    timeout_s: float = 10.0
    deadline_s: float = 900.0
    retries: int = 5
    backoff_s: float = 0.5
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    jitter: Callable[[], float] = field(default=random.SystemRandom().random, repr=False)

    @property
    def url(self) -> str:
        return (self.endpoint or PUBLIC_HUB).rstrip("/")

    def resolve(self, ref: HubRef, *, token: str | None = None) -> HubSnapshot:
        """The adapter that `ref` names now, pinned to its commit, which this caller may read.

        Raises RepoNotFound, RevisionNotFound, GatedRepo, TokenRefused, PickleOnly, NotAnAdapter,
        SeveralAdapters, HubUnavailable.
        """
        with self._call(ref, token) as call:
            snapshot = read_snapshot(ref, _info(call))
            if snapshot.restricted:
                # The Hub describes a gated repository to everyone; better refused now than in the middle of a job.
                _head(replace(call, ref=snapshot.ref), snapshot.weights.path)
        return snapshot

    def listing(self, ref: HubRef, *, token: str | None = None) -> HubListing:
        """What `ref` holds now, pinned to its commit. The Hub describes a gated repository to everyone: see `check_access`.

        Raises RepoNotFound, RevisionNotFound, TokenRefused, HubUnavailable.
        """
        with self._call(ref, token) as call:
            return read_listing(ref, _info(call))

    def check_access(self, ref: HubRef, *, file: str = WEIGHTS, token: str | None = None) -> None:
        """Ask the Hub whether this caller may read this file at `ref`; returns if so.

        To be called before a restricted blob, fetched for one caller, is handed to another.
        Raises RepoNotFound, RevisionNotFound, GatedRepo, TokenRefused, NotAnAdapter, HubUnavailable.
        """
        with self._call(ref, token) as call:
            _head(call, ref.file(file))

    def fetch(
        self,
        snapshot: HubSnapshot | HubListing,
        file: HubFile,
        blobs: BlobStore,
        *,
        media_type: str,
        token: str | None = None,
        limit_bytes: int | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Descriptor:
        """Store one file of the snapshot, verified against the hash the Hub announced for it.

        on_bytes: called with the number of bytes held so far; what it raises ends the download.
        Raises as `check_access`, and DigestMismatch, BlobTooLarge, StoreFull; then no blob has appeared.
        """
        if limit_bytes is not None and file.size_bytes > limit_bytes:
            raise BlobTooLarge(limit_bytes)
        with self._call(snapshot.ref, token) as call:

            def store() -> Descriptor:
                with closing(_verified(_content(call, file, on_bytes), file)) as chunks:
                    return blobs.put(chunks, media_type=media_type, expected=file.sha256, limit_bytes=limit_bytes)

            try:
                return store()
            except DigestMismatch:
                # One bad read on the way is worth a second try from the first byte; two are the file itself.
                return store()

    @contextmanager
    def _call(self, ref: HubRef, token: str | None) -> Iterator["_Call"]:
        secret = token or self.token
        if secret is not None and _TOKEN.fullmatch(secret) is None:
            # Here and not in the HTTP library, whose complaint about a bad header quotes the header.
            raise TokenRefused(ref.repo)
        # False, not None: None means the login cached on this machine.
        headers = build_hf_headers(token=secret or False, library_name="braid")
        # identity: sizes and hashes are of the file, and nothing here unpacks.
        with httpx2.Client(headers=headers | {"accept-encoding": "identity"}, verify=_tls()) as client:
            yield _Call(self, ref, client, secret is not None, ends_at=time.monotonic() + self.deadline_s)


@cache
def _tls() -> ssl.SSLContext:
    # Reading the certificates takes 70 ms, most of a small request; the context knows nothing of callers.
    return httpx2.create_ssl_context()


@dataclass
class _Call:
    """One operation on one repository: its connection, and what is left of its time and retries."""

    hub: Hub
    ref: HubRef
    client: httpx2.Client
    has_token: bool
    ends_at: float
    failures: int = 0

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Swallow a failure that may pass, after a pause, so that the loop around tries again."""
        try:
            yield
        except _Passing as failure:
            self._pause(failure)
        except httpx2.RequestError as failure:
            # The class alone: the library's own text may quote a signed URL.
            self._pause(_Passing(f"the connection failed ({type(failure).__name__})"))

    def _pause(self, failure: "_Passing") -> None:
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
    def answer(self, method: str, url: str, *, start: int = 0, leave_hub: bool = True) -> Iterator["_Answer"]:
        """The successful answer to one request, redirects followed. Raises _Passing or the HubError it means.

        start: first byte wanted.  leave_hub: whether to follow a redirect to storage on another origin.
        """
        range_header = {"range": f"bytes={start}-"} if start else {}
        timeout_s = min(self.hub.timeout_s, max(self.ends_at - time.monotonic(), 0.001))
        request = self.client.build_request(method, url, headers=range_header, timeout=timeout_s)
        answer = self._follow(request, leave_hub=leave_hub)
        with closing(answer.response):
            self._require_success(answer.response)
            yield answer

    def _follow(self, request: httpx2.Request, *, leave_hub: bool) -> "_Answer":
        # By hand: the library's way reads the body of every redirect, which may have no end. It still builds the next
        # request, and so drops Authorization where the origin changes.
        from_hub = httpx2.Headers()
        for _ in range(_REDIRECTS_MAX):
            response = self.client.send(request, stream=True, follow_redirects=False)
            from_hub = response.headers if self._is_hub(response.url) else from_hub
            following = response.next_request
            if following is None or not (leave_hub or self._is_hub(following.url)):
                return _Answer(response, from_hub)
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
            raise _Passing(f"it answered {response.status_code}", wait_s=_retry_after_s(response))
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
class _Answer:
    """`response` is the last of a chain of redirects; `from_hub` are the headers of the last one the Hub itself sent."""

    response: httpx2.Response
    from_hub: httpx2.Headers


@dataclass(eq=False)
class _Passing(Exception):
    """A failure that the next attempt may not meet. `wait_s`: the least pause the server asks for."""

    reason: str
    wait_s: float = 0.0


def _info(call: _Call) -> bytes:
    url = f"{call.hub.url}/api/{call.ref.kind}/{call.ref.repo}/revision/{quote(call.ref.revision, safe='')}?blobs=true"
    while True:
        text = bytearray()
        with call.attempt(), call.answer("GET", url) as answer:
            for chunk in call.body(answer.response):
                text += chunk
                if len(text) > _INFO_MAX_BYTES:
                    raise call.unavailable("its description of the repository is too long")
            return bytes(text)


def _head(call: _Call, path: str) -> None:
    # Not on to storage: whom the Hub sends there, it has let in.
    url = _url(call, path)
    while True:
        with call.attempt(), call.answer("HEAD", url, leave_hub=False) as answer:
            return _require_commit(call, answer, path)


def _content(call: _Call, file: HubFile, on_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
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
                raise _Passing("the body was cut short")
            done = True
        # A reset after the last byte took nothing away.
        done = done or 0 < file.size_bytes == reached


def _beyond(call: _Call, reached: int, response: httpx2.Response, file: HubFile) -> Iterator[bytes]:
    """What the answer adds to the first `reached` bytes; a server that knows no ranges begins again at 0."""
    position, size_bytes = _extent(response)
    if size_bytes not in {None, file.size_bytes}:
        raise call.unavailable(f"{file.path} has {size_bytes} bytes where {file.size_bytes} were announced")
    if position > reached:
        raise _Passing("another range came than was asked for")
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
            raise _Passing("it sent a range without saying which")
        return int(match[1]), int(match[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if _NUMBER.fullmatch(length) else None


def _require_commit(call: _Call, answer: _Answer, path: str) -> None:
    # A missing header is refused too: a login page also answers 200.
    if answer.from_hub.get("x-repo-commit") != call.ref.revision:
        raise call.unavailable(f"it answered for {path} at another commit than {call.ref.revision}")


def _require_same(call: _Call, before: str | None, answer: _Answer) -> str:
    """The ETag the Hub gives now, which is only compared, never believed. Raises HubUnavailable if it changed."""
    now = answer.from_hub.get("x-linked-etag") or answer.from_hub.get("etag") or ""
    # A cache on the way may weaken a tag without a change to the file.
    now = now.removeprefix("W/")
    if before is not None and now != before:
        raise call.unavailable("the file changed while it was read")
    return now


def _verified(chunks: Iterator[bytes], file: HubFile) -> Generator[bytes, None, None]:
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


def _url(call: _Call, path: str) -> str:
    kind = call.ref.kind.removesuffix("s")
    return hf_hub_url(call.ref.repo, path, repo_type=kind, revision=call.ref.revision, endpoint=call.hub.url)


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("retry-after", "")
    return float(text) if _NUMBER.fullmatch(text) else 0.0
