"""Keeps one worker process alive beside the API, and lets it end when the API ends, however that happens."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from app.settings import Settings

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 10.0
_HEALTHY_S = 30.0  # a worker that lived this long is started again at once
_STOP_WAIT_S = 5.0


@contextmanager
def supervised_worker(settings: Settings) -> Iterator[None]:
    """A worker that is started again whenever it dies, until the block ends."""
    stopping = threading.Event()
    thread = threading.Thread(target=_supervise, args=(settings, stopping), name="supervisor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(2 * _STOP_WAIT_S)


def _supervise(settings: Settings, stopping: threading.Event) -> None:
    pause_s = _FIRST_PAUSE_S
    while not stopping.is_set():
        started = time.monotonic()
        _run_once(settings, stopping)
        if stopping.is_set():
            return
        pause_s = _FIRST_PAUSE_S if time.monotonic() - started > _HEALTHY_S else min(2 * pause_s, _LAST_PAUSE_S)
        log.warning("the worker died; starting it again in %.1f s", pause_s)
        stopping.wait(pause_s)


def _run_once(settings: Settings, stopping: threading.Event) -> None:
    """One life of the worker. It reads our end of the pipe: when we are killed, the kernel closes it, and it ends too."""
    command = [sys.executable, "-m", "app.cli", "worker", "--supervised"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=settings.to_environment(), start_new_session=True)
    log.info("worker started, process %d", process.pid)
    while process.poll() is None and not stopping.wait(0.1):
        pass
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
