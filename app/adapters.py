"""Where bytes and deltas meet, the only such place: a stored adapter becomes deltas, merged deltas become a stored adapter."""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_algos import formats
from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.spec import AdapterSpec, Layer, ModuleSpec, check_finite
from merge_algos.formats.wrapped import read_alpha
from merge_algos.formats.written import factor_names, joined, written
from merge_algos.lowrank import LowRankDelta
from merge_algos.merge import ModuleReport, ModuleResult
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.manifest import MEDIA_JSON, MEDIA_TENSORS, AdapterManifest, canonical_json
from storage.tensor_writer import TensorSpec, layout, write
from storage.tensors import TensorFile, open_tensors

K = TypeVar("K")
V = TypeVar("V")

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
_INDEX_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
)
_SPELLING = {dtype: spelling for spelling, dtype in TORCH_DTYPES.items()}
_MAX_CONFIG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class OpenAdapter:
    """A stored adapter, its weights file open: `delta` reads one module."""

    manifest: AdapterManifest
    spec: AdapterSpec
    modules: Mapping[str, ModuleSpec]
    tensors: TensorFile

    @classmethod
    def open(cls, blobs: BlobStore, digest: Digest) -> Self:
        """Raises BlobNotFound, and what `check` raises."""
        manifest = read_manifest(blobs, digest)
        tensors = open_tensors(blobs.path(manifest.weights.digest))
        # the manifest knows the base model of a file that names none
        spec = replace(_describe(blobs, manifest.config, tensors), base_model=manifest.base_model)
        return cls(manifest, spec, {module.name: module for module in spec.modules}, tensors)

    def delta(self, name: str, shape: tuple[int, int], device: str) -> LowRankDelta:
        """The module's delta on the device, scaling folded in; rank 0 where the adapter does not target it."""
        if name not in self.modules:
            return LowRankDelta.zero(*shape).to(torch.float32, device)
        module = formats.completed(self.modules[name], shape)
        return formats.load(module, self.parts(module, device))

    def parts(self, module: ModuleSpec, device: str) -> dict[str, Tensor]:
        """The module's tensors on the device, by role, each cut to the module's slices."""
        by_role = {role: self._read(tensor, module.slices.get(role)) for role, tensor in module.tensors.items()}
        return {role: tensor.to(device) for role, tensor in by_role.items()}

    def described(self, spec: AdapterSpec) -> "OpenAdapter":
        """The same file, read as this spec says."""
        return replace(self, spec=spec, modules={module.name: module for module in spec.modules})

    def _read(self, name: str, slices: tuple[slice, ...] | None) -> Tensor:
        return read_tensor(self.tensors, name) if slices is None else read_slices(self.tensors, name, slices)

    @property
    def dtypes(self) -> frozenset[str]:
        """Of the tensors that are no indices, no alpha and no extra."""
        others = formats.alpha_tensors(self.spec) | {extra.tensor for extra in self.spec.extras}
        infos = (info for info in self.tensors.header.tensors.values() if info.name not in others)
        return frozenset(info.dtype for info in infos if info.dtype in TORCH_DTYPES)


def read_manifest(blobs: BlobStore, digest: Digest) -> AdapterManifest:
    """Raises BlobNotFound."""
    with blobs.open(digest) as stream:
        return AdapterManifest.from_bytes(stream.read())


def read_json(blobs: BlobStore, digest: Digest) -> Any:
    """A JSON blob of ours. Raises BlobNotFound."""
    with blobs.open(digest) as stream:
        return json.load(stream)


