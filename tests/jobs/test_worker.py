"""The worker process from start to end: who starts it, what it refuses, what outlives it, and what it does with poison."""

import signal
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.engine.queue import workflow_id
from app.services import Services
from app.settings import Settings
from forked import Forked
from making import make
from serving import Server, are_gone, eventually, serving, start, stopped
from storage.digest import Digest
from storage.layout import Layout

SHAPES = {f"layers.{n}.q_proj": (512, 512) for n in range(96)}
SMALL = {f"layers.{n}.q_proj": (64, 64) for n in range(4)}
SETTINGS = {"BRAID_SHARD_BYTES": "70000", "BRAID_THREADS": "1"}  # one module to a shard


def post(server: Server, inputs: Sequence[str], weight: float) -> Digest:
    weighted = [{"source": source, "weight": weight} for source in inputs]
    answer = server.http.post("/merge", json={"adapters": weighted})
    assert answer.status_code == 202, answer.text
    return Digest.parse(answer.json()["id"])


def two(server: Server, shapes: dict[str, tuple[int, int]] = SMALL) -> list[str]:
    return [server.add(make(seed, r=8, shapes=shapes)) for seed in range(2)]


def opened(data_dir: Path) -> Services:
    return Services.open(Settings(data_dir=data_dir))


@contextmanager
def worker(data_dir: Path, log: Path, **environment: str) -> Iterator[Forked]:
    """A `braid worker` that takes jobs."""
    process = start("worker", data_dir=data_dir, log=log, environment=environment)
    with stopped(process):
        eventually(lambda: "takes jobs on" in log.read_text() or None, wait_s=60)
        yield process


def starts_of(log: Path) -> int:
    return log.read_text().count(" started: ")


# poison


def kill_children_until_final(server: Server, job: Digest) -> int:
    """How many children it took."""
    killed: set[int] = set()
    while server.http.get(f"/jobs/{job}").json()["state"] in {"queued", "running"}:
        child = server.processes().get("child")
        if child is not None and child.pid not in killed:
            killed.add(child.pid)
            child.kill()
        time.sleep(0.01)
    return len(killed)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Digest, int]]:
    """A job whose child dies every time it merges: all modules at once, which takes longer than to see the child."""
    with serving(tmp_path_factory.mktemp("poison"), BRAID_THREADS="1") as server:
        job = post(server, two(server, SHAPES), 1.0)
        eventually(lambda: server.http.get(f"/jobs/{job}").json()["progress"]["stage"] == "merge" or None, every_s=0.005)
        yield server, job, kill_children_until_final(server, job)


def test_a_job_whose_child_always_dies_fails_as_worker_lost(poisoned: tuple[Server, Digest, int]) -> None:
    server, job, _ = poisoned
    view = server.http.get(f"/jobs/{job}").json()
    assert (view["state"], view["error"]["type"]) == ("failed", "urn:braid:problem:worker-lost")


def test_a_poisoned_job_costs_three_children(poisoned: tuple[Server, Digest, int]) -> None:
    assert poisoned[2] == 3


def test_the_job_after_a_poisoned_one_runs(poisoned: tuple[Server, Digest, int]) -> None:
    server, _, _ = poisoned
    assert server.merge(*two(server), weights=[5, 5])["state"] == "succeeded"


def test_a_problem_survives_a_crash_before_it_was_told(tmp_path: Path) -> None:
    """As if the worker had died after the step and before the job's end was written."""
    with serving(tmp_path, "--no-worker") as server:
        inputs = two(server)
        job = post(server, inputs, 1.0)
    opened(tmp_path).blobs.delete(Digest.parse(inputs[1]))
    with serving(tmp_path) as server:
        first = server.ended(str(job))
    with sqlite3.connect(Layout(tmp_path).jobs) as database:
        database.execute("UPDATE workflow_status SET status = 'PENDING', output = NULL, error = NULL, completed_at = NULL")
    with sqlite3.connect(Layout(tmp_path).index) as database:
        database.execute("UPDATE jobs SET state = 'running', error = NULL, finished_at = NULL")
    with serving(tmp_path) as server:
        second = server.ended(str(job))
    assert (first["error"]["type"], second["error"]) == ("urn:braid:problem:blob-not-found", first["error"])


# who ends when


