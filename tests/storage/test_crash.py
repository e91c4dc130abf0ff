"""Killed writers and full disks, for real: child processes that get SIGKILL or run into a file-size limit. No mocks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import storage.files
from storage.digest import Digest
from storage.files import FileBlobs
from storage.layout import Layout
from storage.verify import verify

PROJECT = Path(storage.files.__file__).parents[1]
DATA = bytes(range(256)) * 1024

SENDER = """
import json, os, resource, signal, sys
from pathlib import Path
from storage.errors import StoreFull
from storage.files import FileBlobs

DATA, BYTES = bytes(range(256)) * 1024, "application/octet-stream"
root = Path(sys.argv[1])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_child(body):
    "Run body in a fork of its own; True if it was killed."
    child = os.fork()
    if child == 0:
        body()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def run(script: str, *args: object) -> subprocess.Popen[str]:
    """A child that has the store's code and the names above; its stdout is a pipe."""
    command = [sys.executable, "-c", SENDER + script, *map(str, args)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def answer(script: str, *args: object) -> str:
    child = run(script, *args)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 0
    return said


def files_under(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if not path.is_dir()]


def assert_recovers(root: Path) -> None:
    """Every visible blob is whole, the sweep leaves nothing else, and the next put succeeds."""
    blobs = FileBlobs(root)
    assert all(each.ok for each in verify(blobs))
    blobs.sweep(0)
    assert sorted(files_under(root)) == [blobs.path(digest) for digest in blobs.digests()]
    assert blobs.put([DATA], media_type="x", expected=Digest.of(DATA)).size_bytes == len(DATA)
    assert blobs.path(Digest.of(DATA)).read_bytes() == DATA


BLOCKED = """
def blocked():
    yield DATA[: len(DATA) // 2]
    print("ready", flush=True)
    signal.pause()

FileBlobs(root).put(blocked(), media_type=BYTES)
"""


def test_a_writer_killed_in_mid_stream_leaves_one_temp_that_the_sweep_takes(tmp_path: Path) -> None:
    writer = run(BLOCKED, tmp_path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    writer.kill()
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    blobs = FileBlobs(tmp_path)
    assert list(blobs.digests()) == []
    (left,) = files_under(tmp_path)
    assert (left.parent, left.stat().st_size) == (Layout(tmp_path).incoming, len(DATA) // 2)
    assert blobs.sweep(3600) == 0
    assert blobs.sweep(0) == 1
    assert files_under(tmp_path) == []
    assert_recovers(tmp_path)


AT_BYTE = """
import random
dice = random.Random(20)

def until(byte):
    sent = 0
    while sent < byte:
        step = min(dice.randint(1, 9000), byte - sent)
        yield DATA[sent : sent + step]
        sent += step
    die()

for index in range(30):
    killed = in_child(lambda: FileBlobs(root / str(index)).put(until(dice.randint(0, len(DATA))), media_type=BYTES))
    print(int(killed))
"""


def test_a_writer_killed_at_any_byte_leaves_no_blob(tmp_path: Path) -> None:
    assert answer(AT_BYTE, tmp_path).split() == ["1"] * 30
    for index in range(30):
        assert list(FileBlobs(tmp_path / str(index)).digests()) == []
        assert len(files_under(tmp_path / str(index))) == 1
        assert_recovers(tmp_path / str(index))


# The interpreter reports every call into C to a profile function: between two of them the disk does not change,
# so dying at each in turn is dying at every state the disk passes through. Small chunks, which the writer hashes itself:
# what it asks of a thread beside it takes a call more or less, and the runs would not be the same.
AT_CALL = """
CHUNKS = [DATA[start : start + 65536] for start in range(0, len(DATA), 65536)]

def dying_at(call, log):
    seen = 0
    def watch(frame, event, argument):
        nonlocal seen
        if event != "c_call":
            return
        seen += 1
        if seen == call:
            os.write(log, argument.__qualname__.encode())
            die()
    return watch

def put(index):
    read, write = os.pipe()
    def body():
        blobs = FileBlobs(root / str(index))
        sys.setprofile(dying_at(index, write))
        blobs.put(CHUNKS, media_type=BYTES)
        sys.setprofile(None)
    killed = in_child(body)
    os.close(write)
    name = os.read(read, 100).decode()
    os.close(read)
    return name if killed else None

names = []
while (name := put(len(names) + 1)) is not None:
    names.append(name)
print(json.dumps(names))
"""


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where the writers died, each in the directory of its number from 1, and the call each died before."""
    root = tmp_path_factory.mktemp("dying")
    return root, json.loads(answer(AT_CALL, root))


def test_a_writer_killed_before_any_system_call_leaves_the_whole_blob_or_none(dying: tuple[Path, list[str]]) -> None:
    root, calls = dying
    present = [list(FileBlobs(root / str(index + 1)).digests()) for index in range(len(calls))]
    replacing = calls.index("replace")
    replaced = calls.index("open", replacing)  # in between the paths become strings, inside the call
    assert all(digests == [] for digests in present[: replacing + 1])
    assert all(digests in ([], [Digest.of(DATA)]) for digests in present[replacing:replaced])
    assert all(digests == [Digest.of(DATA)] for digests in present[replaced:])
    for index in range(len(calls)):
        assert_recovers(root / str(index + 1))


def test_nothing_is_named_before_it_is_on_the_disk(dying: tuple[Path, list[str]]) -> None:
    """What a power cut would show, which no test can cause: the order of the calls that change or flush the disk."""
    _, calls = dying
    directories = ["mkdir", "fsync"] * 4  # root, blobs, sha256, .incoming
    contents = ["FileIO.write"] * 4 + ["fchmod", "fsync"]
    publication = ["mkdir", "fsync", "replace", "fsync", "fsync", "unlink"]
    changes = {*directories, *contents, *publication}
    assert [call for call in calls if call in changes] == directories + contents + publication


BUSY = """
print("ready", flush=True)
index = 0
while True:
    FileBlobs(root).put([index.to_bytes(8, "big"), DATA], media_type=BYTES)
    index += 1
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.01, 0.02, 0.05, 0.1])
def test_a_busy_writer_killed_from_outside_leaves_only_whole_blobs(tmp_path: Path, delay_s: float) -> None:
    writer = run(BUSY, tmp_path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(delay_s)
    writer.kill()
    writer.communicate()
    expected = sorted(Digest.of(index.to_bytes(8, "big") + DATA) for index in range(len(list(FileBlobs(tmp_path).digests()))))
    assert list(FileBlobs(tmp_path).digests()) == expected
    assert_recovers(tmp_path)


FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sizes = [int(size) for size in sys.argv[3:]]
try:
    print(FileBlobs(root).put([DATA[:size] for size in sizes], media_type=BYTES).size_bytes)
except StoreFull as full:
    print("StoreFull:", full.reason)
"""


@pytest.mark.parametrize("sizes", [[200_000], [100_000, 1], [1] * 1001], ids=["inside a chunk", "after a chunk", "byte by byte"])
def test_a_full_disk_is_store_full_and_leaves_nothing(tmp_path: Path, sizes: list[int]) -> None:
    limit_bytes = 1000 if len(sizes) > 2 else 100_000
    assert answer(FULL, tmp_path, limit_bytes, *sizes).strip() == f"StoreFull: {os.strerror(errno.EFBIG)}"
    assert files_under(tmp_path) == []
    assert_recovers(tmp_path)


def test_a_disk_with_exactly_enough_room_is_not_full(tmp_path: Path) -> None:
    assert answer(FULL, tmp_path, 100_000, 60_000, 40_000).strip() == "100000"
    assert [each.size_bytes for each in verify(FileBlobs(tmp_path))] == [100_000]


def test_a_full_disk_keeps_the_blobs_that_were_there(tmp_path: Path) -> None:
    digest = FileBlobs(tmp_path).put([DATA[:10]], media_type="x").digest
    assert answer(FULL, tmp_path, 1000, 2000).startswith("StoreFull")
    assert [(each.digest, each.ok) for each in verify(FileBlobs(tmp_path))] == [(digest, True)]
