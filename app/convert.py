"""An adapter in another format: the same deltas, every scaling folded in, under the names that other loaders read.

It is made while the caller waits, once, and is an adapter of its own from then on: asking twice is asking once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from app import adapters, ingest
from app.adapters import OpenAdapter
from app.engine.assembly import plain_config
from app.engine.child import workbench
from app.engine.local import threads_for
from app.grounding.recipe import refuse_ungrounded
from app.services import Services
from merge_algos import formats
from merge_algos.errors import NonFiniteResult, UnsupportedAdapter
from merge_algos.formats import namings
from merge_algos.formats.components import divided
from merge_algos.formats.spec import AdapterSpec, Shape
from merge_algos.formats.together import agreed_shapes, layers_of, replicated
from merge_algos.formats.written import Written, factor_names, joined
from merge_algos.lowrank import LowRankDelta, distance, shared_A
from merge_algos.merge import reduce
from merge_algos.protocol import ModuleContext
from merge_algos.rank import RankRule
from storage.digest import Descriptor, Digest
from storage.index import AdapterRecord
from storage.manifest import MEDIA_JSON, MEDIA_MANIFEST, AdapterManifest, Source, canonical_json
from storage.tensor_writer import TensorSpec

Format = Literal["peft", "kohya", "diffusers"]

_ALPHA_DTYPE = "F32"  # holds every rank there is; bfloat16 does not


def convert(services: Services, record: AdapterRecord, to: Format) -> AdapterRecord:
    """The adapter in that format: itself if it has it, from the store if it was asked for before.

    Raises UnsupportedAdapter naming a module that has no place in the format, BlobNotFound or NonFiniteResult.
    """
    known = held(services, record, to)
    return known if known is not None else _make(services, record, to)


def held(services: Services, record: AdapterRecord, to: Format) -> AdapterRecord | None:
    """What needs no work any more. Raises BlobNotFound."""
    known = services.index.result(_identity(record, to))
    made = services.index.get(known.target) if known is not None else None
    if made is not None and ingest.complete(services, made.id):
        return made
    with closing(OpenAdapter.open(services.blobs, record.id).tensors) as tensors:
        config = adapters.read_manifest(services.blobs, record.id).config
        shapes = {info.name: info.shape for info in tensors.header.tensors.values()}
        return record if formats.naming_of(None if config is None else {}, shapes).name == to else None


def _identity(record: AdapterRecord, to: Format) -> Digest:
    return Digest.of(canonical_json({"schema": 1, "adapter": str(record.id), "format": to}))


def _make(services: Services, record: AdapterRecord, to: Format) -> AdapterRecord:
    identity = _identity(record, to)
    opened = OpenAdapter.open(services.blobs, record.id)
    with closing(opened.tensors):
        refuse_ungrounded([opened.spec], remedy="merge it alone with base_model, and convert what comes of it")
        if opened.spec.layer_replication:
            raise replicated(f"a {to} file")
        for extra in opened.spec.extras:
            reason = f"it is no delta, and a {to} file made here holds deltas alone"
            raise UnsupportedAdapter(f"tensor {extra.tensor[:200]}", reason, "save the adapter without it")
        shapes = agreed_shapes([opened.spec])
        layers = layers_of([opened.spec], shapes)
        ranks = _ranks(opened.spec, shapes, to)
        dtype = adapters.widest(opened.dtypes)
        # refused before anything is computed; what is fused and how is known afterwards
        namings.registry()[to].written(shapes, layers, ranks)
        bench = workbench(services, "cpu", threads_for(services.settings, 1))
        made = bench.side_by_side(partial(_ship, opened, shapes, dtype), list(shapes))
    modules = dict(zip(shapes, made, strict=True))
    tensors = namings.registry()[to].written(shapes, layers, ranks, one_A=partial(_have_one_A, modules))
    weights = _put(services, modules, tensors, adapters.spelling(dtype))
    report = {"schema": 1, "kind": "conversion", "adapter": str(record.id), "format": to, "rounding_error": _rounding_error(made)}
    config = plain_config(opened.spec.base_model, [opened.spec], ranks, layers)
    manifest = AdapterManifest(
        base_model=opened.spec.base_model,
        config=services.blobs.put([canonical_json(config)], media_type=MEDIA_JSON) if to == "peft" else None,
        weights=weights,
        source=Source("conversion", str(identity)),
        licence=opened.manifest.licence,
        inputs=(record.id,),
        report=services.blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
    )
    stored = services.blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)
    # what is written is read again before it is given out
    converted = ingest.describe(manifest, stored.digest, OpenAdapter.open(services.blobs, stored.digest).spec, record.restricted)
    services.index.publish(identity, converted, manifest.inputs)
    return converted


def _ranks(spec: AdapterSpec, shapes: Mapping[str, Shape], to: Format) -> dict[str, int]:
    """Module -> rank in the file: one for all, so that no loader needs patterns; but kohya's Flux fuses modules of own ranks.

    diffusers 0.42 scales a kohya file whose alphas differ by the commonest alpha (utils/peft_utils.py: the keys of its
    `alpha_pattern` are names of tensors, which match no module); it reads Flux files module by module.
    """
    own = {module.name: max(min(module.r, *shapes[module.name]), 1) for module in spec.modules}
    if to == "kohya" and any(divided(module)[0] == "transformer" for module in own):
        return own
    return dict.fromkeys(own, max(own.values()))


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    """delta: as it is written.  lost, total: squared norms of what rounding took, and of all there was."""

    delta: LowRankDelta
    lost: float
    total: float


def _ship(opened: OpenAdapter, shapes: Mapping[str, Shape], dtype: torch.dtype, name: str) -> _Module:
    delta = opened.delta(name, shapes[name], "cpu").to(torch.float32)
    if delta.rank > min(delta.shape):
        delta = reduce(delta, ModuleContext(name, 0, RankRule())).delta
    shipped = delta.to(dtype)
    if not (shipped.A.isfinite().all() and shipped.B.isfinite().all()):
        raise NonFiniteResult(name, str(dtype).removeprefix("torch."))
    gram = delta.gram()
    return _Module(shipped, distance(delta, shipped, gram=gram) ** 2, delta.norm(gram=gram) ** 2)


def _rounding_error(modules: Iterable[_Module]) -> float:
    lost, total = (math.fsum(parts) for parts in zip(*((m.lost, m.total) for m in modules), strict=True))
    return math.sqrt(lost / total) if total else 0.0


def _have_one_A(modules: Mapping[str, _Module], names: Sequence[str]) -> bool:
    """Whether these modules were rows of one layer and still have its A."""
    deltas = [modules[name].delta for name in names]
    return len({delta.rank for delta in deltas}) == 1 and shared_A(deltas) is not None


def _put(services: Services, modules: Mapping[str, _Module], tensors: Iterable[Written], dtype: str) -> Descriptor:
    halves: dict[str, Tensor] = {}
    for name, module in modules.items():
        halves |= zip(factor_names(name), (module.delta.A, module.delta.B), strict=True)
    named = {tensor.name: tensor for tensor in tensors}
    specs = [TensorSpec(t.name, dtype if t.factors else _ALPHA_DTYPE, t.shape) for t in named.values()]
    return adapters.put_tensors(
        services.blobs, specs, lambda name: joined(named[name], [halves[factor] for factor in named[name].factors])
    )
