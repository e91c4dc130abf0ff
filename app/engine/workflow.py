"""A merge as a durable workflow: fetch, plan, survey where the method asks for it, merge shard by shard, assemble, publish.

An extraction is one too: what it fetches are two models, and its shards are cut from their difference. So is a grounding, which
makes one input of a merge a plain LoRA before the merge sees it.

DBOS remembers which steps are done, the store remembers which shards are. Every step may run twice, so each one
publishes by digest. A problem is an ordinary outcome: it is recorded as the job's, and the workflow itself succeeds.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import compress
from typing import Any, TypeVar, cast

from app import adapters, base_models, bases, extras, ingest
from app.adapters import OpenAdapter
from app.engine.executor import Executor
from app.engine.messages import AssembleTask, EncodeTask, FetchTask, JoinTask, LearnTask, ShardTask, SurveyTask
from app.engine.plan import Plan, plan, plan_extraction, plan_grounding
from app.extract.models import method_of, open_pair
from app.grounding.recipe import ground_recipe, is_grounding, to_ground
from app.grounding.weights import completed, open_weights
from app.recipe import Recipe
from app.services import Services
from merge_algos import catalogue
from merge_algos.adapter import agree, common_base
from merge_algos.extract import Extract
from merge_algos.formats.spec import AdapterSpec
from merge_algos.formats.together import agreed_layers
from merge_algos.ground import DEFAULT_RULE, Ground, expected
from merge_algos.protocol import BasisMethod, MergeMethod, Method
from storage.digest import Descriptor, Digest
from storage.index import AdapterRecord, BasisRecord

log = logging.getLogger(__name__)

T = TypeVar("T", SurveyTask, ShardTask, EncodeTask)


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt at one job. `report(stage, done, total)` is told about progress; `stop()` says whether to give up.

    origins: the adapters of the recipe, where the inputs of later stages are or may be what was grounded from them.
    specs: what `spec` has read.
    """

    services: Services
    recipe: Recipe
    executor: Executor
    report: Callable[[str, int, int], None]
    stop: Callable[[], bool]
    origins: tuple[Digest, ...] = ()
    specs: dict[Digest, AdapterSpec] = field(default_factory=dict)

    def spec(self, adapter: Digest) -> AdapterSpec:
        """Of a stored adapter. Several stages ask, and the header of a large one takes a while to parse."""
        if adapter not in self.specs:
            self.specs[adapter] = OpenAdapter.open(self.services.blobs, adapter).spec
        return self.specs[adapter]


def fetch(run: Run) -> tuple[Digest, ...]:
    """The manifests of the recipe's inputs, in its order, imported if they are not here yet."""
    models = run.recipe.models
    sources = [models.base, models.tuned] if models else [item.source for item in run.recipe.adapters]
    tasks = [FetchTask(source, "base" if models else "adapter") for source in dict.fromkeys(sources)]
    found: dict[str, Digest] = {}
    run.report("fetch", 0, len(sources))
    for task, descriptor in run.executor.run(tasks, stop=run.stop):
        found[task.source] = descriptor.digest
        run.report("fetch", len(found), len(sources))
    return tuple(found[source] for source in sources)


def ground(run: Run, fetched: Sequence[Digest]) -> tuple[Digest, ...]:
    """The inputs of the merge: of each adapter itself, or the plain LoRA that it is beside the base model's weights.

    That one is cached in the index under the digest of its own recipe, its shards resume as those of a merge.
    Raises what `to_ground` raises.
    """
    if run.recipe.models is not None:
        return tuple(fetched)
    specs = [run.spec(digest) for digest in fetched]
    extras.check(run.recipe, extras.merged_specs(run.recipe, specs))
    if run.recipe.base_model is None:
        return tuple(fetched)  # the plan refuses what would need one
    chosen = to_ground(run.recipe, specs)
    counts = [len(spec.modules) if needed else 0 for spec, needed in zip(specs, chosen, strict=True)]
    inputs = list(fetched)
    for number, needed in enumerate(chosen):
        if needed:
            told = _counting(run, sum(counts[:number]), sum(counts))
            own = ground_recipe(run.recipe, run.recipe.adapters[number])
            inputs[number] = _grounded(replace(run, recipe=own, report=told, origins=()), fetched[number])
    return tuple(inputs)


def _counting(run: Run, before: int, total: int) -> Callable[[str, int, int], None]:
    """The report of one grounding among several: modules of all of them."""
    run.report("ground", before, total)

    def told(stage: str, done: int, _: int) -> None:
        if stage == "merge":
            run.report("ground", before + done, total)

    return told


