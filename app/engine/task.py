"""One piece of a merge: what a child process does between two checkpoints.

A task names its inputs by digest and answers with a descriptor, so it can run in any process that reaches the store,
and running it twice stores the same bytes once.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from app import adapters, ingest
from app.adapters import OpenAdapter
from app.card import model_card
from app.recipe import Recipe
from app.report import certificate
from app.services import Services
from merge_algos.formats import peft
from merge_algos.merge import ModuleReport, ModuleResult, build, build_post, merge_module, survey_module
from merge_algos.protocol import ModuleContext
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.manifest import MEDIA_JSON, MEDIA_MANIFEST, MEDIA_MARKDOWN, AdapterManifest, Source, canonical_json
from storage.sources.hub import HubRef
from storage.tensor_writer import TensorSpec
from storage.tensors import TensorFile, open_tensors

T = TypeVar("T")

_RECIPE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class FetchTask:
    """Bring one pinned source into the store: answers with the adapter's manifest."""

    source: str
    kind: Literal["fetch"] = "fetch"


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """Look at some modules before any is merged: answers with their findings, pooled, in JSON.

    known: what the rounds before have settled, None in the first.
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    modules: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[float, ...]]
    number: int
    known: Any = None
    kind: Literal["survey"] = "survey"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Merge some modules: answers with a shard, which is factors in a safetensors blob and their reports in JSON.

    known: what a survey has settled of the whole adapters, None where the method asks for none.
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    modules: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[float, ...]]
    number: int
    known: Any = None
    kind: Literal["shard"] = "shard"


@dataclass(frozen=True, slots=True)
class AssembleTask:
    """Put the shards together, in order: answers with the merged adapter's manifest."""

    recipe: Mapping[str, Any]
    inputs: tuple[Digest, ...]
    base_model: str
    shards: tuple[Descriptor, ...]
    kind: Literal["assemble"] = "assemble"


Task = FetchTask | SurveyTask | ShardTask | AssembleTask


@dataclass(frozen=True, slots=True)
class Workbench:
    """What a task runs with: the services, a device, CPU threads, and how to open an adapter (a caller may keep them open)."""

    services: Services
    device: str
    threads: int
    open_adapter: Callable[[Digest], OpenAdapter]


def run_task(task: Task, bench: Workbench) -> Descriptor:
    """Raises the errors of the libraries as they are; who called turns them into a problem."""
    match task:
        case FetchTask():
            return _fetch(task, bench.services)
        case SurveyTask():
            return _survey(task, bench)
        case ShardTask():
            return _merge_shard(task, bench)
        case AssembleTask():
            return _assemble(task, bench)


def _fetch(task: FetchTask, services: Services) -> Descriptor:
    digest = _find(task.source, services)
    return Descriptor(digest, services.blobs.stat(digest) or 0, MEDIA_MANIFEST)


def _find(source: str, services: Services) -> Digest:
    if source.startswith("sha256:"):
        return Digest.parse(source)
    # what is here already was checked for this caller when the recipe was made
    known = ingest.held(services, source)
    return (known or ingest.obtain(services, HubRef.parse(source.removeprefix("hub:")), token=None)).id


def _survey(task: SurveyTask, bench: Workbench) -> Descriptor:
    recipe = Recipe.from_json(task.recipe)
    opened = [bench.open_adapter(digest) for digest in task.inputs]
    findings = _side_by_side(lambda name: _survey_one(task, recipe, opened, name, bench.device), task.modules, bench.threads)
    pooled = reduce(build(recipe.method, recipe.parameters).pool, findings)
    return bench.services.blobs.put([canonical_json(pooled)], media_type=MEDIA_JSON)


def _survey_one(task: SurveyTask, recipe: Recipe, opened: Sequence[OpenAdapter], name: str, device: str) -> Any:
    deltas = [adapter.delta(name, task.modules[name], device) for adapter in opened]
    method = build(recipe.method, recipe.parameters)
    return survey_module(method, deltas, task.weights[name], _context(task, recipe, name))


def read_findings(blobs: BlobStore, findings: Descriptor) -> Any:
    """What a survey task has answered. Raises BlobNotFound."""
    with blobs.open(findings.digest) as stream:
        return json.load(stream)


def _context(task: SurveyTask | ShardTask, recipe: Recipe, name: str) -> ModuleContext:
    return ModuleContext(name, recipe.seed, recipe.rank, task.known)


