"""kill -9 of the child, the worker, the API or the supervisor at random moments: no job lost, done twice, or begun anew.

The twenty kills happen once, on one data directory, and each test states one fact about all of them. Every other kill waits
for a random number of finished shards instead of a random time, so that on any machine each victim dies in mid-merge too.
"""

import random
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import func, select

from app import ingest
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.workflow import Run, run_all
from app.recipe import Recipe
from app.services import Services
from app.settings import Settings
from making import Made, make
from serving import Server, eventually, serving
from storage.database import reading
from storage.digest import Digest
from storage.jobs import FINAL
from storage.schema import results

pytestmark = pytest.mark.timeout(900)  # of the twenty kills together, on a busy machine; two minutes and a half on an idle one

RUNS = 20
VICTIMS = ("child", "worker", "api", "supervisor")
SHAPES = {f"layers.{n}.q_proj": (512, 512) for n in range(64)}
SMALL = {f"layers.{n}.q_proj": (64, 64) for n in range(8)}
SETTINGS = {"BRAID_SHARD_BYTES": "70000", "BRAID_THREADS": "1"}  # one module to a shard


@dataclass
class Service:
    """A service on one data directory, to be started again after its supervisor was killed."""

    data_dir: Path
    stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> Server:
        self.stack.close()
        return self.stack.enter_context(serving(self.data_dir, **SETTINGS))


@dataclass(frozen=True)
class Hit:
    """What one kill did. kept/recomputed: shards finished before it, and how many of these were stored once more."""

    victim: str
    stage: str
    accepted: Digest
    ended: Mapping[str, Any]
    kept: int
    recomputed: int


