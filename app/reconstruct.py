"""One adapter out of a basis: a task as it was, or a mix of tasks. Asking twice is asking once.

It takes about as long as writing the adapter, so it is done while the caller waits, and reads only what it needs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app import adapters, ingest
from app.adapters import OpenAdapter
from app.bases import OpenBasis, Place
from app.card import reconstruction_card
from app.engine.child import workbench
from app.engine.local import threads_for
from app.errors import UnknownTask
from app.profiles import shipped_ranks
from app.report import read_report
from app.services import Services
from merge_algos.errors import NonFiniteResult
from merge_algos.formats.spec import LINEAR, AdapterSpec, Layer
from merge_algos.formats.together import agreed_layers, agreed_shapes
from merge_algos.formats.written import config_for, factor_names
from merge_algos.lowrank import LowRankDelta, distance, weighted_sum
from merge_algos.merge import reduce
from merge_algos.protocol import ModuleContext
from merge_algos.rank import RankRule
from storage.digest import Descriptor, Digest
from storage.index import AdapterRecord, BasisRecord
from storage.lossless import unpack
from storage.manifest import MEDIA_JSON, MEDIA_MANIFEST, MEDIA_MARKDOWN, MEDIA_TENSORS, AdapterManifest, Source, canonical_json

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """report: the certificate, as `report.json`."""

    record: AdapterRecord
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    name: str
    delta: LowRankDelta
    norm: float
    relative_error: float
    rounding_error: float


def reconstruct(services: Services, basis: BasisRecord, weights: Mapping[str, float], rule: RankRule) -> Rebuilt:
    """The adapter of one task at weight 1, or the weighted sum of several; from the store if it was asked for before.

    Raises UnknownTask, BlobNotFound or NonFiniteResult.
    """
    known = held(services, basis, weights, rule)
    if known is not None:
        return known
    # in the basis's order: that of the caller's weights is not part of what is asked, so it must not show in the bytes
    ordered = {task: weights[task] for task in basis.tasks if task in weights}
    return _make(services, basis, ordered, rule, _identity(basis, weights, rule))


def held(services: Services, basis: BasisRecord, weights: Mapping[str, float], rule: RankRule) -> Rebuilt | None:
    """What was asked for before and is still whole. Raises UnknownTask."""
    for task in weights:
        if task not in basis.tasks:
            raise UnknownTask(task, basis.tasks)
    known = services.index.result(_identity(basis, weights, rule))
    record = services.index.get(known.target) if known is not None else None
    if record is None or not ingest.complete(services, record.id):
        return None
    report = read_report(services.blobs, record.id)
    return Rebuilt(record, report) if report else None


def _identity(basis: BasisRecord, weights: Mapping[str, float], rule: RankRule) -> Digest:
    asked = {"schema": 1, "basis": str(basis.id), "weights": dict(weights), "rank": asdict(rule)}
    return Digest.of(canonical_json(asked))


def _make(services: Services, basis: BasisRecord, weights: Mapping[str, float], rule: RankRule, identity: Digest) -> Rebuilt:
    opened = OpenBasis.open(services.blobs, basis.id)
    with closing(opened.tensors):
        places = {task: opened.place(task) for task in weights}
        alone = list(weights.values()) == [1.0] and rule == RankRule()
        if alone and _is_verbatim(opened, *places.values()):
            parts, report = _verbatim(services, opened, *places.values(), asked=(basis, weights, identity))
        else:
            parts, report = _decoded(services, opened, basis, places, weights, rule, identity)
        grounded = [opened.task(place)["grounded"] for place in places.values() if "grounded" in opened.task(place)]
        report |= {"grounded": grounded} if grounded else {}
    manifest = AdapterManifest(
        base_model=opened.manifest.base_model,
        config=parts[0],
        weights=parts[1],
        source=Source("basis", str(identity)),
        licence=adapters.agreed([opened.task(place)["licence"] for place in places.values()]),
        inputs=(basis.id,),
        report=services.blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
        card=services.blobs.put([reconstruction_card(report, opened.manifest.base_model).encode()], media_type=MEDIA_MARKDOWN),
    )
    stored = services.blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)
    spec = OpenAdapter.open(services.blobs, stored.digest).spec
    record = ingest.describe(manifest, stored.digest, spec, basis.restricted)
    services.index.publish(identity, record, manifest.inputs)
    return Rebuilt(record, report)


def _verbatim(
    services: Services, opened: OpenBasis, place: Place, *, asked: tuple[BasisRecord, Mapping[str, float], Digest]
) -> tuple[tuple[Descriptor | None, Descriptor], dict[str, Any]]:
    """The adapter's own two files. Raises DigestMismatch if they are not."""
    layout = opened.group(place)["layout"]
    config, weights = unpack(layout, place.position, opened.tensors.read)
    expected = Descriptor.from_json(layout["tasks"][place.position]["weights"]).digest
    parts = (
        services.blobs.put([config], media_type=MEDIA_JSON) if config else None,
        services.blobs.put(weights, media_type=MEDIA_TENSORS, expected=expected),
    )
    return parts, _certificate(*asked, error=0.0, modules=())


