"""Several adapters inside one safetensors file, from which each comes back digest for digest, header included.

A stored merge can so carry what it was made of. Whatever the originals share is kept once: configs, headers and each
tensor's bytes are told apart by their sha256 alone. Float bytes are split into planes, one per byte of an element, since
the plane of sign and exponent is far from random and shrinks, while those of the mantissa are noise and stay as they are.

A layout is JSON. A part is a run of original bytes, kept in the packed tensor `<prefix>.blob.<its index>`:
    prefix  as given to `pack`
    parts   per part its blocks in order, each [size_bytes, stored plane 0, plane 1, ...] in bytes; a plane is deflated
            exactly if it is stored in fewer than size_bytes / planes bytes; an empty part has no blocks and no tensor
    tasks   per original {"config": file, "weights": file}, where a file is a Descriptor and "parts": indices whose
            bytes, one after the other, are that file
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage.blobs import Chunk
from storage.digest import Descriptor, Digest
from storage.errors import DigestMismatch, InvalidTensorFile
from storage.manifest import MEDIA_JSON, MEDIA_TENSORS
from storage.tensor_writer import TensorSpec
from storage.tensors import ITEM_BYTES, open_tensors

BLOCK_BYTES = 4 * 1024 * 1024  # compressed on its own, so that memory stays flat for a tensor of any size
_SAMPLE_BYTES = 1024  # enough for noise to look like noise: of 1024 random bytes, none in 300 draws shrank

Blocks = Callable[[], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Original:
    """An adapter to be packed. weights: a safetensors file that does not change while it is packed, such as a blob."""

    config: bytes
    weights: Path


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A run of original bytes. blocks: reads it anew. planes: bytes per element; 1 for text. strategy: zlib's."""

    digest: Digest
    size_bytes: int
    blocks: Blocks
    planes: int
    strategy: int

    def stored(self) -> Iterator[tuple[int, tuple[bytes, ...]]]:
        """Per block its size in bytes and its planes as stored; the same bytes at every call."""
        for block in self.blocks():
            yield len(block), _split(block, self.planes, self.strategy)


@dataclass(frozen=True, slots=True)
class _Packed:
    """One original file, taken apart."""

    descriptor: Descriptor
    parts: tuple[_Part, ...]

    def to_json(self, index: Mapping[Digest, int]) -> dict[str, Any]:
        return self.descriptor.to_json() | {"parts": [index[part.digest] for part in self.parts]}


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """What `pack` found: the tensors to be written, how to read them back, and their bytes on demand."""

    specs: tuple[TensorSpec, ...]
    layout: Mapping[str, Any]
    parts: Mapping[str, _Part]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of that packed tensor. Compressed again at every call: kept, they would fill the memory."""
        for _, planes in self.parts[name].stored():
            yield from planes


def pack(originals: Sequence[Original], prefix: str = "0") -> Packing:
    """Plan one file's tensors for all the originals; at most a few blocks are in memory at a time.

    The specs are U8, 1-D and named `<prefix>.blob.<n>`; equal originals in equal order give equal specs and bytes.
    Raises InvalidTensorFile for weights that `open_tensors` refuses, and for a prefix that is no plain name.
    """
    tasks = [{"config": _pack_config(each.config), "weights": _pack_weights(each.weights)} for each in originals]
    distinct = {part.digest: part for task in tasks for file in task.values() for part in file.parts}
    index = {digest: n for n, digest in enumerate(distinct)}
    layout = {
        "prefix": prefix,
        "parts": [[[size, *map(len, planes)] for size, planes in part.stored()] for part in distinct.values()],
        "tasks": [{key: file.to_json(index) for key, file in task.items()} for task in tasks],
    }
    parts = {_name(layout, index[part.digest]): part for part in distinct.values() if part.size_bytes}
    return Packing(_specs(layout), layout, parts)


def unpack(layout: Mapping[str, Any], task: int, read: Callable[[str], Chunk]) -> tuple[bytes, Iterator[bytes]]:
    """The config of original number `task`, and the bytes of its weights file in order, in chunks of any size.

    read: gives the bytes of a packed tensor. It is called for the parts of that task alone, when their turn comes; a
    part is done with when the next is asked for.
    Raises InvalidTensorFile if what it gave does not fit the layout, DigestMismatch, after the last chunk, if the
    bytes are not the original's. A reader that stops at the error, as BlobStore.put does, never keeps wrong bytes.
    """
    files = layout["tasks"][task]
    return b"".join(_restored(layout, files["config"], read)), _restored(layout, files["weights"], read)


def _pack_config(config: bytes) -> _Packed:
    descriptor = Descriptor(Digest.of(config), len(config), MEDIA_JSON)
    part = _Part(descriptor.digest, len(config), partial(_cut, config), 1, zlib.Z_DEFAULT_STRATEGY)
    return _Packed(descriptor, (part,))


def _pack_weights(path: Path) -> _Packed:
    with open_tensors(path) as file:
        header = file.header
    # A tensor holds no repeated phrases, only repeated bytes: runs and a Huffman code find all there is, in less time.
    parts = [_part(path, 0, header.data_start, planes=1, strategy=zlib.Z_DEFAULT_STRATEGY)]
    for info in header.tensors.values():
        start, planes = header.data_start + info.start, ITEM_BYTES[info.dtype]
        parts.append(_part(path, start, info.size_bytes, planes=planes, strategy=zlib.Z_RLE))
    size_bytes = sum(part.size_bytes for part in parts)
    return _Packed(Descriptor(_digest(_read(path, 0, size_bytes)), size_bytes, MEDIA_TENSORS), tuple(parts))


def _part(path: Path, start: int, size_bytes: int, *, planes: int, strategy: int) -> _Part:
    blocks = partial(_read, path, start, size_bytes)
    return _Part(_digest(blocks()), size_bytes, blocks, planes, strategy)


def _digest(blocks: Iterable[bytes]) -> Digest:
    hasher = hashlib.sha256()
    for block in blocks:
        hasher.update(block)
    return Digest(hasher.hexdigest())


def _cut(data: bytes) -> Iterator[bytes]:
    return (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))


def _read(path: Path, start: int, size_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        for at in range(0, size_bytes, BLOCK_BYTES):
            yield stream.read(min(BLOCK_BYTES, size_bytes - at))


def _name(layout: Mapping[str, Any], part: int) -> str:
    return f"{layout['prefix']}.blob.{part}"


def _specs(layout: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    sizes = ((n, sum(sum(stored) for _, *stored in blocks)) for n, blocks in enumerate(layout["parts"]))
    return tuple(TensorSpec(_name(layout, n), "U8", (size,)) for n, size in sizes if size)


def _split(block: bytes, planes: int, strategy: int) -> tuple[bytes, ...]:
    """The block's planes, each deflated if that makes it smaller; the block as it is if that helps with none."""
    if planes == 1:
        return (_deflated(block, strategy),)
    stored = tuple(_deflated(block[plane::planes], strategy) for plane in range(planes))
    return stored if sum(map(len, stored)) < len(block) else (block,)