def _grounded(run: Run, adapter: Digest) -> Digest:
    """run: of the recipe of one grounding."""
    known = run.services.index.result(run.recipe.digest)
    if known is not None and ingest.complete(run.services, known.target):
        return known.target
    assert run.recipe.base_model is not None
    fetching = FetchTask(run.recipe.base_model, "base", adapter)
    ((_, base),) = run.executor.run([fetching], stop=run.stop)
    pair = (adapter, base.digest)
    artefact = assemble(run, pair, merge(run, pair))
    publish(run.services, run.recipe, artefact)
    return artefact


def learn(run: Run, inputs: Sequence[Digest]) -> dict[str, Any] | None:
    """The last checkpoint of the training, if the method needs one; begun where an earlier attempt was interrupted."""
    recipe, jobs = run.recipe, run.services.jobs
    if not recipe.tasks:
        return None
    assert recipe.base_model is not None
    fetching = FetchTask(recipe.base_model, "base")
    ((_, base),) = run.executor.run([fetching], stop=run.stop)
    checkpoint = jobs.checkpoint(recipe.digest)
    while checkpoint is None or not _progress(run, checkpoint)["done"]:
        task = LearnTask(recipe.to_json(), tuple(inputs), base.digest, checkpoint.digest if checkpoint else None)
        ((_, checkpoint),) = run.executor.run([task], stop=run.stop)
        jobs.set_checkpoint(recipe.digest, checkpoint)
    return checkpoint.to_json()


def _progress(run: Run, checkpoint: Descriptor) -> Mapping[str, Any]:
    training: Mapping[str, Any] = adapters.read_json(run.services.blobs, checkpoint.digest)["training"]
    run.report("learn", training["step"], training["steps"])
    return training


