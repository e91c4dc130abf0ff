"""A job that makes a basis: killed, stopped or cut otherwise, it ends the same; and a task is read from its own parts alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app import ingest
from app.bases import OpenBasis, read_basis
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.executor import Stopped
from app.engine.workflow import Run, run_all
from app.recipe import Recipe
from app.reconstruct import reconstruct
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from making import Made, make
from merge_algos.rank import RankRule
from serving import Server, eventually, serving
from storage.digest import Digest
from storage.index import BasisRecord
from storage.manifest import MEDIA_MANIFEST, AdapterManifest, Source
from storage.tensors import open_tensors

SHAPES = {f"layers.{n}.q_proj": (32, 24) for n in range(8)}
ONE_MODULE, ALL = 1, 2**30  # bytes to a shard
TASKS = ("first", "second", "third")


def adapters() -> list[Made]:
    """The last without the last module."""
    return [make(1, shapes=SHAPES), make(2, r=2, shapes=SHAPES), make(3, r=3, shapes=dict(list(SHAPES.items())[:-1]))]


def opened(data_dir: Path, shard_bytes: int = ALL) -> Services:
    return Services.open(Settings(data_dir=data_dir, shard_bytes=shard_bytes))


def stored(services: Services, made: Sequence[Made]) -> list[str]:
    return [str(ingest.import_upload(services, *([part] for part in each.files.values())).id) for each in made]


def recipe_in(services: Services, codec: str = "truncate") -> Recipe:
    inputs = [{"source": id_, "name": task} for id_, task in zip(stored(services, adapters()), TASKS, strict=True)]
    asked = {"method": "rmm", "parameters": {"codec": codec, "budget": 0.5}, "adapters": inputs}
    return resolve(MergeRequest.model_validate(asked), services, token=None)


def run(services: Services, recipe: Recipe, *, shards: int | None = None) -> Digest:
    """The basis, stopped after so many shards."""
    executor = DirectExecutor(workbench(services, "cpu", 2))

    def stop() -> bool:
        return shards is not None and len(services.jobs.shards(recipe.digest)) >= shards

    return run_all(Run(services, recipe, executor, lambda *_: None, stop))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Digest:
    services = opened(tmp_path_factory.mktemp("undisturbed"))
    return run(services, recipe_in(services))


def test_how_the_shards_are_cut_changes_nothing(tmp_path: Path, undisturbed: Digest) -> None:
    services = opened(tmp_path, ONE_MODULE)
    assert run(services, recipe_in(services)) == undisturbed


@pytest.mark.parametrize("shards", [1, 5])
def test_a_basis_that_was_stopped_goes_on_from_its_shards(tmp_path: Path, undisturbed: Digest, shards: int) -> None:
    services = opened(tmp_path, ONE_MODULE)
    recipe = recipe_in(services)
    with pytest.raises(Stopped):
        run(services, recipe, shards=shards)
    first = services.blobs.path(services.jobs.shards(recipe.digest)[0].digest).stat().st_mtime_ns
    with pytest.raises(Stopped):
        run(services, recipe, shards=shards + 2)
    assert services.blobs.path(services.jobs.shards(recipe.digest)[0].digest).stat().st_mtime_ns == first
    assert run(services, recipe) == undisturbed


# --- reading one task


def record(services: Services, basis: Digest) -> BasisRecord:
    found = services.index.get_basis(basis)
    assert found is not None
    return found


def weights_of(services: Services, basis: Digest, task: str) -> Digest:
    rebuilt = reconstruct(services, record(services, basis), {task: 1.0}, RankRule())
    with services.blobs.open(rebuilt.record.id) as stream:
        return AdapterManifest.from_bytes(stream.read()).weights.digest


def own_parts(services: Services, basis: Digest, task: str) -> set[str]:
    """The tensors of a basis that are a task's alone."""
    opened_basis = OpenBasis.open(services.blobs, basis)
    place = opened_basis.place(task)
    layout = opened_basis.group(place)["layout"]
    if layout is None:
        parts = {n: m["layout"]["part_of"][place.position] for n, m in opened_basis.modules(place).items()}
        return {f"{place.group}.{part}.{module}" for module, part in parts.items()}
    files = layout["tasks"][place.position].values()
    return {f"{layout['prefix']}.blob.{part}" for file in files for part in file["parts"]}


def spoil(services: Services, basis: Digest, names: set[str]) -> None:
    """Overwrite these tensors, in place."""
    path = services.blobs.path(read_basis(services.blobs, basis).tensors.digest)
    with open_tensors(path) as file:
        spans = [(file.header.data_start + t.start, t.size_bytes) for n, t in file.header.tensors.items() if n in names]
    assert spans
    path.chmod(0o644)
    with path.open("r+b") as stream:
        for start, size_bytes in spans:
            stream.seek(start)
            stream.write(b"\xff" * size_bytes)


