"""The pieces of a grounding: what a child process does to make one adapter a plain LoRA beside the base model's weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from app import adapters
from app.adapters import OpenAdapter
from app.engine.assembly import plain_config, put_weights
from app.engine.bench import Workbench
from app.engine.messages import AssembleTask, ShardTask
from app.grounding.weights import BaseWeights, completed, depends, open_weights
from app.profiles import shipped_ranks
from app.recipe import Recipe
from app.report import grounded_section, grounding_certificate, read_report
from merge_algos.errors import UnsupportedAdapter
from merge_algos.formats.spec import AdapterSpec
from merge_algos.ground import Ground
from merge_algos.merge import ModuleResult
from merge_algos.protocol import ModuleContext
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.manifest import MEDIA_JSON, MEDIA_MANIFEST, AdapterManifest, Source, canonical_json


def ground_shard(task: ShardTask, bench: Workbench) -> Descriptor:
    """Some modules of an adapter. task.inputs: the adapter and the base model."""
    adapter, base = task.inputs
    opened = bench.open_adapter(adapter)
    with open_weights(bench.services, base, opened.spec) as weights:
        one = partial(_ground, opened, weights, Recipe.from_json(task.recipe), bench)
        return adapters.put_shard(bench.services.blobs, bench.side_by_side(one, task.modules))


def assemble(task: AssembleTask, bench: Workbench) -> Descriptor:
    """The manifest of the plain LoRA of all shards."""
    blobs, recipe, (adapter, base) = bench.services.blobs, Recipe.from_json(task.recipe), task.inputs
    opened = bench.open_adapter(adapter)
    with open_weights(bench.services, base, opened.spec) as weights:
        spec, source = completed(opened.spec, weights), weights.model.manifest.source
    shards = [adapters.read_shard(blobs, shard) for shard in task.shards]
    reports = tuple(report for shard in shards for report in shard.reports)
    ranks = shipped_ranks({report.module: report.rank_out for report in reports}, recipe.profile)
    report = grounding_certificate(recipe, (adapter, opened.manifest), source, reports, rank=max(ranks.values()))
    config = plain_config(task.base_model, [spec], ranks, spec.layers)
    manifest = AdapterManifest(
        base_model=task.base_model,
        config=blobs.put([canonical_json(config)], media_type=MEDIA_JSON),
        weights=put_weights(blobs, shards, spec.shapes, spec.layers, ranks),
        source=Source("ground", str(recipe.digest)),
        licence=opened.manifest.licence,
        inputs=(adapter,),
        report=blobs.put([canonical_json(report)], media_type=MEDIA_JSON),
    )
    stored = blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)
    _check_names(spec, bench.open_adapter(stored.digest).spec)
    return stored


def sections(blobs: BlobStore, recipe: Recipe, origins: Sequence[Digest], inputs: Sequence[Digest]) -> tuple[dict[str, Any], ...]:
    """What a merge certifies of those of its inputs that were grounded. recipe: of the merge."""
    named = zip(recipe.adapters, origins, inputs, strict=True)
    grounded = [(item.name, digest) for item, origin, digest in named if digest != origin]
    reports = [(name, digest, read_report(blobs, digest)) for name, digest in grounded]
    return tuple(grounded_section(name, digest, report) for name, digest, report in reports if report is not None)


def _ground(opened: OpenAdapter, weights: BaseWeights, recipe: Recipe, bench: Workbench, name: str) -> ModuleResult:
    given = opened.modules[name]
    module = weights.completed(given) if depends(given) else given
    W = weights.weight(module, bench.device) if module.needs_base else None
    context = ModuleContext(name, recipe.seed, recipe.rank)
    return Ground().ground(module, opened.parts(module, bench.device), W, context)


def _check_names(before: AdapterSpec, after: AdapterSpec) -> None:
    """What was written is read again: a name that PEFT's format says otherwise would not meet the other adapters' modules."""
    for name in before.layers.keys() ^ after.layers.keys():
        raise UnsupportedAdapter(
            f"module {name[:200]}",
            "its delta depends on the base model's weight, and PEFT's format has no place for the result",
            "merge it into its base and take a LoRA out of the difference",
        )
