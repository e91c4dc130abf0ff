"""Reading safetensors files that strangers wrote: the header is checked here before any library sees the file.

The safetensors library itself accepts names that stand twice (the last one wins), `../` and NUL in names, 5000
dimensions and headers that cost ten times their size in memory. Reading is by position, not by memory map: the copy is made
by the kernel, while other threads compute, and a file that somebody cuts short is an error, not the end of the process.
Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Self

from storage.errors import InvalidTensorFile

MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_NAME_CHARS = 512
PIECE_BYTES = 1024 * 1024
LENGTH_BYTES = 8  # the file opens with the header's length, little-endian

# Bytes per element. The order is meaning: safetensors 0.8 lays tensors out by it, and the writer relies on that.
# Types narrower than a byte (F4, F6_*) are left out: no adapter uses them and torch cannot compute with them.
ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
        **dict.fromkeys(("F32", "U32", "I32"), 4),
        **dict.fromkeys(("BF16", "F16", "U16", "I16"), 2),
        **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
    }
)

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_MAX_INT = 2**63 - 1  # what any reader downstream can hold


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `start` and `end` are byte offsets relative to the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds: `tensors` in file order, `metadata`, and where in the file the data section starts."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


class _Descriptor:
    """A file descriptor that is closed by hand, or with the last that could read from it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    __del__ = close


@dataclass(frozen=True, slots=True, eq=False)
class TensorFile:
    """A checked file, open for reading: by position, so any number of threads may read at once. Close it after the last."""

    header: Header
    descriptor: _Descriptor

    def read_into(self, name: str, buffer: bytearray | memoryview, start: int = 0) -> None:
        """Fill the buffer with the tensor's bytes from `start` on. Raises InvalidTensorFile if the file ends before that."""
        info, rest = self.header.tensors[name], memoryview(buffer).cast("B")
        at = self.header.data_start + info.start + start
        assert 0 <= start <= info.size_bytes - len(rest), f"{name} has {info.size_bytes} bytes"
        while rest:  # one call gives 2 GiB at most
            got = os.preadv(self.descriptor.number, [rest], at)
            if not got:
                raise InvalidTensorFile(f"the file ends {len(rest)} bytes early", name)
            rest, at = rest[got:], at + got

    def read(self, name: str) -> bytearray:
        """All of the tensor's bytes."""
        return self._part(name, 0, self.header.tensors[name].size_bytes)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The same, in pieces of at most PIECE_BYTES."""
        size_bytes = self.header.tensors[name].size_bytes
        for start in range(0, size_bytes, PIECE_BYTES):
            yield self._part(name, start, min(start + PIECE_BYTES, size_bytes))

    def mapped(self, name: str) -> memoryview:
        """All of them, read-only and uncopied, for who picks a few from everywhere. The map goes with the last view of it."""
        info = self.header.tensors[name]
        at = self.header.data_start + info.start
        first = at - at % mmap.ALLOCATIONGRANULARITY
        length = at - first + info.size_bytes
        return memoryview(mmap.mmap(self.descriptor.number, length, access=mmap.ACCESS_READ, offset=first))[at - first :]

    def close(self) -> None:
        self.descriptor.close()

    def _part(self, name: str, start: int, stop: int) -> bytearray:
        part = bytearray(stop - start)
        self.read_into(name, part, start)
        return part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: Path) -> TensorFile:
    """Check the file's header and keep it open. Raises InvalidTensorFile."""
    with path.open("rb") as stream:
        header = read_header(stream, os.fstat(stream.fileno()).st_size)
        return TensorFile(header, _Descriptor(os.dup(stream.fileno())))


def read_header(stream: BinaryIO, size_bytes: int) -> Header:
    """Read and check the header of a file of `size_bytes` bytes, from its first byte; the data section is not read.

    Differs from the library: everything it tolerates beyond the written format is refused, and names must be plain.
    Raises InvalidTensorFile, and nothing else, whatever the bytes are.
    """
    raw = _read_raw(stream, size_bytes)
    entries = _parse(raw)
    metadata = _metadata(entries.pop(_METADATA, {}))
    if len(entries) > MAX_TENSORS:
        raise InvalidTensorFile(f"{len(entries)} tensors; at most {MAX_TENSORS} are read")
    data_start = LENGTH_BYTES + len(raw)
    tensors = _in_file_order((_tensor(name, entry) for name, entry in entries.items()), size_bytes - data_start)
    return Header(tensors, metadata, data_start)