def test_when_the_service_is_killed_in_mid_merge_all_of_it_ends_within_three_seconds(tmp_path: Path) -> None:
    with serving(tmp_path, **SETTINGS) as server:
        job = post(server, two(server, SHAPES), 1.0)
        eventually(lambda: len(opened(tmp_path).jobs.shards(job)) > 2 or None)
        family = list(server.processes().values())
        server.process.kill()
        eventually(lambda: are_gone(family) or None, wait_s=3)
    assert len(family) == 4


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Digest, int, float, bool, dict[Path, int]]:
    """SIGTERM in mid-merge: where, the job, exit code, seconds, whether all is gone, and when each finished shard was stored."""
    data_dir = tmp_path_factory.mktemp("term")
    with serving(data_dir, **SETTINGS) as server:
        services, job = opened(data_dir), post(server, two(server, SHAPES), 1.0)
        eventually(lambda: len(services.jobs.shards(job)) > 2 or None)
        family = list(server.processes().values())
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(20)
        lasted_s = time.monotonic() - began
        gone = are_gone(family)
    return data_dir, job, code, lasted_s, gone, {blob: blob.stat().st_mtime_ns for blob in finished(services, job)}


Interrupted = tuple[Path, Digest, int, float, bool, dict[Path, int]]


def test_sigterm_ends_the_service_with_exit_code_zero(interrupted: Interrupted) -> None:
    assert interrupted[2] == 0


def test_sigterm_ends_everything_within_ten_seconds(interrupted: Interrupted) -> None:
    assert (interrupted[4], interrupted[3] < 10) == (True, True)


def test_a_job_under_way_at_sigterm_resumes_at_the_next_start(interrupted: Interrupted) -> None:
    data_dir, job, *_, shards = interrupted
    with serving(data_dir, **SETTINGS) as server:
        ended = server.ended(str(job))
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
    assert {blob: blob.stat().st_mtime_ns for blob in shards} == shards


# who may start


def test_a_second_worker_of_the_same_name_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with worker(tmp_path, tmp_path / "first.log"):
        log = tmp_path / "second.log"
        second = start("worker", data_dir=tmp_path, log=log)
        assert second.wait(60) != 0
    assert "give this one another BRAID_WORKER_ID" in " ".join(log.read_text().split())
    assert "Traceback" not in log.read_text()


def test_a_gpu_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    process = start("worker", data_dir=tmp_path, log=log, environment={"BRAID_DEVICES": "cuda:77"})
    assert process.wait(60) != 0
    assert "cuda:77 is not on this machine" in " ".join(log.read_text().split())
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("_time", range(2))
def test_api_and_worker_may_start_at_once_on_an_empty_directory(tmp_path: Path, _time: int) -> None:
    log = tmp_path / "worker.log"
    with stopped(start("worker", data_dir=tmp_path, log=log)), serving(tmp_path, "--no-worker"):
        eventually(lambda: "takes jobs on" in log.read_text() or None, wait_s=60)
    assert "Traceback" not in log.read_text() + (tmp_path / "service.log").read_text()


