"""GET /jobs/{id}/events: what happened, in order, each once, until it ended."""

import pytest
import torch

from asking import ZERO, Event, follow, hub_files, make_named, problem
from hub_server import HubServer
from making import PREFIX, Made, make
from serving import Server

ORDER = ["queued", "running", "progress", "succeeded"]


@pytest.fixture(scope="module")
def adapter(server: Server) -> str:
    # more modules than one shard holds, so that there is progress to tell
    shapes = {f"layers.{n}.q_proj": (8, 8) for n in range(40)}
    return server.add(make(60, shapes=shapes, r=2, base_model="org/events"))


@pytest.fixture(scope="module")
def told(server: Server, adapter: str) -> list[Event]:
    """Followed from the moment the job was accepted."""
    answer = server.http.post("/merge", json={"adapters": [{"source": adapter, "weight": 1}], "seed": 1})
    return follow(server, answer.json()["id"])


def test_events_come_in_the_order_of_a_life(told: list[Event]) -> None:
    assert list(dict.fromkeys(event.name for event in told)) == ORDER


def test_numbers_ascend(told: list[Event]) -> None:
    numbers = [event.number for event in told]
    assert numbers == sorted(set(numbers))


def test_the_stream_ends_with_the_final_state(told: list[Event]) -> None:
    assert [event.name for event in told].index("succeeded") == len(told) - 1


def test_the_final_event_carries_the_result(server: Server, told: list[Event]) -> None:
    job = server.http.get(f"/jobs/{told[-1].data['id']}").json()
    assert told[-1].data == job | {"certificate": None}


def test_no_earlier_event_knows_the_result(told: list[Event]) -> None:
    assert {(event.data["result"], event.data["finished_at"]) for event in told[:-1]} == {(None, None)}


def test_merged_modules_are_counted_up_to_all(told: list[Event]) -> None:
    merging = [event.data["progress"] for event in told if event.data["progress"]["stage"] == "merge"]
    done = [progress["done"] for progress in merging]
    assert (done, {progress["total"] for progress in merging}) == (sorted(set(done)), {40})
    assert done[-1] == 40


def test_the_state_is_that_of_the_moment(told: list[Event]) -> None:
    assert [event.data["state"] for event in told] == ["running" if e.name == "progress" else e.name for e in told]


def test_a_finished_job_tells_the_same_again(server: Server, told: list[Event]) -> None:
    assert follow(server, told[-1].data["id"]) == told


@pytest.mark.parametrize("seen", [0, 1, 3, -2, -1])
def test_last_event_id_resumes_without_repeating(server: Server, told: list[Event], seen: int) -> None:
    last = told[seen]
    resumed = follow(server, last.data["id"], **{"last-event-id": str(last.number)})
    assert resumed == [event for event in told if event.number > last.number]


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", "9" * 30, "²"])
def test_a_last_event_id_that_is_none_begins_at_the_beginning(server: Server, told: list[Event], number: str) -> None:
    path = f"/jobs/{told[-1].data['id']}/events"
    with server.http.stream("GET", path, headers={"last-event-id": number.encode()}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("id:")]
    assert lines == [f"id: {event.number}" for event in told]


@pytest.mark.parametrize("seed", range(100, 105))
def test_whoever_follows_live_learns_the_result(server: Server, adapter: str, seed: int) -> None:
    answer = server.http.post("/merge", json={"adapters": [{"source": adapter, "weight": 1}], "seed": seed})
    assert follow(server, answer.json()["id"])[-1].data["result"]["kind"] == "adapter"


def test_a_failed_job_tells_its_problem(hub_service: Server, hub: HubServer) -> None:
    good = make_named("org/broken")
    name = f"{PREFIX}layers.1.q_proj.lora_A.weight"
    broken = Made({**good.tensors, name: torch.full_like(good.tensors[name], torch.nan)}, good.config)
    hub.add_repo("org/broken", hub_files(broken))
    job = hub_service.http.post("/merge", json={"adapters": [{"source": "hub:org/broken"}]}).json()["id"]
    ended = follow(hub_service, job)[-1]
    assert (ended.name, ended.data["error"]["type"]) == ("failed", "urn:braid:problem:non-finite-tensor")
    assert ended.data["error"]["tensor"] == name


def test_a_job_nobody_knows_is_a_problem(server: Server) -> None:
    problem(server.http.get(f"/jobs/{ZERO}/events"), 404, "unknown-job")
