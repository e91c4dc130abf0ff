"""Adapters that need the base model's weights, over HTTP and from the command line: asked for, killed, cancelled, refused."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from app import ingest
from app.services import Services
from app.settings import Settings
from asking import follow, preloaded, problem
from doras import TARGETS, dense_doras, difference, dora, norm, recipe_of, run, write_adapter
from llama import write_llama
from making import PREFIX, Made, dense_directory, make
from serving import Server, eventually, serving

LARGE = {f"layers.{n}.q_proj": (640, 512) for n in range(24)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and dora and lora on it; large, which takes a while."""
    root = tmp_path_factory.mktemp("models")
    write_llama(root / "base")
    write_adapter(root / "base", root / "dora", dora())
    write_adapter(root / "base", root / "lora", LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS), seed=2)
    generator = torch.Generator().manual_seed(0)
    (root / "large").mkdir()
    (root / "large" / "config.json").write_text('{"model_type": "llama"}')
    state = {f"{module}.weight": torch.randn(shape, generator=generator) for module, shape in LARGE.items()}
    save_file(state, root / "large" / "model.safetensors")
    return root


@pytest.fixture(scope="module")
def service(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"BRAID_BASES_DIR": str(models), "BRAID_SHARD_BYTES": "1", "BRAID_THREADS": "1"}
    with serving(tmp_path_factory.mktemp("grounding"), **settings) as running:
        yield running


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


def uploaded(service: Server, folder: Path) -> str:
    answer = service.http.post("/adapters", files={name: (name, data) for name, data in read(folder).items()})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def ids(service: Server, models: Path) -> Mapping[str, str]:
    return {name: uploaded(service, models / name) for name in ("dora", "lora")}


def post(service: Server, *sources: str, wait_s: int = 60, **fields: Any) -> httpx2.Response:
    body = {"adapters": [{"source": source, "weight": 1.0} for source in sources], "base_model": "dir:base", **fields}
    return service.http.post("/merge", json=body, headers={"prefer": f"wait={wait_s}"})


def test_a_dora_merges_beside_a_lora(service: Server, models: Path, ids: Mapping[str, str], tmp_path: Path) -> None:
    job = post(service, ids["dora"], ids["lora"], base_rank=6).json()
    assert job["state"] == "succeeded", job["error"]
    (section,) = job["certificate"]["grounded"]
    doras, loras = dense_doras(models / "base", models / "dora"), dense_directory(models / "lora")
    found = dense_directory(service.download(job["result"]["id"], tmp_path))
    error = norm(difference(found, {module: doras[module] + loras[module] for module in doras}))
    assert error == pytest.approx(section["relative_error"] * norm(doras), rel=1e-3)
    assert service.http.get(f"/adapters/{job['result']['id']}").json()["inputs"] == [ids["dora"], ids["lora"]]


def test_the_same_request_is_the_same_job(service: Server, ids: Mapping[str, str]) -> None:
    first, second = (post(service, ids["dora"], base_rank={"energy": 0.9}) for _ in range(2))
    assert (second.status_code, second.json()["id"]) == (200, first.json()["id"])
    assert first.json()["result"] == second.json()["result"]


def test_its_events_tell_of_the_stage(service: Server, ids: Mapping[str, str]) -> None:
    job = post(service, ids["dora"], wait_s=0, seed=7).json()["id"]
    stages = [event.data["progress"]["stage"] for event in follow(service, job)]
    assert list(dict.fromkeys(stages)) == ["queued", "fetch", "ground", "merge", "assemble"]


def test_what_it_was_grounded_to_is_an_adapter_with_a_certificate(service: Server, ids: Mapping[str, str]) -> None:
    (section,) = post(service, ids["dora"], base_rank=5).json()["certificate"]["grounded"]
    view = service.http.get(f"/adapters/{section['id']}").json()
    assert (view["source"], view["inputs"]) == ("ground", [ids["dora"]])
    report = service.http.get(f"/adapters/{section['id']}/report.json").json()
    assert (report["kind"], report["totals"]["relative_error"]) == ("grounding", section["relative_error"])


def test_a_basis_takes_one_more(service: Server, ids: Mapping[str, str]) -> None:
    adapters = [{"source": ids["lora"], "name": "lora"}]
    asked = {"method": "rmm", "parameters": {"budget": 0.5}, "adapters": adapters}
    basis = service.http.post("/merge", json=asked, headers={"prefer": "wait=60"}).json()["result"]["id"]
    more = {"adapter": {"source": ids["dora"], "name": "dora"}, "base_model": "dir:base", "base_rank": 4}
    job = service.ended(service.http.post(f"/rmm/{basis}/extend", json=more).json()["id"])
    assert job["state"] == "succeeded", job["error"]
    assert [task.get("grounded", {}).get("rank") for task in job["certificate"]["tasks"]] == [None, 4]


# Kills and cancels


def large_dora(seed: int) -> Made:
    made = make(seed, shapes=LARGE, r=4)
    generator = torch.Generator().manual_seed(seed)
    magnitudes = {
        f"{PREFIX}{module}.lora_magnitude_vector": 20 + torch.rand(d_out, generator=generator)
        for module, (d_out, _) in LARGE.items()
    }
    return Made({**made.tensors, **magnitudes}, {**made.config, "use_dora": True})


