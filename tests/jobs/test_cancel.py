"""DELETE /jobs/{id}: what runs is killed, what was done is kept, and a job that has ended stays as it ended."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.services import Services
from app.settings import Settings
from making import make
from serving import Server, eventually, serving
from storage.digest import Digest
from storage.layout import Layout

SHAPES = {f"layers.{n}.q_proj": (1024, 1024) for n in range(128)}
SETTINGS = {"BRAID_SHARD_BYTES": "150000", "BRAID_THREADS": "1"}  # one module to a shard
SMALL = {f"layers.{n}.q_proj": (64, 64) for n in range(2)}
HOURS_AGO = 7200.0


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("cancel"), **SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def inputs(calm: Server) -> list[str]:
    return [calm.add(make(seed, r=16, shapes=SHAPES)) for seed in range(3)]


@pytest.fixture(scope="module")
def services(calm: Server) -> Services:
    return Services.open(Settings(data_dir=calm.data_dir))


def post(server: Server, inputs: list[str], weight: float) -> Digest:
    weighted = [{"source": source, "weight": weight} for source in inputs]
    answer = server.http.post("/merge", json={"adapters": weighted, "rank": 16})
    assert answer.status_code in {200, 202}, answer.text
    return Digest.parse(answer.json()["id"])


def running(server: Server, services: Services, inputs: list[str], weight: float) -> Digest:
    """A job in the middle of its merge."""
    job = post(server, inputs, weight)
    eventually(lambda: len(services.jobs.shards(job)) > 10 or None)
    return job


def cancel(server: Server, job: Digest) -> dict[str, Any]:
    answer = server.http.delete(f"/jobs/{job}")
    assert answer.status_code == 200, answer.text
    view: dict[str, Any] = answer.json()
    return view


def log_of(services: Services, job: Digest) -> list[str]:
    return [event.event for event in services.jobs.events(job) if event.event != "progress"]


def cpu_s_during(seconds: float, process: psutil.Process) -> float:
    if is_gone(process):
        return 0.0
    before = process.cpu_times()
    time.sleep(seconds)
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_cancelled_merge_computes_no_more_within_two_seconds(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 1.0)
    child = calm.processes()["child"]
    cancel(calm, job)
    time.sleep(1.5)
    assert cpu_s_during(0.5, child) < 0.1


def test_a_child_in_mid_task_is_gone_within_two_seconds(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 1.5)
    child = calm.processes()["child"]
    child.suspend()  # a task without end
    cancel(calm, job)
    eventually(lambda: is_gone(child) or None, wait_s=2)


def test_a_cancelled_merge_publishes_nothing(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 2.0)
    cancel(calm, job)
    following = calm.merge(*inputs[:2], weights=[2, 2], rank=16)  # the slot is free again, so the first one is over
    assert (following["state"], services.index.result(job)) == ("succeeded", None)


def test_a_cancelled_merge_stays_cancelled(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 3.0)
    assert cancel(calm, job)["state"] == "cancelled"
    calm.merge(*inputs[:2], weights=[3, 3], rank=16)
    assert log_of(services, job) == ["queued", "running", "cancelled"]


def test_asking_again_after_a_cancel_is_the_second_attempt(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 4.0)
    cancel(calm, job)
    post(calm, inputs, 4.0)
    ended = calm.ended(str(job))
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)


def test_the_second_attempt_keeps_the_shards_of_the_first(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 5.0)
    cancel(calm, job)
    blobs = [services.blobs.path(shard.digest) for shard in services.jobs.shards(job).values()]
    before = [blob.stat().st_mtime_ns for blob in blobs]
    post(calm, inputs, 5.0)
    calm.ended(str(job))
    assert [blob.stat().st_mtime_ns for blob in blobs] == before


def test_cancelling_twice_is_cancelling_once(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 6.0)
    assert cancel(calm, job) == cancel(calm, job)


def test_a_succeeded_job_cannot_be_cancelled(calm: Server, inputs: list[str]) -> None:
    ended = calm.merge(*inputs[:2], weights=[7, 7], rank=16)
    assert cancel(calm, Digest.parse(ended["id"]))["state"] == "succeeded"


def test_cancelling_a_succeeded_job_keeps_its_result(calm: Server, inputs: list[str]) -> None:
    ended = calm.merge(*inputs[:2], weights=[8, 8], rank=16)
    cancel(calm, Digest.parse(ended["id"]))
    assert calm.http.get(f"/jobs/{ended['id']}").json() == ended


def test_the_child_after_a_killed_one_sweeps_its_temp_file(calm: Server, services: Services, inputs: list[str]) -> None:
    job = running(calm, services, inputs, 9.0)
    orphan = Layout(calm.data_dir).temp()
    orphan.write_bytes(b"what a killed writer leaves")
    os.utime(orphan, (time.time() - HOURS_AGO,) * 2)
    calm.processes()["child"].suspend()  # in mid-task, so that it will be killed
    cancel(calm, job)
    calm.merge(*inputs[:2], weights=[9, 9], rank=16)
    assert not orphan.exists()


@pytest.mark.parametrize("moment", range(4))
def test_a_cancel_that_races_with_the_end_leaves_one_final_state(
    calm: Server, services: Services, inputs: list[str], moment: int
) -> None:
    job = post(calm, inputs[:2], 20.0 + moment)
    eventually(lambda: at_its_end(services, job) or None)
    time.sleep(random.Random(moment).uniform(0, 0.1))
    cancel(calm, job)
    state = calm.ended(str(job))["state"]
    calm.merge(*inputs[:1], weights=[20.0 + moment], rank=8)  # whatever was still under way is over now
    published = services.index.result(job) is not None
    assert (log_of(services, job)[2:], published) in ((["cancelled"], False), (["succeeded"], True))
    assert calm.http.get(f"/jobs/{job}").json()["state"] == state


def at_its_end(services: Services, job: Digest) -> bool:
    known = services.jobs.get(job)
    return known is not None and (known.stage == "assemble" or known.done > len(SHAPES) - 10)


def test_a_queued_job_that_is_cancelled_never_runs(tmp_path: Path) -> None:
    with serving(tmp_path, "--no-worker") as server:
        adapters = [server.add(make(seed, r=16, shapes=SMALL)) for seed in range(2)]
        job = post(server, adapters, 1.0)
        assert cancel(server, job)["state"] == "cancelled"
    with serving(tmp_path) as server:
        assert server.merge(*adapters, rank=4)["state"] == "succeeded"
        assert log_of(Services.open(Settings(data_dir=tmp_path)), job) == ["queued", "cancelled"]
