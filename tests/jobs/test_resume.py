"""What a merge takes over from an earlier run of its recipe, and what it must not."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from app import ingest
from app.engine.child import workbench
from app.engine.direct import DirectExecutor
from app.engine.executor import Stopped, TaskFailed
from app.engine.local import LocalExecutor, open_pool
from app.engine.messages import FetchTask
from app.engine.workflow import Run, run_all
from app.recipe import Recipe
from app.resolve import resolve
from app.schemas import MergeRequest
from app.services import Services
from app.settings import Settings
from making import make
from serving import environment_for
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


# the child, which has two tasks at a time


@dataclass(frozen=True)
class Spawned:
    """A child without a supervisor."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]

    @classmethod
    def start(cls, data_dir: Path, module: str, arguments: Sequence[str]) -> "Spawned":
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        command = [sys.executable, "-m", "app.supervisor", module, *arguments]
        process = subprocess.Popen(command, env=environment_for(data_dir), **pipes)
        return cls(process, process.stdin, process.stdout)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[LocalExecutor]:
    with open_pool(opened(tmp_path, ALL).settings, ["cpu"], partial(Spawned.start, tmp_path)).lease() as executor:
        yield executor
        executor.child.kill()


@pytest.fixture
def fetches(tmp_path: Path) -> list[FetchTask]:
    """Of adapters that are here, so that each is answered with its own digest."""
    return [FetchTask(item.source) for item in recipe_in(opened(tmp_path, ALL)).adapters]


def answered(executor: LocalExecutor, tasks: Sequence[FetchTask]) -> list[str]:
    return [str(found.digest) for _, found in executor.run(tasks, stop=lambda: False)]


def after(polls: int, then: Callable[[], bool]) -> Callable[[], bool]:
    """What is asked so many times for nothing."""
    asked = itertools.count()
    return lambda: next(asked) >= polls and then()


def test_a_child_that_was_left_in_mid_task_does_not_answer_the_next_one(
    executor: LocalExecutor, fetches: list[FetchTask]
) -> None:
    """Else a job would take another's shard for its own."""

    def broken() -> bool:
        raise OSError("the database cannot be read")

    with pytest.raises(OSError, match="cannot be read"):  # asked while the child still imports
        list(executor.run(fetches, stop=after(1, broken)))
    assert answered(executor, fetches[1:]) == [fetches[1].source]


def test_what_was_under_way_when_a_job_was_left_is_not_the_next_jobs(executor: LocalExecutor, fetches: list[FetchTask]) -> None:
    left = executor.run(fetches, stop=lambda: False)
    next(left)
    left.close()
    assert answered(executor, fetches) == [task.source for task in fetches]


def test_what_was_under_way_behind_a_problem_is_not_the_next_jobs(executor: LocalExecutor, fetches: list[FetchTask]) -> None:
    with pytest.raises(TaskFailed, match="nonsense"):
        list(executor.run([FetchTask("sha256:nonsense"), *fetches], stop=lambda: False))
    assert answered(executor, fetches) == [task.source for task in fetches]


def test_answers_come_in_the_order_of_tasks_whatever_the_child_dies_of(executor: LocalExecutor, fetches: list[FetchTask]) -> None:
    many = fetches * 6
    found = []
    for n, (_, descriptor) in enumerate(executor.run(many, stop=lambda: False)):
        found.append(str(descriptor.digest))
        if n in (2, 7):
            executor.child.process.process.kill()
    assert found == [task.source for task in many]


def test_a_child_that_does_not_read_can_be_stopped(executor: LocalExecutor) -> None:
    """It imports for seconds, and a task may be larger than its pipe."""
    with pytest.raises(Stopped):
        list(executor.run([FetchTask("x" * 2**20)], stop=after(1, lambda: True)))
    assert executor.child.process is None
