"""What a data file is, told by its bytes and never by its name: JSONL, Parquet, or a classification head in safetensors."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.adapters import TORCH_DTYPES, read_tensor
from app.errors import InvalidData, MissingColumn, NotInstalled
from merge_algos.formats.spec import check_finite
from storage.materials import Kind
from storage.tensors import LENGTH_BYTES, TensorFile, open_tensors

_PARQUET_MAGIC = b"PAR1"
_MAX_LINE_BYTES = 16 * 1024 * 1024
_MAX_ROWS = 10_000_000
_MAX_COLUMNS = 1000
_MAX_NAME_CHARS = 200
_MAX_UNPACKED_BYTES = 16 * 1024**3  # a Parquet file says how large its columns are before they are unpacked
_BATCH_ROWS = 1024
_HEAD_TENSORS = {"weight", "bias"}


@dataclass(frozen=True, slots=True)
class Described:
    """rows: of a head its classes.  columns: names in order; a head's tensors."""

    kind: Kind
    rows: int
    columns: tuple[str, ...]


def recognise(path: Path) -> Described:
    """What the file holds, all of it read once. Raises InvalidData, InvalidTensorFile, NonFiniteTensor or NotInstalled."""
    kind = kind_of(path)
    rows, columns = _DESCRIBE[kind](path)
    if rows == 0:
        raise InvalidData("it holds no rows")
    return Described(kind, rows, columns)


def kind_of(path: Path) -> Kind:
    """By its first bytes. No text has zeros where a safetensors file has the upper half of its header's length."""
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
    if start.startswith(_PARQUET_MAGIC):
        return "parquet"
    return "safetensors" if len(start) == LENGTH_BYTES and start.endswith(b"\0\0\0") else "jsonl"


def read(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Column -> its value in every row. Raises MissingColumn, and what `recognise` raises."""
    match kind_of(path):
        case "parquet":
            return _read_parquet(path, columns)
        case "jsonl":
            return _read_jsonl(path, columns)
    raise InvalidData("a classification head has no rows to read")


def _describe_jsonl(path: Path) -> tuple[int, tuple[str, ...]]:
    rows, columns = 0, dict[str, None]()
    for rows, row in _lines(path):
        columns |= dict.fromkeys(row)
        _check_columns(tuple(columns), line=rows)
    return rows, tuple(columns)


def _read_jsonl(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {column: [] for column in columns}
    for line, row in _lines(path):
        for column, values in found.items():
            if column not in row:
                raise MissingColumn(column, tuple(row), line)
            values.append(row[column])
    return found


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if number > _MAX_ROWS:
                raise InvalidData(f"more than {_MAX_ROWS} rows", number)
            yield number, _row(raw, number)


def _row(raw: bytes, line: int) -> dict[str, Any]:
    if len(raw) > _MAX_LINE_BYTES:
        raise InvalidData(f"a line of more than {_MAX_LINE_BYTES} bytes", line)
    try:
        text = raw.decode("utf-8")
        if not text.strip():
            raise InvalidData("an empty line where a JSON object is due", line)
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:  # half of an escaped pair is no text, and would fail far from here
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError:
        raise InvalidData("not text in UTF-8", line) from None
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"not JSON: {str(error)[:200]}", line) from None
    if not isinstance(row, dict):
        raise InvalidData("not a JSON object; every line of a JSONL file is one", line)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return unique


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _describe_parquet(path: Path) -> tuple[int, tuple[str, ...]]:
    with _parquet(path) as file:
        columns = tuple(file.schema_arrow.names)
        _check_columns(columns)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            batch.validate(full=True)
        return file.metadata.num_rows, columns


def _read_parquet(path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    with _parquet(path) as file:
        known = tuple(file.schema_arrow.names)
        for column in columns:
            if column not in known:
                raise MissingColumn(column, known)
        table = file.read(columns=list(columns))
        return {column: table.column(column).to_pylist() for column in columns}


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open file, small enough to be unpacked. Raises InvalidData for whatever pyarrow refuses meanwhile."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise NotInstalled("pyarrow", "learn") from None
    try:
        with parquet.ParquetFile(path) as file:
            unpacked_bytes = sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups))
            if file.metadata.num_rows > _MAX_ROWS or unpacked_bytes > _MAX_UNPACKED_BYTES:
                raise InvalidData(f"more than {_MAX_ROWS} rows or {_MAX_UNPACKED_BYTES} bytes unpacked")
            yield file
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InvalidData(f"pyarrow cannot read it as Parquet: {str(error)[:200]}") from None


def _describe_head(path: Path) -> tuple[int, tuple[str, ...]]:
    with open_tensors(path) as tensors:
        shapes = {name: info.shape for name, info in tensors.header.tensors.items()}
        if not {"weight"} <= shapes.keys() <= _HEAD_TENSORS:
            raise InvalidData("a classification head holds the tensor weight, and may hold bias, and nothing else")
        classes = _classes(shapes)
        _check_values(tensors)
    return classes, tuple(sorted(shapes, reverse=True))


def _classes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    weight = shapes["weight"]
    if len(weight) != 2 or 0 in weight:
        raise InvalidData(f"weight has shape {weight} where (classes, features) is due")
    if shapes.get("bias", weight[:1]) != weight[:1]:
        raise InvalidData(f"bias has shape {shapes['bias']} where {weight[:1]} is due")
    return weight[0]


def _check_values(tensors: TensorFile) -> None:
    for name, info in tensors.header.tensors.items():
        if info.dtype not in TORCH_DTYPES:
            raise InvalidData(f"{name} is of type {info.dtype}; one of {', '.join(TORCH_DTYPES)} is due")
        check_finite(name, read_tensor(tensors, name))


def _check_columns(columns: Sequence[str], *, line: int | None = None) -> None:
    if len(columns) > _MAX_COLUMNS or len(set(columns)) < len(columns):
        raise InvalidData(f"more than {_MAX_COLUMNS} columns, or two of one name", line)
    for column in columns:
        if not column.isprintable() or not 0 < len(column) <= _MAX_NAME_CHARS:
            raise InvalidData(f"a column's name is not 1 to {_MAX_NAME_CHARS} printable characters", line)


_DESCRIBE: Mapping[Kind, Callable[[Path], tuple[int, tuple[str, ...]]]] = {
    "jsonl": _describe_jsonl,
    "parquet": _describe_parquet,
    "safetensors": _describe_head,
}
