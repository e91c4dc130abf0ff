"""The pieces of a basis: what a child process does where the result is not one adapter but all of them, smaller."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from app import adapters, bases
from app.bases import EncodedModule
from app.engine.bench import Workbench
from app.engine.grounding import sections
from app.engine.messages import EncodeTask, JoinTask
from app.recipe import Recipe
from app.report import basis_certificate
from merge_algos import catalogue
from merge_algos.formats.spec import LINEAR
from merge_algos.formats.together import agreed_shapes
from merge_algos.protocol import BasisMethod, ModuleContext
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.lossless import Original, pack
from storage.manifest import MEDIA_BASIS, MEDIA_JSON, BasisManifest, canonical_json


def encode_shard(task: EncodeTask, bench: Workbench) -> Descriptor:
    recipe = Recipe.from_json(task.recipe)
    method = method_of(recipe)
    modules = bench.side_by_side(partial(_encode_one, task, recipe, method, bench), task.modules)
    return bases.put_encoded(bench.services.blobs, task.group, modules)


def join(task: JoinTask, bench: Workbench) -> Descriptor:
    """The basis of all shards, or of the inputs' own bytes where they are kept as they are."""
    blobs, recipe = bench.services.blobs, Recipe.from_json(task.recipe)
    parent = bases.OpenBasis.open(blobs, Digest.parse(recipe.extends)) if recipe.extends else None
    groups = list(parent.contents["groups"]) if parent else []
    earlier = [parent.manifest.tensors] if parent else []
    if method_of(recipe).verbatim:
        tensors, layout = _pack(blobs, task.inputs, len(groups), earlier)
        modules: list[Mapping[str, Any]] = []
    else:
        (tensors, modules), layout = bases.join_shards(blobs, task.shards, earlier), None
    shapes = agreed_shapes([bench.open_adapter(digest).spec for digest in task.inputs])
    group = {
        "parameters": dict(recipe.parameters),
        "dtype": recipe.dtype,
        "profile": recipe.profile,
        "tasks": [
            _task(task, bench, recipe, modules, n, shapes) | _grounded(task, bench, recipe, n) for n in range(len(task.inputs))
        ],
        "modules": {m["module"]: {k: v for k, v in m.items() if k != "module"} for m in modules},
        "layout": layout,
    }
    groups.append(group)
    names = tuple(t["name"] for g in groups for t in g["tasks"])
    inputs = tuple(Digest.parse(t["input"]) for g in groups for t in g["tasks"])
    report = basis_certificate(recipe, groups, tensors)
    manifest = BasisManifest(
        base_model=task.base_model,
        tasks=names,
        tensors=tensors,
        contents=blobs.put([canonical_json({"schema": 1, "groups": groups})], media_type=MEDIA_JSON),
        report=blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
        recipe=str(recipe.digest),
        inputs=inputs,
    )
    return blobs.put([manifest.to_bytes()], media_type=MEDIA_BASIS)


def method_of(recipe: Recipe) -> BasisMethod:
    method = catalogue.build(recipe.method, recipe.parameters)
    assert method.produces == "basis"
    return method  # type: ignore[return-value]


def _encode_one(task: EncodeTask, recipe: Recipe, method: BasisMethod, bench: Workbench, name: str) -> EncodedModule:
    deltas = bench.deltas(task.inputs, name, task.modules[name])
    encoded, errors = method.encode(deltas, ModuleContext(name, recipe.seed, recipe.rank, task.known))
    norms = tuple(delta.norm() for delta in deltas)
    input_bytes = sum(2 * delta.rank * sum(delta.shape) for delta in deltas)
    return EncodedModule(name, encoded, errors, norms, input_bytes)


def _pack(
    blobs: BlobStore, inputs: Sequence[Digest], group: int, earlier: Sequence[Descriptor]
) -> tuple[Descriptor, Mapping[str, Any]]:
    manifests = [adapters.read_manifest(blobs, digest) for digest in inputs]
    packing = pack([Original(_bytes(blobs, m.config), blobs.path(m.weights.digest)) for m in manifests], prefix=str(group))
    stored = bases.put_packing(blobs, packing, earlier)
    return stored, packing.layout


def _bytes(blobs: BlobStore, part: Descriptor | None) -> bytes:
    """Empty where there is none: no config in JSON is."""
    if part is None:
        return b""
    with blobs.open(part.digest) as stream:
        return stream.read()


def _task(
    task: JoinTask,
    bench: Workbench,
    recipe: Recipe,
    modules: Sequence[Mapping[str, Any]],
    n: int,
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """What reconstruction needs to know of one adapter when the adapter is gone. What was grounded is cast to its own type."""
    origins = task.origins or task.inputs
    opened = bench.open_adapter(task.inputs[n])
    return {
        "name": recipe.adapters[n].name,
        "input": str(origins[n]),
        "licence": opened.manifest.licence,
        "revision": opened.spec.revision,
        "task_type": opened.spec.task_type,
        "fan_in_fan_out": opened.spec.fan_in_fan_out,
        "dtype": adapters.spelling(adapters.widest(bench.open_adapter(origins[n]).dtypes)),
        "modules": {module.name: module.r for module in opened.spec.modules},
        "layers": {name: layer.to_json() for name, layer in opened.spec.layers.items() if layer != LINEAR},
        "input_bytes": sum(2 * module.r * sum(shapes[module.name]) for module in opened.spec.modules),
        "relative_error": bases.whole_error(modules, n),
    }


def _grounded(task: JoinTask, bench: Workbench, recipe: Recipe, n: int) -> dict[str, Any]:
    """What one adapter lost before it came into the basis, if its deltas depend on the base model's weights."""
    name, origins = recipe.adapters[n].name, task.origins or task.inputs
    found = [own for own in sections(bench.services.blobs, recipe, origins, task.inputs) if own["name"] == name]
    return {"grounded": found[0]} if found else {}
