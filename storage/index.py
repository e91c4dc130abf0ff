"""What the store knows beside its blobs: which adapters there are, their names and lineage, which recipe gave which result."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, delete, insert, select, tuple_, update

from storage.database import insert_if_absent, reading
from storage.digest import Digest
from storage.manifest import Source
from storage.schema import adapters, bases, lineage, name_requests, names, results


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter as lists show it. restricted: Hub sources whose access must be checked again before it is handed out."""

    id: Digest
    base_model: str
    modules: int
    rank: int
    size_bytes: int
    source: Source
    licence: str | None
    restricted: tuple[str, ...]
    created_at: float


@dataclass(frozen=True, slots=True)
class BasisRecord:
    """One reversible basis. tasks: names, in order.  recipe: a digest.  restricted: as of an adapter."""

    id: Digest
    base_model: str
    tasks: tuple[str, ...]
    modules: int
    size_bytes: int
    recipe: str
    restricted: tuple[str, ...]
    created_at: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a recipe gave: the kind of artefact and its manifest."""

    kind: Literal["adapter", "basis"]
    target: Digest


@dataclass(frozen=True, slots=True)
class Index:
    """Rows about artefacts. Every write is one transaction and may be repeated without effect."""

    engine: Engine

    def add(self, record: AdapterRecord, inputs: Sequence[Digest] = ()) -> None:
        """Record an adapter and its inputs; an adapter already known keeps its row, only freer access is taken over."""
        with self.engine.begin() as connection:
            _add(connection, record, inputs)

    def publish(self, recipe: Digest, record: AdapterRecord | BasisRecord, inputs: Sequence[Digest]) -> None:
        """Record a merge result, give it the names that were asked for, all at once; publishing again changes nothing."""
        with self.engine.begin() as connection:
            publish(connection, recipe, record, inputs)

    def get(self, adapter: Digest) -> AdapterRecord | None:
        with reading(self.engine) as connection:
            row = connection.execute(select(adapters).where(adapters.c.id == str(adapter))).first()
        return _record(row) if row else None

    def find_source(self, source: str) -> AdapterRecord | None:
        """The adapter imported from this pinned source, if any."""
        with reading(self.engine) as connection:
            row = connection.execute(select(adapters).where(adapters.c.source == source, adapters.c.source_kind == "hub")).first()
        return _record(row) if row else None

    def page(self, *, limit: int, after: tuple[float, str] | None = None) -> list[AdapterRecord]:
        """Newest first; `after` is (created_at, id) of the last one seen."""
        query = select(adapters).order_by(adapters.c.created_at.desc(), adapters.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(adapters.c.created_at, adapters.c.id) < tuple_(*after))
        with reading(self.engine) as connection:
            return [_record(row) for row in connection.execute(query)]

    def get_basis(self, basis: Digest) -> BasisRecord | None:
        with reading(self.engine) as connection:
            row = connection.execute(select(bases).where(bases.c.id == str(basis))).first()
        return _basis_record(row) if row else None

    def page_of_bases(self, *, limit: int, after: tuple[float, str] | None = None) -> list[BasisRecord]:
        """Newest first, as `page`."""
        query = select(bases).order_by(bases.c.created_at.desc(), bases.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(bases.c.created_at, bases.c.id) < tuple_(*after))
        with reading(self.engine) as connection:
            return [_basis_record(row) for row in connection.execute(query)]

    def result(self, recipe: Digest) -> Result | None:
        with reading(self.engine) as connection:
            row = connection.execute(select(results).where(results.c.recipe == str(recipe))).first()
        return Result(row.kind, Digest.parse(row.target)) if row else None

    def inputs(self, adapter: Digest) -> tuple[Digest, ...]:
        query = select(lineage.c.parent).where(lineage.c.child == str(adapter)).order_by(lineage.c.position)
        with reading(self.engine) as connection:
            return tuple(Digest.parse(parent) for parent in connection.scalars(query))

    def resolve_name(self, name: str) -> Digest | None:
        with reading(self.engine) as connection:
            target = connection.scalar(select(names.c.target).where(names.c.name == name))
        return Digest.parse(target) if target else None

    def names_of(self, adapter: Digest) -> tuple[str, ...]:
        with reading(self.engine) as connection:
            return tuple(connection.scalars(select(names.c.name).where(names.c.target == str(adapter)).order_by(names.c.name)))

    def set_name(self, name: str, adapter: Digest) -> None:
        with self.engine.begin() as connection:
            _set_name(connection, name, adapter)

    def request_name(self, name: str, recipe: Digest) -> None:
        """Give the result of a recipe this name: now if it is published, else when it will be."""
        with self.engine.begin() as connection:
            insert_if_absent(connection, name_requests, {"recipe": str(recipe), "name": name})
            _grant_names(connection, recipe)

    def forget(self, artefact: Digest) -> bool:
        """Drop an adapter or basis, its names and the results that led to it; whether there was one. Lineage stays as history."""
        with self.engine.begin() as connection:
            connection.execute(delete(names).where(names.c.target == str(artefact)))
            connection.execute(delete(results).where(results.c.target == str(artefact)))
            return any(connection.execute(delete(t).where(t.c.id == str(artefact))).rowcount > 0 for t in (adapters, bases))

    def artefacts(self) -> tuple[Digest, ...]:
        """Every adapter and basis known: the roots of garbage collection."""
        with reading(self.engine) as connection:
            return tuple(Digest.parse(text) for table in (adapters, bases) for text in connection.scalars(select(table.c.id)))


def publish(connection: Connection, recipe: Digest, record: AdapterRecord | BasisRecord, inputs: Sequence[Digest]) -> None:
    """`Index.publish` within a transaction of the caller's.

    A recipe runs again only if its result lost blobs, so a result that differs takes the place of the one before.
    """
    kind = "adapter" if isinstance(record, AdapterRecord) else "basis"
    row = {"recipe": str(recipe), "kind": kind, "target": str(record.id), "created_at": record.created_at}
    _add(connection, record, inputs)
    if not insert_if_absent(connection, results, row):
        differs = update(results).where(results.c.recipe == str(recipe), results.c.target != str(record.id))
        connection.execute(differs.values(row))
    _grant_names(connection, recipe)


def now() -> float:
    """Seconds since the epoch, UTC."""
    return time.time()


def _add(connection: Connection, record: AdapterRecord | BasisRecord, inputs: Sequence[Digest]) -> None:
    if isinstance(record, BasisRecord):
        insert_if_absent(connection, bases, _basis_row(record))
    elif not insert_if_absent(connection, adapters, _row(record)):
        known = connection.scalar(select(adapters.c.restricted).where(adapters.c.id == str(record.id))) or []
        # the same bytes fetched once without a token are public: the least restricted way of getting them counts
        least = [source for source in known if source in record.restricted]
        connection.execute(update(adapters).where(adapters.c.id == str(record.id)).values(restricted=least))
    for position, parent in enumerate(inputs):
        insert_if_absent(connection, lineage, {"child": str(record.id), "position": position, "parent": str(parent)})


def _grant_names(connection: Connection, recipe: Digest) -> None:
    target = connection.scalar(select(results.c.target).where(results.c.recipe == str(recipe)))
    if target is None:
        return
    mine = name_requests.c.recipe == str(recipe)
    for name in connection.scalars(select(name_requests.c.name).where(mine)).all():
        _set_name(connection, name, Digest.parse(target))
    connection.execute(delete(name_requests).where(mine))


def _set_name(connection: Connection, name: str, adapter: Digest) -> None:
    connection.execute(delete(names).where(names.c.name == name))
    connection.execute(insert(names).values(name=name, target=str(adapter)))


def _row(record: AdapterRecord) -> dict[str, Any]:
    return {
        "id": str(record.id),
        "base_model": record.base_model,
        "modules": record.modules,
        "rank": record.rank,
        "size_bytes": record.size_bytes,
        "source_kind": record.source.kind,
        "source": record.source.reference,
        "licence": record.licence,
        "restricted": list(record.restricted),
        "created_at": record.created_at,
    }


def _record(row: Row[Any]) -> AdapterRecord:
    return AdapterRecord(
        id=Digest.parse(row.id),
        base_model=row.base_model,
        modules=row.modules,
        rank=row.rank,
        size_bytes=row.size_bytes,
        source=Source(row.source_kind, row.source),
        licence=row.licence,
        restricted=tuple(row.restricted),
        created_at=row.created_at,
    )


def _basis_row(record: BasisRecord) -> dict[str, Any]:
    lists = {"tasks": list(record.tasks), "restricted": list(record.restricted)}
    return {**asdict(record), "id": str(record.id), **lists}


def _basis_record(row: Row[Any]) -> BasisRecord:
    lists = {"tasks": tuple(row.tasks), "restricted": tuple(row.restricted)}
    return BasisRecord(**{**row._mapping, "id": Digest.parse(row.id), **lists})
