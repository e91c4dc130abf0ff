"""Blobs as files on a local disk: whole or absent, even if the writer is killed or the power fails.

A write is: temp file → count and hash while writing → fsync → rename → fsync the directories (after restic's
`local.go: Save`). The rename replaces, so any number of writers of the same bytes end as one blob.
"""

import errno
import hashlib
import io
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from storage.blobs import Chunk
from storage.digest import Descriptor, Digest
from storage.errors import BlobNotFound, BlobTooLarge, DigestMismatch, StoreFull
from storage.layout import Layout

T = TypeVar("T")

_SYNC_BYTES = 64 * 1024 * 1024  # are sent to the disk while more is written
_SMALL_BYTES = 128 * 1024  # are hashed in less time than it takes to have it done
_BEHIND = 4  # chunks

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class FileBlobs:
    """A BlobStore in the data directory `root`, safe for many threads and processes; directories are made when needed."""

    root: Path

    def put(
        self, chunks: Iterable[Chunk], *, media_type: str, expected: Digest | None = None, limit_bytes: int | None = None
    ) -> Descriptor:
        with self._incoming() as (temp, file):
            digest, size_bytes = _pour(chunks, file, limit_bytes=limit_bytes)
            require(digest, expected)
            _seal(file)
            self._publish(temp, digest, size_bytes)
        return Descriptor(digest, size_bytes, media_type)

    def stat(self, digest: Digest) -> int | None:
        # A link or a directory in a blob's place is foreign, and stays unread.
        try:
            found = self._layout.blob(digest).lstat()
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def open(self, digest: Digest) -> BinaryIO:
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError as err:  # collected between the two
            raise BlobNotFound(str(digest)) from err

    def path(self, digest: Digest) -> Path:
        if self.stat(digest) is None:
            raise BlobNotFound(str(digest))
        return self._layout.blob(digest)

    def digests(self) -> Iterator[Digest]:
        for path in sorted(self._layout.blobs.glob("??/*")):
            digest = self._layout.digest_at(path)
            if digest is not None and self.stat(digest) is not None:
                yield digest

    def delete(self, digest: Digest) -> None:
        # No fsync: a blob that comes back after a power cut is whole, and the next collection takes it again.
        self._layout.blob(digest).unlink(missing_ok=True)

    def age_s(self, digest: Digest) -> float:
        age_s = _age_s(self.path(digest))
        if age_s is None:
            raise BlobNotFound(str(digest))
        return age_s

    def sweep(self, older_than_s: float) -> int:
        """Remove the temp files of killed writers; returns how many.

        older_than_s: since the last byte arrived; take longer than any live writer may pause.
        """
        orphans = [path for path in self._layout.incoming.glob(Layout.temp_pattern) if _is_older(path, older_than_s)]
        for path in orphans:
            path.unlink(missing_ok=True)
        return len(orphans)

    @property
    def _layout(self) -> Layout:
        return Layout(self.root)

    @contextmanager
    def _incoming(self) -> Iterator[tuple[Path, io.FileIO]]:
        """A new temp file, gone afterwards unless it was renamed."""
        temp = self._layout.temp()
        with _room():
            _make_dir(temp.parent)
        try:
            # Unbuffered: a full disk shows in the write that met it, and not a second time in close().
            with _create(temp) as file:
                yield temp, file
        finally:
            temp.unlink(missing_ok=True)

    def _publish(self, temp: Path, digest: Digest, size_bytes: int) -> None:
        """Make the sealed temp the blob, or restart the age of the blob that is there; on return it outlives a power cut.

        A blob of the wrong size (cut short by a failing disk) is replaced.
        """
        blob = self._layout.blob(digest)
        with _room():
            _make_dir(blob.parent)
            if self.stat(digest) != size_bytes or not _touch(blob):
                temp.replace(blob)
            # Also when the blob was there: the writer who made it may not have come this far.
            _sync_dir(blob.parent)
            _sync_dir(blob.parent.parent)


