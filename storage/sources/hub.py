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

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace

import httpx2
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily, which mypy cannot see

from storage.blobs import BlobStore
from storage.digest import Descriptor
from storage.errors import BlobTooLarge, DigestMismatch, TokenRefused
from storage.sources.hub_call import Call, RangesIgnored, content, head, info, part, tls, verified
from storage.sources.hub_snapshot import WEIGHTS, HubFile, HubListing, HubRef, HubSnapshot, read_listing, read_snapshot

__all__ = ["PUBLIC_HUB", "Hub", "HubFile", "HubListing", "HubRef", "HubSnapshot", "Part", "RangesIgnored"]

PUBLIC_HUB = "https://huggingface.co"

Part = Callable[[HubFile, int, int], Iterator[bytes]]

_TOKEN = re.compile(r"[!-~]+")


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
            snapshot = read_snapshot(ref, info(call))
            if snapshot.restricted:
                # The Hub describes a gated repository to everyone; better refused now than in the middle of a job.
                head(replace(call, ref=snapshot.ref), snapshot.weights.path)
        return snapshot

    def listing(self, ref: HubRef, *, token: str | None = None) -> HubListing:
        """What `ref` holds now, pinned to its commit. The Hub describes a gated repository to everyone: see `check_access`.

        Raises RepoNotFound, RevisionNotFound, TokenRefused, HubUnavailable.
        """
        with self._call(ref, token) as call:
            return read_listing(ref, info(call))

    def check_access(self, ref: HubRef, *, file: str = WEIGHTS, token: str | None = None) -> None:
        """Ask the Hub whether this caller may read this file at `ref`; returns if so.

        To be called before a restricted blob, fetched for one caller, is handed to another.
        Raises RepoNotFound, RevisionNotFound, GatedRepo, TokenRefused, NotAnAdapter, HubUnavailable.
        """
        with self._call(ref, token) as call:
            head(call, ref.file(file))

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
                with closing(verified(content(call, file, on_bytes), file)) as chunks:
                    return blobs.put(chunks, media_type=media_type, expected=file.sha256, limit_bytes=limit_bytes)

            try:
                return store()
            except DigestMismatch:
                # One bad read on the way is worth a second try from the first byte; two are the file itself.
                return store()

    @contextmanager
    def parts(self, listing: HubListing, *, token: str | None = None) -> Iterator[Part]:
        """What gives the bytes from `start` to `stop` of a file, all over one connection, each with a deadline of its own.

        No hash covers a part: it is of the announced commit and size, and all parts of a file are of one ETag.
        Raises as `check_access`, and RangesIgnored where the server can only send whole files.
        """
        etags: dict[str, str] = {}
        with self._call(listing.ref, token) as call:
            yield lambda file, start, stop: part(call.again(), file, start, stop, etags)

    @contextmanager
    def _call(self, ref: HubRef, token: str | None) -> Iterator[Call]:
        secret = token or self.token
        if secret is not None and _TOKEN.fullmatch(secret) is None:
            # Here and not in the HTTP library, whose complaint about a bad header quotes the header.
            raise TokenRefused(ref.repo)
        # False, not None: None means the login cached on this machine.
        headers = build_hf_headers(token=secret or False, library_name="braid")
        # identity: sizes and hashes are of the file, and nothing here unpacks.
        with httpx2.Client(headers=headers | {"accept-encoding": "identity"}, verify=tls()) as client:
            yield Call(self, ref, client, secret is not None, ends_at=time.monotonic() + self.deadline_s)