def begun(service: Server, adapter: str) -> str:
    """A merge whose grounding has some shards."""
    answer = post(service, adapter, wait_s=0, base_model="dir:large")
    assert answer.status_code == 202, answer.text
    job: str = answer.json()["id"]
    eventually(lambda: is_grounding(service, job) or None)
    return job


def is_grounding(service: Server, job: str) -> bool:
    progress = service.http.get(f"/jobs/{job}").json()["progress"]
    return progress["stage"] == "ground" and 2 < progress["done"] < progress["total"]


@pytest.mark.parametrize(("victim", "seed"), [("child", 11), ("worker", 12)])
def test_a_kill_in_the_midst_changes_no_byte(service: Server, models: Path, victim: str, seed: int, tmp_path: Path) -> None:
    adapter = service.add(large_dora(seed))
    job = begun(service, adapter)
    service.processes()[victim].kill()
    ended = service.ended(job, wait_s=240)
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
    calm = Services.open(Settings(data_dir=tmp_path, bases_dir=models))
    adapter = str(ingest.import_upload(calm, *([part] for part in large_dora(seed).files.values())).id)
    recipe = recipe_of(calm, adapter, base_model="dir:large")
    assert (str(recipe.digest), str(run(calm, recipe))) == (job, ended["result"]["id"])


def test_a_cancelled_grounding_ends_and_goes_on_when_asked_again(service: Server) -> None:
    adapter = service.add(large_dora(13))
    job = begun(service, adapter)
    assert service.http.delete(f"/jobs/{job}").json()["state"] == "cancelled"
    again = post(service, adapter, wait_s=0, base_model="dir:large").json()
    ended = service.ended(again["id"], wait_s=240)
    assert (again["id"], ended["state"], ended["attempt"]) == (job, "succeeded", 2)


# Refused


def test_without_a_base_it_is_refused_before_there_is_a_job(service: Server, ids: Mapping[str, str]) -> None:
    answer = service.http.post("/merge", json={"adapters": [{"source": ids["dora"]}, {"source": ids["lora"]}]})
    found = problem(answer, 422, "unsupported-adapter")
    assert found["subject"].startswith("module model.layers.0.") and found["remedy"].startswith("give base_model")


@pytest.mark.parametrize(
    ("names", "fields", "field"),
    [
        (["lora"], {}, "base_model"),
        (["lora"], {"base_model": None, "base_rank": 4}, "base_rank"),
        (["dora"], {"tasks": [{"name": "t", "data": "sha256:" + "0" * 64}]}, "tasks"),
    ],
)
def test_what_nothing_needs_is_refused(
    service: Server, ids: Mapping[str, str], names: list[str], fields: dict[str, Any], field: str
) -> None:
    found = problem(post(service, *(ids[name] for name in names), **fields), 422, "invalid-field")
    assert found["field"] == field


@pytest.mark.parametrize("base_rank", [0, {"energy": 2.0}, {"energy": 0.9, "max": 0}, "all"])
def test_a_rank_that_is_none_is_named(service: Server, ids: Mapping[str, str], base_rank: Any) -> None:
    found = problem(post(service, ids["dora"], base_rank=base_rank), 422, "invalid-request")
    assert found["errors"][0]["field"].startswith("body.base_rank")


def test_another_base_is_refused_by_the_module_it_lacks(service: Server, ids: Mapping[str, str]) -> None:
    found = problem(post(service, ids["dora"], base_model="dir:large"), 422, "bad-base")
    assert "module model.layers.0." in found["detail"]


def test_another_format_is_refused(service: Server, ids: Mapping[str, str]) -> None:
    answer = service.http.get(f"/adapters/{ids['dora']}/adapter_model.safetensors?format=kohya")
    problem(answer, 422, "unsupported-adapter")


# The command line


def test_the_command_merges_here_with_any_directory(models: Path, tmp_path: Path) -> None:
    command = ("merge", models / "dora", models / "lora", "-w", "1", "-w", "1", "--base-model", models / "base")
    ran = preloaded(*command, "--base-rank", "energy:0.9:30", "-o", tmp_path / "out", data_dir=tmp_path / "data")
    assert ran.returncode == 0, ran.stderr
    assert "Cut before the merge" in ran.stdout
    doras, loras = dense_doras(models / "base", models / "dora"), dense_directory(models / "lora")
    error = norm(difference(dense_directory(tmp_path / "out"), {module: doras[module] + loras[module] for module in doras}))
    assert 0.01 < error / norm(doras) <= 0.1**0.5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give base_model"),
        (["--base-model", "nowhere"], "must begin with hub:, dir: or sha256:"),
        (["--base-model", "BASE", "--base-rank", "all"], "--base-rank: 'all' is neither a number nor energy:0.99"),
        (["--base-rank", "4"], "base_rank"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_a_sentence(models: Path, tmp_path: Path, flags: list[str], says: str) -> None:
    given = [str(models / "base") if flag == "BASE" else flag for flag in flags]
    ran = preloaded("merge", models / "dora", *given, "-o", tmp_path / "out", data_dir=tmp_path / "data")
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert says in ran.stderr


def test_a_server_reads_no_directory_of_this_machine(service: Server, models: Path, tmp_path: Path) -> None:
    ran = preloaded("merge", models / "dora", "--base-model", models / "base", "--url", service.url, data_dir=tmp_path)
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert "does not read directories of this machine" in ran.stderr
