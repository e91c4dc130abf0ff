"""The Hub source, against a real local Hub (tests/hub_server.py): what is resolved, what is refused, and to whom."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from hub_server import HubServer
from storage.digest import Digest
from storage.errors import (
    GatedRepo,
    HubError,
    HubUnavailable,
    NotAnAdapter,
    PickleOnly,
    RepoNotFound,
    RevisionNotFound,
    StorageError,
    TokenRefused,
)
from storage.sources.hub import Hub, HubRef

TOKEN = "hf_friendOfTheRepository"
STRANGER = "hf_knownButNotInvited"
CONFIG, WEIGHTS = b'{"r": 8}', bytes(range(256)) * 1200
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS, "README.md": b"hello", "optimizer.pt": b"pickle"}
REF = HubRef("org/lora", "main", "")


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def commit(server: HubServer) -> str:
    return server.add_repo("org/lora", FILES, refs=("main", "v1", "refs/pr/1"), card={"license": "apache-2.0"})


@pytest.fixture
def guarded(server: HubServer) -> str:
    server.tokens.add(STRANGER)
    return server.add_repo("org/lora", FILES, gated=True, readers=[TOKEN])


def client(server: HubServer, **rest: Any) -> Hub:
    return Hub(server.endpoint, **{"timeout_s": 5.0, "deadline_s": 20.0, "backoff_s": 0.01, **rest})


def error_of(action: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        action()
    return caught.value


# Resolving


@pytest.mark.parametrize("revision", ["main", "v1", "refs/pr/1"])
def test_a_branch_tag_or_pull_request_becomes_its_commit(server: HubServer, commit: str, revision: str) -> None:
    assert client(server).resolve(replace(REF, revision=revision)).ref == HubRef("org/lora", commit, "")


def test_a_commit_stays_itself_after_the_branch_moved(server: HubServer, commit: str) -> None:
    server.add_repo("org/lora", {})
    assert client(server).resolve(replace(REF, revision=commit)).weights.size_bytes == len(WEIGHTS)


def test_an_answer_about_another_commit_is_refused(server: HubServer, commit: str) -> None:
    pinned = server.repos["org/lora"].refs
    pinned["a" * 40] = commit
    with pytest.raises(HubUnavailable, match="another commit"):
        client(server).resolve(replace(REF, revision="a" * 40))


def test_a_subfolder_holds_its_own_adapter(server: HubServer) -> None:
    server.add_repo("org/lora", {f"deep/er/{path}": data for path, data in FILES.items()})
    assert client(server).resolve(replace(REF, subfolder="deep/er")).weights.path == "deep/er/adapter_model.safetensors"


def test_the_weights_carry_the_sha256_of_lfs(server: HubServer, commit: str) -> None:
    assert client(server).resolve(REF).weights.sha256 == Digest.of(WEIGHTS)


def test_the_config_carries_the_hash_of_git(server: HubServer, commit: str) -> None:
    expected = hashlib.sha1(b"blob 8\0" + CONFIG).hexdigest()
    assert client(server).resolve(REF).config.git_sha1 == expected


@pytest.mark.parametrize(
    ("card", "licence"),
    [({"license": "mit"}, "mit"), ({"license": "other", "license_name": "llama"}, "llama"), ({"license": [1]}, None), ({}, None)],
)
def test_the_licence_comes_from_the_card(server: HubServer, card: dict[str, Any], licence: str | None) -> None:
    server.add_repo("org/lora", FILES, card=card)
    assert client(server).resolve(REF).licence == licence


def test_a_public_repository_is_not_restricted(server: HubServer, commit: str) -> None:
    assert not client(server).resolve(REF).restricted


@pytest.mark.parametrize("kind", ["gated", "private"])
def test_a_gated_or_private_repository_is_restricted(server: HubServer, kind: str) -> None:
    server.add_repo("org/lora", FILES, readers=[TOKEN], **{kind: True})
    assert client(server).resolve(REF, token=TOKEN).restricted


def test_resolving_a_public_repository_is_one_request(server: HubServer, commit: str) -> None:
    client(server).resolve(REF)
    assert len(server.seen) == 1


def test_a_renamed_repository_is_followed(server: HubServer, commit: str) -> None:
    server.moved["old/lora"] = "org/lora"
    assert client(server).resolve(HubRef("old/lora")).ref.revision == commit


def test_the_operators_token_is_used_where_the_caller_has_none(server: HubServer, guarded: str) -> None:
    assert client(server, token=TOKEN).resolve(REF).ref.revision == guarded


def test_the_callers_token_goes_before_the_operators(server: HubServer, guarded: str) -> None:
    with pytest.raises(GatedRepo):
        client(server, token=TOKEN).resolve(REF, token=STRANGER)


def test_without_a_token_the_login_of_the_machine_is_not_used(
    server: HubServer, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    client(server).resolve(REF)
    assert "authorization" not in server.seen[0].headers


# What is missing or forbidden


def test_an_unknown_repository_is_not_found(server: HubServer) -> None:
    assert error_of(lambda: client(server).resolve(REF)).__class__ is RepoNotFound


def test_a_private_repository_is_not_found_without_a_token(server: HubServer) -> None:
    server.add_repo("org/lora", FILES, private=True, readers=[TOKEN])
    assert error_of(lambda: client(server).resolve(REF)).__class__ is RepoNotFound


def test_a_private_repository_is_not_found_for_a_stranger(server: HubServer) -> None:
    server.add_repo("org/lora", FILES, private=True, readers=[TOKEN])
    server.tokens.add(STRANGER)
    assert error_of(lambda: client(server).resolve(REF, token=STRANGER)).__class__ is RepoNotFound


def test_an_unknown_revision_is_named(server: HubServer, commit: str) -> None:
    error = error_of(lambda: client(server).resolve(replace(REF, revision="nope")))
    assert isinstance(error, RevisionNotFound) and error.revision == "nope"


def test_a_gated_repository_is_refused_without_a_token_with_401(server: HubServer, guarded: str) -> None:
    assert error_of(lambda: client(server).resolve(REF)).__class__ is GatedRepo


def test_a_gated_repository_is_refused_to_a_stranger_with_403(server: HubServer, guarded: str) -> None:
    assert error_of(lambda: client(server).resolve(REF, token=STRANGER)).__class__ is GatedRepo


def test_a_token_the_hub_does_not_know_is_refused(server: HubServer, commit: str) -> None:
    assert error_of(lambda: client(server).resolve(REF, token="hf_madeUp")).__class__ is TokenRefused


@pytest.mark.parametrize("bad", ["hf_a\r\nX-Evil: 1", "hf_ä", "hf a", "\0"])
def test_a_token_that_is_no_header_is_refused_before_any_request(server: HubServer, commit: str, bad: str) -> None:
    error_of(lambda: client(server).resolve(REF, token=bad))
    assert server.seen == []


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt"])
def test_weights_as_pickle_alone_are_named_and_refused(server: HubServer, pickle: str) -> None:
    server.add_repo("org/lora", {"adapter_config.json": CONFIG, pickle: b"x"})
    error = error_of(lambda: client(server).resolve(REF))
    assert isinstance(error, PickleOnly) and error.file == pickle


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_an_adapter_lacks_is_named(server: HubServer, missing: str) -> None:
    server.add_repo("org/lora", {path: data for path, data in FILES.items() if path != missing})
    error = error_of(lambda: client(server).resolve(REF))
    assert isinstance(error, NotAnAdapter) and error.missing == missing


def test_an_adapter_elsewhere_in_the_repository_does_not_count(server: HubServer, commit: str) -> None:
    error = error_of(lambda: client(server).resolve(replace(REF, subfolder="sub")))
    assert isinstance(error, NotAnAdapter) and error.missing == "sub/adapter_config.json"


@pytest.mark.parametrize("body", ["", "[]", "{", '{"sha": "../../x", "siblings": []}', '{"sha": 7}', "null"])
def test_an_answer_that_makes_no_sense_is_unavailable(server: HubServer, commit: str, body: str) -> None:
    server.fail("api", "body", value=body)
    assert error_of(lambda: client(server).resolve(REF)).__class__ is HubUnavailable


def test_an_answer_without_end_is_not_read_to_the_end(server: HubServer, commit: str) -> None:
    server.fail("api", "body", value=" " * 33 * 2**20)
    with pytest.raises(HubUnavailable, match="too long"):
        client(server).resolve(REF)


def test_redirects_in_circles_are_left(server: HubServer, commit: str) -> None:
    server.moved["org/lora"] = "org/lora"
    with pytest.raises(HubUnavailable, match="circles"):
        client(server).resolve(REF)


def test_a_hub_that_is_not_there_is_unavailable() -> None:
    hub = Hub("http://127.0.0.1:9", None, retries=1, backoff_s=0.01)
    assert error_of(lambda: hub.resolve(REF)).__class__ is HubUnavailable


def test_a_busy_hub_is_asked_again(server: HubServer, commit: str) -> None:
    server.fail("api", "status", times=3)
    assert client(server).resolve(REF).ref.revision == commit


def test_a_reset_while_resolving_is_tried_again(server: HubServer, commit: str) -> None:
    server.fail("api", "reset", at=20)
    assert client(server).resolve(REF).ref.revision == commit


def test_retries_are_bounded(server: HubServer, commit: str) -> None:
    server.fail("api", "status", times=99)
    error_of(lambda: client(server, retries=3).resolve(REF))
    assert len(server.seen) == 4


def test_pauses_double_and_jitter_shortens_them(server: HubServer, commit: str) -> None:
    pauses_s: list[float] = []
    server.fail("api", "status", times=3)
    client(server, backoff_s=1.0, sleep=pauses_s.append, jitter=lambda: 0.5).resolve(REF)
    assert pauses_s == [0.75, 1.5, 3.0]


def test_the_pause_the_hub_asks_for_is_kept(server: HubServer, commit: str) -> None:
    pauses_s: list[float] = []
    server.fail("api", "status", code=429, headers={"Retry-After": "7"})
    client(server, sleep=pauses_s.append).resolve(REF)
    assert pauses_s == [7.0]


def test_a_pause_beyond_the_deadline_is_not_begun(server: HubServer, commit: str) -> None:
    server.fail("api", "status", code=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubUnavailable, match="20 s allowed"):
        client(server).resolve(REF)


def test_a_repository_that_is_missing_is_asked_for_once(server: HubServer) -> None:
    error_of(lambda: client(server).resolve(REF))
    assert len(server.seen) == 1


# Access


def test_access_is_granted_to_a_reader(server: HubServer, guarded: str) -> None:
    client(server).check_access(replace(REF, revision=guarded), token=TOKEN)


@pytest.mark.parametrize(("kind", "error"), [("gated", GatedRepo), ("private", RepoNotFound)])
def test_access_is_refused_to_another_caller(server: HubServer, kind: str, error: type[HubError]) -> None:
    server.tokens.add(STRANGER)
    server.add_repo("org/lora", FILES, readers=[TOKEN], **{kind: True})
    snapshot = client(server).resolve(REF, token=TOKEN)
    assert error_of(lambda: client(server).check_access(snapshot.ref, token=STRANGER)).__class__ is error


def test_checking_access_moves_no_bytes(server: HubServer, commit: str) -> None:
    client(server).check_access(replace(REF, revision=commit))
    assert [(seen.host, seen.method) for seen in server.seen] == [("hub", "HEAD")]


def test_checking_access_survives_a_rename(server: HubServer, commit: str) -> None:
    server.moved["old/lora"] = "org/lora"
    client(server).check_access(HubRef("old/lora", commit))


def test_access_is_not_granted_by_an_answer_about_another_commit(server: HubServer, commit: str) -> None:
    server.fail("adapter_model.safetensors", "commit", value="b" * 40)
    with pytest.raises(HubUnavailable, match="another commit"):
        client(server).check_access(replace(REF, revision=commit))


def test_a_caller_never_carries_the_cookie_of_another(server: HubServer, guarded: str) -> None:
    hub = client(server)
    server.cookie = "session=friend"
    hub.resolve(REF, token=TOKEN)
    error_of(lambda: hub.resolve(REF, token=STRANGER))
    assert "cookie" not in server.seen[-1].headers


# The server of these tests is a Hub in the eyes of the real library


def test_the_real_client_downloads_a_file_from_the_test_server(server: HubServer, tmp_path: Path, commit: str) -> None:
    path = hf_hub_download("org/lora", "adapter_model.safetensors", endpoint=server.endpoint, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == WEIGHTS


def test_the_real_client_downloads_a_snapshot_from_the_test_server(server: HubServer, tmp_path: Path, commit: str) -> None:
    folder = Path(snapshot_download("org/lora", endpoint=server.endpoint, cache_dir=tmp_path, token=False))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_the_real_client_pins_the_commit(server: HubServer, tmp_path: Path, commit: str) -> None:
    folder = snapshot_download("org/lora", revision="v1", endpoint=server.endpoint, cache_dir=tmp_path, token=False)
    assert Path(folder).name == commit
