"""What every BlobStore promises, checked on each of ours."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.files
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.errors import BlobNotFound, BlobTooLarge, DigestMismatch
from storage.files import FileBlobs
from storage.layout import Layout
from storage.memory import MemoryBlobs

BYTES = "application/octet-stream"
ABSENT = Digest("0" * 64)
WRITERS = 64
MIB = 1024 * 1024
STORES = (FileBlobs, MemoryBlobs)
PROJECT = Path(storage.files.__file__).parents[1]

Make = Callable[[Path], BlobStore]


@pytest.fixture(params=STORES)
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    make: Make = request.param
    return make(tmp_path)


def put(blobs: BlobStore, data: bytes) -> Digest:
    return blobs.put([data], media_type=BYTES).digest


def read(blobs: BlobStore, digest: Digest) -> bytes:
    with blobs.open(digest) as reader:
        return reader.read()


def files_under(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if not path.is_dir()]


def assert_empty(blobs: BlobStore, root: Path) -> None:
    assert list(blobs.digests()) == []
    assert files_under(root) == []


def test_bytes_come_back_under_the_sha256_of_all_chunks(blobs: BlobStore) -> None:
    descriptor = blobs.put([b"ab", b"", b"c"], media_type="text/plain")
    assert descriptor == Descriptor(Digest(hashlib.sha256(b"abc").hexdigest()), 3, "text/plain")
    assert read(blobs, descriptor.digest) == b"abc"
    assert blobs.stat(descriptor.digest) == 3


@pytest.mark.parametrize("make", STORES)
@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.binary(max_size=300), max_size=12))
def test_any_chunking_of_the_same_bytes_is_the_same_blob(make: Make, chunks: list[bytes]) -> None:
    with TemporaryDirectory() as directory:
        blobs, whole = make(Path(directory)), b"".join(chunks)
        assert blobs.put(iter(chunks), media_type=BYTES).digest == put(blobs, whole) == Digest.of(whole)
        assert read(blobs, Digest.of(whole)) == whole


def test_chunks_of_all_sizes_are_hashed_in_their_order(blobs: BlobStore) -> None:
    sizes = [3, MIB, 5, 7, 4 * MIB, *[MIB] * 140, 1]  # small ones after large ones, and enough to be synced on the way
    parts = [os.urandom(1024) * (size // 1024) + bytes([n % 256]) * (size % 1024) for n, size in enumerate(sizes)]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    descriptor = blobs.put((memoryview(part) for part in parts), media_type=BYTES)
    assert descriptor == Descriptor(Digest(whole.hexdigest()), sum(sizes), BYTES)
    assert read(blobs, descriptor.digest) == b"".join(parts)


@pytest.mark.parametrize("later", [0, 1, 20])
def test_what_fails_beside_the_writing_is_not_forgotten(later: int) -> None:
    done: list[int] = []
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)), storage.files._Beside() as beside:
        beside.call(os.fsync, 1_000_000)  # a disk tells its failure once, and the next call is well
        for n in range(later):
            beside.call(done.append, n)
    assert done == list(range(len(done)))


def test_storing_twice_is_storing_once(blobs: BlobStore) -> None:
    assert put(blobs, b"same") == put(blobs, b"same")
    assert list(blobs.digests()) == [Digest.of(b"same")]


def test_the_empty_blob_is_a_blob(blobs: BlobStore) -> None:
    digest = blobs.put([], media_type=BYTES, limit_bytes=0).digest
    assert (digest, blobs.stat(digest), read(blobs, digest)) == (Digest.of(b""), 0, b"")
    assert blobs.path(digest).read_bytes() == b""


def test_a_reader_seeks(blobs: BlobStore) -> None:
    with blobs.open(put(blobs, b"0123456789")) as reader:
        reader.seek(4)
        assert reader.read(3) == b"456"


def test_the_expected_digest_is_accepted(blobs: BlobStore) -> None:
    assert blobs.put([b"x"], media_type=BYTES, expected=Digest.of(b"x")).digest == Digest.of(b"x")


def test_other_bytes_than_expected_leave_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch) as caught:
        blobs.put([b"evil"], media_type=BYTES, expected=Digest.of(b"good"))
    assert (caught.value.expected, caught.value.got) == (str(Digest.of(b"good")), str(Digest.of(b"evil")))
    assert_empty(blobs, tmp_path)


def test_exactly_the_limit_is_accepted(blobs: BlobStore) -> None:
    assert blobs.put([b"123", b"45"], media_type=BYTES, limit_bytes=5).size_bytes == 5


def test_a_byte_past_the_limit_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(BlobTooLarge) as caught:
        blobs.put([b"123", b"456"], media_type=BYTES, limit_bytes=5)
    assert caught.value.limit_bytes == 5
    assert_empty(blobs, tmp_path)


def test_an_endless_sender_is_stopped_at_the_limit(blobs: BlobStore) -> None:
    sent_bytes = 0

    def forever() -> Iterator[bytes]:
        nonlocal sent_bytes
        while True:
            sent_bytes += 1000
            yield bytes(1000)

    with pytest.raises(BlobTooLarge):
        blobs.put(forever(), media_type=BYTES, limit_bytes=10_000)
    assert sent_bytes == 11_000


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, OSError(errno.ENOSPC, "the sender's disk")])
def test_a_sender_that_fails_leaves_nothing_and_its_own_error_is_seen(
    blobs: BlobStore, tmp_path: Path, error: type[BaseException] | BaseException
) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise error

    expected = error if isinstance(error, type) else type(error)
    with pytest.raises(expected):
        blobs.put(broken(), media_type=BYTES)
    assert_empty(blobs, tmp_path)


def test_an_absent_blob_is_not_found(blobs: BlobStore) -> None:
    assert blobs.stat(ABSENT) is None
    for ask in (blobs.open, blobs.path, blobs.age_s):
        with pytest.raises(BlobNotFound) as caught:
            ask(ABSENT)
        assert caught.value.digest == str(ABSENT)


def test_deleting_leaves_nothing_and_twice_is_once(blobs: BlobStore, tmp_path: Path) -> None:
    digest = put(blobs, b"x")
    blobs.path(digest)
    blobs.delete(digest)
    blobs.delete(digest)
    assert blobs.stat(digest) is None
    assert_empty(blobs, tmp_path)


def test_a_deleted_blob_can_be_stored_again(blobs: BlobStore) -> None:
    digest = put(blobs, b"x")
    blobs.delete(digest)
    assert read(blobs, put(blobs, b"x")) == b"x"


def test_an_open_reader_survives_the_delete(blobs: BlobStore) -> None:
    digest = put(blobs, b"still here")
    with blobs.open(digest) as reader:
        blobs.delete(digest)
        assert reader.read() == b"still here"


def test_the_path_is_a_read_only_file_of_the_same_bytes(blobs: BlobStore) -> None:
    path = blobs.path(put(blobs, b"weights"))
    assert path.read_bytes() == b"weights"
    assert stat.S_IMODE(path.lstat().st_mode) == 0o444
    assert stat.S_ISREG(path.lstat().st_mode)


def test_asking_for_the_path_again_gives_the_same_file(blobs: BlobStore) -> None:
    digest = put(blobs, b"weights")
    first = blobs.path(digest)
    inode = first.stat().st_ino
    assert (blobs.path(digest), blobs.path(digest).stat().st_ino) == (first, inode)


def test_digests_ascend(blobs: BlobStore) -> None:
    stored = {put(blobs, bytes([value])) for value in range(40)}
    assert list(blobs.digests()) == sorted(stored)


def test_an_unused_store_is_empty(blobs: BlobStore) -> None:
    assert list(blobs.digests()) == []


def test_age_counts_from_the_last_time_the_bytes_were_stored(blobs: BlobStore) -> None:
    digest = put(blobs, b"x")
    time.sleep(0.4)
    assert 0.39 < blobs.age_s(digest) < 60
    put(blobs, b"x")
    assert 0 <= blobs.age_s(digest) < 0.39


def test_racing_threads_store_one_blob(blobs: BlobStore, tmp_path: Path) -> None:
    start, block = Barrier(WRITERS), os.urandom(5000)

    def write(_: int) -> Digest:
        start.wait()
        return blobs.put([block] * 10, media_type=BYTES).digest

    with ThreadPoolExecutor(WRITERS) as pool:
        stored = set(pool.map(write, range(WRITERS)))
    assert stored == set(blobs.digests()) == {Digest.of(block * 10)}
    assert read(blobs, Digest.of(block * 10)) == block * 10
    assert len(files_under(tmp_path)) == (1 if isinstance(blobs, FileBlobs) else 0)


def test_threads_that_ask_for_the_path_at_once_see_whole_files(blobs: BlobStore, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    digest, start = put(blobs, data), Barrier(16)

    def ask(_: int) -> bytes:
        start.wait()
        return blobs.path(digest).read_bytes()

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) == {data}
    assert files_under(tmp_path) == [blobs.path(digest)]


RACE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from storage.files import FileBlobs

threads, start = int(sys.argv[2]), Barrier(int(sys.argv[2]) + 1)

def write(_):
    start.wait()
    return FileBlobs(Path(sys.argv[1])).put([b"block" * 1000] * 20, media_type="x").digest.hex

with ThreadPoolExecutor(threads) as pool:
    stored = [pool.submit(write, index) for index in range(threads)]
    print("ready", flush=True)
    sys.stdin.readline()
    start.wait()
    print(*{each.result() for each in stored})
"""


