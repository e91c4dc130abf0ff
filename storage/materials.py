"""What merges can be learned from: base models and data files the store holds, where they came from, who may use them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, Table, delete, select, tuple_, update

from storage.database import insert_if_absent, reading
from storage.digest import Digest
from storage.schema import base_models, data_files

Kind = Literal["jsonl", "parquet", "safetensors"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One data file; `id` is that of its bytes. rows: lines or records; classes of a classification head.

    columns: their names, in order; a head's tensors.  restricted: Hub sources whose access is checked again before use.
    source: empty for an upload, else `hub:datasets/org/name@commit#split/<number>-of-<count>`.
    """

    id: Digest
    kind: Kind
    rows: int
    columns: tuple[str, ...]
    size_bytes: int
    restricted: tuple[str, ...]
    source: str
    created_at: float


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """One base model; `id` is its manifest. size_bytes: of all its files.  restricted: as of a data file.

    source: `hub:org/name@commit`, with `#<digest of their names>` where it is some of its tensors; or `dir:<folder>`.
    """

    id: Digest
    source: str
    size_bytes: int
    restricted: tuple[str, ...]
    created_at: float


@dataclass(frozen=True, slots=True)
class Materials:
    """Rows about base models and data files. Every write is one transaction and may be repeated without effect."""

    engine: Engine

    def add_file(self, record: FileRecord) -> None:
        """Record a data file; one already known keeps its row, only freer access is taken over."""
        self._add(data_files, {**asdict(record), "columns": list(record.columns)}, record.id, record.restricted)

    def add_base(self, record: BaseRecord) -> None:
        """Record a base model, as `add_file`."""
        self._add(base_models, asdict(record), record.id, record.restricted)

    def file(self, data: Digest) -> FileRecord | None:
        row = self._first(select(data_files).where(data_files.c.id == str(data)))
        return _file(row) if row else None

    def base(self, base: Digest) -> BaseRecord | None:
        row = self._first(select(base_models).where(base_models.c.id == str(base)))
        return _base(row) if row else None

    def base_from(self, source: str) -> BaseRecord | None:
        """The base model imported from this pinned source, if any."""
        row = self._first(select(base_models).where(base_models.c.source == source))
        return _base(row) if row else None

    def bases_from(self, beginning: str) -> tuple[BaseRecord, ...]:
        """Base models whose source begins so, in the order of their sources."""
        query = select(base_models).where(base_models.c.source.startswith(beginning, autoescape=True))
        with reading(self.engine) as connection:
            return tuple(_base(row) for row in connection.execute(query.order_by(base_models.c.source)))

    def files_from(self, beginning: str) -> tuple[FileRecord, ...]:
        """Data files whose source begins so, in the order of their sources."""
        query = select(data_files).where(data_files.c.source.startswith(beginning, autoescape=True)).order_by(data_files.c.source)
        with reading(self.engine) as connection:
            return tuple(_file(row) for row in connection.execute(query))

    def page_of_files(self, *, limit: int, after: tuple[float, str] | None = None) -> list[FileRecord]:
        """Newest first; `after` is (created_at, id) of the last one seen."""
        query = select(data_files).order_by(data_files.c.created_at.desc(), data_files.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(data_files.c.created_at, data_files.c.id) < tuple_(*after))
        with reading(self.engine) as connection:
            return [_file(row) for row in connection.execute(query)]

    def forget(self, entry: Digest) -> bool:
        """Drop a data file or base model; whether there was one."""
        with self.engine.begin() as connection:
            dropped = [connection.execute(delete(t).where(t.c.id == str(entry))).rowcount for t in (data_files, base_models)]
        return any(dropped)

    def files(self) -> tuple[Digest, ...]:
        """Every data file known: each is one blob that garbage collection keeps."""
        return self._ids(data_files)

    def bases(self) -> tuple[Digest, ...]:
        """Every base model known: manifests that garbage collection keeps, with their parts."""
        return self._ids(base_models)

    def _add(self, table: Table, row: Mapping[str, Any], entry: Digest, restricted: Sequence[str]) -> None:
        with self.engine.begin() as connection:
            if not insert_if_absent(connection, table, {**row, "id": str(entry), "restricted": list(restricted)}):
                _free(connection, table, entry, restricted)

    def _first(self, query: Any) -> Row[Any] | None:
        with reading(self.engine) as connection:
            row: Row[Any] | None = connection.execute(query).first()
        return row

    def _ids(self, table: Table) -> tuple[Digest, ...]:
        with reading(self.engine) as connection:
            return tuple(Digest.parse(text) for text in connection.scalars(select(table.c.id)))


def _free(connection: Connection, table: Table, entry: Digest, restricted: Sequence[str]) -> None:
    this = table.c.id == str(entry)
    known = connection.scalar(select(table.c.restricted).where(this)) or []
    # the same bytes had once without a token are public: the least restricted way of getting them counts
    least = [source for source in known if source in restricted]
    connection.execute(update(table).where(this).values(restricted=least))


def _file(row: Row[Any]) -> FileRecord:
    lists = {"columns": tuple(row.columns), "restricted": tuple(row.restricted)}
    return FileRecord(**{**row._mapping, "id": Digest.parse(row.id), **lists})


def _base(row: Row[Any]) -> BaseRecord:
    return BaseRecord(**{**row._mapping, "id": Digest.parse(row.id), "restricted": tuple(row.restricted)})
