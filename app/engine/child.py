"""The process that computes: reads tasks as JSON lines, answers with descriptors, and can be killed at any moment.

It holds nothing that the store does not hold. Started by `local`, one per device; it ends when its parent does.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, TextIO

import torch
from pydantic import TypeAdapter

from app import logs
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


def main(device: str, threads: int) -> None:
    """Serve tasks until standard input ends."""
    answers = _private_stdout()
    settings = Settings()
    logs.configure(settings.log_level)
    torch.set_num_threads(1)  # every module has one thread, see task: more of them work on other modules
    bench = workbench(Services.open(settings), device, threads)
    promised: SimpleQueue[Future[dict[str, Any]]] = SimpleQueue()
    threading.Thread(target=_reply, args=(promised, answers), daemon=True).start()
    with ThreadPoolExecutor() as pool:  # as many at a time as were sent: while one writes what it computed, the next computes
        for line in _lines():
            promised.put(pool.submit(_answer, line, bench))


def workbench(services: Services, device: str, threads: int) -> Workbench:
    """A bench that keeps recently used adapters open: their headers are parsed once per merge, not once per shard."""

    @lru_cache(maxsize=_OPEN_ADAPTERS)
    def open_adapter(digest: Digest) -> OpenAdapter:
        return OpenAdapter.open(services.blobs, digest)

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
        for line in sys.stdin:
            queue.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield queue.get()


def _private_stdout() -> TextIO:
    """The pipe to the parent, moved out of the way of libraries that print."""
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return private


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
