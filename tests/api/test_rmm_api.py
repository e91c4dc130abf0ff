"""One basis, any task back: what it says of itself is what float64 arithmetic finds, and a mix is the sum of its tasks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from asking import pages, problem
from making import PREFIX, SHAPES, Made, dense, make
from reversing import (
    CONFIG,
    WEIGHTS,
    adapter_deltas,
    body,
    distance,
    errors,
    make_basis,
    part,
    reconstructed,
    relative_error,
    report,
    shown,
    summed,
    task_deltas,
)
from serving import Server

BASE = "org/rmm-api"
WIDER = {"layers.0.q_proj": (24, 16), "layers.2.mlp.up": (40, 16), "layers.10.v_proj": (8, 16), "head": (5, 40)}


def flat() -> Made:
    """Rank-deficient: its second direction repeats the first; and one module is zero."""
    made = make(7, r=2, base_model=BASE)
    tensors = {name: t.clone() for name, t in made.tensors.items()}
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor[1] = tensor[0]
    tensors[f"{PREFIX}layers.1.q_proj.lora_B.weight"].zero_()
    return Made(tensors, made.config)


MADE = {
    "math": make(1, base_model=BASE),
    "code": make(2, r=2, alpha=3, shapes=WIDER, base_model=BASE, target_modules=r".*\.(q_proj|up|v_proj)|head"),
    "rslora": make(3, r=3, alpha=6, use_rslora=True, base_model=BASE),
    "patterns": make(
        4, ranks={"layers.0.q_proj": 2, "layers.1.mlp.up": 7}, alpha_pattern={"layers.0.q_proj": 5}, base_model=BASE
    ),
    "flat": flat(),
    "half": make(5, r=2, dtype=torch.float16, base_model=BASE),
    "brain": make(6, r=2, dtype=torch.bfloat16, base_model=BASE),
}
EXACT = ("math", "code", "rslora", "patterns", "flat")  # shipped as float32, so that nothing is rounded
FRACTION = 0.4


@pytest.fixture(scope="module")
def ids(server: Server) -> dict[str, str]:
    return {name: server.add(made) for name, made in MADE.items()}


@pytest.fixture(scope="module")
def basis(server: Server, ids: dict[str, str]) -> str:
    return make_basis(server, ids, codec="auto", budget=FRACTION)


@pytest.fixture(scope="module")
def lossless(server: Server, ids: dict[str, str]) -> str:
    return make_basis(server, ids, codec="lossless")


# --- the basis


def test_it_is_one_safetensors_file_and_what_explains_it(server: Server, basis: str) -> None:
    links = shown(server, basis)["links"]
    assert set(links) == {"self", "reconstruct", "extend", "basis.safetensors", "basis.json", "report.json"}
    tensors = load(server.http.get(links["basis.safetensors"]).content)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.uint8"}


def test_it_is_smaller_than_its_budget(server: Server, basis: str) -> None:
    view = shown(server, basis)
    taken = sum(len(tensor) for tensor in load(server.http.get(view["links"]["basis.safetensors"]).content).values())
    assert view["size_bytes"] == taken <= FRACTION * view["input_bytes"]


def test_the_bytes_it_is_measured_against_are_those_of_the_factors_as_bf16(server: Server, basis: str) -> None:
    factors = sum(2 * tensor.numel() for made in MADE.values() for tensor in made.tensors.values())
    assert shown(server, basis)["input_bytes"] == factors


def test_it_names_its_tasks_and_what_they_were(server: Server, basis: str, ids: dict[str, str]) -> None:
    assert [(task["name"], task["input"]) for task in shown(server, basis)["tasks"]] == list(ids.items())


def test_every_module_has_a_codec(server: Server, basis: str) -> None:
    view, modules = shown(server, basis), SHAPES | WIDER
    assert sum(view["codecs"].values()) == view["modules"] == len(modules)


def test_the_certificate_says_how_it_was_made(server: Server, basis: str, ids: dict[str, str]) -> None:
    found = report(server, basis)
    assert [item["source"] for item in found["recipe"]["adapters"]] == list(ids.values())
    assert found["recipe_digest"] == shown(server, basis)["recipe"]


def test_the_job_shows_the_certificate(server: Server, basis: str) -> None:
    job = server.http.get(f"/jobs/{shown(server, basis)['recipe']}").json()
    assert (job["result"]["id"], job["certificate"]) == (basis, report(server, basis))


@pytest.mark.parametrize("name", ["basis.safetensors", "basis.json", "report.json"])
def test_the_etag_of_a_file_is_its_sha256(server: Server, basis: str, name: str) -> None:
    answer = server.http.get(f"/rmm/{basis}/{name}")
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'


def test_the_same_adapters_are_the_same_basis(server: Server, basis: str, ids: dict[str, str]) -> None:
    answer = server.http.post("/merge", json=body(ids, codec="auto", budget=FRACTION))
    assert (answer.status_code, answer.json()["result"]["id"]) == (200, basis)


def test_bases_are_listed_newest_first(server: Server, basis: str, lossless: str) -> None:
    listed = [view["id"] for page in pages(server, "/rmm", limit=1) for view in page]
    assert listed.index(lossless) < listed.index(basis)


@pytest.mark.parametrize("codec", ["truncate", "tucker2", "rmm", "rmm_aligned", "hybrid"])
def test_one_codec_can_be_asked_for(server: Server, ids: dict[str, str], codec: str) -> None:
    made = make_basis(server, {name: ids[name] for name in ("math", "code")}, codec=codec, budget=0.3)
    assert set(shown(server, made)["codecs"]) == {codec}
    for task, error in errors(server, made).items():
        assert error == pytest.approx(relative_error(task_deltas(server, made, task), dense(MADE[task])), rel=1e-5)


# --- a task


@pytest.mark.parametrize("task", EXACT)
def test_the_error_stated_is_the_error_measured(server: Server, basis: str, task: str) -> None:
    found = relative_error(task_deltas(server, basis, task), dense(MADE[task]))
    assert errors(server, basis)[task] == pytest.approx(found, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("task", EXACT)
def test_the_errors_of_its_modules_are_those_measured(server: Server, basis: str, task: str) -> None:
    back, wanted, position = task_deltas(server, basis, task), dense(MADE[task]), list(MADE).index(task)
    for module in report(server, basis)["modules"]:
        name = module["module"]
        if float(wanted.get(name, torch.zeros(1)).norm()):
            found = relative_error({name: back[name]}, {name: wanted[name]})
            assert module["errors"][position] == pytest.approx(found, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("task", ["half", "brain"])
def test_rounding_to_a_narrow_type_is_stated_beside_it(server: Server, basis: str, task: str) -> None:
    told = reconstructed(server, basis, task=task)
    found = relative_error(task_deltas(server, basis, task), dense(MADE[task]))
    assert told["rounding_error"] > 0
    assert found == pytest.approx((told["relative_error"] ** 2 + told["rounding_error"] ** 2) ** 0.5, rel=0.05)


@pytest.mark.parametrize("task", MADE)
def test_it_has_the_modules_and_the_type_of_its_adapter(server: Server, basis: str, task: str) -> None:
    tensors = load(part(server, basis, task))
    assert tensors.keys() == MADE[task].tensors.keys()
    assert {t.dtype for t in tensors.values()} == {t.dtype for t in MADE[task].tensors.values()}


def test_a_dtype_that_is_asked_for_is_that_of_every_task(server: Server, ids: dict[str, str]) -> None:
    made = make_basis(server, {name: ids[name] for name in ("math", "half")}, {"dtype": "bfloat16"})
    for task in ("math", "half"):
        assert {t.dtype for t in load(part(server, made, task)).values()} == {torch.bfloat16}


def test_a_compact_basis_gives_adapters_without_padding(server: Server, ids: dict[str, str]) -> None:
    chosen = {name: ids[name] for name in ("math", "patterns")}
    compact, portable = (make_basis(server, chosen, {"profile": p}, budget=0.6) for p in ("compact", "portable"))
    ranks = {len(t) for name, t in load(part(server, portable, "patterns")).items() if "lora_A" in name}
    assert len(ranks) == 1
    assert distance(task_deltas(server, compact, "patterns"), task_deltas(server, portable, "patterns")) < 1e-5
    assert len(part(server, compact, "patterns")) < len(part(server, portable, "patterns"))


def test_reconstructing_gives_an_adapter_like_any_other(server: Server, basis: str) -> None:
    told = reconstructed(server, basis, task="math")
    view = server.http.get(told["adapter"]["links"]["self"]).json()
    assert view == told["adapter"]
    assert (view["source"], view["inputs"], told["task"], told["weights"]) == ("basis", [basis], "math", {"math": 1.0})
    assert told["relative_error"] == errors(server, basis)["math"]


def test_its_report_says_what_was_lost(server: Server, basis: str) -> None:
    told = reconstructed(server, basis, task="math")
    found = server.http.get(told["adapter"]["links"]["report.json"]).json()
    assert (found["basis"], found["relative_error"]) == (basis, told["relative_error"])


def test_it_can_be_merged(server: Server, basis: str, tmp_path: Path) -> None:
    adapter = reconstructed(server, basis, task="math")["adapter"]["id"]
    job = server.merge(adapter, weights=[2.0])
    merged = adapter_deltas(server, job["result"]["id"], tmp_path)
    assert relative_error(merged, summed([(2.0, task_deltas(server, basis, "math"))])) < 1e-6


def test_it_can_be_named(server: Server, basis: str) -> None:
    told = reconstructed(server, basis, task="code", name="rmm-api/code")
    assert told["adapter"]["name"] == "rmm-api/code"


def test_asking_twice_is_asking_once(server: Server, basis: str) -> None:
    first = reconstructed(server, basis, task="rslora")
    blobs = sorted((server.data_dir / "blobs").rglob("*"))
    ages = [blob.stat().st_mtime_ns for blob in blobs]
    assert reconstructed(server, basis, task="rslora") == first
    assert [blob.stat().st_mtime_ns for blob in blobs] == ages  # storing a blob again would have restarted its age


# --- a task's files


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_one_request_gives_a_file_of_a_task(server: Server, basis: str, name: str) -> None:
    told = reconstructed(server, basis, task="math")
    link = next(task for task in shown(server, basis)["tasks"] if task["name"] == "math")["links"][name]
    assert server.http.get(link).content == server.http.get(told["adapter"]["links"][name]).content


def test_a_file_of_a_task_keeps_to_http(server: Server, basis: str) -> None:
    path = f"/rmm/{basis}/tasks/patterns/{WEIGHTS}"
    head = server.http.head(path)
    whole, etag = server.http.get(path), head.headers["etag"]
    assert etag == f'"{hashlib.sha256(whole.content).hexdigest()}"'
    assert (head.content, head.headers["content-length"]) == (b"", str(len(whole.content)))
    assert server.http.get(path, headers={"if-none-match": etag}).status_code == 304
    ranged = server.http.get(path, headers={"range": "bytes=8-15"})
    assert (ranged.status_code, ranged.content) == (206, whole.content[8:16])


@pytest.mark.parametrize("ask", ["reconstruct", "weights", WEIGHTS])
def test_a_task_it_has_not_is_answered_with_those_it_has(server: Server, basis: str, ask: str) -> None:
    asked = {"reconstruct": {"task": "maths"}, "weights": {"weights": {"math": 1, "maths": 1}}}
    if ask in asked:
        answer = server.http.post(f"/rmm/{basis}/reconstruct", json=asked[ask])
    else:
        answer = server.http.get(f"/rmm/{basis}/tasks/maths/{ask}")
    told = problem(answer, 404, "unknown-task")
    assert (told["task"], told["tasks"]) == ("maths", list(MADE))
    assert all(name in told["detail"] for name in MADE)


@pytest.mark.parametrize("path", ["adapter_model.bin", "tasks/math/adapter_model.bin"])
def test_a_file_it_has_not_is_unknown(server: Server, basis: str, path: str) -> None:
    problem(server.http.get(f"/rmm/{basis}/{path}"), 404, "unknown-part")


# --- a mix


@pytest.mark.parametrize(
    "weights",
    [{"math": 0.5, "code": 0.5}, {"math": 1, "rslora": -0.7, "patterns": 2}, {"flat": -3}, {"code": 0}, {"math": 1, "brain": 1}],
    ids="+".join,
)
def test_a_mix_is_the_weighted_sum_of_what_comes_back(
    server: Server, basis: str, tmp_path: Path, weights: dict[str, float]
) -> None:
    told = reconstructed(server, basis, weights=weights)
    wanted = summed([(weight, task_deltas(server, basis, task)) for task, weight in weights.items()])
    tolerance = 2e-6 if "brain" not in weights else 5e-3  # a task alone is bf16 here, in the mix it is not
    assert distance(adapter_deltas(server, told["adapter"]["id"], tmp_path), wanted) <= tolerance * distance(wanted, {})


def test_the_error_of_a_mix_is_a_bound(server: Server, basis: str, tmp_path: Path) -> None:
    weights = {"math": 0.5, "code": -1.5}
    told = reconstructed(server, basis, weights=weights)
    mixed = adapter_deltas(server, told["adapter"]["id"], tmp_path)
    lost = distance(mixed, summed([(weight, dense(MADE[task])) for task, weight in weights.items()]))
    assert 0 < lost / distance(mixed, {}) <= told["relative_error"] * (1 + 1e-5)


def test_a_mix_at_a_rank_is_the_best_of_that_rank(server: Server, basis: str, tmp_path: Path) -> None:
    told = reconstructed(server, basis, weights={"math": 1, "rslora": 1}, rank=2)
    wanted = summed([(1, task_deltas(server, basis, "math")), (1, task_deltas(server, basis, "rslora"))])
    assert told["adapter"]["rank"] == 2
    for name, delta in adapter_deltas(server, told["adapter"]["id"], tmp_path).items():
        U, S, Vh = torch.linalg.svd(wanted[name], full_matrices=False)
        assert float((delta - U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]).norm()) < 1e-5 * float(S[0])


def test_the_order_of_the_weights_means_nothing(server: Server, basis: str) -> None:
    first, second = {"math": 0.25, "code": 0.75}, {"code": 0.75, "math": 0.25}
    told = reconstructed(server, basis, weights=first)
    server.http.delete(told["adapter"]["links"]["self"]).raise_for_status()
    assert reconstructed(server, basis, weights=second)["adapter"]["id"] == told["adapter"]["id"]


def test_a_weight_of_one_is_the_task(server: Server, basis: str) -> None:
    assert reconstructed(server, basis, weights={"math": 1}) == reconstructed(server, basis, task="math")


# --- the adapters' own bytes


@pytest.mark.parametrize("task", MADE)
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_lossless_gives_the_very_files(server: Server, lossless: str, task: str, name: str) -> None:
    assert part(server, lossless, task, name) == MADE[task].files[name]


def test_lossless_says_that_nothing_is_lost(server: Server, lossless: str) -> None:
    view = shown(server, lossless)
    assert set(errors(server, lossless).values()) == {0.0}
    assert (view["codecs"], view["size_bytes"]) == ({"lossless": view["modules"]}, view["file_bytes"])


def test_a_lossless_mix_is_the_sum_of_the_adapters(server: Server, lossless: str, tmp_path: Path) -> None:
    weights = {"math": 0.5, "code": -1, "half": 2}
    told = reconstructed(server, lossless, weights=weights)
    wanted = summed([(weight, dense(MADE[task])) for task, weight in weights.items()])
    assert told["relative_error"] == 0.0
    assert relative_error(adapter_deltas(server, told["adapter"]["id"], tmp_path), wanted) < 2e-6


def test_a_lossless_task_can_be_cut_to_a_rank(server: Server, lossless: str, tmp_path: Path) -> None:
    told = reconstructed(server, lossless, weights={"math": 1}, rank=2)
    found = relative_error(adapter_deltas(server, told["adapter"]["id"], tmp_path), dense(MADE["math"]))
    assert (told["adapter"]["rank"], told["relative_error"]) == (2, pytest.approx(found, rel=1e-5))


# --- a few adapters, and the same one again


def test_one_adapter_is_a_basis(server: Server, ids: dict[str, str]) -> None:
    made = make_basis(server, {"only": ids["math"]}, budget=1.0)
    found = relative_error(task_deltas(server, made, "only"), dense(MADE["math"]))
    assert errors(server, made)["only"] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("codec", ["truncate", "lossless"])
def test_the_same_adapter_again_costs_almost_nothing(server: Server, ids: dict[str, str], codec: str) -> None:
    pair = {name: ids[name] for name in ("math", "code")}
    two = make_basis(server, pair, codec=codec, budget=0.4)
    four = make_basis(server, {**pair, "math-again": ids["math"], "code-again": ids["code"]}, codec=codec, budget=0.2)
    assert shown(server, four)["size_bytes"] <= 1.01 * shown(server, two)["size_bytes"]
    assert part(server, four, "math") == part(server, four, "math-again")
    assert json.loads(part(server, four, "math", CONFIG)) == json.loads(part(server, four, "math-again", CONFIG))


def test_names_come_from_the_sources(server: Server, ids: dict[str, str]) -> None:
    asked: dict[str, Any] = body({})
    asked["adapters"] = [{"source": ids["math"]}, {"source": ids["math"]}]
    job = server.http.post("/merge", json=asked, headers={"prefer": "wait=50"}).json()
    natural = ids["math"].removeprefix("sha256:")[:12]
    assert list(errors(server, job["result"]["id"])) == [natural, f"{natural}-2"]
