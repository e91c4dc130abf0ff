"""The process that computes: reads tasks as JSON lines, answers with descriptors, and can be killed at any moment.

It holds nothing that the store does not hold. Started for `local`, one per device; it ends when its worker does.
"""

import ctypes
import gc
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import Any, TextIO

import torch
from pydantic import TypeAdapter
from setproctitle import setproctitle
from threadpoolctl import threadpool_limits

from app.adapters import OpenAdapter
from app.engine.bench import Workbench, threads_of
from app.engine.messages import Task
from app.engine.task import run_task
from app.errors import problem
from app.services import Services
from app.settings import Settings
from storage.digest import Digest

log = logging.getLogger(__name__)

TASKS: TypeAdapter[Task] = TypeAdapter(Task)
_OPEN_ADAPTERS = 64
# mallopt: threads that merge side by side use one heap, and what they free goes back; heaps of their own keep 200 MiB more
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def main(settings: Settings, device: str, threads: str) -> None:
    """Serve tasks until standard input ends."""
    setproctitle(f"braid child {device}")
    answers = _private_stdout()
    _configure_libraries()
    gc.freeze()  # looking through all that was imported takes as long as merging ten modules
    bench = workbench(Services.open(settings), device, int(threads))
    promised: SimpleQueue[Future[dict[str, Any]]] = SimpleQueue()
    threading.Thread(target=_reply, args=(promised, answers), daemon=True).start()
    with ThreadPoolExecutor() as pool:  # as many at a time as were sent: while one writes what it computed, the next computes
        for line in _lines():
            promised.put(pool.submit(_answer, line, bench))


def _configure_libraries() -> None:
    """One thread for every module, see task: more of them work on other modules."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.putenv(f"{library}_NUM_THREADS", "1")  # for libraries that are loaded later
    keep_what_is_freed()


def keep_what_is_freed() -> None:
    """Let the next module have the memory of the last: to get it from the system each time takes as long as to fill it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 32 << 20)):
            libc.mallopt(option, value)


def workbench(services: Services, device: str, threads: int) -> Workbench:
    """A bench that keeps recently used adapters open: their headers are parsed once per merge, not once per shard."""

    cached = lru_cache(maxsize=_OPEN_ADAPTERS)(partial(OpenAdapter.open, services.blobs))
    one_at_a_time = threading.Lock()

    def open_adapter(digest: Digest) -> OpenAdapter:
        with one_at_a_time:  # tasks that begin together would each open it
            return cached(digest)

    return Workbench(services, device, threads, threads_of(threads), open_adapter)


def _answer(line: str, bench: Workbench) -> dict[str, Any]:
    try:
        return {"done": run_task(TASKS.validate_json(line), bench).to_json()}
    except Exception as error:  # the rim: whatever went wrong becomes the job's problem, and this process goes on
        described = problem(error)
        log.log(
            logging.ERROR if described["status"] == 500 else logging.INFO,
            "task failed: %s",
            error,
            exc_info=described["status"] == 500,
        )
        return {"problem": described}


def _reply(promised: SimpleQueue[Future[dict[str, Any]]], answers: TextIO) -> None:
    """Answers in the order of the tasks."""
    while True:
        answers.write(json.dumps(promised.get().result()) + "\n")
        answers.flush()


def _lines() -> Iterator[str]:
    """Lines of standard input. They are read by a thread, so that the parent's death ends this process even in mid-task."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        with os.fdopen(0) as lines:
            for line in lines:
                queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield queue.get()


def _private_stdout() -> TextIO:
    """The pipe to the parent, moved out of the way of libraries that print."""
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return private
