"""What servers read of an adapter, and so what portable results may say: they ignore rsLoRA, patterns and regular expressions."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app.profiles import VLLM_RANKS, served_rank
from asking import problem
from making import dense, dense_directory, make
from merge_algos.errors import InvalidRank
from serving import Server

BASE = "org/profiles"
SHAPES = {"layers.0.q_proj": (40, 40), "layers.1.q_proj": (40, 40), "layers.1.up": (40, 40)}
INPUTS = {
    "rsLoRA": make(1, r=3, use_rslora=True, base_model=BASE, shapes=SHAPES),
    "patterns": make(2, r=4, ranks={"layers.1.up": 9}, alpha_pattern={"layers.0.q_proj": 5}, base_model=BASE, shapes=SHAPES),
}
SERVED = ["portable", "vllm"]


def merged(server: Server, directory: Path, profile: str, **asked: Any) -> Path:
    job = server.merge(*map(server.add, INPUTS.values()), profile=profile, dtype="float32", **asked)
    assert job["state"] == "succeeded", job["error"]
    return server.download(job["result"]["id"], directory)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("profile", SERVED)
def test_what_servers_ignore_is_not_there(server: Server, tmp_path: Path, profile: str) -> None:
    config = config_of(merged(server, tmp_path, profile))
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["lora_alpha"] == config["r"]
    assert sorted(config["target_modules"]) == sorted(SHAPES)
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)


@pytest.mark.parametrize("profile", SERVED)
def test_every_factor_has_the_one_rank(server: Server, tmp_path: Path, profile: str) -> None:
    directory = merged(server, tmp_path, profile)
    ranks = {min(tensor.shape) for tensor in load_file(directory / "adapter_model.safetensors").values()}
    assert ranks == {config_of(directory)["r"]}


@pytest.mark.parametrize("profile", [*SERVED, "compact"])
def test_the_delta_is_the_same_in_every_profile(server: Server, tmp_path: Path, profile: str) -> None:
    one, other = map(dense, INPUTS.values())
    for module, delta in dense_directory(merged(server, tmp_path, profile)).items():
        assert float((delta - one[module] - other[module]).norm() / delta.norm()) < 1e-6


@pytest.mark.parametrize(("rank", "served"), [(None, 16), (3, 8), (8, 8), (9, 16)])
def test_vllm_gets_the_next_of_its_ranks(server: Server, tmp_path: Path, rank: int | None, served: int) -> None:
    assert config_of(merged(server, tmp_path, "vllm", rank=rank))["r"] == served


@pytest.mark.parametrize("rank", VLLM_RANKS)
def test_a_rank_that_is_served_stays(rank: int) -> None:
    assert (served_rank(rank), served_rank(rank - 1)) == (rank, rank)


def test_a_rank_above_all_that_are_served_is_refused() -> None:
    with pytest.raises(InvalidRank, match="512"):
        served_rank(513)


def test_such_a_rank_is_refused_before_any_work(server: Server) -> None:
    adapter = server.add(make(3, base_model=BASE, r=600, shapes={"layers.0.q_proj": (640, 640)}))
    asked = {"adapters": [{"source": adapter}], "profile": "vllm", "rank": 600}
    problem(server.http.post("/merge", json=asked), 422, "invalid-rank")


def test_a_result_that_turns_out_so_high_fails_by_name(server: Server) -> None:
    adapter = server.add(make(3, base_model=BASE, r=600, shapes={"layers.0.q_proj": (640, 640)}))
    error = server.merge(adapter, profile="vllm")["error"]
    assert error["type"] == "urn:braid:problem:invalid-rank" and "600" in error["detail"]


def test_a_task_comes_out_of_a_basis_at_a_served_rank(server: Server, tmp_path: Path) -> None:
    sources = [server.add(made) for made in INPUTS.values()]
    asked = {"adapters": [{"source": source} for source in sources], "method": "rmm", "parameters": {"codec": "truncate"}}
    job = server.http.post("/merge", json={**asked, "profile": "vllm"}, headers={"prefer": "wait=60"}).json()
    basis = server.ended(job["id"])["result"]["id"]
    task = server.http.get(f"/rmm/{basis}").json()["tasks"][0]
    assert server.http.get(task["links"]["adapter_config.json"]).json()["r"] in VLLM_RANKS