@dataclass(frozen=True)
class Soak:
    hits: tuple[Hit, ...]
    services: Services

    def recipe(self, hit: Hit) -> Recipe:
        job = self.services.jobs.get(hit.accepted)
        assert job is not None
        return Recipe.from_json(job.recipe)


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    data_dir = tmp_path_factory.mktemp("soak")
    service, dice = Service(data_dir), random.Random(20)
    with service.stack:
        server = service.start()
        inputs = [server.add(made) for made in adapters(SHAPES)]
        services = Services.open(Settings(data_dir=data_dir))
        server.merge(*inputs, rank=16)  # the child is warm from here on
        started = time.monotonic()
        server.merge(*inputs, rank=16, weights=[1, 1, 1, 2])
        lasts_s = time.monotonic() - started
        hits = []
        for number in range(RUNS):
            accepted = post(server, inputs, weight=3.0 + number, rank=16)
            if number % 2:
                await_shards(services, accepted, dice.randrange(1, len(SHAPES) * 3 // 4))
            else:
                time.sleep(dice.uniform(0, 0.9 * lasts_s))
            server, hit = strike(service, server, services, accepted, VICTIMS[number % len(VICTIMS)])
            hits.append(hit)
        yield Soak(tuple(hits), services)


def adapters(shapes: Mapping[str, tuple[int, int]]) -> list[Made]:
    return [make(seed, r=16, shapes=shapes) for seed in range(4)]


def post(server: Server, inputs: list[str], *, weight: float, rank: int | None) -> Digest:
    weighted = [{"source": source, "weight": weight} for source in inputs]
    answer = server.http.post("/merge", json={"adapters": weighted, "rank": rank})
    assert answer.status_code == 202, answer.text
    return Digest.parse(answer.json()["id"])


def await_shards(services: Services, job: Digest, count: int) -> None:
    """Or until the job has ended, which drops them: on a busy machine it may before we look again."""
    known = lambda: services.jobs.get(job)  # noqa: E731
    eventually(lambda: len(services.jobs.shards(job)) >= count or known().state in FINAL or None, every_s=0.005)


def strike(service: Service, server: Server, services: Services, accepted: Digest, victim: str) -> tuple[Server, Hit]:
    """Kill the victim, start the service again if it was the supervisor, and wait for the job's end."""
    process = eventually(lambda: server.processes().get(victim))
    job = services.jobs.get(accepted)
    assert job is not None
    before = shard_times(services, accepted)
    process.send_signal(signal.SIGKILL)
    if victim == "supervisor":
        server = service.start()
    server.expect_a_broken_connection()
    ended = server.ended(str(accepted))
    after = {blob: services.blobs.path(blob).stat().st_mtime_ns for blob in before}
    again = sum(after[blob] != at for blob, at in before.items())
    return server, Hit(victim, job.stage, accepted, ended, kept=len(before), recomputed=again)


def shard_times(services: Services, job: Digest) -> dict[Digest, int]:
    """When each finished shard was stored: storing it again, which a second run does, restarts its age."""
    blobs = [shard.digest for shard in services.jobs.shards(job).values()]
    return {blob: services.blobs.path(blob).stat().st_mtime_ns for blob in blobs}


def succeeded_events(services: Services, job: Digest) -> int:
    return sum(event.event == "succeeded" for event in services.jobs.events(job))


def results_of(services: Services, job: Digest) -> int:
    with reading(services.index.engine) as connection:
        return connection.scalar(select(func.count()).where(results.c.recipe == str(job))) or 0


def test_every_job_ends_succeeded(soak: Soak) -> None:
    assert [hit.ended["state"] for hit in soak.hits] == ["succeeded"] * RUNS


def test_no_accepted_job_is_lost(soak: Soak) -> None:
    assert [str(hit.accepted) for hit in soak.hits if soak.services.jobs.get(hit.accepted) is None] == []


def test_every_job_is_still_at_its_first_attempt(soak: Soak) -> None:
    assert {hit.ended["attempt"] for hit in soak.hits} == {1}


def test_every_job_succeeds_once(soak: Soak) -> None:
    assert {succeeded_events(soak.services, hit.accepted) for hit in soak.hits} == {1}


def test_every_recipe_has_one_result(soak: Soak) -> None:
    assert {results_of(soak.services, hit.accepted) for hit in soak.hits} == {1}


def test_finished_shards_are_not_run_again(soak: Soak) -> None:
    assert [hit for hit in soak.hits if hit.recomputed] == []


def test_the_kills_hit_running_merges_with_shards_to_keep(soak: Soak) -> None:
    """Else the test above would say nothing."""
    assert {hit.victim for hit in soak.hits if hit.stage == "merge" and 0 < hit.kept < len(SHAPES)} == set(VICTIMS)


def test_results_are_the_bytes_of_a_merge_that_nothing_disturbed(
    soak: Soak, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference runs in this process, in one shard; the adapter's id covers its weights, certificate and card."""
    calm = Services.open(Settings(data_dir=tmp_path, shard_bytes=2**30))
    for made in adapters(SHAPES):
        ingest.import_upload(calm, *([part] for part in made.files.values()))
    expected = [str(undisturbed(calm, soak.recipe(hit))) for hit in soak.hits]
    with capsys.disabled():
        print(figures(soak))
    assert [hit.ended["result"]["id"] for hit in soak.hits] == expected


def undisturbed(services: Services, recipe: Recipe) -> Digest:
    executor = DirectExecutor(workbench(services, "cpu", 2))
    return run_all(Run(services, recipe, executor, report=lambda *_: None, stop=lambda: False))


def figures(soak: Soak) -> str:
    jobs = [hit.accepted for hit in soak.hits]
    lost = sum(hit.ended["state"] != "succeeded" for hit in soak.hits)
    twice = sum(succeeded_events(soak.services, job) != 1 or results_of(soak.services, job) != 1 for job in jobs)
    merging = [hit for hit in soak.hits if hit.stage == "merge" and hit.kept]
    return (
        f"\n{len(jobs)} kills: {lost} lost, {twice} published twice, {len(merging)} resumed in mid-merge with "
        f"{sum(hit.kept for hit in merging)} finished shards, {sum(hit.recomputed for hit in soak.hits)} of them run again"
    )


def test_a_burst_survives_kills_of_several_processes_together(tmp_path: Path) -> None:
    service = Service(tmp_path)
    with service.stack:
        server = service.start()
        inputs = [server.add(made) for made in adapters(SMALL)]
        jobs = [post(server, inputs, weight=1.0 + n, rank=16) for n in range(10)]
        time.sleep(0.5)
        kill_together(server, "api", "worker")
        server.expect_a_broken_connection()
        time.sleep(0.5)
        kill_together(server, "supervisor", "api", "worker", "child")
        server = service.start()
        ended = [server.ended(str(job)) for job in jobs]
        services = Services.open(Settings(data_dir=tmp_path))
        assert [(job["state"], succeeded_events(services, Digest.parse(job["id"]))) for job in ended] == [("succeeded", 1)] * 10


def kill_together(server: Server, *victims: str) -> None:
    found = [process for name, process in server.processes().items() if name in victims]
    for process in found:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(found, timeout=5)