def learned_table(services: Services, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What merging needs to know of a training."""
    return {"table": adapters.read_json(services.blobs, Descriptor.from_json(checkpoint).digest)["table"]}


def survey(run: Run, inputs: Sequence[Digest], step: Callable[[Callable[[], Any]], Any]) -> Any:
    """What the method knows of the whole adapters before it merges a module; None if it asks for nothing.

    step: makes a round durable. A round that is interrupted is run again from its first module: findings are no shards, they
    are pooled as they come, and nothing but what a finished round has settled is kept.
    """
    method = _method(run)
    known: Any = None
    while method.unsettled(known):
        known = step(partial(_round, run, inputs, method, known))
    return known


def merge(run: Run, inputs: Sequence[Digest], known: Any = None) -> tuple[Descriptor, ...]:
    """All shards in order; those that an earlier attempt has finished, and whose blobs are still whole, are not run again.

    A basis of the adapters' own bytes has none: it is joined in one go.
    """
    method = _method(run)
    if method.produces == "basis" and cast(BasisMethod, method).verbatim:
        return ()
    planned = _plan(run, inputs, known)
    _check_extras(run, inputs, planned)
    finished = _finished(run, planned)
    done = sum(len(planned.shards[number]) for number in finished)
    run.report("merge", done, len(planned.modules))
    kind: Any = EncodeTask if method.produces == "basis" else ShardTask
    todo = [_task(kind, run, inputs, planned, n, known) for n in range(len(planned.shards)) if n not in finished]
    extra: dict[str, Any] = {"group": _group(run)} if kind is EncodeTask else {"origins": run.origins}
    todo = [replace(task, **extra) for task in todo]
    for task, shard in run.executor.run(todo, stop=run.stop):
        run.services.jobs.add_shard(run.recipe.digest, task.number, shard)
        finished[task.number] = shard
        done += len(task.modules)
        run.report("merge", done, len(planned.modules))
    return tuple(finished[number] for number in range(len(planned.shards)))


def _check_extras(run: Run, inputs: Sequence[Digest], planned: Plan) -> None:
    """Raises UnsupportedAdapter, before anything is merged, for extras that cannot be mixed as the recipe says."""
    if run.recipe.models is None and not is_grounding(run.recipe):
        specs = [run.spec(digest) for digest in run.origins or inputs]
        extras.combined(run.recipe, extras.merged_specs(run.recipe, specs), planned.weights)


def assemble(
    run: Run,
    inputs: Sequence[Digest],
    shards: Sequence[Descriptor],
    checkpoint: Mapping[str, Any] | None = None,
    known: Any = None,
) -> Digest:
    """The manifest of the adapter, or of the basis."""
    planned = _plan(run, inputs, known)
    run.report("assemble", 0, 1)
    kind: Any = JoinTask if _method(run).produces == "basis" else AssembleTask
    task = kind(run.recipe.to_json(), tuple(inputs), planned.base_model, tuple(shards), origins=run.origins)
    if checkpoint is not None:
        task = replace(task, learned=Descriptor.from_json(checkpoint).digest)
    if run.recipe.models is not None:
        task = replace(task, known=known)
    ((_, descriptor),) = run.executor.run([task], stop=run.stop)
    run.report("assemble", 1, 1)
    return descriptor.digest


def publish(services: Services, recipe: Recipe, artefact: Digest, *, attempt: int | None = None) -> bool:
    """Make the result known under its recipe; the shards are no longer needed.

    attempt: of the job that ends as succeeded with it, at once; False if that job is final already, for then it was cancelled,
    and nothing is made known. None if there is no job.
    """
    record, parents = _record(services, recipe, artefact)
    if attempt is not None:
        return services.jobs.succeed(recipe.digest, attempt, record, parents)
    services.index.publish(recipe.digest, record, parents)
    services.jobs.drop_shards(recipe.digest)
    return True


def _record(services: Services, recipe: Recipe, artefact: Digest) -> tuple[AdapterRecord | BasisRecord, tuple[Digest, ...]]:
    """The index row of a result, and what it was made of: adapters, and the basis that a basis extends."""
    if recipe.models is not None or is_grounding(recipe) or catalogue.find(recipe.method).produces == "adapter":
        opened = OpenAdapter.open(services.blobs, artefact)
        merged = ingest.describe_merged(services, opened.manifest, artefact, opened.spec)
        return replace(merged, restricted=_restricted(services, recipe, merged)), opened.manifest.inputs
    basis = bases.OpenBasis.open(services.blobs, artefact)
    extends = Digest.parse(recipe.extends) if recipe.extends else None
    modules = {name for group in basis.contents["groups"] for task in group["tasks"] for name in task["modules"]}
    described = ingest.describe_basis(services, basis.manifest, artefact, len(modules), extends)
    record = replace(described, restricted=_restricted(services, recipe, described))
    return record, (*([extends] if extends else []), *basis.manifest.inputs)


def _restricted(services: Services, recipe: Recipe, record: ingest.Restricted) -> tuple[str, ...]:
    """What a result is restricted by: its inputs, and the data and the base model that it was learned or grounded with."""
    data = tuple(source for task in recipe.tasks for source in task.restricted)
    base: tuple[str, ...] = ()
    if recipe.tasks and recipe.base_model is not None:
        base = base_models.restrictions(services, base_models.obtain(services, recipe.base_model))
    elif recipe.base_model is not None:
        base = base_models.restricted_by(services, recipe.base_model)
    return tuple(dict.fromkeys((*record.restricted, *data, *base)))


def _plan(run: Run, inputs: Sequence[Digest], known: Any = None) -> Plan:
    """The plan for inputs that are in the store, read from their headers. Raises what makes the merge impossible.

    known: of an extraction what its survey has settled, without which the plan is that of the survey.
    """
    services, recipe = run.services, run.recipe
    if recipe.models is not None:
        return plan_models(services, recipe, inputs, known)
    if is_grounding(recipe):
        adapter, base = inputs
        with open_weights(services, base, run.spec(adapter)) as weights:
            return plan_grounding(recipe, completed(run.spec(adapter), weights), shard_bytes=services.settings.shard_bytes)
    return _plan_merge(services, recipe, extras.merged_specs(recipe, [run.spec(digest) for digest in inputs]))


def plan_models(services: Services, recipe: Recipe, models: Sequence[Digest], known: Any = None) -> Plan:
    """Of an extraction; known as of `_plan`."""
    with open_pair(services, recipe, models) as pair:
        return plan_extraction(recipe, pair, known, shard_bytes=services.settings.shard_bytes)


def preview(services: Services, recipe: Recipe, fetched: Sequence[Digest]) -> None:
    """Refuse what can be refused of a merge whose adapters are in the store, before anything is grounded.

    Raises what `to_ground` and the plan raise; and, where the base model is in the store too, what `completed` does.
    """
    specs = [OpenAdapter.open(services.blobs, digest).spec for digest in fetched]
    chosen = to_ground(recipe, specs)
    specs = extras.merged_specs(recipe, specs)
    extras.check(recipe, specs)
    own = tuple(specs)
    base = base_models.held(services, recipe.base_model) if recipe.base_model else None
    for number in (number for number, needed in enumerate(chosen) if needed and base is not None):
        assert base is not None
        with open_weights(services, base, specs[number]) as weights:
            specs[number] = completed(specs[number], weights)
    if all(module.shape is not None for spec in compress(specs, chosen) for module in spec.modules):
        rule = recipe.base_rank or DEFAULT_RULE
        planned = _plan_merge(services, recipe, [expected(s, rule) if n else s for s, n in zip(specs, chosen, strict=True)])
        extras.combined(recipe, own, planned.weights)


def _plan_merge(services: Services, recipe: Recipe, specs: Sequence[AdapterSpec]) -> Plan:
    planned = plan(recipe, specs, shard_bytes=services.settings.shard_bytes)
    if recipe.extends is not None:
        parent = bases.OpenBasis.open(services.blobs, Digest.parse(recipe.extends))
        agree([*parent.shapes, planned.modules])
        agreed_layers([*parent.layers, (planned.modules, planned.layers)])
        both = [parent.manifest.base_model, planned.base_model]
        return replace(planned, base_model=common_base(both, allow_mismatch=recipe.allow_base_mismatch))
    return planned


def run_all(run: Run) -> Digest:
    """The whole merge in this process, without a job database: what the command line does when there is no server."""
    fetched = fetch(run)
    run, inputs = replace(run, origins=fetched), ground(run, fetched)
    checkpoint = learn(run, inputs)
    known = learned_table(run.services, checkpoint) if checkpoint else survey(run, inputs, lambda body: body())
    adapter = assemble(run, inputs, merge(run, inputs, known), checkpoint, known)
    publish(run.services, run.recipe, adapter)
    return adapter


def _method(run: Run) -> MergeMethod | BasisMethod | Extract | Ground:
    if run.recipe.models is not None:
        return method_of(run.recipe)
    if is_grounding(run.recipe):
        return Ground()
    return catalogue.build(run.recipe.method, run.recipe.parameters)


def _round(run: Run, inputs: Sequence[Digest], method: Method, known: Any) -> Any:
    planned = _plan(run, inputs)
    tasks = [_task(SurveyTask, run, inputs, planned, n, known) for n in range(len(planned.shards))]
    return method.settle(reduce(method.pool, _findings(run, tasks, len(planned.modules))), known)


def _findings(run: Run, tasks: Sequence[SurveyTask], modules: int) -> Iterator[Any]:
    """In the order of the tasks, though an executor may answer in any.

    They are read at once, so nothing has to lease their blobs against garbage collection: its grace is for such a moment.
    """
    done, following, early = 0, 0, dict[int, Any]()
    run.report("survey", 0, modules)
    for task, blob in run.executor.run(tasks, stop=run.stop):
        early[task.number] = adapters.read_json(run.services.blobs, blob.digest)
        done += len(task.modules)
        run.report("survey", done, modules)
        while following in early:
            yield early.pop(following)
            following += 1


def _finished(run: Run, planned: Plan) -> dict[int, Descriptor]:
    known = run.services.jobs.shards(run.recipe.digest)
    cut = dict(enumerate(planned.shards))
    return {number: shard for number, shard in known.items() if _is_whole(run.services, shard, cut.get(number, ()))}


def _is_whole(services: Services, shard: Descriptor, modules: Sequence[str]) -> bool:
    """All there, and of just these modules: an earlier run with another BRAID_SHARD_BYTES has cut the merge differently."""
    if services.blobs.stat(shard.digest) != shard.size_bytes:
        return False
    tensors, merged = adapters.describe_shard(services.blobs, shard)
    return merged == tuple(modules) and services.blobs.stat(tensors.digest) == tensors.size_bytes


def _task(kind: type[T], run: Run, inputs: Sequence[Digest], planned: Plan, number: int, known: Any) -> T:
    """The task of this kind over the modules of one shard."""
    modules = {name: planned.modules[name] for name in planned.shards[number]}
    weights = {name: planned.weights[name] for name in modules}
    return kind(run.recipe.to_json(), tuple(inputs), modules, weights, number, known)


def _group(run: Run) -> int:
    """The number of the new adapters' group: after those of the basis that is extended."""
    if run.recipe.extends is None:
        return 0
    return len(bases.OpenBasis.open(run.services.blobs, Digest.parse(run.recipe.extends)).contents["groups"])


def to_json(shards: Sequence[Descriptor]) -> list[dict[str, Any]]:
    return [shard.to_json() for shard in shards]


def from_json(shards: Sequence[Mapping[str, Any]]) -> tuple[Descriptor, ...]:
    return tuple(Descriptor.from_json(shard) for shard in shards)
