"""Tasks in this very process, for the command line without a server."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.engine.bench import Workbench
from app.engine.executor import Stopped, T
from app.engine.task import run_task
from storage.digest import Descriptor


@dataclass(frozen=True, slots=True)
class DirectExecutor:
    """Runs each task when its turn comes. Errors pass through as they are."""

    bench: Workbench

    def run(self, tasks: Sequence[T], *, stop: Callable[[], bool]) -> Iterator[tuple[T, Descriptor]]:
        for task in tasks:
            if stop():
                raise Stopped
            yield task, run_task(task, self.bench)
