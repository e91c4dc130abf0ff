"""A store of its own for every test, with a Hub and a directory of base models beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.services import Services
from app.settings import Settings
from hub_server import HubServer
from pairs import write_pair


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base and tuned, of which everything differs."""
    write_pair(tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def settings(tmp_path: Path, hub: HubServer, models: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data", bases_dir=models, hub_endpoint=hub.endpoint, hub_deadline_s=2, max_base_bytes=20_000_000
    )


@pytest.fixture
def services(settings: Settings) -> Services:
    return Services.open(settings)
