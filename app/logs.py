"""Logging of our processes: one format on standard error, and libraries that would tell too much kept quiet."""

import logging
import sys

# they log URLs, which may be signed, and headers
_QUIET = ("httpx2", "httpcore2")


def configure(level: str) -> None:
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
