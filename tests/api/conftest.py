"""A Hub of our own, a service that pulls from it and logs everything, and one with narrow limits."""

from collections.abc import Iterator

import pytest

from asking import OPERATORS_TOKEN
from hub_server import HubServer
from serving import Server, serving


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="session")
def hub_service(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service whose Hub is `hub`. It gives up on the Hub after 3 s and logs at DEBUG."""
    settings = {"BRAID_HUB_ENDPOINT": hub.endpoint, "BRAID_HUB_DEADLINE_S": "3", "BRAID_LOG_LEVEL": "DEBUG"}
    with serving(tmp_path_factory.mktemp("hub-service"), **settings) as running:
        yield running


@pytest.fixture(scope="session")
def lean(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service without a worker, which takes adapters of 2 MB at most and has a Hub token of its own."""
    settings = {"BRAID_HUB_ENDPOINT": hub.endpoint, "BRAID_HUB_TOKEN": OPERATORS_TOKEN, "BRAID_LOG_LEVEL": "DEBUG"}
    with serving(tmp_path_factory.mktemp("lean"), "--no-worker", BRAID_MAX_UPLOAD_BYTES="2000000", **settings) as running:
        yield running
