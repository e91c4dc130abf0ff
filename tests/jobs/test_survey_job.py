"""A merge whose method surveys all modules first: what the service makes of it, and what a kill or a cancel in its midst does."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from app import ingest
from app.adapters import OpenAdapter
from app.commands import collect_garbage
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.executor import Stopped, T
from app.engine.workflow import Run, run_all
from app.recipe import Recipe
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from making import Made, make
from merge_algos import Adapter, merge
from serving import Server, eventually, serving
from storage.digest import Descriptor, Digest

SHAPES = {f"layers.{n}.{name}": shape for n in range(3) for name, shape in {"q_proj": (32, 24), "up": (48, 24)}.items()}
ONE_MODULE, ALL = 1, 2**30  # bytes to a shard
PARAMETERS = {"trim": "model", "density": 0.3}
WEIGHTS, RANK = (0.75, -0.5), 4


def opened(data_dir: Path, shard_bytes: int) -> Services:
    return Services.open(Settings(data_dir=data_dir, shard_bytes=shard_bytes))


def adapters(shapes: Mapping[str, tuple[int, int]] = SHAPES) -> list[Made]:
    """Of unequal size, the second without the last module."""
    fewer = dict(list(shapes.items())[:-1])
    return [make(1, shapes=shapes, alpha=2), make(2, shapes=fewer, r=3, ranks={next(iter(fewer)): 2})]


def asked(sources: Sequence[str], **fields: Any) -> dict[str, Any]:
    """The second adapter has no weight in the first module, so that its entries there do not count."""
    inputs: list[dict[str, Any]] = [{"source": s, "weight": w} for s, w in zip(sources, WEIGHTS, strict=True)]
    inputs[1]["weights_by_module"] = {r"layers\.0\.q_proj$": 0.0}
    return {"adapters": inputs, "rank": RANK, "method": "ties", "parameters": PARAMETERS, **fields}


def recipe_in(services: Services, made: Sequence[Made], **fields: Any) -> Recipe:
    stored = [ingest.import_upload(services, *([part] for part in each.files.values())) for each in made]
    return resolve(MergeRequest.model_validate(asked([str(each.id) for each in stored], **fields)), services, token=None)


class Told:
    """What a run reports, and a stop after so many reports of its survey."""

    def __init__(self, surveyed: int | None = None) -> None:
        self.reports: list[tuple[str, int, int]] = []
        self.surveyed = surveyed

    def report(self, stage: str, done: int, total: int) -> None:
        self.reports.append((stage, done, total))

    def stop(self) -> bool:
        return self.surveyed is not None and len(self.of("survey")) >= self.surveyed

    def of(self, stage: str) -> list[tuple[int, int]]:
        return [(done, total) for told, done, total in self.reports if told == stage]


class Backwards:
    """An executor that answers the last task first, as one of many machines may."""

    def __init__(self, services: Services) -> None:
        self.direct = DirectExecutor(workbench(services, "cpu", 2))

    def run(self, tasks: Sequence[T], *, stop: Callable[[], bool]) -> Iterator[tuple[T, Descriptor]]:
        return iter(list(self.direct.run(tasks, stop=stop))[::-1])


def run(services: Services, recipe: Recipe, told: Told | None = None, executor: Any = None) -> Digest:
    told = told or Told()
    direct = executor or DirectExecutor(workbench(services, "cpu", 2))
    return run_all(Run(services, recipe, direct, told.report, told.stop))


def undisturbed(data_dir: Path) -> Digest:
    services = opened(data_dir, ALL)
    return run(services, recipe_in(services, adapters()))


def test_the_service_ships_the_very_factors_of_the_library(tmp_path: Path) -> None:
    services = opened(tmp_path, ONE_MODULE)
    recipe = recipe_in(services, adapters(), profile="compact")
    inputs = [OpenAdapter.open(services.blobs, Digest.parse(item.source)) for item in recipe.adapters]
    # what has no weight in a module is as if it were absent there, which is how the library is told so
    deltas = [{name: each.delta(name, SHAPES[name], "cpu") for name in each.modules} for each in inputs]
    del deltas[1]["layers.0.q_proj"]
    library = merge([Adapter("b", each) for each in deltas], method="ties", weights=WEIGHTS, rank=RANK, parameters=PARAMETERS)
    shipped = OpenAdapter.open(services.blobs, run(services, recipe))
    for name, expected in library.adapter.deltas.items():
        delta = shipped.delta(name, SHAPES[name], "cpu")
        assert torch.equal(delta.B, expected.B) and torch.equal(delta.A, expected.A)


def test_how_the_shards_are_cut_changes_nothing(tmp_path: Path) -> None:
    services = opened(tmp_path / "store", ONE_MODULE)
    assert run(services, recipe_in(services, adapters())) == undisturbed(tmp_path / "other")


def test_the_order_of_the_answers_changes_nothing(tmp_path: Path) -> None:
    services = opened(tmp_path / "store", ONE_MODULE)
    recipe = recipe_in(services, adapters())
    assert run(services, recipe, executor=Backwards(services)) == undisturbed(tmp_path / "other")


def test_a_survey_tells_how_far_every_round_is(tmp_path: Path) -> None:
    services, told = opened(tmp_path, ONE_MODULE), Told()
    run(services, recipe_in(services, adapters()), told)
    assert told.of("survey") == [(done, len(SHAPES)) for done in range(len(SHAPES) + 1)] * 2


def test_a_method_that_asks_for_none_is_not_surveyed(tmp_path: Path) -> None:
    services, told = opened(tmp_path, ALL), Told()
    run(services, recipe_in(services, adapters(), parameters={}), told)
    assert told.of("survey") == []


@pytest.mark.parametrize("reports", [1, 4, len(SHAPES) + 1, len(SHAPES) + 4])
def test_a_survey_that_was_stopped_begins_again_and_ends_the_same(tmp_path: Path, reports: int) -> None:
    services = opened(tmp_path / "store", ONE_MODULE)
    recipe = recipe_in(services, adapters())
    with pytest.raises(Stopped):
        run(services, recipe, Told(surveyed=reports))
    assert services.jobs.shards(recipe.digest) == {}
    assert run(services, recipe) == undisturbed(tmp_path / "other")


def test_garbage_collection_leaves_nothing_of_a_survey(tmp_path: Path) -> None:
    services = opened(tmp_path, ONE_MODULE)
    recipe = recipe_in(services, adapters())
    before = set(services.blobs.digests())
    result = run(services, recipe)
    collect_garbage(services.settings, grace_s=0)
    parts = {part.digest for part in OpenAdapter.open(services.blobs, result).manifest.parts.values()}
    assert set(services.blobs.digests()) == before | parts | {result}


# --- kill -9 and cancel, on a real service

LARGE = {f"layers.{n}.q_proj": (640, 512) for n in range(40)}
SETTINGS = {"BRAID_SHARD_BYTES": "1", "BRAID_THREADS": "1"}  # one module to a shard


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("survey"), **SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def inputs(service: Server) -> list[str]:
    return [service.add(made) for made in adapters(LARGE)]


@pytest.fixture(scope="module")
def services(service: Server) -> Services:
    return Services.open(Settings(data_dir=service.data_dir))


def post(server: Server, inputs: Sequence[str], density: float) -> Digest:
    answer = server.http.post("/merge", json=asked(inputs, parameters={**PARAMETERS, "density": density}))
    assert answer.status_code == 202, answer.text
    return Digest.parse(answer.json()["id"])


def surveying(server: Server, services: Services, inputs: Sequence[str], density: float, *, rounds: int = 1) -> Digest:
    """A job in the middle of this round of its survey."""
    job = post(server, inputs, density)
    eventually(lambda: is_surveying(services, job, rounds) or None)
    return job


def surveyed(services: Services, job: Digest) -> list[int]:
    """Modules done, as the survey has told it: every round begins at 0."""
    return [event.done for event in services.jobs.events(job) if event.stage == "survey"]


def is_surveying(services: Services, job: Digest, rounds: int) -> bool:
    told = surveyed(services, job)
    return told.count(0) == rounds and told[-1] > 2


@pytest.fixture(scope="module")
def calm(services: Services, inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Digest], str]:
    """The result of a job's recipe where nothing disturbs it: in this process, in one shard."""
    elsewhere = opened(tmp_path_factory.mktemp("calm"), ALL)
    for made in adapters(LARGE):
        ingest.import_upload(elsewhere, *([part] for part in made.files.values()))

    def result(job: Digest) -> str:
        known, threads = services.jobs.get(job), torch.get_num_threads()
        assert known is not None
        torch.set_num_threads(1)
        merged = run(elsewhere, Recipe.from_json(known.recipe))
        torch.set_num_threads(threads)
        return str(merged)

    return result


