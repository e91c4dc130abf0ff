"""The one seam of the store: bytes in, digest out. Backends are `files` (disk) and `memory`; any other is one more file."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from storage.digest import Descriptor, Digest

Chunk = bytes | bytearray | memoryview  # one-dimensional, of format B


class BlobStore(Protocol):
    """Content-addressed bytes. A blob exists whole or not at all, and never changes."""

    def put(
        self, chunks: Iterable[Chunk], *, media_type: str, expected: Digest | None = None, limit_bytes: int | None = None
    ) -> Descriptor:
        """Store the concatenation of `chunks` under the sha256 computed here; storing the same bytes again is a no-op.

        A chunk may still be read when the next is asked for, so it must not change.
        Raises DigestMismatch if `expected` is given and differs, BlobTooLarge past `limit_bytes`,
        StoreFull if the backend has no room. After an error, or a kill at any moment, no blob has appeared.
        """
        ...

    def stat(self, digest: Digest) -> int | None:
        """Size in bytes, or None if there is no such blob."""
        ...

    def open(self, digest: Digest) -> BinaryIO:
        """A seekable binary reader. Raises BlobNotFound."""
        ...

    def path(self, digest: Digest) -> Path:
        """A local read-only file of exactly these bytes. Raises BlobNotFound."""
        ...

    def digests(self) -> Iterator[Digest]:
        """Every blob present, in ascending order."""
        ...

    def delete(self, digest: Digest) -> None:
        """Forget the blob; deleting an absent one is a no-op."""
        ...

    def age_s(self, digest: Digest) -> float:
        """Seconds since the blob was stored or last stored again. Raises BlobNotFound."""
        ...