def _decoded(
    services: Services,
    opened: OpenBasis,
    basis: BasisRecord,
    places: Mapping[str, Place],
    weights: Mapping[str, float],
    rule: RankRule,
    identity: Digest,
) -> tuple[tuple[Descriptor | None, Descriptor], dict[str, Any]]:
    shapes = _shapes(services, opened, basis, places)
    bench = workbench(services, "cpu", threads_for(services.settings, 1))
    readers = [_reader(services, opened, basis, task, place) for task, place in places.items()]
    dtype = _dtype(opened, list(places.values()))
    one = partial(_module, readers, list(weights.values()), shapes, rule, dtype)
    modules = bench.side_by_side(one, list(shapes))
    profile = opened.group(next(iter(places.values())))["profile"]
    ranks = shipped_ranks({m.name: m.delta.rank for m in modules}, profile)
    report = _certificate(basis, weights, identity, error=_error(opened, places, weights, modules), modules=modules)
    layers = _layers(services, opened, basis, places, shapes)
    weights_part = _put_weights(services, modules, shapes, layers, ranks)
    return (_put_config(services, opened, places, ranks, layers), weights_part), report


def _reader(services: Services, opened: OpenBasis, basis: BasisRecord, task: str, place: Place) -> Callable[..., LowRankDelta]:
    """(module, shape) -> the task's delta; rank 0 where it has none."""
    if _is_verbatim(opened, place):
        adapter = OpenAdapter.open(services.blobs, reconstruct(services, basis, {task: 1.0}, RankRule()).record.id)
        return lambda module, shape: adapter.delta(module, shape, "cpu")
    own = opened.task(place)["modules"]
    return lambda module, shape: opened.delta(place, module) if module in own else LowRankDelta.zero(*shape)


def _module(
    readers: Sequence[Callable[..., LowRankDelta]],
    weights: Sequence[float],
    shapes: Shapes,
    rule: RankRule,
    dtype: torch.dtype,
    name: str,
) -> _Module:
    deltas = [read(name, shapes[name]) for read in readers]
    whole = deltas[0] if list(weights) == [1.0] else weighted_sum(deltas, weights)
    _check_finite(whole, name)  # a weight may be too large for what it weighs
    cut = reduce(whole, ModuleContext(name, 0, rule)) if rule != RankRule() or whole.rank > min(whole.shape) else None
    finished = cut.delta if cut else whole
    shipped = finished.to(dtype)
    _check_finite(shipped, name)
    norm = cut.norm if cut else whole.norm()
    rounding = distance(finished, shipped)
    return _Module(name, shipped, norm, math.sqrt(cut.lost) if cut else 0.0, rounding / norm if norm else 0.0)


def _check_finite(delta: LowRankDelta, module: str) -> None:
    if not (delta.B.isfinite().all() and delta.A.isfinite().all()):
        raise NonFiniteResult(module, str(delta.B.dtype).removeprefix("torch."))


def _shapes(services: Services, opened: OpenBasis, basis: BasisRecord, places: Mapping[str, Place]) -> dict[str, tuple[int, int]]:
    """Module -> shape, of all modules that any of the tasks has."""
    shapes = agreed_shapes(list(_verbatim_specs(services, opened, basis, places).values()))
    for place in places.values():
        if not _is_verbatim(opened, place):
            known = opened.shapes[place.group]
            shapes |= {module: known[module] for module in opened.task(place)["modules"]}
    return shapes


def _verbatim_specs(
    services: Services, opened: OpenBasis, basis: BasisRecord, places: Mapping[str, Place]
) -> dict[str, AdapterSpec]:
    """Of each task that is kept as its own bytes."""
    ids = {
        task: reconstruct(services, basis, {task: 1.0}, RankRule()).record.id
        for task, place in places.items()
        if _is_verbatim(opened, place)
    }
    return {task: OpenAdapter.open(services.blobs, digest).spec for task, digest in ids.items()}


