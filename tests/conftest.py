"""Shared fixtures: one service for all tests that only talk to it."""

from collections.abc import Iterator

import pytest

from serving import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real service with a worker, shared by every test of the session that neither kills it nor counts its adapters."""
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running