def check(blobs: BlobStore, config: Descriptor | None, weights: Descriptor) -> AdapterSpec:
    """Read a whole adapter once before it is accepted. config: None of a single file.

    Raises InvalidTensorFile, UnsupportedAdapter, ShapeMismatch, InvalidParams, BadPattern or NonFiniteTensor, naming
    the tensor, module or flag.
    """
    with open_tensors(blobs.path(weights.digest)) as tensors:
        spec = _describe(blobs, config, tensors)
        alphas = formats.alpha_tensors(spec)
        for name in tensors.header.tensors:
            tensor = read_tensor(tensors, name)
            check_finite(name, tensor)
            if name in alphas:
                read_alpha(name, tensor)
        if formats.index_tensors(spec):  # indices are small, and what they point at is known only when they are read
            for module in (module for module in spec.modules if not module.needs_base):
                formats.load(module, {role: read_tensor(tensors, name) for role, name in module.tensors.items()})
    return spec


def agreed(values: Sequence[str | None]) -> str | None:
    """The value that all inputs share, or none."""
    return values[0] if len(set(values)) == 1 else None


def widest(dtypes: Iterable[str]) -> torch.dtype:
    """What dtype `auto` means: the narrowest type that holds every input's values."""
    distinct = set(dtypes)
    if distinct in ({"BF16"}, {"F16"}):
        return TORCH_DTYPES[distinct.pop()]
    return torch.float32


