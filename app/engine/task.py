"""One piece of a merge: what a child process does between two checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, cast

import torch

from app import adapters, base_models, extras, ingest
from app.adapters import OpenAdapter
from app.card import model_card
from app.engine import basis, extraction, grounding, learning
from app.engine.assembly import plain_config, put_weights, shipped_dtype
from app.engine.bench import Workbench
from app.engine.grounding import sections
from app.engine.messages import AssembleTask, EncodeTask, FetchTask, JoinTask, LearnTask, ShardTask, SurveyTask, Task
from app.grounding import fetch
from app.grounding.recipe import is_grounding
from app.profiles import shipped_ranks
from app.recipe import Recipe, module_weights
from app.report import certificate
from app.services import Services
from merge_algos import catalogue
from merge_algos.formats.together import agreed_shapes, layers_of
from merge_algos.merge import ModuleResult, build_post, merge_module, survey_module
from merge_algos.protocol import MergeMethod, ModuleContext
from storage.digest import Descriptor, Digest
from storage.manifest import MEDIA_BASE, MEDIA_JSON, MEDIA_MANIFEST, MEDIA_MARKDOWN, AdapterManifest, Source, canonical_json
from storage.sources.hub import HubRef


def run_task(task: Task, bench: Workbench) -> Descriptor:
    """Raises the errors of the libraries as they are; who called turns them into a problem."""
    recipe = None if isinstance(task, FetchTask) else Recipe.from_json(task.recipe)
    extracts = recipe is not None and recipe.models is not None
    grounds = recipe is not None and is_grounding(recipe)
    bodies: Mapping[type[Task], Callable[..., Descriptor]] = {
        FetchTask: _fetch,
        LearnTask: learning.advance,
        SurveyTask: extraction.survey if extracts else _survey,
        ShardTask: extraction.extract_shard if extracts else grounding.ground_shard if grounds else _merge_shard,
        AssembleTask: extraction.assemble if extracts else grounding.assemble if grounds else _assemble,
        EncodeTask: basis.encode_shard,
        JoinTask: basis.join,
    }
    return bodies[type(task)](task, bench)


def _fetch(task: FetchTask, bench: Workbench) -> Descriptor:
    services = bench.services
    if task.what == "base":
        spec = bench.open_adapter(task.needed_by).spec if task.needed_by else None
        digest = fetch.obtain(services, task.source, spec) if spec else base_models.obtain(services, task.source)
        return Descriptor(digest, services.blobs.stat(digest) or 0, MEDIA_BASE)
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
    one = partial(_survey_one, task, recipe, _opened(task, recipe, bench), bench.device)
    findings = bench.side_by_side(one, task.modules)
    pooled = reduce(catalogue.build(recipe.method, recipe.parameters).pool, findings)
    return bench.services.blobs.put([canonical_json(pooled)], media_type=MEDIA_JSON)


def _survey_one(task: SurveyTask, recipe: Recipe, opened: Sequence[OpenAdapter], device: str, name: str) -> Any:
    deltas = [adapter.delta(name, task.modules[name], device) for adapter in opened]
    method = catalogue.build(recipe.method, recipe.parameters)
    return survey_module(method, deltas, task.weights[name], _context(task, recipe, name))


def _opened(task: SurveyTask | ShardTask, recipe: Recipe, bench: Workbench) -> list[OpenAdapter]:
    return extras.as_merged(recipe, [bench.open_adapter(digest) for digest in task.inputs])


def _context(task: SurveyTask | ShardTask, recipe: Recipe, name: str) -> ModuleContext:
    return ModuleContext(name, recipe.seed, recipe.rank, task.known)


def _merge_shard(task: ShardTask, bench: Workbench) -> Descriptor:
    recipe = Recipe.from_json(task.recipe)
    # of the whole adapters, so looked up once, not in every module
    dtypes = (dtype for digest in task.origins or task.inputs for dtype in bench.open_adapter(digest).dtypes)
    one = partial(_merge_one, task, recipe, shipped_dtype(recipe, dtypes), _opened(task, recipe, bench), bench.device)
    return adapters.put_shard(bench.services.blobs, bench.side_by_side(one, task.modules))


def _merge_one(
    task: ShardTask, recipe: Recipe, dtype: torch.dtype, opened: Sequence[OpenAdapter], device: str, name: str
) -> ModuleResult:
    method = cast(MergeMethod, catalogue.build(recipe.method, recipe.parameters))
    steps = [build_post(step.name, step.parameters) for step in recipe.post]
    deltas = [adapter.delta(name, task.modules[name], device) for adapter in opened]
    return merge_module(method, deltas, task.weights[name], _context(task, recipe, name), dtype, steps)


def _assemble(task: AssembleTask, bench: Workbench) -> Descriptor:
    blobs, recipe = bench.services.blobs, Recipe.from_json(task.recipe)
    origins = task.origins or task.inputs
    inputs = [(digest, adapters.read_manifest(blobs, digest)) for digest in origins]
    specs = extras.merged_specs(recipe, [bench.open_adapter(digest).spec for digest in task.inputs])
    shapes = agreed_shapes(specs)
    layers = layers_of(specs, shapes)
    shards = [adapters.read_shard(blobs, shard) for shard in task.shards]
    reports = tuple(report for shard in shards for report in shard.reports)
    ranks = shipped_ranks({report.module: report.rank_out for report in reports}, recipe.profile)
    learned = adapters.read_json(blobs, task.learned) if task.learned else None
    training, grounded = learned and learned["training"], sections(blobs, recipe, origins, task.inputs)
    opened = extras.as_merged(recipe, [bench.open_adapter(digest) for digest in origins])
    found = extras.combined(recipe, [each.spec for each in opened], module_weights(recipe.adapters, tuple(shapes)))
    rank, beside = max(ranks.values()), extras.certified(recipe, found)
    report = certificate(recipe, inputs, reports, rank=rank, training=training, grounded=grounded, extras=beside)
    manifest = AdapterManifest(
        base_model=task.base_model,
        config=blobs.put(
            [canonical_json({**plain_config(task.base_model, specs, ranks, layers), **found.config})], media_type=MEDIA_JSON
        ),
        weights=put_weights(blobs, shards, shapes, layers, ranks, extras.tensors_of(recipe, found, opened, shapes)),
        source=Source("merge", str(recipe.digest)),
        licence=adapters.agreed([manifest.licence for _, manifest in inputs]),
        inputs=origins,
        report=blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
        card=blobs.put([model_card(report, task.base_model).encode()], media_type=MEDIA_MARKDOWN),
        coefficients=blobs.put([canonical_json(_coefficients(recipe, origins, learned))], media_type=MEDIA_JSON)
        if learned
        else None,
    )
    return blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)


def _coefficients(recipe: Recipe, inputs: Sequence[Digest], learned: Mapping[str, Any]) -> dict[str, Any]:
    """`coefficients.json`: its `table` is the parameter of the method `coefficients`, for these adapters in this order."""
    names = [{"name": item.name, "id": str(digest)} for item, digest in zip(recipe.adapters, inputs, strict=True)]
    granularity = recipe.parameters["granularity"]
    return {"schema": 1, "granularity": granularity, "adapters": names, "table": learned["table"]}
