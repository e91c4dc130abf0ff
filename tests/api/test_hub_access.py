"""Private and gated adapters: for those whom the Hub lets in, and for nobody else; and a token leaves no trace."""

from pathlib import Path
from typing import Any

import httpx2
import pytest

from asking import OPERATORS_TOKEN, follow, hub_files, make_named, problem
from hub_server import API, HubServer
from serving import Server

MINE = "hf_the-token-of-one-caller"
OTHERS = "hf_the-token-of-another-caller"
UNKNOWN = "hf_a-token-the-hub-never-gave"


@pytest.fixture(scope="module", params=["private", "gated"])
def repo(request: pytest.FixtureRequest, hub: HubServer) -> str:
    """A repository that MINE may read and OTHERS may not."""
    name = f"org/{request.param}"
    hub.add_repo(name, hub_files(make_named(name)), readers=[MINE], **{request.param: True})
    hub.tokens.add(OTHERS)
    return name


@pytest.fixture(scope="module")
def merged(hub_service: Server, repo: str) -> dict[str, Any]:
    """What the caller who may read the repository made of it."""
    headers = {"x-hub-token": MINE, "prefer": "wait=50"}
    answer = hub_service.http.post("/merge", json={"adapters": [{"source": f"hub:{repo}", "weight": 2}]}, headers=headers)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


@pytest.fixture(scope="module")
def source(merged: dict[str, Any]) -> str:
    return str(merged["certificate"]["inputs"][0]["id"])


def as_caller(token: str | None) -> dict[str, str]:
    return {"x-hub-token": token} if token else {}


def assert_refused(answer: httpx2.Response, repo: str, token: str | None) -> None:
    """As the Hub itself distinguishes: what is private does not exist for others, what is gated is known to be."""
    if token == UNKNOWN:
        problem(answer, 401, "token-refused")
    elif repo == "org/private":
        problem(answer, 404, "repo-not-found")
    else:
        problem(answer, 403, "gated-repo")


def test_the_caller_who_may_read_can_merge(merged: dict[str, Any]) -> None:
    assert merged["state"] == "succeeded"


def test_the_caller_who_may_read_gets_the_result(hub_service: Server, merged: dict[str, Any]) -> None:
    for link in merged["result"]["links"].values():
        assert hub_service.http.get(link, headers=as_caller(MINE)).status_code == 200


def test_nobody_else_is_to_keep_a_copy(hub_service: Server, merged: dict[str, Any]) -> None:
    answer = hub_service.http.get(merged["result"]["links"]["adapter_config.json"], headers=as_caller(MINE))
    assert answer.headers["cache-control"].startswith("private")


@pytest.mark.parametrize("token", [None, OTHERS, UNKNOWN])
class TestAnotherCaller:
    """Everything was fetched already, with the token of one who may."""

    def test_cannot_merge_it_by_reference(self, hub_service: Server, repo: str, merged: Any, token: str | None) -> None:
        body = {"adapters": [{"source": f"hub:{repo}", "weight": 2}]}
        assert_refused(hub_service.http.post("/merge", json=body, headers=as_caller(token)), repo, token)

    def test_cannot_merge_it_by_commit(self, hub_service: Server, repo: str, merged: Any, token: str | None) -> None:
        body = {"adapters": [{"source": merged["certificate"]["recipe"]["adapters"][0]["source"], "weight": 2}]}
        assert_refused(hub_service.http.post("/merge", json=body, headers=as_caller(token)), repo, token)

    def test_cannot_merge_it_by_digest(self, hub_service: Server, repo: str, source: str, token: str | None) -> None:
        body = {"adapters": [{"source": source, "weight": 2}]}
        assert_refused(hub_service.http.post("/merge", json=body, headers=as_caller(token)), repo, token)

    def test_cannot_merge_what_was_made_of_it(self, hub_service: Server, repo: str, merged: Any, token: str | None) -> None:
        body = {"adapters": [{"source": merged["result"]["id"]}]}
        assert_refused(hub_service.http.post("/merge", json=body, headers=as_caller(token)), repo, token)

    def test_cannot_import_it(self, hub_service: Server, repo: str, merged: Any, token: str | None) -> None:
        answer = hub_service.http.post("/adapters", json={"source": f"hub:{repo}"}, headers=as_caller(token))
        assert_refused(answer, repo, token)

    def test_cannot_download_it(self, hub_service: Server, repo: str, source: str, token: str | None) -> None:
        path = f"/adapters/{source}/adapter_model.safetensors"
        assert_refused(hub_service.http.get(path, headers=as_caller(token)), repo, token)

    def test_cannot_download_what_was_made_of_it(self, hub_service: Server, repo: str, merged: Any, token: str | None) -> None:
        for name, link in merged["result"]["links"].items():
            if name != "self":
                assert_refused(hub_service.http.get(link, headers=as_caller(token)), repo, token)

    def test_cannot_learn_that_a_guess_was_right(self, hub_service: Server, repo: str, source: str, token: str | None) -> None:
        path = f"/adapters/{source}/adapter_model.safetensors"
        assert_refused(hub_service.http.get(path, headers=as_caller(token) | {"if-none-match": "*"}), repo, token)

    def test_does_not_see_the_certificate(self, hub_service: Server, merged: Any, token: str | None) -> None:
        job = hub_service.http.get(f"/jobs/{merged['id']}", headers=as_caller(token)).json()
        assert (job["state"], job["certificate"]) == ("succeeded", None)


