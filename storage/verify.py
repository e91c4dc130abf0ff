"""Read every blob again and compare: the only way to find bytes that changed on the disk."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from storage.blobs import BlobStore
from storage.digest import Digest
from storage.errors import BlobNotFound

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """One blob read again. `got`: the digest of the bytes that are there now; `ok`: it is still `digest`."""

    digest: Digest
    ok: bool
    size_bytes: int
    got: Digest


def verify(blobs: BlobStore) -> Iterator[Verified]:
    """One result per blob, as soon as it is known, in ascending order; blobs deleted meanwhile are left out."""
    for digest in blobs.digests():
        try:
            reader = blobs.open(digest)
        except BlobNotFound:
            continue
        with reader:
            got, size_bytes = _measure(reader)
        yield Verified(digest, got == digest, size_bytes, got)


def _measure(reader: BinaryIO) -> tuple[Digest, int]:
    hasher, size_bytes = hashlib.sha256(), 0
    while chunk := reader.read(_CHUNK_BYTES):
        hasher.update(chunk)
        size_bytes += len(chunk)
    return Digest(hasher.hexdigest()), size_bytes
