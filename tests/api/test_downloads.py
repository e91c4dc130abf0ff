"""Downloads: caches, ranges and digests as RFC 9110 and RFC 9530 have them."""

import base64
import hashlib

import httpx2
import pytest

from asking import ZERO, problem
from making import make
from serving import Server

MADE = make(41, base_model="org/downloads")
BODY = MADE.files["adapter_model.safetensors"]
SHA256 = hashlib.sha256(BODY)
ETAG = f'"{SHA256.hexdigest()}"'


@pytest.fixture(scope="module")
def adapter(server: Server) -> str:
    return server.add(MADE)


def get(server: Server, adapter: str, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http.get(f"/adapters/{adapter}/adapter_model.safetensors", headers=named)


def test_the_bytes_are_those_that_were_uploaded(server: Server, adapter: str) -> None:
    assert get(server, adapter).content == BODY


def test_the_etag_is_the_sha256_of_the_body(server: Server, adapter: str) -> None:
    assert get(server, adapter).headers["etag"] == ETAG


def test_repr_digest_is_the_sha256_of_the_body(server: Server, adapter: str) -> None:
    assert get(server, adapter).headers["repr-digest"] == f"sha-256=:{base64.b64encode(SHA256.digest()).decode()}:"


def test_content_length_is_the_size(server: Server, adapter: str) -> None:
    assert get(server, adapter).headers["content-length"] == str(len(BODY))


def test_what_never_changes_may_be_kept_for_ever(server: Server, adapter: str) -> None:
    assert get(server, adapter).headers["cache-control"] == "public, max-age=31536000, immutable"


@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors", "report.json", "README.md"])
def test_every_linked_part_of_a_merge_has_its_own_etag(server: Server, adapter: str, part: str) -> None:
    result = server.merge(adapter, weights=[0.25])["result"]
    answer = server.http.get(result["links"][part])
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'


@pytest.mark.parametrize("tags", [ETAG, f"W/{ETAG}", f'"other", {ETAG}', f'"a",W/"b" , {ETAG}', "*"])
def test_a_copy_at_hand_is_not_sent_again(server: Server, adapter: str, tags: str) -> None:
    answer = get(server, adapter, if_none_match=tags)
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", ETAG)


@pytest.mark.parametrize("tags", ['"other"', SHA256.hexdigest(), '"', ""])
def test_another_copy_does_not_count(server: Server, adapter: str, tags: str) -> None:
    assert get(server, adapter, if_none_match=tags).status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=100-199", 100, 200),
        ("bytes=100-", 100, len(BODY)),
        ("bytes=-7", len(BODY) - 7, len(BODY)),
        (f"bytes=-{len(BODY) + 5}", 0, len(BODY)),
        (f"bytes=10-{len(BODY) * 2}", 10, len(BODY)),
        ("BYTES=0-0", 0, 1),
        (f"bytes=0-3, {len(BODY)}-", 0, 4),
    ],
)
def test_a_range_gives_just_these_bytes(server: Server, adapter: str, asked: str, start: int, end: int) -> None:
    answer = get(server, adapter, range=asked)
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(BODY)}"
    assert (answer.status_code, answer.content) == (206, BODY[start:end])


def test_several_ranges_come_in_parts(server: Server, adapter: str) -> None:
    answer = get(server, adapter, range="bytes=0-3,10-19,-5")
    boundary = answer.headers["content-type"].partition("boundary=")[2].encode()
    parts = [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in answer.content.split(b"--" + boundary)[1:-1]]
    assert (answer.status_code, parts) == (206, [BODY[:4], BODY[10:20], BODY[-5:]])


@pytest.mark.parametrize("asked", ["bytes=5-2", "items=0-1", "bytes=x-y", "bytes=", "bytes=-", "bytes 0-1", "bytes=0-1,x"])
def test_a_range_that_means_nothing_is_ignored(server: Server, adapter: str, asked: str) -> None:
    answer = get(server, adapter, range=asked)
    assert (answer.status_code, answer.content) == (200, BODY)


@pytest.mark.parametrize("asked", [f"bytes={len(BODY)}-", "bytes=-0", "bytes=999999999-,999999999-"])
def test_a_range_beyond_the_end_is_a_problem_that_tells_the_size(server: Server, adapter: str, asked: str) -> None:
    answer = get(server, adapter, range=asked)
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(BODY)}"


def test_if_range_with_the_etag_gives_the_range(server: Server, adapter: str) -> None:
    assert get(server, adapter, range="bytes=0-3", if_range=ETAG).content == BODY[:4]


@pytest.mark.parametrize("tag", ['"other"', f"W/{ETAG}", "Tue, 01 Jan 2019 00:00:00 GMT"])
def test_if_range_with_anything_else_gives_everything(server: Server, adapter: str, tag: str) -> None:
    assert get(server, adapter, range=f"bytes={len(BODY)}-", if_range=tag).content == BODY


def test_head_tells_what_get_would_send(server: Server, adapter: str) -> None:
    path = f"/adapters/{adapter}/adapter_model.safetensors"
    head, whole = server.http.head(path), server.http.get(path)
    told = {name: value for name, value in whole.headers.items() if name != "date"}
    assert (head.content, {name: value for name, value in head.headers.items() if name != "date"}) == (b"", told)


def test_a_part_the_adapter_has_not_is_unknown(server: Server, adapter: str) -> None:
    assert "report.json" in problem(server.http.get(f"/adapters/{adapter}/report.json"), 404, "unknown-part")["detail"]


def test_an_adapter_that_is_not_there_is_unknown(server: Server) -> None:
    problem(server.http.get(f"/adapters/{ZERO}/adapter_config.json"), 404, "unknown-adapter")


@pytest.mark.parametrize(
    "part",
    [
        "..%2f..%2findex.sqlite",
        "%2e%2e%2fadapter_config.json",
        "..%5cindex.sqlite",
        "%2fetc%2fpasswd",
        "adapter_config.json%00",
        "adapter_config.json%2f..",
        "%2e%2e",
        "x" * 5000,
    ],
)
def test_a_path_in_place_of_a_part_leads_nowhere(server: Server, adapter: str, part: str) -> None:
    answer = server.http.get(f"/adapters/{adapter}/{part}")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