def test_the_caller_who_may_read_sees_the_certificate(hub_service: Server, merged: dict[str, Any]) -> None:
    job = hub_service.http.get(f"/jobs/{merged['id']}", headers=as_caller(MINE)).json()
    assert job["certificate"] == merged["certificate"]


def test_whoever_lost_access_has_lost_the_copy_here(hub_service: Server, hub: HubServer) -> None:
    hub.add_repo("org/revoked", hub_files(make_named("org/revoked")), readers=[MINE], private=True)
    adapter = hub_service.http.post("/adapters", json={"source": "hub:org/revoked"}, headers=as_caller(MINE)).json()["id"]
    hub.repos["org/revoked"].readers = frozenset()
    answer = hub_service.http.get(f"/adapters/{adapter}/adapter_config.json", headers=as_caller(MINE))
    problem(answer, 404, "repo-not-found")


@pytest.mark.parametrize("secret", [MINE, OTHERS, UNKNOWN])
def test_no_secret_is_written_anywhere(hub_service: Server, merged: dict[str, Any], secret: str) -> None:
    """The log is at DEBUG and lies in the data directory, beside the databases and blobs."""
    assert "DEBUG" in hub_service.log.read_text()
    holding = [str(path) for path in files(hub_service.data_dir) if secret.encode() in path.read_bytes()]
    assert holding == []


def test_no_token_is_answered(hub_service: Server, merged: dict[str, Any], source: str) -> None:
    paths = [
        "/jobs",
        "/adapters",
        f"/jobs/{merged['id']}",
        f"/adapters/{source}",
        "/metrics",
        *merged["result"]["links"].values(),
    ]
    for path in paths:
        assert MINE not in hub_service.http.get(path, headers=as_caller(MINE)).text
    assert all(MINE not in str(event.data) for event in follow(hub_service, merged["id"], **as_caller(MINE)))


def test_a_token_goes_to_the_hub_and_not_to_its_storage(hub: HubServer, merged: dict[str, Any]) -> None:
    assert [seen for seen in hub.requests(host="cdn") if "authorization" in seen.headers] == []


def test_a_token_that_no_header_can_hold_is_refused(hub_service: Server, repo: str) -> None:
    answer = hub_service.http.post("/adapters", json={"source": f"hub:{repo}"}, headers={"x-hub-token": "tökén".encode()})
    problem(answer, 401, "token-refused")


# --- public adapters


def test_a_known_commit_needs_no_hub(hub_service: Server, hub: HubServer) -> None:
    commit = hub.add_repo("org/known", hub_files(make_named("org/known")))
    hub_service.http.post("/adapters", json={"source": "hub:org/known"}).raise_for_status()
    asked = len(hub.seen)
    job = hub_service.merge(f"hub:org/known@{commit}", weights=[3])
    assert hub_service.http.get(job["result"]["links"]["adapter_model.safetensors"]).status_code == 200
    assert len(hub.seen) == asked


# --- what the Hub may answer


