"""POST /merge: the same recipe is the same job, and its result is what float64 arithmetic says."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from asking import follow, hub_files, make_named, pages, problem
from hub_server import HubServer
from making import SHAPES, dense, dense_directory, make
from serving import Server, eventually

WIDER = {"layers.0.q_proj": (24, 16), "layers.2.mlp.up": (40, 16), "layers.10.v_proj": (8, 16), "head": (5, 40)}
MADE = {
    "math": make(1, r=4, alpha=8),
    "code": make(2, r=2, alpha=3, shapes=WIDER, target_modules=r".*\.(q_proj|up|v_proj)|head"),
    "rslora": make(3, r=3, alpha=6, use_rslora=True, layers_to_transform=[0, 1, 2]),
    "patterns": make(4, ranks={"layers.0.q_proj": 2, "layers.1.mlp.up": 7}, alpha_pattern={"layers.0.q_proj": 5}),
    "half": make(5, r=2, dtype=torch.float16),
    "brain": make(6, r=2, dtype=torch.bfloat16),
}
EPS = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def ids(server: Server) -> dict[str, str]:
    return {name: server.add(made) for name, made in MADE.items()}


def expected(names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    return weighted(names, {name: dict.fromkeys(WIDER | SHAPES, w) for name, w in zip(names, weights, strict=True)})


def weighted(names: Sequence[str], weights: Mapping[str, Mapping[str, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name in names:
        for module, delta in dense(MADE[name]).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weights[name][module] * delta
    return total


def best(delta: Tensor, k: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]


def result(server: Server, job: Mapping[str, Any], directory: Path) -> dict[str, Tensor]:
    assert job["state"] == "succeeded", job["error"]
    return dense_directory(server.download(job["result"]["id"], directory))


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 2e-6) -> None:
    assert got.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert (got[module] - delta).norm() <= tolerance * max(1.0, float(delta.norm())), module


def part(server: Server, job: Mapping[str, Any], name: str) -> bytes:
    return server.http.get(job["result"]["links"][name]).raise_for_status().content


def config(server: Server, job: Mapping[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(part(server, job, "adapter_config.json"))
    return read


# --- the job


def test_a_new_recipe_is_accepted_and_a_known_one_is_answered(server: Server, ids: dict[str, str]) -> None:
    body = {"adapters": [{"source": ids["math"], "weight": 0.123}]}
    first = server.http.post("/merge", json=body)
    server.ended(first.json()["id"])
    second = server.http.post("/merge", json=body)
    assert (first.status_code, second.status_code, second.json()["id"]) == (202, 200, first.json()["id"])


def test_location_is_the_job(server: Server, ids: dict[str, str]) -> None:
    answer = server.http.post("/merge", json={"adapters": [{"source": ids["math"], "weight": 0.124}]})
    assert server.http.get(answer.headers["location"]).json()["id"] == answer.json()["id"]


@pytest.mark.parametrize(
    "other",
    [
        {"adapters": [{"source": "math", "weight": 1.0}, {"source": "code", "weight": 1.0}]},
        {"adapters": [{"weight": 1, "source": "math"}, {"weight": 1, "source": "code"}], "method": "task_arithmetic"},
        {"dtype": "auto", "seed": 0, "adapters": [{"source": "math", "weight": 1}, {"source": "code", "weight": 1}]},
        {
            "rank": None,
            "profile": "portable",
            "parameters": {},
            "allow_base_mismatch": False,
            "name": "same/recipe",
            "adapters": [
                {"source": "math", "weight": 1, "name": None, "weights_by_module": {}},
                {"source": "code", "weight": 1},
            ],
        },
    ],
    ids=["1.0", "key order", "some defaults", "all defaults and a name"],
)
def test_the_same_recipe_written_differently_is_the_same_job(server: Server, ids: dict[str, str], other: Any) -> None:
    plain = {"adapters": [{"source": ids["math"], "weight": 1}, {"source": ids["code"], "weight": 1}]}
    written = {**other, "adapters": [{**item, "source": ids[item["source"]]} for item in other["adapters"]]}
    assert server.http.post("/merge", json=written).json()["id"] == server.http.post("/merge", json=plain).json()["id"]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"rank": 2}, {"dtype": "float16"}, {"profile": "compact"}, {"rank": {"energy": 0.5}}], ids=str
)
def test_what_may_change_the_result_is_another_job(server: Server, ids: dict[str, str], change: dict[str, Any]) -> None:
    body = {"adapters": [{"source": ids["math"], "weight": 0.125}]}
    assert server.http.post("/merge", json=body | change).json()["id"] != server.http.post("/merge", json=body).json()["id"]


def test_a_weight_left_out_is_one_nth(server: Server, ids: dict[str, str]) -> None:
    bodies = [
        {"adapters": [{"source": ids["math"]}, {"source": ids["code"]}]},
        {"adapters": [{"source": ids["math"], "weight": 0.5}, {"source": ids["code"], "weight": 0.5}]},
    ]
    first, second = (server.http.post("/merge", json=body).json()["id"] for body in bodies)
    assert first == second


def test_a_branch_and_its_commit_are_the_same_job(hub_service: Server, hub: HubServer) -> None:
    commit = hub.add_repo("org/pinned", hub_files(make_named("org/pinned")))
    jobs = {
        hub_service.http.post("/merge", json={"adapters": [{"source": f"hub:org/pinned{at}"}]}).json()["id"]
        for at in ("", "@main", f"@{commit}")
    }
    assert len(jobs) == 1


def test_two_services_give_the_same_bytes(server: Server, hub_service: Server) -> None:
    inputs = [make(50), make(51, r=3, shapes=WIDER)]
    jobs = [s.merge(*map(s.add, inputs), weights=[0.3, -0.7], rank={"energy": 0.9}) for s in (server, hub_service)]
    assert jobs[0]["result"]["id"] == jobs[1]["result"]["id"]


def test_prefer_wait_answers_with_the_result(server: Server, ids: dict[str, str]) -> None:
    body = {"adapters": [{"source": ids["math"], "weight": 0.126}]}
    answer = server.http.post("/merge", json=body, headers={"prefer": "respond-async, wait=50"})
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


def test_the_certificate_in_the_job_is_the_report(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["code"], rank=3)
    assert job["certificate"] == json.loads(part(server, job, "report.json"))


def test_jobs_are_listed_newest_first_each_once(server: Server, ids: dict[str, str]) -> None:
    for weight in (0.31, 0.32, 0.33):
        server.merge(ids["math"], weights=[weight])
    listed = [job for page in pages(server, "/jobs", limit=2) for job in page]
    assert [job["id"] for job in listed] == [job["id"] for page in pages(server, "/jobs") for job in page]
    assert sorted(listed, key=lambda job: job["created_at"], reverse=True) == listed


def test_lists_leave_certificates_out(server: Server, ids: dict[str, str]) -> None:
    server.merge(ids["math"], weights=[0.34])
    assert {job["certificate"] for page in pages(server, "/jobs") for job in page} == {None}


def test_a_finished_job_cannot_be_cancelled(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], weights=[0.35])
    assert server.http.delete(f"/jobs/{job['id']}").json()["state"] == "succeeded"
    assert server.http.get(f"/jobs/{job['id']}").json() == job


@pytest.fixture(scope="module")
def cancelled(hub_service: Server, hub: HubServer) -> dict[str, Any]:
    """A job that was cancelled while it waited for the Hub."""
    hub.add_repo("org/slow", hub_files(make_named("org/slow"), "slow/"))
    hub.fail("slow/adapter_model.safetensors", "stall", at=20)
    job = hub_service.http.post("/merge", json={"adapters": [{"source": "hub:org/slow/slow"}]}).json()
    eventually(lambda: hub.requests("GET", "slow/adapter_model") or None)
    answer: dict[str, Any] = hub_service.http.delete(f"/jobs/{job['id']}").raise_for_status().json()
    return answer


def test_a_running_job_is_cancelled(cancelled: dict[str, Any]) -> None:
    assert (cancelled["state"], cancelled["attempt"], cancelled["result"]) == ("cancelled", 1, None)


def test_cancelling_twice_is_cancelling_once(hub_service: Server, cancelled: dict[str, Any]) -> None:
    assert hub_service.http.delete(f"/jobs/{cancelled['id']}").json() == cancelled


def test_a_cancelled_job_that_is_asked_for_again_makes_its_second_attempt(hub_service: Server, cancelled: dict[str, Any]) -> None:
    again = hub_service.http.post("/merge", json={"adapters": [{"source": "hub:org/slow/slow"}]}).json()
    assert again["id"] == cancelled["id"]
    ended = hub_service.ended(again["id"])
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)


def test_each_attempt_tells_its_own_events(hub_service: Server, cancelled: dict[str, Any]) -> None:
    hub_service.merge("hub:org/slow/slow")
    states = [(e.data["attempt"], e.data["state"]) for e in follow(hub_service, cancelled["id"])]
    assert list(dict.fromkeys(states)) == [
        (1, "queued"),
        (1, "running"),
        (1, "cancelled"),
        (2, "queued"),
        (2, "running"),
        (2, "succeeded"),
    ]


def test_a_deleted_result_is_made_again_and_is_the_same(server: Server, ids: dict[str, str]) -> None:
    first = server.merge(ids["math"], weights=[0.36])
    server.http.delete(f"/adapters/{first['result']['id']}").raise_for_status()
    assert server.http.get(f"/jobs/{first['id']}").json()["result"] is None
    second = server.merge(ids["math"], weights=[0.36])
    assert (second["attempt"], second["result"]["id"]) == (2, first["result"]["id"])


# --- the sources


def test_a_name_given_to_a_result_is_a_source(server: Server, ids: dict[str, str]) -> None:
    named = server.merge(ids["math"], ids["code"], weights=[1, -1], name="merge-api/difference")
    again = server.merge("name:merge-api/difference", weights=[2])
    assert again["certificate"]["inputs"][0]["id"] == named["result"]["id"]


def test_a_name_can_be_given_after_the_fact(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], weights=[0.37])
    server.merge(ids["math"], weights=[0.37], name="merge-api/late")
    assert server.http.get(f"/adapters/{job['result']['id']}").json()["name"] == "merge-api/late"


def test_a_hub_source_with_folder_and_revision(hub_service: Server, hub: HubServer) -> None:
    old, new = make_named("org/folders", 1), make_named("org/folders", 2)
    commit = hub.add_repo("org/folders", hub_files(old, "tasks/math/"), refs=("v1",))
    hub.add_repo("org/folders", hub_files(new, "tasks/math/"))
    job = hub_service.merge("hub:org/folders/tasks/math@v1", "hub:org/folders/tasks/math", weights=[1, -1])
    pinned = [item["source"] for item in job["certificate"]["recipe"]["adapters"]]
    assert pinned[0] == f"hub:org/folders/tasks/math@{commit}"
    assert pinned[0] != pinned[1]


def test_a_hub_source_means_what_its_files_say(hub_service: Server, hub: HubServer, tmp_path: Path) -> None:
    made = make_named("org/exact", 3)
    hub.add_repo("org/exact", hub_files(made))
    job = hub_service.merge("hub:org/exact", weights=[-2])
    assert_close(result(hub_service, job, tmp_path), {module: -2 * delta for module, delta in dense(made).items()})


# --- the arithmetic


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["math"], [1]),
        (["math", "code"], [0.7, 0.3]),
        (["rslora", "patterns"], [1, 1]),
        (["math", "code", "rslora", "patterns"], [0.4, -1.5, 2, 0.25]),
        (["math", "math"], [1, 1]),
        (["code", "math"], [0, 1]),
        (["half", "brain", "math"], [1, 1, -1]),
    ],
    ids=lambda value: "+".join(map(str, value)),
)
def test_the_result_is_the_weighted_sum(
    server: Server, ids: dict[str, str], tmp_path: Path, names: list[str], weights: list[float]
) -> None:
    job = server.merge(*(ids[name] for name in names), weights=weights)
    assert_close(result(server, job, tmp_path), expected(names, weights))


def test_what_cancels_out_is_zero(server: Server, ids: dict[str, str], tmp_path: Path) -> None:
    job = server.merge(ids["math"], ids["math"], weights=[1, -1])
    assert_close(result(server, job, tmp_path), expected(["math"], [0]))


def test_weights_by_module_replace_the_weight_where_they_match(server: Server, ids: dict[str, str], tmp_path: Path) -> None:
    by_module = {r"layers\.(0|1)\.": -1.0, "^head$": 4}
    inputs = [
        {"source": ids["math"], "weight": 0.5, "weights_by_module": {"q_proj$": 0}},
        {"source": ids["code"], "weight": 2, "weights_by_module": by_module},
    ]
    job = server.http.post("/merge", json={"adapters": inputs}, headers={"prefer": "wait=50"}).json()
    modules = WIDER | SHAPES
    math = {module: 0.0 if re.search("q_proj$", module) else 0.5 for module in modules}
    code = {module: next((w for p, w in by_module.items() if re.search(p, module)), 2.0) for module in modules}
    assert_close(result(server, job, tmp_path), weighted(["math", "code"], {"math": math, "code": code}))


def test_an_integer_rank_gives_the_best_approximation(server: Server, ids: dict[str, str], tmp_path: Path) -> None:
    job = server.merge(ids["math"], ids["rslora"], rank=3)
    wanted = {module: best(delta, 3) for module, delta in expected(["math", "rslora"], [1, 1]).items()}
    assert_close(result(server, job, tmp_path), wanted, 1e-5)


def test_the_error_certified_is_the_error_measured(server: Server, ids: dict[str, str], tmp_path: Path) -> None:
    job = server.merge(ids["math"], ids["rslora"], rank=2)
    got, wanted = result(server, job, tmp_path), expected(["math", "rslora"], [1, 1])
    measured = {m: float((got[m] - wanted[m]).norm() / wanted[m].norm()) for m in wanted}
    certified = {m["module"]: m["relative_error"] for m in job["certificate"]["modules"]}
    assert certified == pytest.approx(measured, rel=1e-4)


def test_an_energy_keeps_the_smallest_rank_that_holds_it(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["rslora"], rank={"energy": 0.8}, profile="compact")
    wanted = {}
    for module, delta in expected(["math", "rslora"], [1, 1]).items():
        energy = torch.linalg.svdvals(delta).square()
        wanted[module] = int((energy.cumsum(0) < 0.8 * energy.sum()).sum()) + 1
    assert {m["module"]: m["rank_out"] for m in job["certificate"]["modules"]} == wanted


def test_an_energy_stops_at_its_maximum(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["rslora"], rank={"energy": 0.999, "max": 2})
    assert config(server, job)["r"] == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_has_the_dtype_asked_for(server: Server, ids: dict[str, str], tmp_path: Path, dtype: str) -> None:
    job = server.merge(ids["math"], ids["code"], dtype=dtype)
    tensors = load(part(server, job, "adapter_model.safetensors"))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert_close(result(server, job, tmp_path), expected(["math", "code"], [1, 1]), EPS[dtype] * 2)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [(["half"], "float16"), (["brain"], "bfloat16"), (["half", "brain"], "float32"), (["brain", "math"], "float32")],
    ids=str,
)
def test_auto_is_the_narrowest_dtype_that_holds_every_input(
    server: Server, ids: dict[str, str], names: list[str], dtype: str
) -> None:
    job = server.merge(*(ids[name] for name in names))
    tensors = load(part(server, job, "adapter_model.safetensors"))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}


def test_portable_is_one_rank_with_alpha_equal_to_it(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["patterns"], ids["code"])
    written = config(server, job)
    assert written["lora_alpha"] == written["r"] == 4 + 7
    assert (written["rank_pattern"], written["alpha_pattern"], written["use_rslora"]) == ({}, {}, False)


def test_portable_pads_every_factor_to_the_rank(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["patterns"], ids["code"])
    tensors = load(part(server, job, "adapter_model.safetensors"))
    assert {t.shape[0] if "lora_A" in name else t.shape[1] for name, t in tensors.items()} == {11}


def test_portable_lists_its_targets(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["code"])
    assert sorted(config(server, job)["target_modules"]) == sorted(SHAPES | WIDER)


def test_compact_pads_nothing(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], ids["code"], profile="compact")
    tensors = load(part(server, job, "adapter_model.safetensors"))
    ranks = {m["module"]: m["rank_out"] for m in job["certificate"]["modules"]}
    assert {module: tensors[f"base_model.model.{module}.lora_A.weight"].shape[0] for module in ranks} == ranks


def test_compact_means_the_same_as_portable(server: Server, ids: dict[str, str], tmp_path: Path) -> None:
    compact, portable = (server.merge(ids["math"], ids["code"], profile=p) for p in ("compact", "portable"))
    assert_close(result(server, compact, tmp_path / "c"), result(server, portable, tmp_path / "p"))


def test_a_seed_is_part_of_the_recipe(server: Server, ids: dict[str, str]) -> None:
    job = server.merge(ids["math"], weights=[0.38], seed=7)
    assert job["certificate"]["recipe"]["seed"] == 7


def test_another_base_model_can_be_allowed(server: Server, ids: dict[str, str]) -> None:
    other = server.add(make(7, base_model="org/other-base"))
    body = {"adapters": [{"source": ids["math"]}, {"source": other}]}
    problem(server.http.post("/merge", json=body), 409, "base-model-mismatch")
    job = server.merge(ids["math"], other, allow_base_mismatch=True)
    assert config(server, job)["base_model_name_or_path"] == "org/base"
