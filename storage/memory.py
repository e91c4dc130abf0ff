"""Blobs in memory: for tests, and for merges whose result is handed over and not kept. Lost with the process."""

import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage.blobs import Chunk
from storage.digest import Descriptor, Digest
from storage.errors import BlobNotFound
from storage.files import FileBlobs, capped, require


class _Held(NamedTuple):
    data: bytes
    stored_s: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class MemoryBlobs:
    """A BlobStore in one process, safe for many threads.

    spill: a directory of its own, made when the first blob is asked for as a file.
    """

    spill: Path
    _held: dict[Digest, _Held] = field(default_factory=dict, init=False, repr=False, compare=False)

    def put(
        self, chunks: Iterable[Chunk], *, media_type: str, expected: Digest | None = None, limit_bytes: int | None = None
    ) -> Descriptor:
        data = b"".join(bytes(chunk) for chunk in capped(chunks, limit_bytes=limit_bytes))
        digest = Digest.of(data)
        require(digest, expected)
        self._held[digest] = _Held(data, time.monotonic())
        return Descriptor(digest, len(data), media_type)

    def stat(self, digest: Digest) -> int | None:
        held = self._held.get(digest)
        return None if held is None else len(held.data)

    def open(self, digest: Digest) -> BinaryIO:
        return io.BytesIO(self._get(digest).data)

    def path(self, digest: Digest) -> Path:
        data, files = self._get(digest).data, FileBlobs(self.spill)
        if files.stat(digest) != len(data):
            files.put([data], media_type="application/octet-stream", expected=digest)
        return files.path(digest)

    def digests(self) -> Iterator[Digest]:
        yield from sorted(self._held)

    def delete(self, digest: Digest) -> None:
        self._held.pop(digest, None)
        FileBlobs(self.spill).delete(digest)

    def age_s(self, digest: Digest) -> float:
        return time.monotonic() - self._get(digest).stored_s

    def _get(self, digest: Digest) -> _Held:
        held = self._held.get(digest)
        if held is None:
            raise BlobNotFound(str(digest))
        return held
