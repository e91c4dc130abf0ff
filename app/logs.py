"""Logging of our processes: one format on standard error, and libraries that tell too much kept quiet."""

import logging
import sys

_TELLTALE = ("httpx2", "httpcore2")  # they log URLs, which may be signed, and headers
_WORDY = ("alembic.runtime.plugins", "dbos")  # a hundred lines at the first start


def configure(level: str) -> None:
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in (*_TELLTALE, *_WORDY):
        logging.getLogger(name).setLevel(logging.WARNING)
