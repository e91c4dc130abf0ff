"""`braid serve`: the API on a socket, a supervised worker beside it."""

import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack

import uvicorn

from app import logs
from app.engine.devices import available
from app.main import create_app
from app.settings import Settings
from app.supervisor import supervised_worker


def run_server(settings: Settings, *, worker: bool, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Says where it listens once the socket is bound."""
    logs.configure(settings.log_level)
    if worker:
        available(settings.devices)  # a GPU that is not there would otherwise end the worker again and again
    listener = _bind(settings)
    config = uvicorn.Config(
        create_app(settings), log_config=None, log_level=settings.log_level.lower(), timeout_graceful_shutdown=5
    )
    # uvicorn raises the signal that ended it once more: by default that would end us before the worker is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        stack.enter_context(listener)
        if worker:
            stack.enter_context(supervised_worker(settings))
        host, port = listener.getsockname()[:2]
        say(f"Braid listens on http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run(sockets=[listener])


def _bind(settings: Settings) -> socket.socket:
    """Bound before anything starts, so that a port in use is known at once and a free one can be told."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # named, because asyncio turns Nagle's delay off only for a socket that says it is TCP: 4 ms an answer instead of 45
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    listener.listen(128)  # from here on nobody is refused: who comes before the API is ready waits
    return listener
