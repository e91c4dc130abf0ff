"""What a merge takes over from an earlier run of its recipe, and what it must not."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from app import ingest
from app.engine.child import TASKS, workbench
from app.engine.direct import DirectExecutor
from app.engine.executor import Stopped
from app.engine.local import open_pool
from app.engine.messages import FetchTask
from app.engine.workflow import Run, run_all
from app.recipe import Recipe
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from making import make
from storage.digest import Digest

SHAPES = {f"layers.{n}.q_proj": (32, 32) for n in range(12)}
ONE_MODULE, TWO_MODULES, ALL = 1500, 2500, 2**30  # bytes to a shard


def opened(data_dir: Path, shard_bytes: int) -> Services:
    return Services.open(Settings(data_dir=data_dir, shard_bytes=shard_bytes))


def recipe_in(services: Services) -> Recipe:
    adapters = [ingest.import_upload(services, *([part] for part in make(n, shapes=SHAPES).files.values())) for n in range(2)]
    body = {"adapters": [{"source": str(adapter.id)} for adapter in adapters], "rank": 4}
    return resolve(MergeRequest.model_validate(body), services, token=None)


def run(services: Services, recipe: Recipe, *, shards: int | None = None) -> Digest:
    """The merge, stopped after so many shards."""
    executor = DirectExecutor(workbench(services, "cpu", 2))

    def stop() -> bool:
        return shards is not None and len(services.jobs.shards(recipe.digest)) >= shards

    return run_all(Run(services, recipe, executor, lambda *_: None, stop))


def undisturbed(data_dir: Path) -> Digest:
    services = opened(data_dir, ALL)
    return run(services, recipe_in(services))


def mtimes(services: Services, recipe: Recipe) -> Sequence[int]:
    return [services.blobs.path(shard.digest).stat().st_mtime_ns for shard in services.jobs.shards(recipe.digest).values()]


@pytest.mark.parametrize(("first", "second"), [(ONE_MODULE, TWO_MODULES), (TWO_MODULES, ONE_MODULE), (ONE_MODULE, ALL)])
def test_shards_cut_under_another_setting_are_not_mixed_in(tmp_path: Path, first: int, second: int) -> None:
    services = opened(tmp_path / "store", first)
    recipe = recipe_in(services)
    with pytest.raises(Stopped):
        run(services, recipe, shards=5)
    assert run(opened(tmp_path / "store", second), recipe) == undisturbed(tmp_path / "other")


def test_a_finished_shard_is_not_run_again(tmp_path: Path) -> None:
    services = opened(tmp_path, ONE_MODULE)
    recipe = recipe_in(services)
    with pytest.raises(Stopped):
        run(services, recipe, shards=5)
    before = mtimes(services, recipe)
    with pytest.raises(Stopped):
        run(services, recipe, shards=9)
    assert mtimes(services, recipe)[:5] == before


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_shard_whose_blob_is_damaged_is_run_again(tmp_path: Path, content: bytes | None) -> None:
    services = opened(tmp_path / "store", ONE_MODULE)
    recipe = recipe_in(services)
    with pytest.raises(Stopped):
        run(services, recipe, shards=5)
    blob = services.blobs.path(services.jobs.shards(recipe.digest)[3].digest)
    blob.unlink()
    if content is not None:
        blob.write_bytes(content)
    assert run(services, recipe) == undisturbed(tmp_path / "other")


def test_a_child_that_was_left_in_mid_task_does_not_answer_the_next_one(tmp_path: Path) -> None:
    """Else a job would take another's shard for its own."""
    services = opened(tmp_path, ALL)
    one, two = (item.source for item in recipe_in(services).adapters)
    with open_pool(services.settings, ["cpu"]).lease() as executor:

        def broken() -> bool:
            raise OSError("the database cannot be read")

        with pytest.raises(OSError, match="cannot be read"):  # asked while the child still imports
            executor.child.ask(TASKS.dump_json(FetchTask(one)), stop=broken)
        ((_, fetched),) = executor.run([FetchTask(two)], stop=lambda: False)
        executor.child.kill()
    assert str(fetched.digest) == two


def test_a_child_that_does_not_read_can_be_stopped(tmp_path: Path) -> None:
    """It imports for seconds, and a task may be larger than its pipe."""
    services = opened(tmp_path, ALL)
    with open_pool(services.settings, ["cpu"]).lease() as executor:
        with pytest.raises(Stopped):
            executor.child.ask(b"x" * 2**20, stop=lambda: True)
        assert executor.child.process is None