def _deflated(plane: bytes, strategy: int) -> bytes:
    # A sample from all over the plane: noise is the common case, and a full attempt at it would cost the most time.
    step = len(plane) // _SAMPLE_BYTES
    if step > 1 and not _shrinks(plane[::step]):
        return plane
    return min(plane, _deflate(plane, strategy), key=len)


def _shrinks(sample: bytes) -> bool:
    return len(_deflate(sample, zlib.Z_HUFFMAN_ONLY)) < len(sample)


def _deflate(data: bytes, strategy: int) -> bytes:
    compressor = zlib.compressobj(strategy=strategy)
    return compressor.compress(data) + compressor.flush()


def _restored(layout: Mapping[str, Any], file: Mapping[str, Any], read: Callable[[str], Chunk]) -> Iterator[bytes]:
    """Raises InvalidTensorFile as soon as a part does not fit, DigestMismatch at the end."""
    whole = hashlib.sha256()
    for part in file["parts"]:
        for block in _joined(layout["parts"][part], _name(layout, part), read):
            whole.update(block)
            yield block
    expected, got = Digest.parse(file["digest"]), Digest(whole.hexdigest())
    if got != expected:
        raise DigestMismatch(str(expected), str(got))


def _joined(blocks: Iterable[Sequence[int]], name: str, read: Callable[[str], Chunk]) -> Iterator[bytes]:
    rest = memoryview(read(name) if blocks else b"")
    for size_bytes, *stored in blocks:
        block, planes = bytearray(size_bytes), len(stored)
        for plane, length in enumerate(stored):
            block[plane::planes] = _inflated(rest[:length], size_bytes // planes, name)
            rest = rest[length:]
        yield bytes(block)


def _inflated(stored: memoryview, size_bytes: int, name: str) -> bytes | memoryview:
    """A plane of `size_bytes` bytes. Raises InvalidTensorFile if that is not what comes out."""
    plane: bytes | memoryview = stored
    if len(stored) < size_bytes:
        try:
            plane = zlib.decompressobj().decompress(stored, size_bytes + 1)  # bounded: a damaged stream may be a bomb
        except zlib.error as error:
            raise InvalidTensorFile(f"packed bytes that do not inflate: {error}", name) from error
    if len(plane) != size_bytes:
        raise InvalidTensorFile(f"a plane of {len(plane)} bytes where {size_bytes} are due", name)
    return plane
