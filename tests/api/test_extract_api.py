"""Extraction over HTTP and from the command line: jobs, kills, cancels, downloads, and bad input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save_file

from app.services import Services
from app.settings import Settings
from asking import ZERO, follow, preloaded, problem
from making import dense_directory
from merge_algos import extract
from pairs import MODULES, in_shards, recipe_in, run, state_of, write_pair
from serving import Server, eventually, serving

LARGE = {f"layers.{n}.q_proj.weight": (640, 512) for n in range(40)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and tuned, small; large-base and large-tuned, which take a while."""
    root = tmp_path_factory.mktemp("models")
    write_pair(root)
    generator = torch.Generator().manual_seed(0)
    for name in ("large-base", "large-tuned"):
        (root / name).mkdir()
        (root / name / "config.json").write_text('{"model_type": "llama"}')
        state = {tensor: torch.randn(shape, generator=generator) for tensor, shape in LARGE.items()}
        save_file(state, root / name / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"BRAID_BASES_DIR": str(models), "BRAID_SHARD_BYTES": "1", "BRAID_THREADS": "1", "BRAID_HUB_DEADLINE_S": "2"}
    with serving(tmp_path_factory.mktemp("extract"), **settings) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    return {"base": "dir:base", "tuned": "dir:tuned", "rank": 4, **fields}


def post(service: Server, wait_s: int = 60, **fields: Any) -> httpx2.Response:
    return service.http.post("/extract", json=body(**fields), headers={"prefer": f"wait={wait_s}"})


def test_a_request_becomes_a_job_and_the_job_an_adapter(service: Server, models: Path, tmp_path: Path) -> None:
    answer = post(service, name="me/extracted")
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (200, f"/jobs/{job['id']}")
    assert (job["state"], job["method"], job["result"]["kind"]) == ("succeeded", "extract", "adapter")
    deltas = dense_directory(service.download(job["result"]["id"], tmp_path))
    expected = extract(state_of(models / "base"), state_of(models / "tuned"), rank=4).adapter.deltas
    assert set(deltas) == MODULES
    for name, delta in expected.items():
        torch.testing.assert_close(deltas[name], delta.to_dense().double(), atol=1e-6, rtol=1e-5)
    view = service.http.get(f"/adapters/{job['result']['id']}").json()
    recipe = job["certificate"]["recipe"]["models"]
    assert (view["source"], view["recipe"], view["name"]) == ("extract", job["id"], "me/extracted")
    assert view["inputs"] == [recipe["base"], recipe["tuned"]]


def test_the_same_request_is_the_same_job(service: Server) -> None:
    first, second = (post(service, rank=3) for _ in range(2))
    assert first.json()["id"] == second.json()["id"] and second.status_code == 200
    assert first.json()["result"] == second.json()["result"]


def test_a_result_merges_like_any_adapter(service: Server) -> None:
    extracted = post(service).json()["result"]["id"]
    merged = service.merge(extracted, weights=[0.5])
    assert (merged["state"], merged["certificate"]["totals"]["exact"]) == ("succeeded", True)


def test_a_model_once_read_is_known_by_its_id(service: Server) -> None:
    recipe = post(service).json()["certificate"]["recipe"]["models"]
    assert post(service, base=recipe["base"], tuned=recipe["tuned"]).json()["certificate"]["recipe"]["models"] == recipe


def test_its_events_tell_survey_and_shards(service: Server) -> None:
    job = post(service, wait_s=0, seed=7).json()["id"]
    stages = [event.data["progress"]["stage"] for event in follow(service, job)]
    assert list(dict.fromkeys(stages)) == ["queued", "fetch", "survey", "merge", "assemble"]


# Kills and cancels


def begun(service: Server, seed: int) -> str:
    """A large extraction some shards of which are done."""
    answer = post(service, wait_s=0, base="dir:large-base", tuned="dir:large-tuned", rank=16, seed=seed)
    assert answer.status_code == 202, answer.text
    job: str = answer.json()["id"]
    eventually(lambda: is_merging(service, job) or None)
    return job


def is_merging(service: Server, job: str) -> bool:
    progress = service.http.get(f"/jobs/{job}").json()["progress"]
    return progress["stage"] == "merge" and 2 < progress["done"] < progress["total"]


@pytest.mark.parametrize(("victim", "seed"), [("child", 11), ("worker", 12)])
def test_a_kill_in_the_midst_changes_no_byte(service: Server, models: Path, victim: str, seed: int, tmp_path: Path) -> None:
    job = begun(service, seed)
    service.processes()[victim].kill()
    ended = service.ended(job, wait_s=240)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
    calm = Services.open(Settings(data_dir=tmp_path, bases_dir=models))
    recipe = recipe_in(calm, base="dir:large-base", tuned="dir:large-tuned", rank=16, seed=seed)
    assert (str(recipe.digest), str(run(calm, recipe))) == (job, ended["result"]["id"])


def test_a_cancelled_extraction_ends_and_goes_on_when_asked_again(service: Server) -> None:
    job = begun(service, 13)
    assert service.http.delete(f"/jobs/{job}").json()["state"] == "cancelled"
    again = post(service, wait_s=0, base="dir:large-base", tuned="dir:large-tuned", rank=16, seed=13).json()
    assert again["id"] == job
    ended = service.ended(job, wait_s=240)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)


