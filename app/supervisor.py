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
from collections.abc import Callable, Collection, Iterator, Sequence
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
_KILL_WAIT_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
REFUSED, REFUSED_FOR_NOW = 2, 75  # exit codes of a process that has told in a sentence why it cannot run
# macOS: numpy has used Accelerate by the time it is imported, and Accelerate does not survive a fork
FORKS = sys.platform != "darwin"


@dataclass(frozen=True, slots=True)
class Ward:
    """A process to keep alive: main(settings, *arguments) of a module. Whoever ends, or is ended, is started again.

    fds: what it inherits under the same numbers.  child: the module of the children that it may ask for; then it gets one more
    argument, the number of its end of a connection.  fatal: exit codes of its first life that say that no other would do better.
    """

    module: str
    arguments: tuple[str, ...] = ()
    fds: tuple[int, ...] = ()
    child: str | None = None
    fatal: Collection[int] = range(1, 256)


WORKER = Ward("app.engine.worker", child="app.engine.child")


@dataclass(eq=False)
class _Life:
    """How it goes with a ward. connection: our end, while the process lives."""

    ward: Ward
    deaths: int = 0
    pause_s: float = _FIRST_PAUSE_S / 2  # doubled when it first dies
    due: float = 0.0
    started: float = 0.0
    pid: int | None = None
    connection: socket.socket | None = None

    def end(self) -> None:
        """It is to live again, after a pause that grows as long as it does not live long."""
        if self.connection:
            self.connection.close()
        lasted_s = time.monotonic() - self.started
        self.pause_s = _FIRST_PAUSE_S if lasted_s > _HEALTHY_S else min(2 * self.pause_s, _LAST_PAUSE_S)
        self.deaths, self.due, self.connection = self.deaths + 1, time.monotonic() + self.pause_s, None


@dataclass(frozen=True, slots=True)
class _Own:
    """What is the supervisor's alone. lifeline: what wards read, and its other end.  woken: readable when a signal has come."""

    lifeline: int
    held: int
    woken: socket.socket
    waker: socket.socket

    @property
    def fds(self) -> tuple[int, ...]:
        return self.lifeline, self.held, self.woken.fileno(), self.waker.fileno()


def run_worker(settings: Settings) -> int:
    """`braid worker`: a worker without an API, until SIGTERM or SIGINT. The exit code."""
    open_standard_streams()
    logs.configure(settings.log_level)
    return supervise(settings, [WORKER])


def supervise(settings: Settings, wards: Sequence[Ward], *, forks: bool = FORKS) -> int:
    """Keep them alive until SIGTERM, SIGINT, or an end that is fatal. The exit code: 0 if told to stop."""
    for module in (name for ward in wards for name in (ward.module, ward.child) if name and forks):
        importlib.import_module(module)
    gc.freeze()  # else each process would copy all memory when it first collects garbage
    with _own() as own:
        family = _Family(settings, [_Life(ward) for ward in wards], own, forks)
        try:
            code = family.live()
            return REFUSED if code == REFUSED_FOR_NOW else code  # the difference is ours
        finally:
            family.end()


