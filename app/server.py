"""`braid serve`: which processes there are, and the one that holds the API."""

import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

import uvicorn
from setproctitle import setproctitle

from app import logs
from app.engine.processes import end_with_supervisor
from app.main import create_app
from app.settings import Settings
from app.supervisor import FORKS, REFUSED, WORKER, Ward, open_standard_streams, supervise

_START_FAILED = 3


def run_server(settings: Settings, *, worker: bool, say: Callable[[str], None], forks: bool = FORKS) -> int:
    """Serve until SIGTERM or SIGINT: the exit code. Says where it listens once the socket is bound."""
    open_standard_streams()
    logs.configure(settings.log_level)
    with _bind(settings) as listener:
        host, port = listener.getsockname()[:2]
        say(f"Braid listens on http://{f'[{host}]' if ':' in host else host}:{port}")
        api = Ward("app.server", (str(listener.fileno()),), fds=(listener.fileno(),))
        # a worker that cannot have its devices never can; one whose name is taken may get it when the other has ended
        workers = [replace(WORKER, fatal={REFUSED})] if worker else []
        return supervise(settings, [api, *workers], forks=forks)


def main(settings: Settings, listener: str) -> None:
    """The process of the API. listener: the number of the descriptor of a socket that listens, which outlives it."""
    setproctitle("braid api")
    end_with_supervisor()
    config = uvicorn.Config(
        create_app(settings), log_config=None, log_level=settings.log_level.lower(), timeout_graceful_shutdown=5
    )
    # uvicorn raises the signal that ended it once more
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = uvicorn.Server(config)
    server.run(sockets=[socket.socket(fileno=int(listener))])
    sys.exit(0 if server.started else _START_FAILED)


def _bind(settings: Settings) -> socket.socket:
    """Bound before anything starts, so that a port in use is known at once and a free one can be told."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # named, because asyncio turns Nagle's delay off only for a socket that says it is TCP: 4 ms an answer instead of 45
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    listener.listen(128)  # from here on nobody is refused: who comes before the API is ready waits
    return listener
