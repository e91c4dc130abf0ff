"""What tests of reversible bases ask again and again: make one, look at it, take a task out, and measure what it lost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import load
from torch import Tensor

from making import dense_tensors
from serving import Server

WAIT = {"prefer": "wait=50"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def body(adapters: Mapping[str, str], request: Mapping[str, Any] = {}, **parameters: Any) -> dict[str, Any]:
    """adapters: task -> source. The codec is a quick one unless the test says which."""
    inputs = [{"source": source, "name": task} for task, source in adapters.items()]
    return {"method": "rmm", "parameters": {"codec": "truncate", **parameters}, "adapters": inputs, **request}


def make_basis(
    server: Server, adapters: Mapping[str, str], request: Mapping[str, Any] = {}, *, token: str | None = None, **parameters: Any
) -> str:
    """The basis's id, expecting success."""
    headers = {"x-hub-token": token} if token else {}
    answer = server.http.post("/merge", json=body(adapters, request, **parameters), headers=WAIT | headers)
    return made(server, answer)


def extended(server: Server, basis: str, source: str, task: str, **fields: Any) -> str:
    """The new basis's id, expecting success."""
    return made(server, server.http.post(f"/rmm/{basis}/extend", json={"adapter": {"source": source, "name": task}, **fields}))


def made(server: Server, answer: httpx2.Response) -> str:
    assert answer.status_code in {200, 202}, answer.text
    job = server.ended(answer.json()["id"])
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert job["result"]["kind"] == "basis"
    return str(job["result"]["id"])


def shown(server: Server, basis: str) -> dict[str, Any]:
    view: dict[str, Any] = server.http.get(f"/rmm/{basis}").raise_for_status().json()
    return view


def errors(server: Server, basis: str) -> dict[str, float]:
    return {task["name"]: task["relative_error"] for task in shown(server, basis)["tasks"]}


def report(server: Server, basis: str) -> dict[str, Any]:
    found: dict[str, Any] = server.http.get(f"/rmm/{basis}/report.json").raise_for_status().json()
    return found


def reconstructed(server: Server, basis: str, **asked: Any) -> dict[str, Any]:
    answer = server.http.post(f"/rmm/{basis}/reconstruct", json=asked)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def part(server: Server, basis: str, task: str, name: str = WEIGHTS) -> bytes:
    return server.http.get(f"/rmm/{basis}/tasks/{task}/{name}").raise_for_status().content


def task_deltas(server: Server, basis: str, task: str) -> dict[str, Tensor]:
    """Module -> what comes back, dense float64."""
    return dense_tensors(load(part(server, basis, task)), json.loads(part(server, basis, task, CONFIG)))


def adapter_deltas(server: Server, adapter: str, directory: Path) -> dict[str, Tensor]:
    files = server.download(adapter, directory)
    return dense_tensors(load((files / WEIGHTS).read_bytes()), json.loads((files / CONFIG).read_text()))


def relative_error(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Over all modules, as `||got - wanted|| / ||wanted||`."""
    return distance(got, wanted) / distance(wanted, {})


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference; a module that one side lacks is zero there."""
    names = dict.fromkeys((*left, *right))
    return float(sum((at(left, right, name) - at(right, left, name)).square().sum() for name in names)) ** 0.5


def at(deltas: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> Tensor:
    return deltas[name] if name in deltas else torch.zeros_like(other[name])


def summed(terms: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The weighted sum, float64."""
    total: dict[str, Tensor] = {}
    for weight, deltas in terms:
        for name, delta in deltas.items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total
