"""From records to what callers see. Links are paths, so they hold behind any proxy."""

import json
from typing import Any

from app.adapters import read_manifest
from app.schemas import AdapterView, JobView, MethodView, PostStepView, Problem, Progress, ResultView, utc
from app.services import Services
from merge_algos import methods, post
from storage.digest import Digest
from storage.index import AdapterRecord
from storage.jobs import Job


def job_view(services: Services, job: Job, *, detail: bool = False) -> JobView:
    """detail: with the whole certificate, for one job; lists and events go without."""
    result = services.index.result(job.id) if job.state == "succeeded" else None
    shown = ResultView(kind=result.kind, id=str(result.target), links=adapter_links(services, result.target)) if result else None
    return JobView(
        id=str(job.id),
        state=job.state,
        method=job.method,
        attempt=job.attempt,
        progress=Progress(stage=job.stage, done=job.done, total=job.total),
        result=shown,
        error=Problem(**job.error) if job.error else None,
        certificate=certificate(services, result.target) if result and detail else None,
        links={"self": f"/jobs/{job.id}", "events": f"/jobs/{job.id}/events"},
        created_at=utc(job.created_at),
        finished_at=utc(job.finished_at) if job.finished_at else None,
    )


def certificate(services: Services, adapter: Digest) -> dict[str, Any] | None:
    """The report of a merged adapter; None for one that was imported, or whose blobs were deleted."""
    if services.blobs.stat(adapter) is None:
        return None
    report = read_manifest(services.blobs, adapter).report
    if report is None or services.blobs.stat(report.digest) is None:
        return None
    with services.blobs.open(report.digest) as stream:
        document: dict[str, Any] = json.load(stream)
    return document


def adapter_view(services: Services, record: AdapterRecord) -> AdapterView:
    """An adapter with the first of its names. What a private one is called is no secret here, its files are."""
    names = services.index.names_of(record.id)
    merged = record.source.kind == "merge"
    return AdapterView(
        id=str(record.id),
        name=names[0] if names else None,
        base_model=record.base_model,
        modules=record.modules,
        rank=record.rank,
        size_bytes=record.size_bytes,
        source=record.source.kind if merged or not record.source.reference else record.source.reference,
        licence=record.licence,
        recipe=record.source.reference if merged else None,
        inputs=[str(parent) for parent in services.index.inputs(record.id)],
        links=adapter_links(services, record.id),
        created_at=utc(record.created_at),
    )


def adapter_links(services: Services, adapter: Digest) -> dict[str, str]:
    own = {"self": f"/adapters/{adapter}"}
    if services.blobs.stat(adapter) is None:
        return own
    parts = read_manifest(services.blobs, adapter).parts
    return own | {name: f"/adapters/{adapter}/{name}" for name in parts}


def method_view(name: str, parameters: dict[str, Any]) -> MethodView:
    """parameters: the JSON Schema of the method's fields."""
    method = methods.find(name)
    return MethodView(
        name=method.name,
        summary=(method.__doc__ or "").strip().partition("\n")[0],
        paper=method.paper,
        version=method.version,
        needs=method.needs,
        memory=method.memory,
        min_adapters=method.min_adapters,
        max_adapters=method.max_adapters,
        default_weight=method.default_weight,
        breaks=dict(method.breaks),
        parameters=parameters,
    )


def post_step_view(name: str, parameters: dict[str, Any]) -> PostStepView:
    """parameters: the JSON Schema of the step's fields."""
    step = post.find(name)
    summary = (step.__doc__ or "").strip().partition("\n")[0]
    return PostStepView(name=step.name, summary=summary, paper=step.paper, version=step.version, parameters=parameters)
