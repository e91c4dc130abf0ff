"""Writing safetensors files that are the same bytes for the same tensors, streamed so that memory stays flat.

The bytes are those of `safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})`, version 0.8. That call
wants every tensor in memory at once; here each one is asked for when its turn comes. One metadata key, because the
library's order of several is random from run to run, and a digest needs bytes that never change.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from storage.blobs import Chunk
from storage.errors import InvalidTensorFile
from storage.tensors import ITEM_BYTES, LENGTH_BYTES, PIECE_BYTES, TensorInfo, check_name, read_header, tensor_size

_ALIGNMENT_BYTES = 8  # the data section starts at a multiple of it
_RANK = {dtype: rank for rank, dtype in enumerate(ITEM_BYTES)}
_METADATA_ENTRY = '"__metadata__":{"format":"pt"}'


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `dtype` in safetensors' spelling. Raises InvalidTensorFile for what no reader should meet."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_name(self.name)
        tensor_size(self.dtype, self.shape, tensor=self.name)

    @property
    def size_bytes(self) -> int:
        return tensor_size(self.dtype, self.shape, tensor=self.name)


@dataclass(frozen=True, slots=True)
class Layout:
    """A file before its tensors: `header` is every byte up to the data section, `tensors` are in file order."""

    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(info.size_bytes for info in self.tensors)


def layout(specs: Sequence[TensorSpec]) -> Layout:
    """Place the tensors, in an order that depends on them alone: by type as ITEM_BYTES lists them, then by name.

    Raises InvalidTensorFile if two share a name, or if there are more than our own reader accepts.
    """
    ordered = sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name))
    entries, end = [_METADATA_ENTRY], 0
    for spec in ordered:
        start, end = end, end + spec.size_bytes
        entries.append(_entry(spec, start, end))
    header = _framed("{" + ",".join(entries) + "}")
    # What we write passes our own door; that is also where a repeated name is found.
    checked = read_header(io.BytesIO(header), len(header) + end)
    return Layout(header, tuple(checked.tensors.values()))


def write(plan: Layout, tensor_bytes: Callable[[str], Iterable[Chunk]]) -> Iterator[Chunk]:
    """The file's bytes in order, in pieces of at most PIECE_BYTES after the header, for BlobStore.put.

    A piece is a view of the bytes that were given.

    tensor_bytes: called once per tensor, in file order, when its turn comes; gives the row-major little-endian bytes
    in chunks of any size. Raises InvalidTensorFile as soon as a tensor has too many bytes, or ends with too few.
    """
    yield plan.header
    for info in plan.tensors:
        written = 0
        for piece in _pieces(tensor_bytes(info.name)):
            written += len(piece)
            if written > info.size_bytes:
                raise InvalidTensorFile(f"{info.size_bytes} bytes were announced, but more were given", info.name)
            yield piece
        if written < info.size_bytes:
            raise InvalidTensorFile(f"{info.size_bytes} bytes were announced, but {written} were given", info.name)


def _entry(spec: TensorSpec, start: int, end: int) -> str:
    fields = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    return f"{_json(spec.name)}:{_json(fields)}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _framed(text: str) -> bytes:
    raw = text.encode()
    raw += b" " * (-len(raw) % _ALIGNMENT_BYTES)
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def _pieces(chunks: Iterable[Chunk]) -> Iterator[memoryview]:
    for chunk in chunks:
        if memoryview(chunk).nbytes == 0:  # cast() refuses a shape with a zero in it
            continue
        flat = memoryview(chunk).cast("B")
        for start in range(0, len(flat), PIECE_BYTES):
            yield flat[start : start + PIECE_BYTES]