def test_racing_processes_store_one_blob_on_a_fresh_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path), str(WRITERS // 8)]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe, text=True) for _ in range(8)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    data = b"block" * 20_000
    assert {writer.communicate(timeout=60)[0].strip() for writer in writers} == {Digest.of(data).hex}
    assert [writer.returncode for writer in writers] == [0] * 8
    assert files_under(tmp_path) == [FileBlobs(tmp_path).path(Digest.of(data))]
    assert read(FileBlobs(tmp_path), Digest.of(data)) == data


def test_storing_again_keeps_the_file_that_others_have_mapped(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    path = blobs.path(put(blobs, b"x"))
    inode = path.stat().st_ino
    put(blobs, b"x")
    assert path.stat().st_ino == inode


def test_storing_again_repairs_a_blob_that_was_cut_short(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    path = blobs.path(put(blobs, b"whole"))
    path.chmod(0o644)
    path.write_bytes(b"wh")
    put(blobs, b"whole")
    assert path.read_bytes() == b"whole"


def test_a_new_store_on_the_same_directory_has_the_same_blobs(tmp_path: Path) -> None:
    digest = put(FileBlobs(tmp_path), b"x")
    assert read(FileBlobs(tmp_path), digest) == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "README",
        ".DS_Store",
        "{shard}/notes.txt",
        "{shard}/{hex}.bak",
        "zz/{hex}",
        "{hex}",
        ".incoming/{hex}",
        "{shard}/.tmp-1",
        "{other}/{hex}",
    ],
)
def test_foreign_files_are_ignored(tmp_path: Path, name: str) -> None:
    blobs = FileBlobs(tmp_path)
    digest = put(blobs, b"x")
    other = "00" if digest.hex[:2] != "00" else "01"
    foreign = Layout(tmp_path).blobs / name.format(shard=digest.hex[:2], hex=digest.hex, other=other)
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"foreign")
    assert list(blobs.digests()) == [digest]


