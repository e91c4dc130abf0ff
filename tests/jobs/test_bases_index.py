"""Bases in the index, beside adapters: rows, pages, names, results; and a database from before there were any."""

from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, inspect, text

import storage.migrations
from indexing import JOB, OTHER, begin, record
from storage.database import connect, upgrade
from storage.digest import Digest
from storage.index import BasisRecord, Index, Result
from storage.jobs import Jobs


def basis(seed: str = "basis", *, at: float = 1.0, restricted: tuple[str, ...] = ()) -> BasisRecord:
    return BasisRecord(Digest.of(seed.encode()), "org/base", ("zeta", "alpha"), 6, 1000, str(JOB), restricted, at)


def test_a_basis_comes_back_as_it_was(index: Index) -> None:
    index.publish(JOB, basis(restricted=("hub:a/b@1",)), [])
    assert index.get_basis(basis().id) == basis(restricted=("hub:a/b@1",))


def test_a_basis_is_no_adapter_and_an_adapter_no_basis(index: Index) -> None:
    index.publish(JOB, basis(), [])
    index.add(record())
    assert (index.get(basis().id), index.get_basis(record().id)) == (None, None)
    assert (index.page(limit=9), index.page_of_bases(limit=9)) == ([record()], [basis()])


def test_a_published_basis_is_known_by_its_recipe_with_its_lineage(index: Index) -> None:
    index.publish(JOB, basis(), [OTHER, record().id, OTHER])
    assert index.result(JOB) == Result("basis", basis().id)
    assert index.inputs(basis().id) == (OTHER, record().id, OTHER)


def test_publishing_again_keeps_the_first_row(index: Index) -> None:
    index.publish(JOB, basis(at=1.0), [])
    index.publish(JOB, basis(at=2.0), [])
    assert index.get_basis(basis().id) == basis(at=1.0)


def test_a_basis_gets_the_name_that_was_asked_for(index: Index) -> None:
    index.request_name("me/basis", JOB)
    index.publish(JOB, basis(), [])
    assert index.resolve_name("me/basis") == basis().id


def test_forgetting_a_basis_takes_names_and_results_along(index: Index) -> None:
    index.request_name("me/basis", JOB)
    index.publish(JOB, basis(), [])
    assert index.forget(basis().id)
    assert (index.get_basis(basis().id), index.resolve_name("me/basis"), index.result(JOB)) == (None, None, None)
    assert not index.forget(basis().id)


def test_adapters_and_bases_are_the_roots(index: Index) -> None:
    index.add(record())
    index.publish(JOB, basis(), [])
    assert set(index.artefacts()) == {record().id, basis().id}


def test_pages_of_bases_are_newest_first_and_miss_none(index: Index) -> None:
    made = [basis(str(n), at=float(n // 2)) for n in range(5)]  # pairs of one moment
    for n, each in enumerate(made):
        index.publish(Digest.of(str(n).encode()), each, [])
    first = index.page_of_bases(limit=2)
    rest = index.page_of_bases(limit=9, after=(first[-1].created_at, str(first[-1].id)))
    assert [*first, *rest] == sorted(made, key=lambda each: (each.created_at, str(each.id)), reverse=True)


def test_a_job_succeeds_with_a_basis(index: Index, jobs: Jobs) -> None:
    begin(jobs)
    assert jobs.succeed(JOB, 1, basis(), [OTHER])
    assert index.result(JOB) == Result("basis", basis().id)


# --- a database from before bases


@pytest.fixture
def old(tmp_path: Path) -> Engine:
    """At revision 0001."""
    engine = connect(f"sqlite:///{tmp_path / 'old.sqlite'}")
    config = Config()
    config.set_main_option("script_location", str(Path(storage.migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    return engine


def test_an_old_database_has_no_bases(old: Engine) -> None:
    with old.connect() as connection:
        assert "bases" not in inspect(connection).get_table_names()
        assert connection.scalar(text("select version_num from alembic_version")) == "0001"


def test_upgrading_an_old_database_keeps_its_rows(old: Engine, tmp_path: Path) -> None:
    index, jobs = Index(old), Jobs(old)
    index.publish(JOB, replace(record(), restricted=("hub:a/b@1",)), [OTHER])
    index.set_name("me/x", record().id)
    begin(jobs, OTHER)
    before = (index.page(limit=9), index.result(JOB), index.inputs(record().id), jobs.get(OTHER), jobs.events(OTHER))
    upgrade(old, tmp_path / "lock")
    after = (index.page(limit=9), index.result(JOB), index.inputs(record().id), jobs.get(OTHER), jobs.events(OTHER))
    assert (after, index.resolve_name("me/x")) == (before, record().id)


def test_an_upgraded_database_takes_bases(old: Engine, tmp_path: Path) -> None:
    upgrade(old, tmp_path / "lock")
    index = Index(old)
    index.publish(JOB, basis(), [])
    assert index.artefacts() == (basis().id,)