# who shares


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An API without a worker."""
    with serving(tmp_path_factory.mktemp("apart"), "--no-worker") as server:
        yield server


def test_an_api_without_worker_and_a_worker_apart_work_together(apart: Server, tmp_path: Path) -> None:
    with worker(apart.data_dir, tmp_path / "worker.log"):
        assert apart.merge(*two(apart), weights=[3, 3])["state"] == "succeeded"


def test_when_a_worker_apart_is_killed_nothing_of_it_stays(apart: Server, tmp_path: Path) -> None:
    with worker(apart.data_dir, tmp_path / "worker.log") as process:
        apart.merge(*two(apart), weights=[4, 4])  # so the child has started
        below = psutil.Process(process.pid).children()
        process.kill()
        eventually(lambda: are_gone(below) or None, wait_s=3)
    assert len(below) == 2


def test_workers_of_different_names_share_the_queue(apart: Server, tmp_path: Path) -> None:
    logs = [tmp_path / name for name in ("a", "b")]
    with worker(apart.data_dir, logs[0], BRAID_WORKER_ID="a"), worker(apart.data_dir, logs[1], BRAID_WORKER_ID="b"):
        inputs = two(apart)
        jobs = [post(apart, inputs, 10.0 + n) for n in range(12)]
        assert {apart.ended(str(job))["state"] for job in jobs} == {"succeeded"}
    services = opened(apart.data_dir)
    ends = [sum(event.event == "succeeded" for event in services.jobs.events(job)) for job in jobs]
    started = [starts_of(log) for log in logs]
    assert (ends, sum(started), min(started) > 0) == ([1] * 12, 12, True)


def test_a_worker_that_never_comes_back_leaves_its_job_to_another(apart: Server, tmp_path: Path) -> None:
    services, logs = opened(apart.data_dir), [tmp_path / name for name in ("lost", "found")]
    with worker(apart.data_dir, logs[0], BRAID_WORKER_ID="lost", **SETTINGS) as process:
        job = post(apart, two(apart, SHAPES), 30.0)
        eventually(lambda: len(services.jobs.shards(job)) > 2 or None)
        process.kill()
    kept = {blob: blob.stat().st_mtime_ns for blob in finished(services, job)}
    with worker(apart.data_dir, logs[1], BRAID_WORKER_ID="found", **SETTINGS):
        ended = apart.ended(str(job))
    assert (ended["state"], ended["attempt"], starts_of(logs[1])) == ("succeeded", 1, 1)
    assert {blob: blob.stat().st_mtime_ns for blob in kept} == kept


def finished(services: Services, job: Digest) -> list[Path]:
    return [services.blobs.path(shard.digest) for shard in services.jobs.shards(job).values()]


# what was queued when the API was killed


@dataclass(frozen=True)
class Restarted:
    """A service on the data of an API that was killed, and the job that was queued there under each name."""

    server: Server
    inputs: Sequence[str]
    jobs: Mapping[str, Digest]

    def ended(self, name: str) -> dict[str, Any]:
        return self.server.ended(str(self.jobs[name]))


WEIGHTS = {"untouched": 1.0, "without its workflow": 2.0, "ended by its workflow alone": 3.0, "the death of every worker": 4.0}


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarted]:
    """A power cut may take the last commits of one database alone. Deaths are written down, since each of them takes seconds."""
    data_dir = tmp_path_factory.mktemp("restarted")
    with serving(data_dir, "--no-worker") as server:
        inputs = two(server)
        jobs = {name: post(server, inputs, weight) for name, weight in WEIGHTS.items()}
        change_workflow(data_dir, "DELETE FROM workflow_status", jobs["without its workflow"])
        assert post(server, inputs, WEIGHTS["without its workflow"]) == jobs["without its workflow"]
        server.process.kill()
    change_workflow(data_dir, "UPDATE workflow_status SET status = 'SUCCESS'", jobs["ended by its workflow alone"])
    change_workflow(data_dir, "UPDATE workflow_status SET recovery_attempts = 50", jobs["the death of every worker"])
    with serving(data_dir) as server:
        yield Restarted(server, inputs, jobs)


def change_workflow(data_dir: Path, statement: str, job: Digest) -> None:
    with sqlite3.connect(Layout(data_dir).jobs) as database:
        changed = database.execute(f"{statement} WHERE workflow_uuid = ?", (workflow_id(str(job), 1),)).rowcount
    assert changed == 1


def test_a_queued_job_survives_a_restart(restarted: Restarted) -> None:
    assert restarted.ended("untouched")["state"] == "succeeded"


def test_a_queued_job_whose_workflow_is_missing_runs_when_asked_for_again(restarted: Restarted) -> None:
    assert restarted.ended("without its workflow")["state"] == "succeeded"


def test_a_job_whose_workflow_has_ended_without_it_can_be_asked_for_again(restarted: Restarted) -> None:
    name = "ended by its workflow alone"
    assert restarted.ended(name)["state"] == "failed"
    assert post(restarted.server, restarted.inputs, WEIGHTS[name]) == restarted.jobs[name]
    assert restarted.ended(name)["state"] == "succeeded"


def test_a_job_that_killed_every_worker_fails_as_worker_lost(restarted: Restarted) -> None:
    ended = restarted.ended("the death of every worker")
    assert (ended["state"], ended["error"]["type"]) == ("failed", "urn:braid:problem:worker-lost")


def test_many_askers_at_once_get_one_job(apart: Server) -> None:
    inputs = two(apart)
    with ThreadPoolExecutor(8) as askers:
        jobs = list(askers.map(lambda _: post(apart, inputs, 77.0), range(16)))
    assert (len(set(jobs)), [e.event for e in opened(apart.data_dir).jobs.events(jobs[0])]) == (1, ["queued"])