@pytest.mark.parametrize("codec", ["truncate", "rmm", "tucker2", "lossless"])
def test_a_task_is_read_from_the_shared_parts_and_its_own(tmp_path: Path, codec: str) -> None:
    here, there = (opened(tmp_path / name) for name in ("here", "there"))
    basis = run(here, recipe_in(here, codec))
    assert run(there, recipe_in(there, codec)) == basis
    spoil(there, basis, own_parts(there, basis, "second") - own_parts(there, basis, "first") - own_parts(there, basis, "third"))
    for task in ("first", "third"):
        assert weights_of(there, basis, task) == weights_of(here, basis, task)


# --- what is private stays so


def restricted(services: Services, made: Made, source: str) -> str:
    """An adapter as if it had come from a private repository."""
    upload = ingest.import_upload(services, *([part] for part in made.files.values()))
    with services.blobs.open(upload.id) as stream:
        manifest = replace(AdapterManifest.from_bytes(stream.read()), source=Source("hub", source))
    blob = services.blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)
    services.index.add(replace(upload, id=blob.digest, source=manifest.source, restricted=(source,)))
    return str(blob.digest)


@pytest.mark.parametrize("method", ["rmm", "task_arithmetic"])
@pytest.mark.parametrize("deep", [False, True], ids=["itself", "what was merged of it"])
def test_a_private_input_forgotten_during_the_job_still_restricts_the_result(tmp_path: Path, method: str, deep: bool) -> None:
    services, source = opened(tmp_path), f"hub:org/private@{'a' * 40}"
    adapter = restricted(services, adapters()[0], source)
    used = adapter
    if deep:
        used = str(run(services, recipe_without_access(services, asking("task_arithmetic", adapter), adapter)))
        services.index.forget(Digest.parse(adapter))
    recipe = recipe_without_access(services, asking(method, used), used)
    services.index.forget(Digest.parse(used))
    result = run(services, recipe)
    found = services.index.get(result) or services.index.get_basis(result)
    assert found is not None and found.restricted == (source,)


def asking(method: str, source: str) -> MergeRequest:
    parameters = {"codec": "truncate"} if method == "rmm" else {}
    return MergeRequest.model_validate({"method": method, "parameters": parameters, "adapters": [{"source": source}]})


def recipe_without_access(services: Services, request: MergeRequest, source: str) -> Recipe:
    """The recipe that resolving would give a caller who may read the source."""
    (placeholder,) = stored(services, [adapters()[1]])
    plain = request.model_copy(
        update={"adapters": [item.model_copy(update={"source": placeholder}) for item in request.adapters]}
    )
    recipe = resolve(plain, services, token=None)
    return replace(recipe, adapters=tuple(replace(item, source=source) for item in recipe.adapters))


def test_a_basis_forgotten_while_it_is_extended_still_restricts_the_new_one(tmp_path: Path) -> None:
    services, source = opened(tmp_path), f"hub:org/private@{'b' * 40}"
    adapter = restricted(services, adapters()[0], source)
    old = run(services, recipe_without_access(services, asking("rmm", adapter), adapter))
    services.index.forget(old)
    assert ingest.restrictions(services, [old]) == (source,)


# --- kill -9, on a real service

LARGE = {f"layers.{n}.q_proj": (512, 384) for n in range(12)}
SETTINGS = {"BRAID_SHARD_BYTES": "1", "BRAID_THREADS": "1"}  # one module to a shard


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("basis"), **SETTINGS) as server:
        yield server


@pytest.mark.parametrize(("victim", "stage"), [("child", "merge"), ("worker", "survey")])
def test_a_basis_whose_process_is_killed_has_the_same_bytes(service: Server, tmp_path: Path, victim: str, stage: str) -> None:
    inputs = [make(n, r=2, shapes=LARGE) for n in (21, 22)]
    budget = {"child": 0.4, "worker": 0.5}[victim] + (0.05 if stage == "survey" else 0.0)
    body = {"method": "rmm", "parameters": {"codec": "truncate", "budget": budget}}
    asked = {**body, "adapters": [{"source": service.add(made)} for made in inputs]}
    job = service.http.post("/merge", json=asked).raise_for_status().json()["id"]
    progress = lambda: service.http.get(f"/jobs/{job}").json()["progress"]  # noqa: E731
    eventually(lambda: (progress()["stage"] == stage and progress()["done"] > 2) or None, wait_s=60)
    service.processes()[victim].kill()
    ended = service.ended(job)
    services = opened(tmp_path)
    stored(services, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calm = run(services, resolve(MergeRequest.model_validate(asked), services, token=None))
    torch.set_num_threads(threads)
    assert (ended["state"], ended["attempt"], ended["result"]["id"]) == ("succeeded", 1, str(calm))
