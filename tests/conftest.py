"""Shared fixtures: one service for all tests that only talk to it."""

import os
from collections.abc import Iterator

import pytest

from serving import Server, serving

LONGEST = ("test_kill.py", "test_worker.py", "test_cancel.py", "test_basis_job.py", "test_language_jobs.py", "test_survey_job.py")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes to two cores: part of their time goes by while they wait for services."""
    return min(8, (3 * (os.cpu_count() or 1) + 1) // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes begin first: begun last, one of them would run alone while all other processes wait."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real service with a worker, shared by every test of the session that neither kills it nor counts its adapters."""
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running
