"""Learning with a language model, through HTTP; and jobs that are killed or cancelled while they learn."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from learning_jobs import add_file, run
from llama import LLAMA_TEXTS, write_llama, write_llama_gguf
from making import make
from serving import Server, eventually, serving

pytestmark = pytest.mark.timeout(600)

LONG = 1500  # steps: some seconds, and several checkpoints on any machine
ENDLESS = 1_000_000


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    write_llama(root / "llama")
    (root / "quantised").mkdir()
    write_llama_gguf(root / "quantised", root / "llama")
    return root


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, bases: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("language"), BRAID_BASES_DIR=str(bases), BRAID_THREADS="1") as running:
        yield running


def llama_request(server: Server, base: str = "llama", **parameters: Any) -> dict[str, Any]:
    kinds = {"q_proj": (32, 32), "v_proj": (16, 32)}
    shapes = {f"model.layers.{n}.self_attn.{kind}": shape for n in range(2) for kind, shape in kinds.items()}
    classes = [{"label": n % 3} if "task_type" in parameters else {} for n in range(4 * len(LLAMA_TEXTS))]
    rows = [{"text": text, "prompt": "one is", **own} for text, own in zip(LLAMA_TEXTS * 4, classes, strict=True)]
    return {
        "method": "atlas",
        "base_model": f"dir:{base}",
        "parameters": {"steps": 6, "evaluate_every": 2, "init": 0.0, **parameters},
        "adapters": [{"source": server.add(make(seed, shapes=shapes)), "name": f"a{seed}"} for seed in range(2)],
        "tasks": [{"name": "colours", "data": add_file(server, "".join(json.dumps(row) + "\n" for row in rows).encode())}],
    }


@pytest.mark.parametrize("more", [{}, {"prompt": "prompt"}])
def test_a_language_model_learns(language: Server, more: dict[str, str]) -> None:
    body = llama_request(language)
    body["tasks"][0] |= more
    job = run(language, body)
    assert job["state"] == "succeeded", job["error"]
    curve = job["certificate"]["training"]["curve"]
    assert [point["step"] for point in curve] == [0, 2, 4, 6]
    assert max(point["score"] for point in curve) >= curve[0]["score"]


def test_a_gguf_is_a_base_model_too(language: Server) -> None:
    job = run(language, llama_request(language, base="quantised"))
    assert job["state"] == "succeeded", job["error"]
    assert job["certificate"]["training"]["step"] == 6


def test_a_classifier_with_heads_of_the_tasks(language: Server) -> None:
    body = llama_request(language, task_type="sequence_classification")
    body["tasks"][0]["head"] = add_file(language, save({"weight": torch.randn(3, 32)}))
    job = run(language, body)
    assert job["state"] == "succeeded", job["error"]
    assert set(job["certificate"]["training"]["accuracy"]) == {"colours"}


def test_labels_that_the_models_own_head_lacks_fail_the_job(language: Server) -> None:
    job = run(language, llama_request(language, task_type="sequence_classification"))
    assert job["state"] == "failed"
    assert "row 2 has the label 2" in job["error"]["detail"]


# Interruptions


def long_request(server: Server, seed: int, steps: int = LONG) -> dict[str, Any]:
    return {**llama_request(server, steps=steps, evaluate_every=200, patience=10**6), "seed": seed}


def step_of(server: Server, job: str, least: int) -> int | None:
    """The step of the last checkpoint, once it is this far and told: the checkpoint is kept before the progress is."""
    view = server.http.get(f"/jobs/{job}").json()
    assert view["state"] in ("queued", "running"), view
    told = view["progress"]["stage"] == "learn" and view["learning"]
    return view["learning"]["step"] if told and view["learning"]["step"] >= least else None


def reached(server: Server, job: str, least: int) -> int:
    return eventually(lambda: step_of(server, job, least), wait_s=120)


def interrupted(server: Server, victims: Sequence[str]) -> dict[str, Any]:
    job = server.http.post("/merge", json=long_request(server, 0)).json()["id"]
    step = 0
    for victim in victims:
        step = reached(server, job, step + 1)
        server.processes()[victim].send_signal(signal.SIGKILL)
    return server.ended(job, wait_s=240)


def test_kill_9_goes_on_from_the_last_checkpoint_to_the_same_bytes(bases: Path, language: Server, tmp_path: Path) -> None:
    with serving(tmp_path, BRAID_BASES_DIR=str(bases), BRAID_THREADS="1") as server:
        killed = interrupted(server, ("child", "worker"))
    calm = interrupted(language, ())
    assert (killed["state"], killed["attempt"]) == ("succeeded", 1), killed["error"]
    assert killed["result"]["id"] == calm["result"]["id"]


def test_cancelling_stops_at_once_and_keeps_what_was_learned(language: Server) -> None:
    job = language.http.post("/merge", json=long_request(language, 1, ENDLESS)).json()["id"]
    reached(language, job, 1)
    view = language.http.get(f"/jobs/{job}").json()
    assert (view["progress"]["stage"], view["progress"]["total"]) == ("learn", ENDLESS)
    assert view["learning"]["curve"][0]["step"] == 0
    child = language.processes()["child"]
    started = time.monotonic()
    assert language.http.delete(f"/jobs/{job}").json()["state"] == "cancelled"
    eventually(lambda: None if child.is_running() and child.status() != "zombie" else True, wait_s=10, every_s=0.02)
    assert time.monotonic() - started < 2.0  # a second, and what a busy machine adds
    assert language.http.get(f"/jobs/{job}").json()["learning"]["best"]