@pytest.fixture(scope="module")
def killed(service: Server, services: Services, inputs: list[str]) -> Mapping[str, Digest]:
    """Victim -> a job that has ended after its kill; the worker's was in its second round."""
    jobs = {}
    for victim, rounds, density in (("child", 1, 0.4), ("worker", 2, 0.5)):
        jobs[victim] = surveying(service, services, inputs, density, rounds=rounds)
        service.processes()[victim].kill()
        service.ended(str(jobs[victim]))
    return jobs


every_victim = pytest.mark.parametrize("victim", ["child", "worker"])


@every_victim
def test_a_survey_whose_process_is_killed_ends_with_the_same_bytes(
    service: Server, killed: Mapping[str, Digest], calm: Callable[[Digest], str], victim: str
) -> None:
    ended = service.ended(str(killed[victim]))
    assert (ended["state"], ended["attempt"], ended["result"]["id"]) == ("succeeded", 1, calm(killed[victim]))


@pytest.mark.parametrize(("victim", "begun"), [("child", 2), ("worker", 3)])
def test_a_kill_costs_the_task_in_flight_or_with_the_worker_the_round(
    services: Services, killed: Mapping[str, Digest], victim: str, begun: int
) -> None:
    assert surveyed(services, killed[victim]).count(0) == begun


def test_a_job_cancelled_in_its_survey_ends_there(service: Server, services: Services, inputs: list[str]) -> None:
    job = surveying(service, services, inputs, 0.6)
    assert service.http.delete(f"/jobs/{job}").json()["state"] == "cancelled"
    time.sleep(1)
    known = services.jobs.get(job)
    assert known is not None
    assert (known.state, known.stage, services.jobs.shards(job)) == ("cancelled", "survey", {})


def test_asking_again_after_a_cancel_surveys_again(service: Server, services: Services, inputs: list[str]) -> None:
    job = surveying(service, services, inputs, 0.7)
    service.http.delete(f"/jobs/{job}")
    assert post(service, inputs, 0.7) == job
    ended = service.ended(str(job))
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