def _layers(
    services: Services, opened: OpenBasis, basis: BasisRecord, places: Mapping[str, Place], shapes: Shapes
) -> dict[str, Layer]:
    """Module -> the layer it is to all of the tasks. Raises ShapeMismatch."""
    verbatim = _verbatim_specs(services, opened, basis, places)
    layers: dict[str, Mapping[str, Layer]] = {task: spec.layers for task, spec in verbatim.items()}
    for task, place in places.items():
        if task not in verbatim:
            said = opened.task(place)
            known = {name: Layer.from_json(layer) for name, layer in said.get("layers", {}).items()}
            layers[task] = {name: known.get(name, LINEAR) for name in said["modules"]}
    return agreed_layers(({name: shapes[name] for name in own}, own) for own in layers.values())


def _error(opened: OpenBasis, places: Mapping[str, Place], weights: Mapping[str, float], modules: Sequence[_Module]) -> float:
    """The measured error of one task; of a mix, or what is cut, at most the sum of what was lost, relative to the norm."""
    cut = math.sqrt(math.fsum((m.relative_error * m.norm) ** 2 for m in modules))
    if list(weights.values()) == [1.0] and cut == 0.0:
        (place,) = places.values()
        return float(opened.task(place)["relative_error"])
    lost = sum(abs(weights[task]) * _lost(opened, place) for task, place in places.items())
    total = math.sqrt(math.fsum(m.norm**2 for m in modules))
    return (lost + cut) / total if total else 0.0


def _lost(opened: OpenBasis, place: Place) -> float:
    """Frobenius norm of what the basis lost of a task."""
    modules = opened.modules(place).values()
    return math.sqrt(math.fsum((m["errors"][place.position] * m["norms"][place.position]) ** 2 for m in modules))


def _certificate(
    basis: BasisRecord, weights: Mapping[str, float], identity: Digest, *, error: float, modules: Sequence[_Module]
) -> dict[str, Any]:
    total = math.fsum(m.norm**2 for m in modules)
    rounded = math.fsum((m.rounding_error * m.norm) ** 2 for m in modules)
    return {
        "schema": 1,
        "kind": "reconstruction",
        "basis": str(basis.id),
        "weights": dict(weights),
        "digest": str(identity),
        "relative_error": error,
        "rounding_error": math.sqrt(rounded / total) if total else 0.0,
        "modules": [
            {"module": m.name, "rank": m.delta.rank, "cut_error": m.relative_error, "rounding_error": m.rounding_error}
            for m in modules
        ],
    }


def _put_config(
    services: Services,
    opened: OpenBasis,
    places: Mapping[str, Place],
    ranks: Mapping[str, int],
    layers: Mapping[str, Layer],
) -> Descriptor:
    tasks = [opened.task(place) for place in places.values()]
    config = config_for(
        base_model=opened.manifest.base_model,
        revision=adapters.agreed([task["revision"] for task in tasks]),
        task_type=adapters.agreed([task["task_type"] for task in tasks]),
        fan_in_fan_out=any(task["fan_in_fan_out"] for task in tasks),
        ranks=ranks,
        layers=layers,
    )
    return services.blobs.put([canonical_json(config)], media_type=MEDIA_JSON)


def _put_weights(
    services: Services, modules: Sequence[_Module], shapes: Shapes, layers: Mapping[str, Layer], ranks: Mapping[str, int]
) -> Descriptor:
    halves: dict[str, Tensor] = {}
    for m in modules:
        halves |= zip(factor_names(m.name), (m.delta.A, m.delta.B), strict=True)
    dtype = lambda name: adapters.spelling(halves[name].dtype)  # noqa: E731
    return adapters.put_adapter(services.blobs, shapes, layers, ranks, halves.__getitem__, dtype)


def _dtype(opened: OpenBasis, places: Sequence[Place]) -> torch.dtype:
    """The widest of what the tasks' recipes say, or of their own where they say nothing."""
    asked = [(opened.group(place)["dtype"], opened.task(place)["dtype"]) for place in places]
    return adapters.widest(own if said == "auto" else adapters.spelling(getattr(torch, said)) for said, own in asked)


def _is_verbatim(opened: OpenBasis, place: Place) -> bool:
    return opened.group(place)["layout"] is not None