def capped(chunks: Iterable[Chunk], *, limit_bytes: int | None) -> Iterator[Chunk]:
    """The same chunks. Raises BlobTooLarge instead of yielding the chunk that passes the limit."""
    total_bytes = 0
    for chunk in chunks:
        total_bytes += len(chunk)
        if limit_bytes is not None and total_bytes > limit_bytes:
            raise BlobTooLarge(limit_bytes)
        yield chunk


def require(got: Digest, expected: Digest | None) -> None:
    """Raises DigestMismatch if something was expected and it is not `got`."""
    if expected is not None and got != expected:
        raise DigestMismatch(str(expected), str(got))


def _pour(chunks: Iterable[Chunk], file: io.FileIO, *, limit_bytes: int | None) -> tuple[Digest, int]:
    """Write, while one thread hashes what is being written, and another sends to the disk what has been."""
    hasher, size_bytes, synced_bytes = hashlib.sha256(), 0, 0
    with _Beside() as hashing, _Beside() as syncing:
        for chunk in capped(chunks, limit_bytes=limit_bytes):
            hashing.call(hasher.update, chunk, at_once=len(chunk) < _SMALL_BYTES)
            _write(file, chunk)
            size_bytes += len(chunk)
            if size_bytes - synced_bytes >= _SYNC_BYTES and syncing.is_idle:
                syncing.call(_sync, file)
                synced_bytes = size_bytes
    return Digest(hasher.hexdigest()), size_bytes


class _Beside:
    """A thread that makes calls in their order, a few behind whoever asks for them. It starts with the first.

    What a call raises is raised by a later one, or at the end: a disk tells its failure once, so it may not get lost.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._begun: deque[Future[Any]] = deque()

    @property
    def is_idle(self) -> bool:
        return all(call.done() for call in self._begun)

    def call(self, function: Callable[[T], object], argument: T, *, at_once: bool = False) -> None:
        """at_once: if nothing is ahead of it, in the caller's thread."""
        if at_once and self.is_idle:
            function(argument)
            return
        self._begun.append(self._pool.submit(function, argument))
        if len(self._begun) > _BEHIND:
            self._begun.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if failure is None:
            for call in self._begun:
                call.result()


def _write(file: io.FileIO, chunk: Chunk) -> None:
    """All of the chunk: a single write stops short where the room ends, and only the next one says why."""
    rest = memoryview(chunk)
    # Around the write alone: an ENOSPC raised by the caller's iterator is about the caller's disk.
    with _room():
        while rest:
            rest = rest[file.write(rest) :]


def _create(path: Path) -> io.FileIO:
    with _room():
        return path.open("xb", buffering=0)


def _seal(file: io.FileIO) -> None:
    """Read-only and on the disk: mode first, so that the one fsync covers both."""
    with _room():
        os.fchmod(file.fileno(), 0o444)
    _sync(file)


def _sync(file: io.FileIO) -> None:
    with _room():
        os.fsync(file.fileno())


@contextmanager
def _room() -> Iterator[None]:
    """Raises StoreFull for the OSErrors that mean the disk, the quota or the file-size limit is reached."""
    try:
        yield
    except OSError as err:
        if err.errno in _FULL:
            raise StoreFull(os.strerror(err.errno)) from err
        raise


def _touch(blob: Path) -> bool:
    """Restart the blob's age. False if it was collected in this moment, or is another user's: then replace it."""
    try:
        os.utime(blob)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def _age_s(path: Path) -> float | None:
    """Never negative, though clocks are set back; None if there is no such file."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except FileNotFoundError:
        return None


def _is_older(path: Path, than_s: float) -> bool:
    age_s = _age_s(path)
    return age_s is not None and age_s >= than_s


def _make_dir(path: Path) -> None:
    """Make the directory and its parents; every new name is on the disk before anything is put under it."""
    if path.is_dir():
        return
    _make_dir(path.parent)
    path.mkdir(exist_ok=True)
    _sync_dir(path.parent)


def _sync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