def _merge_shard(task: ShardTask, bench: Workbench) -> Descriptor:
    recipe = Recipe.from_json(task.recipe)
    opened = [bench.open_adapter(digest) for digest in task.inputs]
    results = _side_by_side(lambda name: _merge_one(task, recipe, opened, name, bench.device), task.modules, bench.threads)
    return adapters.put_shard(bench.services.blobs, results)


def _side_by_side(one: Callable[[str], T], names: Iterable[str], threads: int) -> list[T]:
    """`one` of every name, in order, each by one thread: small matrices gain little from more, and bytes never depend on it.

    Raises the first error, in order; what has not begun by then does not begin.
    """
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(one, name) for name in names]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _merge_one(task: ShardTask, recipe: Recipe, opened: Sequence[OpenAdapter], name: str, device: str) -> ModuleResult:
    deltas = [adapter.delta(name, task.modules[name], device) for adapter in opened]
    dtype = _RECIPE_DTYPES.get(recipe.dtype) or adapters.widest(d for adapter in opened for d in adapter.dtypes)
    method = build(recipe.method, recipe.parameters)
    steps = [build_post(step.name, step.parameters) for step in recipe.post]
    return merge_module(method, deltas, task.weights[name], _context(task, recipe, name), dtype, steps)


def _assemble(task: AssembleTask, bench: Workbench) -> Descriptor:
    blobs, recipe = bench.services.blobs, Recipe.from_json(task.recipe)
    inputs = [(digest, adapters.read_manifest(blobs, digest)) for digest in task.inputs]
    shards = [adapters.read_shard(blobs, shard) for shard in task.shards]
    reports = tuple(report for shard in shards for report in shard.reports)
    ranks = _shipped_ranks(recipe, reports)
    report = certificate(recipe, inputs, reports, rank=max(ranks.values()))
    manifest = AdapterManifest(
        base_model=task.base_model,
        config=blobs.put([canonical_json(_config(task, bench, ranks))], media_type=MEDIA_JSON),
        weights=_put_weights(blobs, shards, ranks),
        source=Source("merge", str(recipe.digest)),
        licence=_licence([manifest for _, manifest in inputs]),
        inputs=task.inputs,
        report=blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
        card=blobs.put([model_card(report, task.base_model).encode()], media_type=MEDIA_MARKDOWN),
    )
    return blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)


def _shipped_ranks(recipe: Recipe, reports: Sequence[ModuleReport]) -> dict[str, int]:
    """Module -> rank in the file. PEFT knows no rank 0, so a module that cancelled out is shipped as one pair of zeros."""
    own = {report.module: max(report.rank_out, 1) for report in reports}
    return own if recipe.profile == "compact" else dict.fromkeys(own, max(own.values()))


def _config(task: AssembleTask, bench: Workbench, ranks: Mapping[str, int]) -> dict[str, Any]:
    specs = [bench.open_adapter(digest).spec for digest in task.inputs]
    return peft.config_for(
        base_model=task.base_model,
        revision=_agreed([spec.revision for spec in specs]),
        task_type=_agreed([spec.task_type for spec in specs]),
        fan_in_fan_out=any(spec.fan_in_fan_out for spec in specs),
        ranks=ranks,
    )


def _put_weights(blobs: BlobStore, shards: Sequence[adapters.Shard], ranks: Mapping[str, int]) -> Descriptor:
    """Stream the factors of all shards into one file, each padded with zeros to its rank."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(blobs.path(shard.tensors.digest))) for shard in shards]
        where = {name: file for file in files for name in file.header.tensors}
        padded = {name: r for module, r in ranks.items() for name in peft.factor_names(module)}
        specs = [_padded_spec(where[name], name, r) for name, r in padded.items()]
        return adapters.put_tensors(blobs, specs, lambda name: _padded(where[name], name, padded[name]))


def _padded_spec(file: TensorFile, name: str, r: int) -> TensorSpec:
    info = file.header.tensors[name]
    return TensorSpec(name, info.dtype, (r, info.shape[1]) if peft.is_lora_A(name) else (info.shape[0], r))


def _padded(file: TensorFile, name: str, r: int) -> Tensor:
    tensor = adapters.read_tensor(file, name)
    extra = (0, 0, 0, r - tensor.shape[0]) if peft.is_lora_A(name) else (0, r - tensor.shape[1])
    return torch.nn.functional.pad(tensor, extra)


def _agreed(values: Sequence[str | None]) -> str | None:
    """The value all inputs share, or none."""
    return values[0] if len(set(values)) == 1 else None


def _licence(inputs: Sequence[AdapterManifest]) -> str | None:
    return _agreed([manifest.licence for manifest in inputs])
