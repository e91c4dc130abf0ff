"""Parts of files from the Hub: just the bytes that are asked for, whatever breaks on the way, or a refusal."""

import logging
from collections.abc import Iterator

import pytest

from hub_server import HubServer
from storage.errors import GatedRepo, HubUnavailable
from storage.sources.hub import Hub, HubFile, HubListing, HubRef, RangesIgnored

WEIGHTS = bytes(range(256)) * 40
NAME, TOKEN = "model.safetensors", "hf_theOneThatMayRead"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("org/base", {NAME: WEIGHTS})
        yield server


def listed(server: HubServer, repo: str = "org/base") -> tuple[Hub, HubListing, HubFile]:
    hub = Hub(server.endpoint, timeout_s=5.0, deadline_s=20.0, backoff_s=0.01)
    listing = hub.listing(HubRef(repo), token=TOKEN if repo == "org/gated" else None)
    return hub, listing, listing.names[NAME]


def read(server: HubServer, *spans: tuple[int, int]) -> list[bytes]:
    hub, listing, file = listed(server)
    with hub.parts(listing) as part:
        return [b"".join(part(file, *span)) for span in spans]


@pytest.mark.parametrize("span", [(0, 1), (0, 8), (100, 1000), (len(WEIGHTS) - 1, len(WEIGHTS)), (0, len(WEIGHTS)), (5, 5)])
def test_a_part_is_those_bytes(server: HubServer, span: tuple[int, int]) -> None:
    assert read(server, span) == [WEIGHTS[slice(*span)]]


def test_only_those_bytes_are_asked_for(server: HubServer) -> None:
    read(server, (0, 8), (100, 1000))
    assert [seen.headers["range"] for seen in server.requests("GET", host="cdn")] == ["bytes=0-7", "bytes=100-999"]


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_part_goes_on_where_it_broke(server: HubServer, kind: str) -> None:
    server.fail(NAME, kind, at=300, times=2)
    assert read(server, (100, 1000)) == [WEIGHTS[100:1000]]
    assert [seen.headers["range"] for seen in server.requests("GET", host="cdn")][1] == "bytes=400-999"


def test_a_server_that_ignores_ranges_is_told_apart(server: HubServer) -> None:
    server.fail(NAME, "no_range", times=float("inf"))
    with pytest.raises(RangesIgnored):
        read(server, (100, 1000))


@pytest.mark.parametrize(("kind", "value"), [("commit", "0" * 40), ("etag", '"other"')])
def test_all_parts_are_of_one_file(server: HubServer, kind: str, value: str) -> None:
    server.fail(NAME, kind, value=value)
    with pytest.raises(HubUnavailable):
        read(server, (0, 8), (8, 16))


def test_a_file_of_another_size_than_announced_is_refused(server: HubServer) -> None:
    server.fail(NAME, "extra", times=float("inf"))
    with pytest.raises(HubUnavailable, match=r"has \d+ bytes where \d+ were announced"):
        read(server, (0, 8))


def test_a_gated_repository_is_refused_without_its_token(server: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    server.add_repo("org/gated", {NAME: WEIGHTS}, gated=True, readers=[TOKEN])
    hub, listing, file = listed(server, "org/gated")
    with caplog.at_level(logging.DEBUG):
        with hub.parts(listing, token=TOKEN) as part:
            assert b"".join(part(file, 3, 9)) == WEIGHTS[3:9]
        with pytest.raises(GatedRepo), hub.parts(listing) as part:
            list(part(file, 3, 9))
    assert TOKEN not in caplog.text


def test_each_part_has_all_of_its_retries(server: HubServer) -> None:
    hub, listing, file = listed(server)
    with hub.parts(listing) as part:
        for _ in range(3):
            server.fail(NAME, "status", times=hub.retries)
            assert b"".join(part(file, 0, 8)) == WEIGHTS[:8]