def spelling(dtype: torch.dtype) -> str:
    """As safetensors names it."""
    return _SPELLING[dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """Some merged modules: their factors in one safetensors blob, and what each of them cost."""

    tensors: Descriptor
    reports: tuple[ModuleReport, ...]


def put_shard(blobs: BlobStore, results: Sequence[ModuleResult]) -> Descriptor:
    """Store factors as they are under their PEFT names, and the reports beside them."""
    tensors = {name: half for r in results for name, half in _factors(r.report.module, r.delta)}
    specs = [TensorSpec(name, _SPELLING[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    stored = put_tensors(blobs, specs, tensors.__getitem__)
    document = {"tensors": stored.to_json(), "modules": [asdict(r.report) for r in results]}
    return blobs.put([canonical_json(document)], media_type=MEDIA_JSON)


def read_shard(blobs: BlobStore, shard: Descriptor) -> Shard:
    """Raises BlobNotFound."""
    with blobs.open(shard.digest) as stream:
        document = json.load(stream)
    return Shard(Descriptor.from_json(document["tensors"]), tuple(ModuleReport(**m) for m in document["modules"]))


def describe_shard(blobs: BlobStore, shard: Descriptor) -> tuple[Descriptor, tuple[str, ...]]:
    """The tensors and the modules of a shard, of an adapter or of a basis. Raises BlobNotFound."""
    with blobs.open(shard.digest) as stream:
        document = json.load(stream)
    return Descriptor.from_json(document["tensors"]), tuple(m["module"] for m in document["modules"])


def put_tensors(blobs: BlobStore, specs: Sequence[TensorSpec], tensor: Callable[[str], Tensor]) -> Descriptor:
    """Store a safetensors file whose tensors are asked for one at a time, so that memory stays flat.

    tensor: called by a thread of its own, for the next tensor while the last one is hashed and written.
    """
    plan = layout(specs)
    with closing(_ahead(lambda info: _bytes(tensor(info.name)), plan.tensors)) as ready:
        return blobs.put(write(plan, lambda _: [next(ready)]), media_type=MEDIA_TENSORS)


def read_tensor(tensors: TensorFile, name: str) -> Tensor:
    """One tensor, in memory of its own."""
    info = tensors.header.tensors[name]
    return read_tensor_bytes(tensors, name).view(_torch_dtype(info.dtype)).reshape(info.shape)


def read_slices(tensors: TensorFile, name: str, slices: tuple[slice, ...]) -> Tensor:
    """A part of a tensor, in memory of its own. Mapped: one of many experts' columns are a few bytes of every row."""
    info, dtype = tensors.header.tensors[name], _torch_dtype(tensors.header.tensors[name].dtype)
    whole = np.frombuffer(tensors.mapped(name), np.uint8).reshape(*info.shape, dtype.itemsize)
    return torch.from_numpy(np.array(whole[slices])).view(dtype)[..., 0]


def _torch_dtype(spelling: str) -> torch.dtype:
    return TORCH_DTYPES.get(spelling) or _INDEX_DTYPES[spelling]


def read_tensor_bytes(tensors: TensorFile, name: str) -> Tensor:
    """The same as 1-D uint8, whatever its type."""
    return _read(tensors, name, 0, tensors.header.tensors[name].size_bytes)


def read_rows(tensors: TensorFile, name: str, start: int, stop: int, d_in: int) -> Tensor:
    """Some rows of a tensor, read as a matrix of d_in columns."""
    dtype = _torch_dtype(tensors.header.tensors[name].dtype)
    row_bytes = d_in * dtype.itemsize
    return _read(tensors, name, start * row_bytes, stop * row_bytes).view(dtype).reshape(stop - start, d_in)


def _read(tensors: TensorFile, name: str, start: int, stop: int) -> Tensor:
    data = torch.empty(stop - start, dtype=torch.uint8)
    tensors.read_into(name, data.numpy().data, start)
    return data


def put_adapter(
    blobs: BlobStore,
    shapes: Mapping[str, tuple[int, int]],
    layers: Mapping[str, Layer],
    ranks: Mapping[str, int],
    factor: Callable[[str], Tensor],
    dtype: Callable[[str], str],
    beside: Mapping[TensorSpec, Callable[[], Tensor]] = MappingProxyType({}),
) -> Descriptor:
    """Store modules as PEFT lays them out, each padded with zeros to its rank.

    factor: the plain factor of a name, as `put_shard` names them, asked for when its turn comes.  dtype: its spelling.
    beside: other tensors, asked for in their turn, too.
    """
    tensors = {tensor.name: tensor for tensor in written(shapes, layers, ranks)}
    others = {spec.name: read for spec, read in beside.items()}
    specs = [TensorSpec(name, dtype(tensor.factors[0]), tensor.shape) for name, tensor in tensors.items()]

    def tensor(name: str) -> Tensor:
        if name in others:
            return others[name]()
        return joined(tensors[name], [factor(part) for part in tensors[name].factors])

    return put_tensors(blobs, [*specs, *beside], tensor)


def _describe(blobs: BlobStore, config: Descriptor | None, tensors: TensorFile) -> AdapterSpec:
    infos = tensors.header.tensors
    shapes = {name: info.shape for name, info in infos.items()}
    spec = formats.describe(_config(blobs, config) if config else None, shapes, tensors.header.metadata)
    indices = formats.index_tensors(spec)
    for info in infos.values():
        known = _INDEX_DTYPES if info.name in indices else TORCH_DTYPES
        if info.dtype not in known:
            reason = f"{'indices' if info.name in indices else 'factors'} of type {info.dtype} have no exact meaning here"
            raise UnsupportedAdapter(f"tensor {info.name[:200]}", reason, f"save it as one of {', '.join(known)}")
    return spec


def _config(blobs: BlobStore, config: Descriptor) -> Mapping[str, Any]:
    with blobs.open(config.digest) as stream:
        raw = stream.read(_MAX_CONFIG_BYTES + 1)
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict) or len(raw) > _MAX_CONFIG_BYTES:
        raise UnsupportedAdapter("adapter_config.json", "it is not a JSON object", "check how the adapter was saved")
    return parsed


def _factors(module: str, delta: LowRankDelta) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    lora_A, lora_B = factor_names(module)
    return (lora_A, delta.A), (lora_B, delta.B)


def _ahead(make: Callable[[K], V], keys: Iterable[K]) -> Generator[V, None, None]:
    """`make` of every key, in order; the next one is made by a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        begun: deque[Future[V]] = deque()
        for key in keys:
            begun.append(pool.submit(make, key))
            if len(begun) > 1:
                yield begun.popleft().result()
        yield from (future.result() for future in begun)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
