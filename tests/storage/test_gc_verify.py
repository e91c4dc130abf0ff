"""What a collection takes and spares, and what a verification finds."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from storage.blobs import BlobStore
from storage.digest import Digest
from storage.errors import BlobNotFound
from storage.files import FileBlobs
from storage.gc import Collected, collect
from storage.memory import MemoryBlobs
from storage.verify import Verified, verify

DAY_S = 86_400.0
ABSENT = Digest("0" * 64)
MIB = 1 << 20


@pytest.fixture(params=[FileBlobs, MemoryBlobs])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    make: Callable[[Path], BlobStore] = request.param
    return make(tmp_path)


def put(blobs: BlobStore, *contents: bytes) -> list[Digest]:
    return sorted(blobs.put([data], media_type="x").digest for data in contents)


def rot(blobs: FileBlobs, digest: Digest, data: bytes) -> None:
    path = blobs.path(digest)
    path.chmod(0o644)
    path.write_bytes(data)


def test_only_blobs_that_are_not_live_are_deleted(blobs: BlobStore) -> None:
    (live,) = put(blobs, b"live")
    dead = put(blobs, b"dead", b"dead too")
    assert collect(blobs, live=[live], grace_s=0) == Collected(tuple(dead), (live,), len(b"dead") + len(b"dead too"))
    assert list(blobs.digests()) == [live]


def test_young_blobs_are_spared(blobs: BlobStore) -> None:
    young = put(blobs, b"a", b"b")
    assert collect(blobs, live=(), grace_s=DAY_S) == Collected((), tuple(young), 0)
    assert list(blobs.digests()) == young


def test_storing_again_restarts_the_grace(blobs: BlobStore) -> None:
    old, again = (put(blobs, data)[0] for data in (b"old", b"again"))
    time.sleep(0.6)
    put(blobs, b"again")
    assert collect(blobs, live=(), grace_s=0.5) == Collected((old,), (again,), 3)


def test_a_live_digest_without_a_blob_is_no_concern(blobs: BlobStore) -> None:
    assert collect(blobs, live={ABSENT}, grace_s=0) == Collected((), (), 0)


def test_collecting_again_finds_nothing(blobs: BlobStore) -> None:
    put(blobs, b"dead")
    collect(blobs, live=(), grace_s=0)
    assert collect(blobs, live=(), grace_s=0) == Collected((), (), 0)


class Eventful(FileBlobs):
    """A disk store whose listing is complete before the first digest is handed out, and on which others then act."""

    def digests(self) -> Iterator[Digest]:
        listed = list(FileBlobs.digests(self))
        time.sleep(0.6)
        FileBlobs.put(self, [b"again"], media_type="x")
        FileBlobs.delete(self, Digest.of(b"gone"))
        yield from listed


def test_what_others_do_during_a_collection_is_seen(tmp_path: Path) -> None:
    blobs = Eventful(tmp_path)
    put(blobs, b"again", b"gone", b"dead")
    collected = collect(blobs, live=(), grace_s=0.5)
    assert collected == Collected((Digest.of(b"dead"),), (Digest.of(b"again"),), len(b"dead"))


def test_writers_readers_and_collectors_of_one_blob_do_not_trip_each_other(blobs: BlobStore, tmp_path: Path) -> None:
    data, deadline_s = b"contested", time.monotonic() + 0.7

    def read() -> None:
        with suppress(BlobNotFound), blobs.open(Digest.of(data)) as reader:
            assert reader.read() == data

    def repeat(action: Callable[[], object]) -> None:
        while time.monotonic() < deadline_s:
            action()

    actions = [lambda: put(blobs, data), read, lambda: collect(blobs, live=(), grace_s=0), lambda: list(verify(blobs))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(repeat, actions * 2))
    collect(blobs, live=(), grace_s=0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_sound_blobs_verify_one_by_one_in_order(blobs: BlobStore) -> None:
    stored = put(blobs, b"", b"x", b"y" * (2 * MIB + 1), b"z" * MIB)
    results = list(verify(blobs))
    assert [each.digest for each in results] == stored
    assert all(each.ok and each.got == each.digest and each.size_bytes == blobs.stat(each.digest) for each in results)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    sound, rotten = put(blobs, b"one", b"two")
    changed = bytes([blobs.path(rotten).read_bytes()[0] ^ 1, *blobs.path(rotten).read_bytes()[1:]])
    rot(blobs, rotten, changed)
    assert list(verify(blobs)) == [Verified(sound, True, 3, sound), Verified(rotten, False, 3, Digest.of(changed))]


@pytest.mark.parametrize("data", [b"", b"tw", b"two and more"], ids=["emptied", "cut short", "grown"])
def test_a_changed_size_is_found(tmp_path: Path, data: bytes) -> None:
    blobs = FileBlobs(tmp_path)
    (digest,) = put(blobs, b"two")
    rot(blobs, digest, data)
    assert list(verify(blobs)) == [Verified(digest, False, len(data), Digest.of(data))]


def test_a_rotten_blob_is_healed_by_deleting_and_storing_again(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    (digest,) = put(blobs, b"two")
    rot(blobs, digest, b"owt")
    blobs.delete(digest)
    put(blobs, b"two")
    assert [each.ok for each in verify(blobs)] == [True]


def test_results_come_while_the_rest_is_unread(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    first, second = put(blobs, b"one", b"two")
    results = verify(blobs)
    assert next(results).digest == first
    rot(blobs, second, b"late")
    assert not next(results).ok


def test_a_blob_deleted_meanwhile_is_left_out(tmp_path: Path) -> None:
    blobs = Eventful(tmp_path)
    put(blobs, b"again", b"gone", b"dead")
    assert [each.digest for each in verify(blobs)] == sorted([Digest.of(b"again"), Digest.of(b"dead")])