def open_standard_streams() -> None:
    """Where a standard stream is closed, the next file to be opened would get its number, and be taken for it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


@contextmanager
def _own() -> Iterator[_Own]:
    lifeline, held = os.pipe()
    woken, waker = socket.socketpair()
    with woken, waker:
        woken.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        before = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
        try:
            yield _Own(lifeline, held, woken, waker)
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            os.close(lifeline)
            os.close(held)


@dataclass(eq=False)
class _Family:
    """All processes below this one. children: those that wards asked for.  dead: wards that nobody has looked after since."""

    settings: Settings
    lives: Sequence[_Life]
    own: _Own
    forks: bool
    children: set[int] = field(default_factory=set)
    dead: list[tuple[_Life, int]] = field(default_factory=list)

    def live(self) -> int:
        while True:
            self._begin_due()
            asking = [life.connection for life in self.lives if life.connection]
            ready = select.select([self.own.woken, *asking], [], [], self._next_due_s())[0]
            for connection in asking:
                if connection in ready:
                    self._answer(connection)
            if self.own.woken in ready and {signal.SIGTERM, signal.SIGINT} & set(self.own.woken.recv(4096)):
                return 0
            if (code := self._mourn()) is not None:
                return code

    def end(self) -> None:
        """Tell all to stop, and kill who has not within seconds. Children end with the worker."""
        for life in self.lives:
            if life.pid is not None:
                os.kill(life.pid, signal.SIGTERM)
        self._wait(self._left, _STOP_WAIT_S)
        for pid in self._left():
            os.kill(pid, signal.SIGKILL)
        self._wait(self._left, _KILL_WAIT_S)

    def _left(self) -> list[int]:
        return [*(life.pid for life in self.lives if life.pid is not None), *self.children]

    def _wait(self, left: Callable[[], Collection[int]], longest_s: float) -> None:
        """Until none of these is left. Not for ever: what hangs in the kernel does not even die of SIGKILL."""
        ends_at = time.monotonic() + longest_s
        while left() and time.monotonic() < ends_at:
            self._reap()
            time.sleep(0.01)

    # beginnings

    def _next_due_s(self) -> float | None:
        due = [life.due for life in self.lives if life.pid is None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _begin_due(self) -> None:
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
            if ward.child:
                life.connection, theirs = socket.socketpair()
                stack.enter_context(theirs)
                arguments, fds = (*arguments, str(theirs.fileno())), (*fds, theirs.fileno())
            life.pid = self._launch(ward.module, arguments, stdin=self.own.lifeline, fds=fds)
        log.debug("%s started, process %d", ward.module, life.pid)

    def _launch(self, module: str, arguments: Sequence[str], *, stdin: int, stdout: int = 1, fds: Collection[int] = ()) -> int:
        """A session of its own: Ctrl-C in a terminal is for us to hear."""
        if not self.forks:
            return _spawn(self.settings, [module, *arguments], stdin, stdout, fds)
        stops = (signal.SIGTERM, signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # they would find our handlers in the fork, and be lost
        try:
            pid = os.fork()
            if pid == 0:
                self._become(module, arguments, stdin, stdout, fds)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        return pid

    def _become(self, module: str, arguments: Sequence[str], stdin: int, stdout: int, fds: Collection[int]) -> None:
        """In the fork: nothing of the supervisor but what was given to it. Does not return."""
        code = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            given = [fd for life in self.lives for fd in life.ward.fds]
            asked = [life.connection.fileno() for life in self.lives if life.connection]
            for fd in {*self.own.fds, *given, *asked, stdin, stdout} - {0, 1, 2, *fds}:
                os.close(fd)
            code = run(module, self.settings, arguments)
        except Exception:
            log.exception("%s did not begin", module)
        finally:
            os._exit(code)  # what is above us on the stack is not ours to unwind

    # children of wards

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):  # it died while it asked
            question, fds = question_from(connection)
            if "kill" in question:
                self._kill(question["kill"])
                connection.send(b"{}")
            elif question:
                connection.send(json.dumps(self._child(question["launch"], *fds)).encode())

    def _child(self, command: Sequence[str], stdin: int, stdout: int) -> dict[str, Any]:
        try:
            pid = self._launch(command[0], command[1:], stdin=stdin, stdout=stdout)
        except OSError as error:  # no memory or no process left: for the job to tell
            return {"refused": sentence(error)}
        finally:
            os.close(stdin)
            os.close(stdout)
        self.children.add(pid)
        return {"pid": pid}

    def _kill(self, pid: int) -> None:
        if pid in self.children:  # as long as it has not been reaped the number is its own
            os.kill(pid, signal.SIGKILL)
            self._wait(lambda: self.children & {pid}, _KILL_WAIT_S)

    # ends

    def _reap(self) -> None:
        """Note who has ended. A ward that has is without a process, and its exit code waits for `_mourn`."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                self.children.discard(found[0])
                for life in self.lives:
                    if life.pid == found[0]:
                        life.pid = None
                        self.dead.append((life, os.waitstatus_to_exitcode(found[1])))

    def _mourn(self) -> int | None:
        """Plan the next lives of the wards that have ended; an exit code if one of these ends is fatal."""
        self._reap()
        while self.dead:
            life, code = self.dead.pop(0)
            if life.deaths == 0 and code in life.ward.fatal:
                if code not in (REFUSED, REFUSED_FOR_NOW):  # which told its own sentence
                    log.error("%s ended with %d, and with it the service", life.ward.module, code)
                return code
            life.end()
            log.warning("%s ended with %d; starting it again in %.1f s", life.ward.module, code, life.pause_s)
        return None


def _spawn(settings: Settings, command: Sequence[str], stdin: int, stdout: int, fds: Collection[int]) -> int:
    """A fresh interpreter that runs `command`: a module and its arguments."""
    pipes = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)]
    environment = settings.to_environment()
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        words = [sys.executable, "-m", "app.supervisor", *command]
        return os.posix_spawn(sys.executable, words, environment, file_actions=pipes, setsid=True)
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


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