@pytest.mark.parametrize("plant", [lambda path, target: path.symlink_to(target), lambda path, target: path.mkdir()])
def test_a_link_or_a_directory_in_the_place_of_a_blob_is_no_blob(tmp_path: Path, plant: Callable[[Path, Path], None]) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"not ours to serve")
    place = Layout(tmp_path).blob(ABSENT)
    place.parent.mkdir(parents=True)
    plant(place, secret)
    blobs = FileBlobs(tmp_path)
    assert (list(blobs.digests()), blobs.stat(ABSENT)) == ([], None)
    for ask in (blobs.open, blobs.path, blobs.age_s):
        with pytest.raises(BlobNotFound):
            ask(ABSENT)


def test_the_sweep_takes_old_temps_and_leaves_young_ones_and_blobs(tmp_path: Path) -> None:
    blobs, layout = FileBlobs(tmp_path), Layout(tmp_path)
    digest = put(blobs, b"x")
    old, young, foreign = layout.temp(), layout.temp(), layout.incoming / "notes"
    for path in (old, young, foreign):
        path.write_bytes(b"partial")
    for path in (old, foreign, blobs.path(digest)):
        os.utime(path, (time.time() - 1000,) * 2)
    assert blobs.sweep(500) == 1
    assert sorted(files_under(tmp_path)) == sorted([young, foreign, blobs.path(digest)])


def test_the_sweep_of_an_unused_store_finds_nothing(tmp_path: Path) -> None:
    assert FileBlobs(tmp_path / "never" / "made").sweep(0) == 0


def test_a_clock_set_back_makes_no_negative_age(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    digest = put(blobs, b"x")
    os.utime(blobs.path(digest), (time.time() + 1000,) * 2)
    assert blobs.age_s(digest) == 0


def test_every_temp_name_is_new_and_beside_the_blobs() -> None:
    layout = Layout(Path("data"))
    names = [layout.temp() for _ in range(100)]
    assert len(set(names)) == 100
    assert all(name.parent == layout.incoming and name.match(Layout.temp_pattern) for name in names)


def test_a_blob_path_and_its_digest_are_inverse() -> None:
    layout = Layout(Path("data"))
    digest = Digest.of(b"x")
    assert layout.blob(digest) == Path("data/blobs/sha256") / digest.hex[:2] / digest.hex
    assert layout.digest_at(layout.blob(digest)) == digest
