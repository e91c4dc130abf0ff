"""What becomes of a basis: adapters are added, originals forgotten, blobs collected; who may read it; and what is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
import pytest

from app.commands import collect_garbage
from app.settings import Settings
from asking import ZERO, hub_files, make_named, problem
from hub_server import HubServer
from making import dense, make
from reversing import (
    CONFIG,
    WEIGHTS,
    body,
    errors,
    extended,
    make_basis,
    part,
    reconstructed,
    relative_error,
    report,
    shown,
    task_deltas,
)
from serving import Server, serving

BASE = "org/rmm-lifecycle"
MADE = {
    "math": make(11, base_model=BASE),
    "code": make(12, r=3, alpha=5, base_model=BASE),
    "law": make(13, r=2, base_model=BASE, shapes={"layers.0.q_proj": (24, 16), "layers.7.q_proj": (8, 8)}),
}
OTHER_BASE = make(14, base_model="org/rmm-another")
OTHER_SHAPE = make(15, base_model=BASE, shapes={"layers.0.q_proj": (24, 8)})
SLOPPY = make(16, r=2, base_model=BASE, shapes={"layers.0.q_proj": (24, 16)})
MINE, OTHERS = "hf_the-token-of-one-rmm-caller", "hf_the-token-of-another-rmm-caller"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("rmm")) as running:
        yield running


@pytest.fixture(scope="module")
def ids(service: Server) -> dict[str, str]:
    return {name: service.add(made) for name, made in MADE.items()}


def collected(server: Server) -> None:
    collect_garbage(Settings(data_dir=server.data_dir), grace_s=0)


# --- adding adapters


@pytest.fixture(scope="module", params=["truncate", "lossless", "rmm"])
def grown(request: pytest.FixtureRequest, service: Server) -> dict[str, Any]:
    """A basis of two, whose originals are gone, and what came of adding a third to it. tasks: their files before."""
    parameters = {"codec": request.param, **({"p": 1} if request.param == "rmm" else {"budget": 0.5})}
    pair = {name: service.add(MADE[name]) for name in ("math", "code")}
    old = make_basis(service, pair, **parameters)
    before = {task: part(service, old, task) for task in pair}
    view = shown(service, old)
    for adapter in pair.values():
        service.http.delete(f"/adapters/{adapter}").raise_for_status()
    collected(service)
    assert all(service.http.get(f"/adapters/{adapter}").status_code == 404 for adapter in pair.values())
    return {"old": old, "view": view, "before": before, "new": extended(service, old, service.add(MADE["law"]), "law")}


def test_an_extension_is_a_new_basis_of_all_tasks(service: Server, grown: dict[str, Any]) -> None:
    assert grown["new"] != grown["old"]
    assert list(errors(service, grown["new"])) == ["math", "code", "law"]


def test_an_extension_knows_what_it_extends(service: Server, grown: dict[str, Any]) -> None:
    view = shown(service, grown["new"])
    assert (view["extends"], report(service, grown["new"])["recipe"]["extends"]) == (grown["old"], grown["old"])


def test_the_basis_that_was_extended_is_as_it_was(service: Server, grown: dict[str, Any]) -> None:
    assert shown(service, grown["old"]) == grown["view"]


@pytest.mark.parametrize("task", ["math", "code"])
def test_no_earlier_task_changes(service: Server, grown: dict[str, Any], task: str) -> None:
    assert part(service, grown["new"], task) == grown["before"][task]


def test_every_error_stated_of_an_extension_is_the_error_measured(service: Server, grown: dict[str, Any]) -> None:
    for task, stated in errors(service, grown["new"]).items():
        found = relative_error(task_deltas(service, grown["new"], task), dense(MADE[task]))
        assert stated == pytest.approx(found, rel=1e-5, abs=1e-6)


def test_old_and_new_tasks_mix(service: Server, grown: dict[str, Any]) -> None:
    told = reconstructed(service, grown["new"], weights={"math": 1, "law": -1})
    assert told["adapter"]["modules"] == len(dense(MADE["math"]) | dense(MADE["law"]))


def test_extending_again_is_the_same_basis(service: Server, grown: dict[str, Any]) -> None:
    assert extended(service, grown["old"], service.add(MADE["law"]), "law") == grown["new"]


def test_an_extension_can_be_extended(service: Server, grown: dict[str, Any]) -> None:
    third = extended(service, grown["new"], service.add(MADE["math"]), "math-again")
    assert list(errors(service, third)) == ["math", "code", "law", "math-again"]
    assert part(service, third, "code") == grown["before"]["code"]


def test_an_extension_outlives_the_basis_it_extends(service: Server) -> None:
    old = make_basis(service, {"math": service.add(MADE["math"])}, budget=0.31)
    new = extended(service, old, service.add(MADE["code"]), "code")
    before = part(service, new, "math")
    service.http.delete(f"/rmm/{old}").raise_for_status()
    collected(service)
    assert part(service, new, "math") == before


def test_an_extension_takes_over_the_profile(service: Server, ids: dict[str, str]) -> None:
    old = make_basis(service, {"math": ids["math"]}, {"profile": "compact"}, budget=0.6)
    new = extended(service, old, ids["code"], "code")
    assert report(service, new)["recipe"]["profile"] == "compact"


def test_an_extension_may_have_parameters_of_its_own(service: Server, ids: dict[str, str]) -> None:
    old = make_basis(service, {"math": ids["math"], "code": ids["code"]}, codec="rmm", p=1)
    new = extended(service, old, ids["law"], "law", parameters={"codec": "truncate", "budget": 0.5})
    assert shown(service, new)["codecs"].keys() == {"rmm", "truncate"}


def test_another_base_model_can_be_allowed(service: Server, ids: dict[str, str]) -> None:
    old = make_basis(service, {"math": ids["math"]}, budget=0.32)
    extension = {"adapter": {"source": service.add(OTHER_BASE), "name": "foreign"}}
    told = problem(service.http.post(f"/rmm/{old}/extend", json=extension), 409, "base-model-mismatch")
    assert "org/rmm-another" in told["detail"]
    new = extended(service, old, service.add(OTHER_BASE), "foreign", allow_base_mismatch=True)
    assert shown(service, new)["base_model"] == BASE


@pytest.mark.parametrize(
    ("extension", "status", "slug", "mention"),
    [
        ({"adapter": {"source": "law", "name": "math"}}, 422, "invalid-field", "'math' already"),
        ({"adapter": {"source": "law", "weight": 1}}, 422, "invalid-field", "weigh them"),
        ({"adapter": {"source": "shape"}}, 422, "shape-mismatch", "layers.0.q_proj"),
        ({"adapter": {"source": "law"}, "parameters": {"budget": 0}}, 422, "invalid-params", "parameters.budget"),
        ({"adapter": {"source": "law"}, "parameters": {"p": 1, "codec": "rmm"}}, 422, "invalid-params", "parameters.p"),
        ({"adapter": {"source": "law"}, "rank": 2}, 422, "invalid-request", "body.rank"),
        ({"adapters": [{"source": "law"}]}, 422, "invalid-request", "body.adapter"),
        ({"adapter": {"source": ZERO}}, 404, "unknown-adapter", ZERO),
    ],
    ids=["a task of that name", "a weight", "another shape", "no budget", "p out of range", "a rank", "several", "unknown"],
)
def test_an_extension_that_cannot_be_is_refused(
    service: Server, ids: dict[str, str], extension: dict[str, Any], status: int, slug: str, mention: str
) -> None:
    old = make_basis(service, {"math": ids["math"], "code": ids["code"]}, budget=0.4)
    known = {"shape": service.add(OTHER_SHAPE), **ids}
    if item := extension.get("adapter"):
        extension = {**extension, "adapter": {**item, "source": known.get(item["source"], item["source"])}}
    assert mention in problem(service.http.post(f"/rmm/{old}/extend", json=extension), status, slug)["detail"]


# --- what a basis is not


@pytest.fixture(scope="module")
def named(service: Server, ids: dict[str, str]) -> str:
    return make_basis(service, {"math": ids["math"]}, {"name": "rmm-lifecycle/basis"}, budget=0.33)


def test_a_basis_has_the_name_it_was_given(service: Server, named: str) -> None:
    assert shown(service, named)["name"] == "rmm-lifecycle/basis"


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("method", ["task_arithmetic", "rmm"])
def test_a_basis_is_no_source(service: Server, named: str, by_name: bool, method: str) -> None:
    source = "name:rmm-lifecycle/basis" if by_name else named
    answer = service.http.post("/merge", json={"method": method, "adapters": [{"source": source}]})
    assert source in problem(answer, 404, "unknown-adapter")["detail"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/adapter_config.json"), ("GET", "/report.json")]
)
def test_a_basis_is_no_adapter(service: Server, named: str, method: str, path: str) -> None:
    problem(service.http.request(method, f"/adapters/{named}{path}"), 404, "unknown-adapter")
    assert shown(service, named)["id"] == named


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", f"/tasks/math/{WEIGHTS}"), ("GET", "/report.json")]
)
def test_an_adapter_is_no_basis(service: Server, ids: dict[str, str], method: str, path: str) -> None:
    problem(service.http.request(method, f"/rmm/{ids['math']}{path}"), 404, "unknown-basis")
    assert service.http.get(f"/adapters/{ids['math']}").status_code == 200


# --- garbage


def test_collecting_garbage_keeps_all_of_a_basis(service: Server, ids: dict[str, str]) -> None:
    basis = make_basis(service, ids, budget=0.34)
    collected(service)
    assert set(task_deltas(service, basis, "law")) == set(dense(MADE["law"]))


def test_a_forgotten_basis_is_gone_and_its_bytes_with_it(service: Server, ids: dict[str, str]) -> None:
    basis = make_basis(service, ids, budget=0.35)
    etags = [service.http.get(f"/rmm/{basis}/{name}").headers["etag"].strip('"') for name in ("basis.safetensors", "basis.json")]
    assert service.http.delete(f"/rmm/{basis}").status_code == 204
    problem(service.http.get(f"/rmm/{basis}"), 404, "unknown-basis")
    problem(service.http.delete(f"/rmm/{basis}"), 404, "unknown-basis")
    collected(service)
    left = {blob.name for blob in (service.data_dir / "blobs").rglob("*")}
    assert not left & {basis.removeprefix("sha256:"), *etags}


def test_a_forgotten_basis_is_made_again_and_is_the_same(service: Server, ids: dict[str, str]) -> None:
    basis = make_basis(service, ids, budget=0.36)
    service.http.delete(f"/rmm/{basis}").raise_for_status()
    collected(service)
    assert make_basis(service, ids, budget=0.36) == basis


def test_a_basis_that_lost_a_blob_is_unknown_until_it_is_made_again(service: Server, ids: dict[str, str]) -> None:
    basis = make_basis(service, ids, budget=0.37)
    etag = service.http.get(f"/rmm/{basis}/report.json").headers["etag"].strip('"')
    (service.data_dir / "blobs" / "sha256" / etag[:2] / etag).unlink()
    problem(service.http.get(f"/rmm/{basis}"), 404, "unknown-basis")
    assert basis not in [view["id"] for view in service.http.get("/rmm").raise_for_status().json()["data"]]
    assert make_basis(service, ids, budget=0.37) == basis


# --- private adapters


@pytest.fixture(scope="module")
def private(hub_service: Server, hub: HubServer) -> dict[str, str]:
    """A basis of a private and a public adapter, and one that extends it; MINE may read them, OTHERS may not."""
    hub.add_repo("org/rmm-private", hub_files(make_named("org/rmm-private-base")), readers=[MINE], private=True)
    hub.add_repo("org/rmm-public", hub_files(make_named("org/rmm-private-base", 2)))
    hub.tokens.add(OTHERS)
    basis = make_basis(hub_service, {"secret": "hub:org/rmm-private", "open": "hub:org/rmm-public"}, token=MINE)
    for task in shown(hub_service, basis)["tasks"]:
        hub_service.http.delete(f"/adapters/{task['input']}").raise_for_status()
    again = {"adapter": {"source": "hub:org/rmm-public", "name": "again"}}
    job = hub_service.http.post(f"/rmm/{basis}/extend", json=again, headers={"x-hub-token": MINE}).raise_for_status().json()
    return {"basis": basis, "extension": hub_service.ended(job["id"])["result"]["id"]}


def requests(server: Server, basis: str, headers: Mapping[str, str]) -> dict[str, httpx2.Response]:
    """Every way to its bytes."""
    http, path = server.http, f"/rmm/{basis}"
    return {
        "file": http.get(f"{path}/basis.safetensors", headers=headers),
        "contents": http.get(f"{path}/basis.json", headers=headers),
        "certificate": http.get(f"{path}/report.json", headers=headers),
        "task": http.get(f"{path}/tasks/secret/{WEIGHTS}", headers=headers),
        "public task": http.get(f"{path}/tasks/open/{CONFIG}", headers={**headers, "if-none-match": "*"}),
        "reconstruct": http.post(f"{path}/reconstruct", json={"task": "secret"}, headers=headers),
        "mix": http.post(f"{path}/reconstruct", json={"weights": {"open": 1, "secret": 0}}, headers=headers),
        "extend": http.post(f"{path}/extend", json={"adapter": {"source": "hub:org/rmm-public", "name": "x"}}, headers=headers),
    }


@pytest.mark.parametrize("which", ["basis", "extension"])
def test_who_may_read_the_adapters_gets_all_of_it(hub_service: Server, private: dict[str, str], which: str) -> None:
    answers = requests(hub_service, private[which], {"x-hub-token": MINE})
    assert {answer.status_code for answer in answers.values()} <= {200, 202, 304}


@pytest.mark.parametrize("token", [None, OTHERS])
@pytest.mark.parametrize("which", ["basis", "extension"])
def test_nobody_else_gets_any_of_it(hub_service: Server, private: dict[str, str], which: str, token: str | None) -> None:
    for answer in requests(hub_service, private[which], {"x-hub-token": token} if token else {}).values():
        problem(answer, 404, "repo-not-found")


@pytest.mark.parametrize("token", [None, OTHERS])
def test_what_came_out_of_it_is_as_private(hub_service: Server, private: dict[str, str], token: str | None) -> None:
    answer = hub_service.http.post(
        f"/rmm/{private['basis']}/reconstruct", json={"task": "open"}, headers={"x-hub-token": MINE}
    ).raise_for_status()
    link = answer.json()["adapter"]["links"][WEIGHTS]
    assert hub_service.http.get(link, headers={"x-hub-token": MINE}).headers["cache-control"].startswith("private")
    problem(hub_service.http.get(link, headers={"x-hub-token": token} if token else {}), 404, "repo-not-found")


@pytest.mark.parametrize("token", [None, OTHERS])
def test_its_job_shows_nobody_else_the_certificate(hub_service: Server, private: dict[str, str], token: str | None) -> None:
    recipe = shown(hub_service, private["basis"])["recipe"]
    job = hub_service.http.get(f"/jobs/{recipe}", headers={"x-hub-token": token} if token else {}).json()
    assert (job["state"], job["certificate"]) == ("succeeded", None)


def test_its_job_shows_the_certificate_to_who_may_read_it(hub_service: Server, private: dict[str, str]) -> None:
    recipe = shown(hub_service, private["basis"])["recipe"]
    job = hub_service.http.get(f"/jobs/{recipe}", headers={"x-hub-token": MINE}).json()
    assert job["certificate"]["kind"] == "basis"


# --- bad input


def several(count: int = 2, **fields: Any) -> dict[str, Any]:
    return {"adapters": [{"source": "math", **fields} for _ in range(count)]}


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "p negative": ({"parameters": {"codec": "rmm", "p": -1}}, 422, "invalid-params", "parameters.p"),
    "p out of range": ({"parameters": {"codec": "rmm", "p": 2}}, 422, "invalid-params", "at most 1 principal"),
    "p text": ({"parameters": {"codec": "rmm", "p": "1"}}, 422, "invalid-params", "parameters.p"),
    "p of a codec without": ({"parameters": {"codec": "tucker2", "p": 1}}, 422, "invalid-params", "parameters.p"),
    "no budget": ({"parameters": {"budget": 0}}, 422, "invalid-params", "parameters.budget"),
    "budget negative": ({"parameters": {"budget": -0.5}}, 422, "invalid-params", "parameters.budget"),
    "budget true": ({"parameters": {"budget": True}}, 422, "invalid-params", "parameters.budget"),
    "codec unknown": ({"parameters": {"codec": "zip"}}, 422, "invalid-params", "parameters.codec"),
    "quantize unknown": ({"parameters": {"quantize": "int3"}}, 422, "invalid-params", "parameters.quantize"),
    "parameter unknown": ({"parameters": {"bits": 4}}, 422, "invalid-params", "parameters.bits"),
    "no adapters": ({"adapters": []}, 422, "invalid-request", "body.adapters"),
    "65 adapters": (several(65), 422, "wrong-count", "64"),
    "two tasks of one name": (several(name="a"), 422, "invalid-field", "'a' is used twice"),
    "a path as a name": (several(1, name="../a"), 422, "invalid-request", "body.adapters.0.name"),
    "a hidden name": (several(1, name=".a"), 422, "invalid-request", "body.adapters.0.name"),
    "a name with a slash": (several(1, name="a/b"), 422, "invalid-request", "body.adapters.0.name"),
    "a name with a newline": (several(1, name="a\n"), 422, "invalid-request", "body.adapters.0.name"),
    "a weight": (several(weight=1), 422, "invalid-field", "adapters.0.weight"),
    "weights by module": (several(weights_by_module={"q_proj": 1}), 422, "invalid-field", "adapters.0.weight"),
    "a rank": ({"rank": 2}, 422, "invalid-rank", "budget"),
    "an energy": ({"rank": {"energy": 0.9}}, 422, "invalid-rank", "budget"),
    "a post-step": ({"post": [{"name": "pico"}]}, 422, "invalid-field", "post"),
    "another base model": ({"adapters": [{"source": "math"}, {"source": "base"}]}, 409, "base-model-mismatch", "org/rmm-another"),
    "another shape": ({"adapters": [{"source": "math"}, {"source": "shape"}]}, 422, "shape-mismatch", "layers.0.q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_basis_that_cannot_be_is_refused(service: Server, ids: dict[str, str], case: str) -> None:
    change, status, slug, mention = REFUSED[case]
    known = {"base": service.add(OTHER_BASE), "shape": service.add(OTHER_SHAPE), **ids}
    asked = {**body({"math": "math", "code": "code"}), **change}
    asked["adapters"] = [{**item, "source": known[item["source"]]} for item in asked["adapters"]]
    assert mention in problem(service.http.post("/merge", json=asked), status, slug)["detail"]


@pytest.mark.parametrize(
    ("asked", "status", "slug", "mention"),
    [
        ({}, 422, "invalid-field", "task or weights"),
        ({"task": "math", "weights": {"math": 1}}, 422, "invalid-field", "task or weights"),
        ({"task": "math", "rank": 2}, 422, "invalid-field", "rank"),
        ({"weights": {}}, 422, "invalid-field", "weights"),
        ({"weights": {"math": "1"}}, 422, "invalid-request", "body.weights.math"),
        ({"weights": {"../math": 1}}, 422, "invalid-request", "body.weights"),
        ({"weights": {"math": 1}, "rank": 0}, 422, "invalid-request", "body.rank"),
        ({"weights": {"math": 1e300}}, 422, "non-finite-result", "layers.0"),
        ({"weights": {"math": 1e300}, "rank": 1}, 422, "non-finite-result", "layers.0"),
        ({"task": "math", "name": "no-namespace"}, 422, "invalid-request", "body.name"),
        ({"task": "math", "dtype": "float16"}, 422, "invalid-request", "body.dtype"),
    ],
    ids=str,
)
def test_what_cannot_come_out_of_it_is_refused(
    service: Server, named: str, asked: dict[str, Any], status: int, slug: str, mention: str
) -> None:
    assert mention in problem(service.http.post(f"/rmm/{named}/reconstruct", json=asked), status, slug)["detail"]


@pytest.mark.parametrize("path", ["", "/report.json", f"/tasks/math/{WEIGHTS}"])
def test_a_basis_that_is_not_there_is_unknown(service: Server, path: str) -> None:
    problem(service.http.get(f"/rmm/{ZERO}{path}"), 404, "unknown-basis")
    problem(service.http.get(f"/rmm/latest{path}"), 422, "bad-digest")


@pytest.mark.parametrize("task", ["..%2fmath", "%2e%2e", "math%00", "x" * 5000])
def test_a_path_in_place_of_a_task_leads_nowhere(service: Server, named: str, task: str) -> None:
    assert service.http.get(f"/rmm/{named}/tasks/{task}/{WEIGHTS}").status_code == 404
