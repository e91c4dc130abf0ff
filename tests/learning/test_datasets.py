"""Splits of datasets on a Hub: found, pinned, fetched, verified, held; and for whom."""

import json
from io import BytesIO

import pyarrow as pa
import pytest
from pyarrow import parquet

from app import data
from app.errors import InvalidData, InvalidField, UnknownSplit
from app.services import Services
from app.settings import Settings
from hub_server import HubServer
from storage.digest import Digest
from storage.errors import (
    BadSource,
    BlobTooLarge,
    DigestMismatch,
    GatedRepo,
    HubUnavailable,
    NotAnAdapter,
    RepoNotFound,
    RevisionNotFound,
)
from storage.sources.hub import HubRef

MINE, OTHERS = "hf_mine", "hf_others"
REPO, SOURCE = "datasets/org/films", "hub:datasets/org/films"


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def as_parquet(*texts: str) -> bytes:
    stream = BytesIO()
    parquet.write_table(pa.table({"text": list(texts)}), stream)
    return stream.getvalue()


SHARDS = {f"data/train-0000{n}-of-00002.parquet": as_parquet(f"shard {n}") for n in (1, 0)}
FILES = {**SHARDS, "data/test-00000-of-00001.parquet": as_parquet("test"), "README.md": b"hello", "films.py": b"import os"}


def texts(services: Services, digests: tuple[Digest, ...]) -> list[str]:
    return [text for digest in digests for text in data.read_columns(services, digest, ["text"])["text"]]


def pinned(services: Services, source: str = SOURCE, split: str = "train", token: str | None = None) -> str:
    return data.pin(services, source, split, token=token)


def test_a_split_is_pinned_then_fetched_in_the_order_of_its_files(services: Services, hub: HubServer) -> None:
    commit = hub.add_repo(REPO, FILES)
    pin = pinned(services)
    assert pin == f"{SOURCE}@{commit}" and services.materials.files() == ()
    assert texts(services, data.obtain(services, pin, "train")) == ["shard 0", "shard 1"]
    assert texts(services, data.obtain(services, pin, "test")) == ["test"]


def test_no_other_file_is_fetched(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, FILES)
    data.obtain(services, pinned(services), "train")
    fetched = {seen.path.rpartition("/")[2] for seen in hub.requests("GET", "/resolve/", host="hub")}
    assert fetched == {name.rpartition("/")[2] for name in SHARDS}


def test_a_branch_that_moves_on_does_not_move_what_is_pinned(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {"train.jsonl": jsonl("before")})
    pin = pinned(services)
    hub.add_repo(REPO, {"train.jsonl": jsonl("after")})
    assert texts(services, data.obtain(services, pin, "train")) == ["before"]
    assert texts(services, data.obtain(services, pinned(services), "train")) == ["after"]


@pytest.mark.parametrize(
    "path",
    [
        "data/train-00000-of-00001.parquet",
        "data/train-00000-of-00001-0123456789abcdef.parquet",
        "train-00000-of-00001.parquet",
        "train.parquet",
        "data/train.parquet",
        "train/0000.parquet",
    ],
)
def test_a_split_is_found_in_its_usual_places(services: Services, hub: HubServer, path: str) -> None:
    hub.add_repo(REPO, {path: as_parquet("here"), "data/test.jsonl": jsonl("not here")})
    assert texts(services, data.obtain(services, pinned(services), "train")) == ["here"]


@pytest.mark.parametrize("path", ["train.jsonl", "data/train.jsonl"])
def test_a_split_may_be_jsonl(services: Services, hub: HubServer, path: str) -> None:
    hub.add_repo(REPO, {path: jsonl("here")})
    assert texts(services, data.obtain(services, pinned(services), "train")) == ["here"]


def test_a_folder_holds_a_dataset_of_its_own(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {"german/train.jsonl": jsonl("Film"), "train.jsonl": jsonl("film")})
    assert texts(services, data.obtain(services, pinned(services, f"{SOURCE}/german"), "train")) == ["Film"]


def test_what_is_held_needs_no_hub(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, FILES)
    pin = pinned(services)
    held, asked = data.obtain(services, pin, "train"), len(hub.seen)
    assert (pinned(services, pin), data.obtain(services, pin, "train")) == (pin, held)
    assert len(hub.seen) == asked


def test_what_lost_a_file_is_fetched_again(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, FILES)
    pin = pinned(services)
    held = data.obtain(services, pin, "train")
    services.materials.forget(held[1])
    services.blobs.delete(held[0])
    assert data.obtain(services, pin, "train") == held
    assert texts(services, held) == ["shard 0", "shard 1"]


