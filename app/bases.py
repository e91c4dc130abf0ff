"""Where the bytes of a basis and deltas meet: encoded modules become a stored basis, a stored basis becomes one task's deltas.

One safetensors file: `<group>.shared.<module>` is read for every task, `<group>.<part>.<module>` for one. A group is what was
encoded together: extending a basis adds one and leaves the others as they are.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from app.adapters import put_tensors, read_tensor_bytes
from merge_algos.codec import Encoded
from merge_algos.formats.spec import Layer
from merge_algos.lowrank import LowRankDelta
from merge_algos.survey import decode
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.lossless import Packing
from storage.manifest import MEDIA_JSON, MEDIA_TENSORS, BasisManifest, canonical_json
from storage.tensor_writer import TensorSpec, layout, write
from storage.tensors import TensorFile, open_tensors

_NOTHING = torch.zeros(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedModule:
    """One module of one group. errors: relative, norms: Frobenius, both per task of the group.  input_bytes: as bf16."""

    module: str
    encoded: Encoded
    errors: tuple[float, ...]
    norms: tuple[float, ...]
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task lies: the group's number and its position in the group."""

    group: int
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class OpenBasis:
    """A stored basis, its file open: reading a task touches the shared parts and its own."""

    manifest: BasisManifest
    contents: Mapping[str, Any]
    tensors: TensorFile

    @classmethod
    def open(cls, blobs: BlobStore, digest: Digest) -> Self:
        """Raises BlobNotFound."""
        manifest = read_basis(blobs, digest)
        with blobs.open(manifest.contents.digest) as stream:
            contents = json.load(stream)
        return cls(manifest, contents, open_tensors(blobs.path(manifest.tensors.digest)))

    @property
    def shapes(self) -> list[dict[str, tuple[int, int]]]:
        """Module -> (d_out, d_in), of each group; none of a group that holds the adapters' own bytes."""
        groups = self.contents["groups"]
        return [{name: (m["shape"][0], m["shape"][1]) for name, m in group["modules"].items()} for group in groups]

    @property
    def layers(self) -> list[tuple[dict[str, tuple[int, int]], dict[str, Layer]]]:
        """The modules of each task with their shapes, and their layers where these are not linear."""
        found = []
        for shapes, group in zip(self.shapes, self.contents["groups"], strict=True):
            for task in group["tasks"]:
                own = {name: shapes[name] for name in task["modules"] if name in shapes}
                found.append((own, {name: Layer.from_json(layer) for name, layer in task.get("layers", {}).items()}))
        return found

    def place(self, task: str) -> Place:
        """The task is one of the manifest's."""
        rest = self.manifest.tasks.index(task)
        for number, group in enumerate(self.contents["groups"]):
            if rest < len(group["tasks"]):
                return Place(number, rest)
            rest -= len(group["tasks"])
        raise AssertionError("a manifest and its contents name the same tasks")

    def group(self, place: Place) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.contents["groups"][place.group]
        return found

    def task(self, place: Place) -> Mapping[str, Any]:
        """What the contents say of a task: its name, what its adapter's config said, the errors of the whole."""
        found: Mapping[str, Any] = self.group(place)["tasks"][place.position]
        return found

    def modules(self, place: Place) -> Mapping[str, Mapping[str, Any]]:
        """Module -> codec, shape, layout, errors, norms, of the task's group."""
        found: Mapping[str, Mapping[str, Any]] = self.group(place)["modules"]
        return found

    def delta(self, place: Place, module: str) -> LowRankDelta:
        """float32 factors; rank 0 where nothing of the task is kept."""
        own = self.modules(place)[module]
        part = own["layout"]["part_of"][place.position]
        halves = (self._bytes(f"{place.group}.shared.{module}"), self._bytes(f"{place.group}.{part}.{module}"))
        return decode(own["codec"], own["layout"], (own["shape"][0], own["shape"][1]), *halves, place.position)

    def _bytes(self, name: str) -> Tensor:
        return read_tensor_bytes(self.tensors, name) if name in self.tensors.header.tensors else _NOTHING


