"""The default executor: one child process per device, each killed without regret, since a finished task is a blob."""

import json
import logging
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import IO, Any

from app.engine.executor import Stopped, T, TaskFailed
from app.errors import WorkerLost, problem
from app.settings import Settings
from storage.digest import Descriptor

log = logging.getLogger(__name__)

_MAX_DEATHS = 3  # of one task in a row; more is the task's own doing
_STOP_POLL_S = 0.2
# glibc: threads that merge side by side use one heap, and what they free goes back; heaps of their own keep 200 MiB more
_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}


@dataclass(eq=False)
class Child:
    """A process that runs one task at a time on one device, started when first needed and again after it was killed."""

    device: str
    threads: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "app.engine.child", self.device, str(self.threads)]
            # a session of its own: Ctrl-C in a terminal is for the worker to hear, the child ends with its pipe
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, start_new_session=True
            )
        return self.process

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, line: bytes, *, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """The answer to one task, or None if the child died over it. Raises Stopped, after killing it, when `stop` says so."""
        try:
            answer = _exchange(self.start(), line + b"\n", stop)
        except BaseException:
            self.kill()  # whatever ended the wait: the answer still to come must not be taken for the next task's
            raise
        if not answer.endswith(b"\n"):
            self.kill()
            return None
        parsed: dict[str, Any] = json.loads(answer)
        return parsed


def _exchange(process: subprocess.Popen[bytes], line: bytes, stop: Callable[[], bool]) -> bytes:
    """One line there, one line back; what comes back ends without a newline if the process died. Raises Stopped."""
    assert process.stdin is not None and process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)  # a process that still imports reads nothing, and may have to be stopped
    try:
        rest = memoryview(line)
        while rest:
            _await(process.stdin, selectors.EVENT_WRITE, stop)
            rest = rest[os.write(process.stdin.fileno(), rest) :]
        _await(process.stdout, selectors.EVENT_READ, stop)
        return process.stdout.readline()
    except BrokenPipeError:
        return b""


def _await(pipe: IO[bytes], event: int, stop: Callable[[], bool]) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        while not selector.select(_STOP_POLL_S):
            if stop():
                raise Stopped


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """Tasks one after the other in a child of its own."""

    child: Child

    def run(self, tasks: Sequence[T], *, stop: Callable[[], bool]) -> Iterator[tuple[T, Descriptor]]:
        from app.engine.child import TASKS

        for task in tasks:
            if stop():
                raise Stopped
            yield task, self._run_one(TASKS.dump_json(task), stop)

    def _run_one(self, line: bytes, stop: Callable[[], bool]) -> Descriptor:
        for death in range(1, _MAX_DEATHS + 1):
            answer = self.child.ask(line, stop=stop)
            if answer is None:
                log.warning("the child on %s died (%d of %d)", self.child.device, death, _MAX_DEATHS)
            elif "problem" in answer:
                raise TaskFailed(answer["problem"])
            else:
                return Descriptor.from_json(answer["done"])
        raise TaskFailed(problem(WorkerLost(_MAX_DEATHS)))


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


def open_pool(settings: Settings, devices: Sequence[str]) -> LocalPool:
    """Start the children at once, so that the first job does not wait for imports."""
    threads = threads_for(settings, len(devices))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**_ALLOCATOR, **settings.to_environment(), **limits}
    pool = LocalPool(tuple(Child(device, threads, environment) for device in devices))
    for child in pool.children:
        child.start()
        pool.free.put(child)
    return pool
