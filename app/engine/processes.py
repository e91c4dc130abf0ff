"""What a process knows of its supervisor: it ends with it, and asks it for children.

A worker has threads, so it must not fork; the supervisor has none.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, Self

_LONGEST = 65536


class Process(Protocol):
    """One of ours, talked to over its pipes."""

    @property
    def stdin(self) -> IO[bytes]: ...

    @property
    def stdout(self) -> IO[bytes]: ...

    def kill(self) -> None:
        """Returns once it is gone, whatever it was doing."""


Launch = Callable[[str, Sequence[str]], Process]  # of a module with main(settings, *arguments)


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that the supervisor started. It alone may kill it: it knows which ids are still those of its children."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    supervisor: "Supervisor"

    def kill(self) -> None:
        self.supervisor.ask({"kill": self.pid})
        self.stdin.close()
        self.stdout.close()


@dataclass(frozen=True, slots=True)
class Supervisor:
    """As a worker sees it, over a connection: one question at a time, in JSON so short that it comes in one piece."""

    connection: socket.socket
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def inherited(cls, fd: int) -> Self:
        return cls(socket.socket(fileno=fd))

    def launch(self, module: str, arguments: Sequence[str]) -> Launched:
        """Raises OSError if the system has no room for another process."""
        (their_stdin, stdin), (stdout, their_stdout) = os.pipe(), os.pipe()
        with ExitStack() as ours, ExitStack() as theirs:
            for fd in (their_stdin, their_stdout):
                theirs.callback(os.close, fd)
            # unbuffered: of two answers the second must not hide in a buffer, where nobody waits for it
            to_it = ours.enter_context(os.fdopen(stdin, "wb", buffering=0))
            from_it = ours.enter_context(os.fdopen(stdout, "rb", buffering=0))
            answer = self.ask({"launch": [module, *arguments]}, their_stdin, their_stdout)
            if "refused" in answer:
                raise OSError(f"no process could be started: {answer['refused']}")
            ours.pop_all()
        return Launched(answer["pid"], to_it, from_it, self)

    def ask(self, question: dict[str, Any], *fds: int) -> dict[str, Any]:
        """Ends this process if the supervisor is gone, as its lifeline is about to: an error would be the end of a job."""
        with self.turn:
            try:
                socket.send_fds(self.connection, [json.dumps(question).encode()], fds)
                answer = self.connection.recv(_LONGEST)
            except ConnectionError:
                answer = b""
        if not answer:
            os._exit(0)
        return dict(json.loads(answer))


def question_from(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The supervisor's end: what is asked and the descriptors that came with it. Empty where the worker is gone."""
    question, fds, *_ = socket.recv_fds(connection, _LONGEST, 2)
    for fd in fds:
        os.set_inheritable(fd, False)
    return (json.loads(question) if question else {}), list(fds)


def end_with_supervisor() -> None:
    """Called by each ward first of all: its standard input ends when the supervisor does, however that happens."""
    threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(0)  # without a word: the log may be a pipe that nobody reads any more