def read_basis(blobs: BlobStore, digest: Digest) -> BasisManifest:
    """Raises BlobNotFound."""
    with blobs.open(digest) as stream:
        return BasisManifest.from_bytes(stream.read())


def put_encoded(blobs: BlobStore, group: int, modules: Sequence[EncodedModule]) -> Descriptor:
    """Some modules of a basis as a shard: their bytes in one safetensors blob, what lies where and what was lost in JSON."""
    tensors = {name: data for m in modules for name, data in _named(group, m) if len(data)}
    specs = [TensorSpec(name, "U8", (len(data),)) for name, data in tensors.items()]
    stored = put_tensors(blobs, specs, tensors.__getitem__)
    document = {"tensors": stored.to_json(), "modules": [_described(m) for m in modules]}
    return blobs.put([canonical_json(document)], media_type=MEDIA_JSON)


def put_joined(blobs: BlobStore, files: Sequence[TensorFile]) -> Descriptor:
    """The tensors of several files, all of different names, as one file."""
    where = {name: file for file in files for name in file.header.tensors}
    specs = [TensorSpec(name, "U8", file.header.tensors[name].shape) for name, file in where.items()]
    return put_tensors(blobs, specs, lambda name: read_tensor_bytes(where[name], name))


def put_packing(blobs: BlobStore, packing: Packing, earlier: Sequence[Descriptor] = ()) -> Descriptor:
    """The adapters' own bytes, packed, after the tensors of earlier files."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(blobs.path(part.digest))) for part in earlier]
        where = {name: file for file in files for name in file.header.tensors}
        specs = [*(TensorSpec(name, "U8", where[name].header.tensors[name].shape) for name in where), *packing.specs]
        chunks = lambda name: where[name].chunks(name) if name in where else packing.chunks(name)  # noqa: E731
        return blobs.put(write(layout(specs), chunks), media_type=MEDIA_TENSORS)


def join_shards(
    blobs: BlobStore, shards: Sequence[Descriptor], earlier: Sequence[Descriptor] = ()
) -> tuple[Descriptor, list[Any]]:
    """One file of all shards' tensors and those of earlier files, and the shards' modules in order. Raises BlobNotFound."""
    documents = [read_encoded(blobs, shard) for shard in shards]
    digests = [*(part.digest for part in earlier), *(Descriptor.from_json(d["tensors"]).digest for d in documents)]
    with ExitStack() as stack:
        stored = put_joined(blobs, [stack.enter_context(open_tensors(blobs.path(digest))) for digest in digests])
    return stored, [module for document in documents for module in document["modules"]]


def read_encoded(blobs: BlobStore, shard: Descriptor) -> Mapping[str, Any]:
    """Raises BlobNotFound."""
    with blobs.open(shard.digest) as stream:
        document: Mapping[str, Any] = json.load(stream)
    return document


def whole_error(modules: Sequence[Mapping[str, Any]], position: int) -> float:
    """Relative error of a whole adapter, from the relative errors and norms of its modules."""
    total = math.fsum(m["norms"][position] ** 2 for m in modules)
    lost = math.fsum((m["errors"][position] * m["norms"][position]) ** 2 for m in modules)
    return math.sqrt(lost / total) if total else 0.0


def _named(group: int, module: EncodedModule) -> Iterator[tuple[str, Tensor]]:
    yield f"{group}.shared.{module.module}", module.encoded.shared
    for number, part in enumerate(module.encoded.parts):
        yield f"{group}.{number}.{module.module}", part


def _described(m: EncodedModule) -> dict[str, Any]:
    return {
        "module": m.module,
        "codec": m.encoded.codec,
        "shape": list(m.encoded.shape),
        "layout": m.encoded.layout,
        "size_bytes": m.encoded.size_bytes,
        "input_bytes": m.input_bytes,
        "errors": list(m.errors),
        "norms": list(m.norms),
    }