@pytest.fixture(scope="module")
def repos(hub: HubServer) -> None:
    files = make_named("org/odd").files
    config = {"adapter_config.json": files["adapter_config.json"]}
    weights = {"adapter_model.safetensors": files["adapter_model.safetensors"]}
    hub.add_repo("org/odd", files)
    hub.add_repo("org/odd-gated", files, gated=True)
    hub.add_repo("org/odd-pickle", {**config, "adapter_model.bin": b"\x80\x04"})
    hub.add_repo("org/odd-full-model", {"config.json": b"{}", "model.safetensors": b""})
    hub.add_repo("org/odd-no-config", weights)
    hub.add_repo("org/odd-corrupt", hub_files(make_named("org/odd-corrupt", 9), "corrupt/"))
    hub.add_repo("org/odd-kind", {**weights, "adapter_config.json": b'{"peft_type": "IA3"}'})


@pytest.mark.parametrize(
    ("source", "status", "slug", "mention"),
    [
        ("org/nowhere", 404, "repo-not-found", "org/nowhere"),
        ("org/odd@v9", 404, "revision-not-found", "v9"),
        ("org/odd/folder", 422, "not-an-adapter", "folder/adapter_config.json"),
        ("org/odd-gated", 403, "gated-repo", "accept its terms"),
        ("org/odd-pickle", 422, "pickle-only", "adapter_model.bin"),
        ("org/odd-full-model", 422, "not-an-adapter", "adapter_config.json"),
        ("org/odd-no-config", 422, "not-an-adapter", "adapter_config.json"),
        ("org/odd-kind", 422, "unsupported-adapter", "IA3"),
    ],
)
@pytest.mark.parametrize("path", ["/adapters", "/merge"])
@pytest.mark.usefixtures("repos")
def test_each_answer_of_the_hub_is_a_problem_of_its_own(
    hub_service: Server, source: str, status: int, slug: str, mention: str, path: str
) -> None:
    body = {"source": f"hub:{source}"} if path == "/adapters" else {"adapters": [{"source": f"hub:{source}"}]}
    answer = hub_service.http.post(path, json=body)
    if answer.status_code == 202:  # what only the files tell, the job tells
        error = hub_service.ended(answer.json()["id"])["error"]
        assert (error["status"], error["type"]) == (status, f"urn:braid:problem:{slug}")
    else:
        error = problem(answer, status, slug)
    assert mention in error["detail"]


@pytest.mark.usefixtures("repos")
def test_a_token_the_hub_does_not_know_is_a_problem_of_its_own(hub_service: Server) -> None:
    problem(hub_service.http.post("/adapters", json={"source": "hub:org/odd"}, headers=as_caller(UNKNOWN)), 401, "token-refused")


@pytest.mark.usefixtures("repos")
def test_bytes_that_are_not_those_announced_are_a_problem_of_their_own(hub_service: Server, hub: HubServer) -> None:
    hub.fail("corrupt/adapter_model.safetensors", "corrupt", times=2, at=200)
    answer = hub_service.http.post("/adapters", json={"source": "hub:org/odd-corrupt/corrupt"})
    problem(answer, 502, "digest-mismatch")


@pytest.mark.usefixtures("repos")
def test_a_hub_that_is_down_is_a_problem_of_its_own(hub_service: Server, hub: HubServer) -> None:
    fault = hub.fail(API, "status", code=503, times=100)
    answer = hub_service.http.post("/merge", json={"adapters": [{"source": "hub:org/odd"}]})
    fault.times = 0
    assert "503" in problem(answer, 502, "hub-unavailable")["detail"]


# --- the operator's token


@pytest.fixture(scope="module")
def company(hub: HubServer) -> str:
    """A repository that the operator's token may read."""
    hub.add_repo("org/company", hub_files(make_named("org/company")), readers=[OPERATORS_TOKEN], private=True)
    return "hub:org/company"


def test_the_operators_token_reads_for_every_caller(lean: Server, company: str) -> None:
    adapter = lean.http.post("/adapters", json={"source": company}).raise_for_status().json()
    assert lean.http.get(adapter["links"]["adapter_model.safetensors"]).status_code == 200


def test_a_callers_own_token_is_used_before_the_operators(lean: Server, company: str, hub: HubServer) -> None:
    hub.tokens.add(OTHERS)
    answer = lean.http.post("/adapters", json={"source": company}, headers=as_caller(OTHERS))
    problem(answer, 404, "repo-not-found")


def test_the_operators_token_is_written_nowhere(lean: Server, company: str) -> None:
    lean.http.post("/adapters", json={"source": company}).raise_for_status()
    assert [str(path) for path in files(lean.data_dir) if OPERATORS_TOKEN.encode() in path.read_bytes()] == []


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
