"""The one seam inside a merge: who runs the tasks. `local` is child processes; another backend is one more file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from app.engine.messages import Task
from storage.digest import Descriptor

T = TypeVar("T", bound=Task)


class Executor(Protocol):
    """Runs tasks and yields each with its descriptor as it is done, in any order.

    Progress is what it yields; to stop it is to close the iterator, which kills what runs.
    """

    def run(self, tasks: Sequence[T], *, stop: Callable[[], bool]) -> Iterator[tuple[T, Descriptor]]:
        """stop: asked several times a second. Raises Stopped when it says so, TaskFailed if a task has a problem."""
        ...


class Stopped(Exception):
    """The job was cancelled; what ran has been killed."""


@dataclass(eq=False)
class TaskFailed(Exception):
    """A task ended with a problem, in RFC 9457 form."""

    problem: dict[str, Any]

    def __str__(self) -> str:
        return str(self.problem.get("detail"))
