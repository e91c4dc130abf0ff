"""`braid` without its seconds of imports: forks of a process that has imported everything and done nothing.

What they are from then on does not differ: a process of its own, with its own environment, files, threads and children. Only
what libraries read of the environment while they are imported is that of the tests.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from setproctitle import getproctitle

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["app.cli", "app.commands", "app.demo", "app.server", "app.engine.worker", "app.engine.child"])


@dataclass(frozen=True)
class Forked:
    """What tests use of subprocess.Popen."""

    process: ForkServerProcess

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("braid", timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(*command: str, environment: Mapping[str, str], stdout: Path, stderr: Path) -> Forked:
    """stdout: begun anew.  stderr: continued."""
    stdout.write_bytes(b"")
    stderr.touch()
    process = _CONTEXT.Process(target=_become, args=(command, dict(environment), stdout, stderr))
    process.start()
    return Forked(process)


def _become(command: tuple[str, ...], environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    getproctitle()  # finds where the title is by the environment that the process began with
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stdout, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_APPEND | os.O_WRONLY), 2)
    sys.argv[1:] = command
    from app import cli

    for console in (cli.out, cli.err):  # made before there was this environment
        console.width = int(environment.get("COLUMNS", console.width))
    cli.main()
