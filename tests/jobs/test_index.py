"""The index over SQLite: what each method promises, and that the schema does not drift from its migrations."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, event, func, select

import storage.migrations
from indexing import JOB, OTHER, record
from storage.database import reading, upgrade
from storage.digest import Digest
from storage.errors import StoreFull
from storage.index import Index, Result
from storage.manifest import Source
from storage.schema import metadata, results

# the schema


def test_migrations_make_the_tables_of_the_schema(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_upgrading_twice_changes_nothing(engine: Engine, index: Index, tmp_path: Path) -> None:
    index.add(record())
    upgrade(engine, tmp_path / "lock")
    assert index.get(record().id) == record()


@pytest.fixture
def full(engine: Engine) -> Engine:
    """Of a database that has as many pages as it may have: what SQLite says of a full disk, too."""

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # which is never less than it has

    return engine


def add_until_full(index: Index) -> None:
    for number in range(10_000):
        index.add(replace(record(), id=Digest.of(str(number).encode())))


def test_a_full_disk_is_told_as_what_it_is(full: Engine) -> None:
    with pytest.raises(StoreFull, match="full"):
        add_until_full(Index(full))


def test_after_a_full_disk_there_is_what_was_there_before(full: Engine) -> None:
    index = Index(full)
    with pytest.raises(StoreFull):
        add_until_full(index)
    kept = index.get(Digest.of(b"0"))
    assert kept is not None
    assert kept.id == Digest.of(b"0")


def test_migrations_are_called_by_their_numbers() -> None:
    """By which a database that is current is known."""
    folder = Path(storage.migrations.__file__).parent / "versions"
    revisions = {
        path.stem: import_module(f"storage.migrations.versions.{path.stem}").revision for path in folder.glob("[0-9]*.py")
    }
    assert len(revisions) > 2
    assert {stem.partition("_")[0] for stem in revisions} == set(revisions.values())


def test_a_current_database_is_opened_without_alembic(engine: Engine, tmp_path: Path) -> None:
    """Which takes a process that starts half a second."""
    program = f"""
import sys
from pathlib import Path
from storage.database import connect, upgrade
upgrade(connect({str(engine.url)!r}), Path({str(tmp_path / "lock")!r}))
sys.exit("alembic" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# adapters


def test_an_added_adapter_comes_back_as_it_was(index: Index) -> None:
    index.add(record(restricted=("hub:a/b@1",)))
    assert index.get(record().id) == record(restricted=("hub:a/b@1",))


def test_an_unknown_adapter_is_none(index: Index) -> None:
    assert index.get(JOB) is None


def test_adding_again_keeps_the_first_row(index: Index) -> None:
    index.add(record(at=1.0))
    index.add(record(at=2.0))
    assert index.get(record().id) == record(at=1.0)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [(("a",), (), ()), ((), ("a",), ()), (("a", "b"), ("b", "c"), ("b",)), (("a",), ("a",), ("a",))],
)
def test_restrictions_only_ever_shrink(
    index: Index, first: tuple[str, ...], second: tuple[str, ...], left: tuple[str, ...]
) -> None:
    index.add(record(restricted=first))
    index.add(record(restricted=second))
    assert (index.get(record().id) or record()).restricted == left


def test_inputs_keep_their_order_and_their_repeats(index: Index) -> None:
    index.add(record(), [JOB, OTHER, JOB])
    assert index.inputs(record().id) == (JOB, OTHER, JOB)


def test_a_hub_import_is_found_by_its_source(index: Index) -> None:
    hub = record(source=Source("hub", "hub:a/b@1"))
    index.add(hub)
    assert index.find_source("hub:a/b@1") == hub


def test_a_merge_is_not_found_as_a_source(index: Index) -> None:
    index.add(record(source=Source("merge", str(JOB))))
    assert index.find_source(str(JOB)) is None


def test_pages_of_adapters_are_newest_first_and_miss_none(index: Index) -> None:
    added = [record(str(n), at=float(n // 2)) for n in range(7)]  # pairs of one moment
    for each in added:
        index.add(each)
    first = index.page(limit=3)
    second = index.page(limit=10, after=(first[-1].created_at, str(first[-1].id)))
    assert [*first, *second] == sorted(added, key=lambda r: (r.created_at, str(r.id)), reverse=True)


def test_adapters_are_the_roots(index: Index) -> None:
    index.add(record("a"))
    index.add(record("b"))
    assert set(index.artefacts()) == {record("a").id, record("b").id}


# results and names


def test_a_published_result_is_known_by_its_recipe(index: Index) -> None:
    index.publish(JOB, record(), [OTHER])
    assert (index.result(JOB), index.inputs(record().id)) == (Result("adapter", record().id), (OTHER,))


def test_publishing_twice_leaves_one_row(index: Index, engine: Engine) -> None:
    index.publish(JOB, record(), [OTHER])
    index.publish(JOB, record(), [OTHER])
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(results)) == 1


def test_a_result_that_differs_takes_the_place_of_the_one_before(index: Index) -> None:
    index.publish(JOB, record("lost blobs"), [])
    index.publish(JOB, record("made again"), [])
    assert index.result(JOB) == Result("adapter", record("made again").id)


def test_a_name_asked_for_before_publishing_is_given_then(index: Index) -> None:
    index.request_name("me/x", JOB)
    before = index.resolve_name("me/x")
    index.publish(JOB, record(), [])
    assert (before, index.resolve_name("me/x")) == (None, record().id)


def test_a_name_asked_for_after_publishing_is_given_at_once(index: Index) -> None:
    index.publish(JOB, record(), [])
    index.request_name("me/x", JOB)
    assert index.resolve_name("me/x") == record().id


def test_a_granted_request_does_not_come_back_at_the_next_publishing(index: Index) -> None:
    index.request_name("me/x", JOB)
    index.publish(JOB, record(), [])
    index.set_name("me/x", OTHER)
    index.publish(JOB, record(), [])
    assert index.resolve_name("me/x") == OTHER


def test_asking_for_a_name_twice_is_asking_once(index: Index) -> None:
    index.request_name("me/x", JOB)
    index.request_name("me/x", JOB)
    index.publish(JOB, record(), [])
    assert index.names_of(record().id) == ("me/x",)


def test_setting_a_name_moves_it(index: Index) -> None:
    index.set_name("me/x", JOB)
    index.set_name("me/x", OTHER)
    assert (index.names_of(JOB), index.names_of(OTHER)) == ((), ("me/x",))


def test_forgetting_takes_names_and_results_along(index: Index) -> None:
    index.request_name("me/x", JOB)
    index.publish(JOB, record(), [OTHER])
    assert index.forget(record().id)
    assert (index.get(record().id), index.resolve_name("me/x"), index.result(JOB)) == (None, None, None)


def test_forgetting_keeps_the_lineage(index: Index) -> None:
    index.add(record(), [OTHER])
    index.forget(record().id)
    assert index.inputs(record().id) == (OTHER,)


def test_forgetting_what_is_not_there_says_so(index: Index) -> None:
    assert not index.forget(JOB)