# Bad input


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rank": 0}, "body.rank.integer"),
        ({"rank": True}, "body.rank.integer"),
        ({"rank": None}, "body.rank.integer"),
        ({"rank": {"energy": 1.5}}, "body.rank.energy.energy"),
        ({"rank": {"energy": 0.9, "max": 0}}, "body.rank.energy.max"),
        ({"rank": {"heavy_tail": 0}}, "body.rank.heavy_tail.heavy_tail"),
        ({"rank": {"heavy_tail": 4, "energy": 0.9}}, "body.rank.heavy_tail.energy"),
        ({"leftover": "ignore"}, "body.leftover"),
        ({"include": ["x" * 513]}, "body.include.0"),
        ({"include": "lm_head"}, "body.include"),
        ({"base_model_name": "a\nb"}, "body.base_model_name"),
        ({"base_model_name": ""}, "body.base_model_name"),
        ({"name": "plain"}, "body.name"),
        ({"method": "extract"}, "body.method"),
        ({"dtype": "int8"}, "body.dtype"),
        ({"seed": -1}, "body.seed"),
    ],
)
def test_a_field_that_is_wrong_is_named(service: Server, fields: dict[str, Any], field: str) -> None:
    assert problem(post(service, **fields), 422, "invalid-request")["errors"][0]["field"] == field


@pytest.mark.parametrize("missing", ["base", "tuned", "rank"])
def test_what_is_missing_is_named(service: Server, missing: str) -> None:
    sent = {name: value for name, value in body().items() if name != missing}
    answer = service.http.post("/extract", json=sent)
    assert problem(answer, 422, "invalid-request")["errors"][0]["field"] == f"body.{missing}"


@pytest.mark.parametrize(
    ("fields", "status", "slug"),
    [
        ({"base": "dir:nowhere"}, 404, "unknown-base-model"),
        ({"tuned": ZERO}, 404, "unknown-base-model"),
        ({"tuned": "dir:../base"}, 422, "bad-source"),
        ({"tuned": "name:me/x"}, 422, "bad-source"),
        ({"tuned": "sha256:1"}, 422, "bad-digest"),
        ({"tuned": "hub:datasets/org/x"}, 422, "bad-source"),
        ({"tuned": "dir:base"}, 422, "nothing-to-extract"),
        ({"tuned": "dir:large-tuned"}, 422, "incomparable-tensor"),
        ({"rank": 99}, 422, "invalid-rank"),
        ({"exclude": ["nobody"]}, 422, "bad-pattern"),
        ({"include": ["["]}, 422, "invalid-field"),
        ({"include": ["embed"]}, 422, "invalid-params"),
        ({"tuned": "hub:org/away"}, 502, "hub-unavailable"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_job(service: Server, fields: Any, status: int, slug: str) -> None:
    jobs = len(service.http.get("/jobs?limit=200").json()["data"])
    problem(post(service, **fields), status, slug)
    assert len(service.http.get("/jobs?limit=200").json()["data"]) == jobs


def test_what_only_the_weights_tell_is_the_job_s_problem(service: Server) -> None:
    job = post(service, leftover="refuse").json()
    assert (job["state"], job["error"]["type"]) == ("failed", "urn:braid:problem:leftover-tensors")
    assert "model.embed_tokens.weight" in job["error"]["tensors"]


def test_merge_knows_no_method_of_that_name(service: Server) -> None:
    answer = service.http.post("/merge", json={"method": "extract", "adapters": [{"source": ZERO}]})
    problem(answer, 422, "unknown-method")


# The command line


def test_the_command_extracts_here_from_any_directory(models: Path, tmp_path: Path) -> None:
    ran = preloaded(
        *("extract", "--base", models / "base", "--tuned", models / "tuned", "--heavy-tail", "5", "--max-rank", "9"),
        *("--include", "lm_head", "--base-model-name", "org/llama", "-o", tmp_path / "out"),
        data_dir=tmp_path / "data",
    )
    assert ran.returncode == 0, ran.stderr
    assert "model.embed_tokens.weight" in ran.stdout and "AutoModelForCausalLM" in ran.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {module["module"] for module in report["modules"]} == {*MODULES, "lm_head"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/llama"


def test_the_command_extracts_on_a_server(service: Server, tmp_path: Path) -> None:
    command = ("extract", "--base", "dir:base", "--tuned", "dir:tuned", "--energy", "0.8", "--url", service.url)
    ran = preloaded(*command, "-o", tmp_path / "out", data_dir=tmp_path / "data")
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(module["retained_energy"] >= 0.8 for module in report["modules"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give one of --rank, --energy and --heavy-tail"),
        (["--rank", "4", "--energy", "0.9"], "give one of"),
        (["--rank", "4", "--max-rank", "8"], "--rank is the most already"),
        (["--energy", "1.5"], "rank.energy.energy"),
        (["--rank", "4", "--leftover", "ignore"], "leftover"),
    ],
)
def test_flags_that_contradict_are_refused_in_a_sentence(models: Path, tmp_path: Path, flags: list[str], says: str) -> None:
    ran = preloaded("extract", "--base", models / "base", "--tuned", models / "tuned", *flags, data_dir=tmp_path)
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert says in ran.stderr


def test_shards_on_a_server_are_one_model(service: Server, models: Path, tmp_path: Path) -> None:
    whole = post(service).json()["result"]["id"]
    write_pair(models / "sharded")
    in_shards(models / "sharded" / "tuned")
    parts = post(service, base="dir:sharded/base", tuned="dir:sharded/tuned").json()["result"]["id"]
    factors = (dense_directory(service.download(each, tmp_path / each[-4:])) for each in (whole, parts))
    assert all(torch.equal(a, b) for a, b in zip(*(found.values() for found in factors), strict=True))
