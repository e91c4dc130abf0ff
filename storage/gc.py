"""Forget the blobs that nothing points to. What is alive is the caller's knowledge; how old is the store's."""

from collections.abc import Collection
from dataclasses import dataclass

from storage.blobs import BlobStore
from storage.digest import Digest
from storage.errors import BlobNotFound


@dataclass(frozen=True, slots=True)
class Collected:
    """What one collection did; `deleted` and `kept` in ascending order."""

    deleted: tuple[Digest, ...]
    kept: tuple[Digest, ...]
    freed_bytes: int


def collect(blobs: BlobStore, *, live: Collection[Digest], grace_s: float) -> Collected:
    """Delete every blob that is neither live nor younger than `grace_s`.

    grace_s: must exceed the time between storing a blob and pointing to it.
    A blob stored again while this runs is kept: each age is read right before its delete, never from the listing.
    What remains is the instant between those two calls, in which storing the same bytes again could be lost.
    """
    roots, freed, kept = frozenset(live), dict[Digest, int](), list[Digest]()
    for digest in blobs.digests():
        size_bytes = blobs.stat(digest)
        if size_bytes is None:  # another collector was faster
            continue
        if digest in roots or _is_young(blobs, digest, grace_s=grace_s):
            kept.append(digest)
        else:
            blobs.delete(digest)
            freed[digest] = size_bytes
    return Collected(tuple(freed), tuple(kept), sum(freed.values()))


def _is_young(blobs: BlobStore, digest: Digest, *, grace_s: float) -> bool:
    """A blob that is gone by now is not: deleting it once more does nothing."""
    try:
        return blobs.age_s(digest) < grace_s
    except BlobNotFound:
        return False
