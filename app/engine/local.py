"""The default executor: one child process per device, each killed without regret, since a finished task is a blob."""

import contextlib
import json
import logging
import os
import selectors
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import IO, Any

from app.engine.executor import Stopped, T, TaskFailed
from app.engine.messages import Task
from app.engine.processes import Launch, Process
from app.errors import WorkerLost, problem
from app.settings import Settings
from storage.digest import Descriptor

log = logging.getLogger(__name__)

_MAX_DEATHS = 3  # of one task in a row; more is the task's own doing
_AHEAD = 2  # tasks that a child has at a time: while one writes what it computed, the next computes
_STOP_POLL_S = 0.2


@dataclass(eq=False)
class Child:
    """A process that runs tasks on one device, started when first needed and again after it was killed."""

    device: str
    threads: int
    launch: Launch
    process: Process | None = None

    def start(self) -> Process:
        """Called only while no answer is owed: what there is to read then is the end of a dead one's pipe."""
        if self.process is not None and _is_ready(self.process.stdout, selectors.EVENT_READ, 0):
            self.kill()
        if self.process is None:
            self.process = self.launch("app.engine.child", [self.device, str(self.threads)])
        return self.process

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None

    def answers(self, tasks: Sequence[Task], *, stop: Callable[[], bool]) -> Generator[dict[str, Any], None, None]:
        """The answers to these tasks, in order, whatever the child dies of in between.

        After a death tasks go one at a time: two of them may have been too much, and only so is it known whose doing the
        next is. Raises Stopped when `stop` says so, TaskFailed if a task is the child's death again and again.
        """
        sent = done = deaths = 0
        ahead = _AHEAD
        try:
            while done < len(tasks):
                if stop():
                    raise Stopped
                if sent == done:  # nothing is owed, so it may be another process
                    process = self.start()
                while sent < min(done + ahead, len(tasks)):
                    sent += 1  # before it is sent: half a line is owed, too
                    _send(process, _line(tasks[sent - 1]), stop)
                answer = _receive(process, stop)
                if answer is None:
                    self.kill()
                    deaths, sent, ahead = deaths + 1, done, 1
                    log.warning("the child on %s died (%d of %d)", self.device, deaths, _MAX_DEATHS)
                    if deaths == _MAX_DEATHS:
                        raise TaskFailed(problem(WorkerLost(_MAX_DEATHS)))
                else:
                    done, deaths = done + 1, 0
                    yield answer
        finally:
            if sent > done:  # whatever ended the wait: an answer still to come must not be taken for the next task's
                self.kill()


def _line(task: Task) -> bytes:
    from app.engine.child import TASKS

    return TASKS.dump_json(task) + b"\n"


def _send(process: Process, line: bytes, stop: Callable[[], bool]) -> None:
    """A process that is not there to take it is noticed by `_receive`. Raises Stopped."""
    os.set_blocking(process.stdin.fileno(), False)  # a process that still imports reads nothing, and may have to be stopped
    rest = memoryview(line)
    with contextlib.suppress(BrokenPipeError):
        while rest:
            _await(process.stdin, selectors.EVENT_WRITE, stop)
            rest = rest[os.write(process.stdin.fileno(), rest) :]


def _receive(process: Process, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """The next answer, or None if the process died before all of it was there. Raises Stopped."""
    _await(process.stdout, selectors.EVENT_READ, stop)
    answer = process.stdout.readline()
    if not answer.endswith(b"\n"):
        return None
    parsed: dict[str, Any] = json.loads(answer)
    return parsed


def _await(pipe: IO[bytes], event: int, stop: Callable[[], bool]) -> None:
    while not _is_ready(pipe, event, _STOP_POLL_S):
        if stop():
            raise Stopped


def _is_ready(pipe: IO[bytes], event: int, wait_s: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        return bool(selector.select(wait_s))


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """Tasks in order in a child of its own."""

    child: Child

    def run(self, tasks: Sequence[T], *, stop: Callable[[], bool]) -> Iterator[tuple[T, Descriptor]]:
        with contextlib.closing(self.child.answers(tasks, stop=stop)) as answers:
            for task, answer in zip(tasks, answers, strict=True):
                if "problem" in answer:
                    raise TaskFailed(answer["problem"])
                yield task, Descriptor.from_json(answer["done"])


@dataclass(frozen=True, slots=True)
class LocalPool:
    """The executors of one worker, one per device; a job leases one."""

    children: tuple[Child, ...]
    free: SimpleQueue[Child] = field(default_factory=SimpleQueue)

    @contextmanager
    def lease(self) -> Iterator[LocalExecutor]:
        child = self.free.get()
        try:
            yield LocalExecutor(child)
        finally:
            self.free.put(child)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(child.device for child in self.children)


def threads_for(settings: Settings, devices: int) -> int:
    """CPU threads of one job slot, where so many devices share the machine."""
    return settings.threads or max(1, (os.cpu_count() or 1) // devices)


def open_pool(settings: Settings, devices: Sequence[str], launch: Launch) -> LocalPool:
    """Start the children at once, so that the first job does not wait for them."""
    threads = threads_for(settings, len(devices))
    pool = LocalPool(tuple(Child(device, threads, launch) for device in devices))
    for child in pool.children:
        child.start()
        pool.free.put(child)
    return pool
