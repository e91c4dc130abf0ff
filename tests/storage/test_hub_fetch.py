"""Files from the Hub, against a real local Hub (tests/hub_server.py) that fails in every way a Hub has failed us."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Fault, HubServer
from storage.digest import Descriptor, Digest
from storage.errors import BlobTooLarge, DigestMismatch, GatedRepo, HubUnavailable, NotAnAdapter, StorageError
from storage.files import FileBlobs
from storage.sources.hub import Hub, HubRef, HubSnapshot

TOKEN = "hf_friendOfTheRepository"
STRANGER = "hf_knownButNotInvited"
CONFIG, WEIGHTS = b'{"r": 8}', bytes(range(256)) * 1200
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS, "README.md": b"hello", "optimizer.pt": b"pickle"}
MEDIA_TYPE = "application/octet-stream"
REF = HubRef("org/lora", "main", "")


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def blobs(tmp_path: Path) -> FileBlobs:
    return FileBlobs(tmp_path / "data")


@pytest.fixture
def commit(server: HubServer) -> str:
    return server.add_repo("org/lora", FILES, refs=("main", "v1", "refs/pr/1"), card={"license": "apache-2.0"})


@pytest.fixture
def guarded(server: HubServer) -> str:
    server.tokens.add(STRANGER)
    return server.add_repo("org/lora", FILES, gated=True, readers=[TOKEN])


def client(server: HubServer, **rest: Any) -> Hub:
    return Hub(server.endpoint, **{"timeout_s": 5.0, "deadline_s": 20.0, "backoff_s": 0.01, **rest})


def fetch_weights(hub: Hub, blobs: FileBlobs, snapshot: HubSnapshot, **rest: Any) -> Descriptor:
    return hub.fetch(snapshot, snapshot.weights, blobs, media_type=MEDIA_TYPE, **rest)


def fetch_config(hub: Hub, blobs: FileBlobs, snapshot: HubSnapshot, **rest: Any) -> Descriptor:
    return hub.fetch(snapshot, snapshot.config, blobs, media_type=MEDIA_TYPE, **rest)


def ranges(server: HubServer, host: str) -> list[str | None]:
    return [seen.headers.get("range") for seen in server.requests("GET", host=host) if "/api/" not in seen.path]


def error_of(action: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        action()
    return caught.value


# Fetching


def test_the_weights_arrive_through_the_storage_redirect(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    descriptor = fetch_weights(hub, blobs, hub.resolve(REF))
    assert blobs.path(descriptor.digest).read_bytes() == WEIGHTS


def test_the_descriptor_tells_digest_size_and_type(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    assert fetch_weights(hub, blobs, hub.resolve(REF)) == Descriptor(Digest.of(WEIGHTS), len(WEIGHTS), MEDIA_TYPE)


def test_the_config_arrives_from_the_hub_itself(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    assert fetch_config(hub, blobs, hub.resolve(REF)).digest == Digest.of(CONFIG)


def test_weights_outside_lfs_arrive_too(server: HubServer, blobs: FileBlobs) -> None:
    server.add_repo("org/lora", FILES, lfs=())
    hub = client(server)
    assert fetch_weights(hub, blobs, hub.resolve(REF)).digest == Digest.of(WEIGHTS)


def test_an_empty_file_arrives(server: HubServer, blobs: FileBlobs) -> None:
    server.add_repo("org/lora", {**FILES, "adapter_config.json": b""})
    hub = client(server)
    assert fetch_config(hub, blobs, hub.resolve(REF)).size_bytes == 0


def test_only_the_two_files_are_asked_for(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    snapshot = hub.resolve(REF)
    fetch_config(hub, blobs, snapshot)
    fetch_weights(hub, blobs, snapshot)
    asked = [seen.path.rpartition("/")[2] for seen in server.requests(part="/resolve/")]
    assert asked == ["adapter_config.json", "adapter_model.safetensors"]


def test_files_are_asked_for_at_the_commit(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF))
    assert server.requests(part="/resolve/")[0].path.startswith(f"/org/lora/resolve/{commit}/")


def test_a_snapshot_of_a_moved_branch_still_gives_the_old_bytes(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    snapshot = client(server).resolve(REF)
    server.add_repo("org/lora", {**FILES, "adapter_model.safetensors": b"new"})
    assert fetch_weights(client(server), blobs, snapshot).digest == Digest.of(WEIGHTS)


def test_progress_ends_at_the_size(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    held: list[int] = []
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF), on_bytes=held.append)
    assert held == sorted(held) and held[-1] == len(WEIGHTS)


def test_an_error_of_the_progress_callback_ends_the_download(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    def cancel(_: int) -> None:
        raise InterruptedError

    hub = client(server)
    with pytest.raises(InterruptedError):
        fetch_weights(hub, blobs, hub.resolve(REF), on_bytes=cancel)
    assert list(blobs.digests()) == []


def test_a_file_over_the_limit_is_not_asked_for(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    snapshot = hub.resolve(REF)
    with pytest.raises(BlobTooLarge):
        fetch_weights(hub, blobs, snapshot, limit_bytes=len(WEIGHTS) - 1)
    assert server.requests(part="/resolve/") == []


def test_the_token_goes_to_the_hub(server: HubServer, blobs: FileBlobs, guarded: str) -> None:
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF, token=TOKEN), token=TOKEN)
    assert {seen.headers.get("authorization") for seen in server.requests(host="hub")} == {f"Bearer {TOKEN}"}


def test_the_token_does_not_go_to_the_storage_host(server: HubServer, blobs: FileBlobs, guarded: str) -> None:
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF, token=TOKEN), token=TOKEN)
    sent = str([seen.headers for seen in server.requests(host="cdn")])
    assert "range" not in sent and "accept" in sent and "authorization" not in sent and TOKEN not in sent


def test_a_gated_file_is_refused_to_who_may_not_read_it(server: HubServer, blobs: FileBlobs, guarded: str) -> None:
    hub = client(server)
    snapshot = hub.resolve(REF, token=TOKEN)
    with pytest.raises(GatedRepo):
        fetch_weights(hub, blobs, snapshot)


def test_a_file_that_has_gone_is_named(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    hub = client(server)
    snapshot = hub.resolve(REF)
    del server.repos["org/lora"].commits[commit]["adapter_model.safetensors"]
    error = error_of(lambda: fetch_weights(hub, blobs, snapshot))
    assert isinstance(error, NotAnAdapter) and error.missing == "adapter_model.safetensors"


# Faults on the way


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_broken_body_is_resumed_at_the_byte_reached(server: HubServer, blobs: FileBlobs, commit: str, kind: str) -> None:
    server.fail("adapter_model.safetensors", kind, at=100_000)
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF))
    assert ranges(server, "cdn") == [None, "bytes=100000-"]


def test_many_breaks_leave_the_bytes_whole(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cut", at=50_001, times=5)
    hub = client(server)
    assert fetch_weights(hub, blobs, hub.resolve(REF)).digest == Digest.of(WEIGHTS)


def test_a_small_file_is_resumed_too(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_config.json", "cut", at=3)
    hub = client(server)
    fetch_config(hub, blobs, hub.resolve(REF))
    assert ranges(server, "hub") == [None, "bytes=3-"]


def test_a_server_without_ranges_sends_again_and_nothing_doubles(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cut", at=100_000)
    server.fail("adapter_model.safetensors", "no_range")
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF))
    assert ranges(server, "cdn") == [None, "bytes=100000-"]


def test_a_busy_hub_does_not_end_the_download(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "status", times=2)
    hub = client(server)
    assert fetch_weights(hub, blobs, hub.resolve(REF)).digest == Digest.of(WEIGHTS)


def test_a_signed_url_that_expired_is_asked_for_anew(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cdn", code=403)
    hub = client(server)
    fetch_weights(hub, blobs, hub.resolve(REF))
    assert len(server.requests("GET", "/resolve/")) == 2


def test_a_body_that_always_breaks_ends_as_unavailable(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cut", at=1, times=99)
    hub = client(server, retries=2)
    with pytest.raises(HubUnavailable, match="RemoteProtocolError"):
        fetch_weights(hub, blobs, hub.resolve(REF))
    assert list(blobs.digests()) == []


@pytest.mark.parametrize("fetch", [fetch_config, fetch_weights])
def test_corruption_once_is_cured_from_the_first_byte(server: HubServer, blobs: FileBlobs, commit: str, fetch: Any) -> None:
    server.fail("adapter_*", "corrupt", at=5)
    hub = client(server)
    assert fetch(hub, blobs, hub.resolve(REF)).digest in {Digest.of(CONFIG), Digest.of(WEIGHTS)}


@pytest.mark.parametrize("fetch", [fetch_config, fetch_weights])
def test_corruption_for_good_leaves_nothing_in_the_store(server: HubServer, blobs: FileBlobs, commit: str, fetch: Any) -> None:
    server.fail("adapter_*", "corrupt", at=5, times=99)
    hub = client(server)
    with pytest.raises(DigestMismatch):
        fetch(hub, blobs, hub.resolve(REF))
    assert list(blobs.digests()) == []


def test_corruption_for_good_is_read_twice(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "corrupt", at=5, times=99)
    hub = client(server)
    error_of(lambda: fetch_weights(hub, blobs, hub.resolve(REF)))
    assert ranges(server, "cdn") == [None, None]


def test_a_file_of_another_size_is_refused(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "extra")
    hub = client(server)
    with pytest.raises(HubUnavailable, match="were announced"):
        fetch_weights(hub, blobs, hub.resolve(REF))


def test_an_etag_that_changes_between_attempts_is_an_error(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cut", at=1000)
    server.fail("adapter_model.safetensors", "etag", value="before")
    hub = client(server)
    with pytest.raises(HubUnavailable, match="changed while"):
        fetch_weights(hub, blobs, hub.resolve(REF))


def test_a_tag_weakened_on_the_way_is_no_change(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cut", at=1000)
    server.fail("adapter_model.safetensors", "etag", value=f'W/"{Digest.of(WEIGHTS).hex}"')
    hub = client(server)
    assert fetch_weights(hub, blobs, hub.resolve(REF)).digest == Digest.of(WEIGHTS)


def test_another_commit_than_asked_for_is_an_error(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "commit", value="b" * 40)
    hub = client(server)
    with pytest.raises(HubUnavailable, match="another commit"):
        fetch_weights(hub, blobs, hub.resolve(REF))


@pytest.mark.parametrize("etag", ["../../../../escaped", "/escaped", "..\\escaped", "x" * 5000])
def test_a_hostile_etag_writes_nothing_outside(server: HubServer, tmp_path: Path, commit: str, etag: str) -> None:
    server.fail("adapter_*", "etag", value=etag, times=99)
    hub = client(server)
    fetch_weights(hub, FileBlobs(tmp_path / "a/b/data"), hub.resolve(REF))
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {Digest.of(WEIGHTS).hex}


@pytest.mark.timeout(20)
def test_a_slow_trickle_ends_at_the_deadline(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "trickle", per_s=20, times=99)
    hub = client(server, deadline_s=0.6)
    snapshot = hub.resolve(REF)
    begun_s = time.monotonic()
    with pytest.raises(HubUnavailable, match="too slowly"):
        fetch_weights(hub, blobs, snapshot)
    assert 0.5 < time.monotonic() - begun_s < 1.6


@pytest.mark.timeout(20)
def test_a_description_that_trickles_ends_at_the_deadline(server: HubServer, commit: str) -> None:
    server.fail("api", "trickle", per_s=20, times=99)
    with pytest.raises(HubUnavailable, match="too slowly"):
        client(server, deadline_s=0.6).resolve(REF)


@pytest.mark.timeout(20)
def test_a_hub_that_never_answers_ends_at_the_deadline(server: HubServer, commit: str) -> None:
    server.fail("api", "stall", at=2, times=99)
    with pytest.raises(HubUnavailable, match="ReadTimeout"):
        client(server, deadline_s=0.5).resolve(REF)


# Secrets


def test_the_token_is_not_in_the_repr(server: HubServer) -> None:
    assert TOKEN not in repr(client(server, token=TOKEN))


FAULTS = [
    Fault("api", "status", times=99),
    Fault("adapter_model.safetensors", "reset", times=99, at=10),
    Fault("adapter_model.safetensors", "corrupt", times=99, at=10),
    Fault("adapter_model.safetensors", "cdn", times=99, code=403),
    Fault("adapter_model.safetensors", "commit", times=99, value="c" * 40),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_no_error_or_log_tells_the_token(
    server: HubServer, blobs: FileBlobs, guarded: str, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    for name in ("", "httpx2", "httpcore2", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, logger=name)
    server.fail(**vars(fault))
    hub = client(server, token=TOKEN, retries=1)
    error = error_of(lambda: fetch_weights(hub, blobs, hub.resolve(REF)))
    told = caplog.text + repr(error) + str(error) + "".join(traceback.format_exception(error))
    assert "httpcore2" in str(caplog.records) and TOKEN not in told


@pytest.mark.parametrize("bad", ["hf_secret\nvalue", "hf_secretä"])
def test_a_token_that_is_no_header_is_not_quoted(server: HubServer, bad: str) -> None:
    error = error_of(lambda: client(server).resolve(REF, token=bad))
    assert "secret" not in "".join(traceback.format_exception(error)) + repr(error)


def test_an_error_does_not_quote_the_signed_url(server: HubServer, blobs: FileBlobs, commit: str) -> None:
    server.fail("adapter_model.safetensors", "cdn", code=403, times=99)
    hub = client(server, retries=1)
    error = error_of(lambda: fetch_weights(hub, blobs, hub.resolve(REF)))
    assert "signature" not in str(error)
