"""An index of its own for every test, migrated once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from storage.database import connect, upgrade
from storage.index import Index
from storage.jobs import Jobs


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("migrated")
    engine = connect(f"sqlite:///{directory / 'index.sqlite'}")
    upgrade(engine, directory / "lock")
    engine.dispose()
    return directory / "index.sqlite"


@pytest.fixture
def engine(migrated: Path, tmp_path: Path) -> Iterator[Engine]:
    shutil.copy(migrated, tmp_path)
    engine = connect(f"sqlite:///{tmp_path / 'index.sqlite'}")
    yield engine
    engine.dispose()


@pytest.fixture
def index(engine: Engine) -> Index:
    return Index(engine)


@pytest.fixture
def jobs(engine: Engine) -> Jobs:
    return Jobs(engine)