def check_name(name: str) -> None:
    """Raises InvalidTensorFile unless `name` is plain: it shows on a screen and cannot be taken for a path."""
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise InvalidTensorFile(f"a name of {len(name)} characters; 1 to {MAX_NAME_CHARS} are allowed", name)
    # isprintable refuses NUL, control characters and lone surrogates in one go
    if not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        raise InvalidTensorFile("a name that is not plain: it holds '/', '\\', '..' or an unprintable character", name)


def tensor_size(dtype: object, shape: object, *, tensor: str) -> int:
    """Bytes of a tensor of that type and shape. Raises InvalidTensorFile for anything but a known type and a sane shape."""
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        # only text is shown: the repr of hostile nesting may be megabytes, or fail
        shown = repr(dtype[:100]) if isinstance(dtype, str) else type(dtype).__name__
        raise InvalidTensorFile(f"dtype {shown} is not one of {', '.join(ITEM_BYTES)}", tensor)
    dims = _naturals("shape", shape, tensor=tensor)
    if len(dims) > MAX_DIMS:
        raise InvalidTensorFile(f"{len(dims)} dimensions; at most {MAX_DIMS} are read", tensor)
    # Zeros stay out of the bound: a reader that multiplies in 64 bits overflows before it meets them.
    bound = ITEM_BYTES[dtype] * math.prod(dim for dim in dims if dim)
    if bound > _MAX_INT:
        raise InvalidTensorFile("a shape whose size overflows 64 bits", tensor)
    return 0 if 0 in dims else bound


def _read_raw(stream: BinaryIO, size_bytes: int) -> bytes:
    prefix = stream.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise InvalidTensorFile(f"{len(prefix)} bytes are no room for the header's length")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidTensorFile(f"a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if LENGTH_BYTES + length > size_bytes:
        raise InvalidTensorFile(f"a header of {length} bytes does not fit in a file of {size_bytes}")
    raw = stream.read(length)
    if len(raw) < length:
        raise InvalidTensorFile(f"the file ends inside its header, after {len(raw)} of {length} bytes")
    return raw


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise InvalidTensorFile("the header does not open with '{'")
    # A tensor needs three brackets. Millions of empty lists would cost 25 times the header's size in memory.
    if raw.count(b"[") + raw.count(b"{") > 4 * MAX_TENSORS:
        raise InvalidTensorFile(f"a header of more than {4 * MAX_TENSORS} lists and objects")
    try:
        entries: dict[str, Any] = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidTensorFile(f"the header is not JSON in UTF-8: {error}") from error
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise InvalidTensorFile(f"the key {key[:100]!r} stands twice in the header")
    return unique


def _metadata(entry: object) -> Mapping[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InvalidTensorFile(f"{_METADATA} is not an object of strings")
    try:
        "".join((*entry, *entry.values())).encode()
    except UnicodeEncodeError as error:  # a lone surrogate would fail far from here, where the text is sent on
        raise InvalidTensorFile(f"{_METADATA} holds text that is not Unicode") from error
    return MappingProxyType(entry)


def _tensor(name: str, entry: object) -> TensorInfo:
    check_name(name)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise InvalidTensorFile("an entry that does not hold exactly dtype, shape and data_offsets", name)
    size_bytes = tensor_size(entry["dtype"], entry["shape"], tensor=name)
    offsets = _naturals("data_offsets", entry["data_offsets"], tensor=name)
    if len(offsets) != 2 or offsets[1] - offsets[0] != size_bytes:
        raise InvalidTensorFile(f"data_offsets {offsets[:3]} do not span its {size_bytes} bytes", name)
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), offsets[0], offsets[1])


def _naturals(key: str, value: object, *, tensor: str) -> Sequence[int]:
    # type(), not isinstance(): true and false are integers to isinstance
    if not isinstance(value, list | tuple) or not all(type(item) is int and 0 <= item <= _MAX_INT for item in value):
        raise InvalidTensorFile(f"{key} is not a list of whole numbers from 0 to {_MAX_INT}", tensor)
    return value


def _in_file_order(infos: Iterable[TensorInfo], data_bytes: int) -> Mapping[str, TensorInfo]:
    ordered = sorted(infos, key=lambda info: (info.start, info.end))
    at = 0
    for info in ordered:
        if info.start != at:
            raise InvalidTensorFile(f"its bytes start at {info.start} where {at} is due: a hole or an overlap", info.name)
        at = info.end
    if at != data_bytes:
        raise InvalidTensorFile(f"the tensors take {at} bytes, but {data_bytes} follow the header")
    return MappingProxyType({info.name: info for info in ordered})
