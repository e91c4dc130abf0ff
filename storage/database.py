"""Connections and migrations. SQLite by default, Postgres by URL; the tables are the same."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Engine, Table, create_engine, event, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, ExceptionContext

from storage.errors import StoreFull

_MIGRATIONS = Path(__file__).parent / "migrations"
_INSERT: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_PRAGMAS = ("busy_timeout=30000", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON")


def connect(url: str) -> Engine:
    """An engine whose SQLite connections are WAL, wait for locks, and take the write lock when a transaction begins.

    A deferred SQLite transaction that reads and then writes fails at once when another writer came between; taking the
    lock first makes it wait instead.
    """
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        event.listen(engine, "handle_error", _tell_full)
    return engine


def reading(engine: Engine) -> Connection:
    """A connection for reading: a snapshot that never waits for a writer."""
    return engine.connect().execution_options(braid_reading=True)


def insert_if_absent(connection: Connection, table: Table, row: Mapping[str, Any]) -> bool:
    """Whether the row is new. One that is there already stays as it is."""
    insert = _INSERT[connection.dialect.name](table)
    return connection.execute(insert.values(row).on_conflict_do_nothing()).rowcount == 1


def upgrade(engine: Engine, lock: Path) -> None:
    """Bring the schema to the newest version. `lock`: a file; two processes starting at once migrate one after the other."""
    if _is_current(engine):
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock), engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _is_current(engine: Engine) -> bool:
    """Whether there is nothing to migrate. Alembic takes longer to import than everything else here together."""
    with reading(engine) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return False
        versions = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
    return versions == [max(path.stem.partition("_")[0] for path in _MIGRATIONS.glob("versions/[0-9]*.py"))]


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver must not open transactions of its own
    for pragma in _PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    reads = connection.get_execution_options().get("braid_reading")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _tell_full(context: ExceptionContext) -> None:
    """Raises StoreFull where SQLite finds no room."""
    if getattr(context.original_exception, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        raise StoreFull(str(context.original_exception)) from context.original_exception