def test_two_files_of_the_same_bytes_are_two_files_of_the_split(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {f"data/train-0000{n}-of-00002.parquet": as_parquet("same") for n in range(2)})
    pin = pinned(services)
    for _ in range(2):
        assert texts(services, data.obtain(services, pin, "train")) == ["same", "same"]


# --- refused


def test_a_split_that_is_not_there_is_refused_beside_what_is(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, FILES)
    with pytest.raises(UnknownSplit, match=r"'validation'.*data/test-00000-of-00001\.parquet, data/train-00000"):
        pinned(services, split="validation")


def test_a_dataset_of_other_files_is_refused(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {"train.csv": b"text\na\n", "films.py": b"import os"})
    with pytest.raises(UnknownSplit, match="no Parquet or JSONL"):
        pinned(services)


@pytest.mark.parametrize("split", ["", "..", "../train", "a/b", ".*", "train[:10%]", "x" * 97, "a\n"])
def test_a_split_that_is_no_plain_name_is_refused(services: Services, hub: HubServer, split: str) -> None:
    hub.add_repo(REPO, FILES)
    with pytest.raises(InvalidField, match="split"):
        pinned(services, split=split)


def test_a_split_that_misses_files_is_refused(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {"data/train-00001-of-00003.parquet": as_parquet("a")})
    with pytest.raises(InvalidData, match="1 files"):
        pinned(services)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("hub:datasets/org/nothing", RepoNotFound),
        ("hub:org/films", BadSource),
        ("hub:datasets/org", BadSource),
        ("hub:datasets/org/films@", BadSource),
        (f"{SOURCE}@nope", RevisionNotFound),
        (f"{SOURCE}/../x", BadSource),
        (f"{SOURCE}/nowhere", UnknownSplit),
    ],
)
def test_a_source_that_names_no_dataset_is_refused(
    services: Services, hub: HubServer, source: str, error: type[Exception]
) -> None:
    hub.add_repo(REPO, FILES)
    hub.add_repo("org/films", FILES)
    with pytest.raises(error):
        pinned(services, source)


def test_a_file_that_is_not_what_its_name_says_fails_with_the_reason(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {"train.parquet": b"PAR1 and no more"})
    with pytest.raises(InvalidData, match="Parquet"):
        data.obtain(services, pinned(services), "train")


def test_a_file_that_arrives_changed_is_refused(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, {"train.parquet": as_parquet("a")})
    pin = pinned(services)
    hub.fail("train.parquet", "corrupt", times=9, at=20)
    with pytest.raises(DigestMismatch):
        data.obtain(services, pin, "train")
    assert services.materials.files() == ()


def test_a_split_above_the_limit_is_refused_before_a_byte_is_read(settings: Settings, hub: HubServer) -> None:
    services = Services.open(settings.model_copy(update={"max_upload_bytes": 100}))
    hub.add_repo(REPO, FILES)
    with pytest.raises(BlobTooLarge):
        pinned(services)
    assert hub.requests("GET", "/resolve/") == []


def test_a_hub_that_is_away_is_an_error_with_a_name(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail("api", "status", times=99)
    with pytest.raises(HubUnavailable):
        pinned(services)


def test_a_dataset_is_no_adapter(services: Services, hub: HubServer) -> None:
    hub.add_repo(REPO, FILES)
    with pytest.raises(NotAnAdapter):
        services.hub.resolve(HubRef.parse("datasets/org/films"))


# --- private and gated ones


@pytest.fixture(params=["private", "gated"])
def guarded(request: pytest.FixtureRequest, hub: HubServer) -> str:
    hub.add_repo(f"datasets/org/{request.param}", FILES, readers=[MINE], **{request.param: True})
    hub.tokens.add(OTHERS)
    return f"hub:datasets/org/{request.param}"


def test_what_only_the_caller_may_read_is_fetched_at_once(services: Services, guarded: str) -> None:
    pin = pinned(services, guarded, token=MINE)
    assert texts(services, data.obtain(services, pin, "train")) == ["shard 0", "shard 1"]  # without a token, as in a job


@pytest.mark.parametrize("token", [None, OTHERS])
def test_another_caller_gets_it_by_no_name(services: Services, guarded: str, token: str | None) -> None:
    pin = pinned(services, guarded, token=MINE)
    digests = data.obtain(services, pin, "train")
    for source in (guarded, pin, *map(str, digests)):
        with pytest.raises((RepoNotFound, GatedRepo)):
            pinned(services, source, token=token)
        assert pinned(services, source, token=MINE)


def test_who_has_the_bytes_already_needs_no_leave(services: Services, guarded: str) -> None:
    pin = pinned(services, guarded, token=MINE)
    (digest,) = data.obtain(services, pinned(services, pin, "test", MINE), "test")
    assert data.add(services, [FILES["data/test-00000-of-00001.parquet"]]).restricted == ()
    assert pinned(services, str(digest)) == str(digest)
