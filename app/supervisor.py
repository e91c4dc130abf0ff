"""The process that starts the others and keeps them alive: the API, the worker and, when it asks, the worker's children.

It imports what they need and does nothing else, so a fork of it is ready in milliseconds and shares its memory, where imports
take seconds and hundreds of MiB a process. Forks of a process with threads or with a GPU in use go wrong: it has neither.

When it is killed the others end: their standard input is a pipe of which it alone holds the other end.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from app import logs
from app.engine.processes import question_from
from app.errors import REFUSALS, WorkerBusy, sentence
from app.settings import Settings

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 10.0
_HEALTHY_S = 30.0  # one that lived this long is started again as if for the first time
_STOP_WAIT_S = 7.0  # longer than the API waits for the requests under way
REFUSED, REFUSED_FOR_NOW = 2, 75  # exit codes of a process that has told in a sentence why it cannot run
# macOS: numpy has used Accelerate by the time it is imported, and Accelerate does not survive a fork
FORKS = sys.platform != "darwin"


@dataclass(frozen=True, slots=True)
class Ward:
    """A process to keep alive: main(settings, *arguments) of a module.

    fds: what it inherits under the same numbers.  asks: it gets one more argument, the number of its end of a connection, to
    ask for children of its own.  fatal: exit codes that end the service, None for all; who is killed is started again.
    """

    module: str
    arguments: tuple[str, ...] = ()
    fds: tuple[int, ...] = ()
    asks: bool = False
    fatal: Collection[int] | None = None


@dataclass(eq=False)
class _Life:
    """How it goes with a ward. connection: our end, while the process lives."""

    ward: Ward
    due: float = 0.0
    pause_s: float = _FIRST_PAUSE_S / 2
    started: float = 0.0
    pid: int | None = None
    connection: socket.socket | None = None

    def end(self) -> None:
        """It is to live again, after a pause that grows as long as it does not live long."""
        if self.connection:
            self.connection.close()
        lasted_s = time.monotonic() - self.started
        self.pause_s = _FIRST_PAUSE_S if lasted_s > _HEALTHY_S else min(2 * self.pause_s, _LAST_PAUSE_S)
        self.due, self.connection = time.monotonic() + self.pause_s, None


def supervise(settings: Settings, wards: Sequence[Ward], *, preload: Sequence[str] = (), forks: bool = FORKS) -> int:
    """Keep them alive until SIGTERM, SIGINT, or an end that is fatal. The exit code: 0 if told to stop."""
    for module in (*(ward.module for ward in wards), *preload) if forks else ():
        importlib.import_module(module)
    gc.freeze()  # else each process would copy all memory when it first collects garbage
    lifeline, held = os.pipe()
    with _signals() as (woken, waker):
        family = _Family(settings, [_Life(ward) for ward in wards], (lifeline, held, woken.fileno(), waker.fileno()), forks)
        try:
            return family.live(woken)
        finally:
            family.end()
            os.close(lifeline)
            os.close(held)


@contextmanager
def _signals() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The first of the two can be read when a signal has come."""
    woken, waker = socket.socketpair()
    with woken, waker:
        woken.setblocking(False)
        waker.setblocking(False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        before = [signal.signal(number, lambda *_: None) for number in numbers]
        signal.set_wakeup_fd(waker.fileno())
        try:
            yield woken, waker
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@dataclass(eq=False)
class _Family:
    """All processes below this one. ours: lifeline, its other end, and the pair that signals wake."""

    settings: Settings
    lives: Sequence[_Life]
    ours: tuple[int, int, int, int]
    forks: bool
    children: set[int] = field(default_factory=set)

    def live(self, woken: socket.socket) -> int:
        while True:
            self._start_due()
            asking = [life.connection for life in self.lives if life.connection]
            ready = select.select([woken, *asking], [], [], self._next_due_s())[0]
            for connection in asking:
                if connection in ready:
                    self._answer(connection)
            if woken in ready and {signal.SIGTERM, signal.SIGINT} & set(woken.recv(4096)):
                return 0
            if (code := self._fatal()) is not None:
                return code

    def end(self) -> None:
        """Tell all to stop, and kill who has not within seconds. Children end with the worker."""
        for life in self.lives:
            if life.pid is not None:
                os.kill(life.pid, signal.SIGTERM)
        ends_at = time.monotonic() + _STOP_WAIT_S
        while self._left() and time.monotonic() < ends_at:
            self._bury()
            time.sleep(0.02)
        for pid in self._left():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _left(self) -> list[int]:
        return [*(life.pid for life in self.lives if life.pid is not None), *self.children]

    def _next_due_s(self) -> float | None:
        due = [life.due for life in self.lives if life.pid is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    # starting

    def _start_due(self) -> None:
        for life in self.lives:
            if life.pid is None and life.due <= time.monotonic():
                try:
                    self._begin(life)
                except OSError as error:  # no memory or no process left
                    life.end()
                    log.error("%s cannot be started: %s; trying again in %.1f s", life.ward.module, sentence(error), life.pause_s)

    def _begin(self, life: _Life) -> None:
        ward, arguments, fds = life.ward, life.ward.arguments, life.ward.fds
        life.started = time.monotonic()
        with contextlib.ExitStack() as stack:
            if ward.asks:
                life.connection, theirs = socket.socketpair()
                stack.enter_context(theirs)
                arguments, fds = (*arguments, str(theirs.fileno())), (*fds, theirs.fileno())
            life.pid = self._start(ward.module, arguments, stdin=self.ours[0], fds=fds)
        log.debug("%s started, process %d", ward.module, life.pid)

    def _start(self, module: str, arguments: Sequence[str], *, stdin: int, stdout: int = 1, fds: Collection[int] = ()) -> int:
        """A session of its own: Ctrl-C in a terminal is for us to hear."""
        if not self.forks:
            for fd in fds:
                os.set_inheritable(fd, True)
            command = [sys.executable, "-m", "app.supervisor", module, *arguments]
            pipes = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)]
            pid = os.posix_spawn(sys.executable, command, self.settings.to_environment(), file_actions=pipes, setsid=True)
            for fd in fds:
                os.set_inheritable(fd, False)
            return pid
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._become(stdin, stdout, fds)
                code = run(module, self.settings, arguments)
            finally:
                os._exit(code)  # what is above us on the stack is not ours to unwind
        return pid

    def _become(self, stdin: int, stdout: int, fds: Collection[int]) -> None:
        """In the fork: nothing of the supervisor but what was given to it."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        given = [*self.ours, *(fd for life in self.lives for fd in life.ward.fds)]
        asked = [life.connection.fileno() for life in self.lives if life.connection]
        for fd in {*given, *asked, stdin, stdout} - {0, 1, 2, *fds}:
            os.close(fd)

    # children of wards

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):  # it died while it asked
            question, fds = question_from(connection)
            if "kill" in question:
                self._kill(question["kill"])
                connection.send(b"{}")
            elif question:
                connection.send(json.dumps(self._child(question["start"], *fds)).encode())

    def _child(self, command: Sequence[str], stdin: int, stdout: int) -> dict[str, Any]:
        try:
            pid = self._start(command[0], command[1:], stdin=stdin, stdout=stdout)
        except OSError as error:  # no memory or no process left: for the job to tell
            return {"refused": sentence(error)}
        finally:
            os.close(stdin)
            os.close(stdout)
        self.children.add(pid)
        return {"pid": pid}

    def _kill(self, pid: int) -> None:
        if pid in self.children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.children.discard(pid)

    # ends

    def _bury(self) -> list[tuple[_Life, int]]:
        """The wards that have ended since, with their exit codes."""
        ended = []
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.children.discard(found[0])
                for life in self.lives:
                    if life.pid == found[0]:
                        life.pid = None
                        ended.append((life, os.waitstatus_to_exitcode(found[1])))
        return ended

    def _fatal(self) -> int | None:
        """The first exit code, among those of the wards that have ended, that ends the service; the others live again."""
        for life, code in self._bury():
            if code >= 0 and (life.ward.fatal is None or code in life.ward.fatal):
                return code
            life.end()
            log.warning("%s ended with %d; starting it again in %.1f s", life.ward.module, code, life.pause_s)
        return None


def run(module: str, settings: Settings, arguments: Sequence[str]) -> int:
    """The life of a process: its exit code. A refusal is a sentence, as of any command; a defect of ours has its traceback."""
    logs.configure(settings.log_level)
    try:
        importlib.import_module(module).main(settings, *arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except REFUSALS as error:
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        return REFUSED_FOR_NOW if isinstance(error, WorkerBusy | OSError) else REFUSED
    except Exception:
        log.exception("%s ends with a defect", module)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Settings(), sys.argv[2:]))
