"""The pieces of an extraction: what a child process does where an adapter comes out of two models instead of adapters."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial, reduce
from typing import Any

from app import adapters, base_models
from app.card import extraction_card
from app.engine.assembly import put_weights, shipped_dtype
from app.engine.bench import Workbench
from app.engine.messages import AssembleTask, ShardTask, SurveyTask
from app.extract.models import OpenModel, OpenPair, method_of, open_pair
from app.profiles import shipped_ranks
from app.recipe import Recipe
from app.report import extraction_certificate
from merge_algos.extract import Extract, as_matrix, tensor_of
from merge_algos.formats.spec import LINEAR, Layer
from merge_algos.formats.written import config_for
from merge_algos.merge import ModuleResult
from merge_algos.protocol import ModuleContext
from storage.digest import Descriptor
from storage.manifest import MEDIA_JSON, MEDIA_MANIFEST, MEDIA_MARKDOWN, AdapterManifest, Source, canonical_json
from storage.sources.hub import HubRef


def survey(task: SurveyTask, bench: Workbench) -> Descriptor:
    """The findings of some tensors, modules or not."""
    recipe = Recipe.from_json(task.recipe)
    method = method_of(recipe)
    with _opened(task, bench) as opened:
        findings = bench.side_by_side(partial(_measure, opened, method, recipe, bench), task.modules)
    return bench.services.blobs.put([canonical_json(reduce(method.pool, findings))], media_type=MEDIA_JSON)


def extract_shard(task: ShardTask, bench: Workbench) -> Descriptor:
    recipe = Recipe.from_json(task.recipe)
    with _opened(task, bench) as opened:
        results = bench.side_by_side(partial(_extract, task, opened, recipe, bench), task.modules)
    return adapters.put_shard(bench.services.blobs, results)


def assemble(task: AssembleTask, bench: Workbench) -> Descriptor:
    """The manifest of the adapter of all shards."""
    blobs, recipe = bench.services.blobs, Recipe.from_json(task.recipe)
    models = [(digest, base_models.read(bench.services, digest)) for digest in task.inputs]
    shards = [adapters.read_shard(blobs, shard) for shard in task.shards]
    reports = tuple(report for shard in shards for report in shard.reports)
    ranks = shipped_ranks({report.module: report.rank_out for report in reports}, recipe.profile)
    with _opened(task, bench) as opened:
        base, shapes = opened.base, {name: as_matrix(opened.shapes[tensor_of(name)]) for name in ranks}
    layers = dict.fromkeys(ranks, LINEAR)
    report = extraction_certificate(recipe, models, reports, task.known["left_out"], rank=max(ranks.values()))
    manifest = AdapterManifest(
        base_model=task.base_model,
        config=blobs.put([canonical_json(_config(task, base, ranks, layers))], media_type=MEDIA_JSON),
        weights=put_weights(blobs, shards, shapes, layers, ranks),
        source=Source("extract", str(recipe.digest)),
        inputs=task.inputs,
        report=blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
        card=blobs.put([extraction_card(report, task.base_model).encode()], media_type=MEDIA_MARKDOWN),
    )
    return blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)


def _config(task: AssembleTask, base: OpenModel, ranks: Mapping[str, int], layers: Mapping[str, Layer]) -> dict[str, Any]:
    """With the base model's revision, unless the adapter calls it by a name that is not the Hub's."""
    ref = HubRef.parse(base.manifest.source.removeprefix("hub:")) if base.manifest.source.startswith("hub:") else None
    causal = any(str(each).endswith("ForCausalLM") for each in base.config.get("architectures") or ())
    return config_for(
        base_model=task.base_model,
        revision=ref.revision if ref and ref.repo == task.base_model else None,
        task_type="CAUSAL_LM" if causal else None,
        fan_in_fan_out=False,
        ranks=ranks,
        layers=layers,
    )


def _opened(task: SurveyTask | ShardTask | AssembleTask, bench: Workbench) -> AbstractContextManager[OpenPair]:
    return open_pair(bench.services, Recipe.from_json(task.recipe), task.inputs)


def _measure(opened: OpenPair, method: Extract, recipe: Recipe, bench: Workbench, tensor: str) -> dict[str, Any]:
    if not opened.has_difference(tensor):
        return {}
    context = ModuleContext(tensor, recipe.seed, recipe.rank)
    return method.measure(opened.pair(tensor, bench.device), opened.reasons[tensor], context)


def _extract(task: ShardTask, opened: OpenPair, recipe: Recipe, bench: Workbench, name: str) -> ModuleResult:
    pair = opened.pair(tensor_of(name), bench.device)
    context = ModuleContext(name, recipe.seed, recipe.rank, task.known)
    return method_of(recipe).extract(pair, context, shipped_dtype(recipe, opened.dtypes))
