"""Where bytes and deltas meet, the only such place: a stored adapter becomes deltas, merged deltas become a stored adapter."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats import peft
from merge_algos.lowrank import LowRankDelta
from merge_algos.merge import ModuleReport, ModuleResult
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.manifest import MEDIA_JSON, MEDIA_TENSORS, AdapterManifest, canonical_json
from storage.tensor_writer import TensorSpec, layout, write
from storage.tensors import TensorFile, open_tensors

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
_SPELLING = {dtype: spelling for spelling, dtype in TORCH_DTYPES.items()}
_MAX_CONFIG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class OpenAdapter:
    """A stored adapter, its weights mapped: `delta` reads one module and lets its pages go again."""

    manifest: AdapterManifest
    spec: peft.AdapterSpec
    modules: Mapping[str, peft.ModuleSpec]
    tensors: TensorFile

    @classmethod
    def open(cls, blobs: BlobStore, digest: Digest) -> Self:
        """Raises BlobNotFound, and what `check` raises."""
        manifest = read_manifest(blobs, digest)
        tensors = open_tensors(blobs.path(manifest.weights.digest))
        spec = _describe(blobs, manifest.config, tensors)
        return cls(manifest, spec, {module.name: module for module in spec.modules}, tensors)

    def delta(self, name: str, shape: tuple[int, int], device: str) -> LowRankDelta:
        """The module's delta on the device, scaling folded in; rank 0 where the adapter does not target it."""
        if name not in self.modules:
            return LowRankDelta.zero(*shape).to(torch.float32, device)
        module = self.modules[name]
        lora_A, lora_B = read_tensor(self.tensors, module.lora_A), read_tensor(self.tensors, module.lora_B)
        return peft.load(module, lora_A.to(device), lora_B.to(device))

    @property
    def dtypes(self) -> frozenset[str]:
        return frozenset(info.dtype for info in self.tensors.header.tensors.values())


def read_manifest(blobs: BlobStore, digest: Digest) -> AdapterManifest:
    """Raises BlobNotFound."""
    with blobs.open(digest) as stream:
        return AdapterManifest.from_bytes(stream.read())


def read_json(blobs: BlobStore, digest: Digest) -> Any:
    """A JSON blob of ours. Raises BlobNotFound."""
    with blobs.open(digest) as stream:
        return json.load(stream)


def check(blobs: BlobStore, config: Descriptor, weights: Descriptor) -> peft.AdapterSpec:
    """Read a whole adapter once before it is accepted.

    Raises InvalidTensorFile, UnsupportedAdapter, ShapeMismatch, InvalidParams, BadPattern or NonFiniteTensor, naming
    the tensor, module or flag.
    """
    with open_tensors(blobs.path(weights.digest)) as tensors:
        spec = _describe(blobs, config, tensors)
        for name in tensors.header.tensors:
            peft.check_finite(name, read_tensor(tensors, name))
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
    """Store a safetensors file whose tensors are asked for one at a time, so that memory stays flat."""
    return blobs.put(write(layout(specs), lambda name: [_bytes(tensor(name))]), media_type=MEDIA_TENSORS)


def read_tensor(tensors: TensorFile, name: str) -> Tensor:
    """A copy of one tensor; its mapped pages are given back, so walking through a file costs one tensor of memory."""
    info = tensors.header.tensors[name]
    return read_tensor_bytes(tensors, name).view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def read_tensor_bytes(tensors: TensorFile, name: str) -> Tensor:
    """The same as 1-D uint8, whatever its type."""
    if tensors.header.tensors[name].size_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8)
    copied = bytearray(tensors.view(name))
    tensors.release(name)
    return torch.frombuffer(copied, dtype=torch.uint8)


def read_rows(tensors: TensorFile, name: str, start: int, stop: int, d_in: int) -> Tensor:
    """A copy of some rows of a tensor read as a matrix of d_in columns; the pages it mapped are given back."""
    dtype = TORCH_DTYPES[tensors.header.tensors[name].dtype]
    row_bytes = d_in * dtype.itemsize
    copied = bytearray(tensors.view(name)[start * row_bytes : stop * row_bytes])
    tensors.release(name)
    return torch.frombuffer(copied, dtype=dtype).reshape(stop - start, d_in)


def padded(name: str, factor: Tensor, r: int) -> Tensor:
    """A factor by its PEFT name, with rows (A) or columns (B) of zeros up to rank r."""
    extra = (0, 0, 0, r - factor.shape[0]) if peft.is_lora_A(name) else (0, r - factor.shape[1])
    return torch.nn.functional.pad(factor, extra)


def _describe(blobs: BlobStore, config: Descriptor, tensors: TensorFile) -> peft.AdapterSpec:
    infos = tensors.header.tensors
    for info in infos.values():
        if info.dtype not in TORCH_DTYPES:
            reason = f"factors of type {info.dtype} have no exact meaning here"
            raise UnsupportedAdapter(f"tensor {info.name[:200]}", reason, f"save it as one of {', '.join(TORCH_DTYPES)}")
    return peft.describe(_config(blobs, config), {name: info.shape for name, info in infos.items()})


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
    lora_A, lora_B = peft.factor_names(module)
    return (lora_A, delta.A), (lora_B, delta.B)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
