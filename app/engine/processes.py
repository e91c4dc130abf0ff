"""What a process knows of its supervisor: it ends with it, and asks it for children.

A worker has threads, so it must not fork; the supervisor has none.
"""

import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, Self

log = logging.getLogger(__name__)

_LONGEST_LINE = 65536


class Process(Protocol):
    """One of ours, talked to over its pipes."""

    @property
    def stdin(self) -> IO[bytes]: ...

    @property
    def stdout(self) -> IO[bytes]: ...

    def kill(self) -> None:
        """Returns once it is gone, whatever it was doing."""


Start = Callable[[str, Sequence[str]], Process]  # of a module with main(settings, *arguments)


@dataclass(frozen=True, slots=True)
class Asked:
    """A process that the supervisor started. It alone may kill it: it knows which ids are still those of its children."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    forks: "Forks"

    def kill(self) -> None:
        self.forks.ask({"kill": self.pid})
        self.stdin.close()
        self.stdout.close()


@dataclass(frozen=True, slots=True)
class Forks:
    """The worker's end of its connection to the supervisor: one question at a time, each a line of JSON, as is the answer."""

    connection: socket.socket
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def inherited(cls, fd: int) -> Self:
        return cls(socket.socket(fileno=fd))

    def start(self, module: str, arguments: Sequence[str]) -> Asked:
        """Raises OSError if the system has no room for another process."""
        (their_stdin, stdin), (stdout, their_stdout) = os.pipe(), os.pipe()
        with ExitStack() as ours, ExitStack() as theirs:
            for fd in (their_stdin, their_stdout):
                theirs.callback(os.close, fd)
            # unbuffered: of two answers the second must not hide in a buffer, where nobody waits for it
            to_it = ours.enter_context(os.fdopen(stdin, "wb", buffering=0))
            from_it = ours.enter_context(os.fdopen(stdout, "rb", buffering=0))
            answer = self.ask({"start": [module, *arguments]}, their_stdin, their_stdout)
            if "refused" in answer:
                raise OSError(f"no process could be started: {answer['refused']}")
            ours.pop_all()
        return Asked(answer["pid"], to_it, from_it, self)

    def ask(self, question: dict[str, Any], *fds: int) -> dict[str, Any]:
        """Raises ConnectionError if the supervisor is gone; this process is then about to end, too."""
        with self.turn:
            socket.send_fds(self.connection, [json.dumps(question).encode() + b"\n"], fds)
            answer = self.connection.recv(_LONGEST_LINE)
        if not answer:
            raise ConnectionError("the supervisor is gone")
        return dict(json.loads(answer))


def question_from(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The supervisor's end: what is asked and the descriptors that came with it. Empty where the worker is gone."""
    line, fds, *_ = socket.recv_fds(connection, _LONGEST_LINE, 2)
    return (json.loads(line) if line else {}), list(fds)


def end_with_supervisor() -> None:
    """Called by each ward first of all: its standard input ends when the supervisor does, however that happens."""
    threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()


def _end_with_input() -> None:
    os.read(0, 1)
    log.info("ended with the supervisor")
    os._exit(0)
