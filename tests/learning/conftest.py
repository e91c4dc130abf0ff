"""A store of its own for every test, with a Hub and a directory of base models beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.services import Services
from app.settings import Settings
from hub_server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def bases_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "bases"
    directory.mkdir()
    return directory


@pytest.fixture
def settings(tmp_path: Path, hub: HubServer, bases_dir: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        bases_dir=bases_dir,
        hub_endpoint=hub.endpoint,
        hub_deadline_s=2,
        max_base_bytes=200_000_000,
        max_upload_bytes=2_000_000,
    )


@pytest.fixture
def services(settings: Settings) -> Services:
    return Services.open(settings)
