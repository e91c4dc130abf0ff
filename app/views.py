"""From records to what callers see. Links are paths, so they hold behind any proxy."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from app.adapters import read_json, read_manifest
from app.bases import read_basis
from app.reconstruct import Rebuilt
from app.report import read_report
from app.schemas import (
    AdapterView,
    BasisView,
    DataView,
    JobView,
    Learning,
    MethodView,
    PostStepView,
    Problem,
    Progress,
    Reconstruction,
    ResultView,
    TaskView,
    utc,
)
from app.services import Services
from merge_algos import catalogue, post
from storage.digest import Digest
from storage.index import AdapterRecord, BasisRecord, Result
from storage.jobs import Job
from storage.materials import FileRecord


def job_view(services: Services, job: Job, *, detail: bool = False) -> JobView:
    """detail: with the whole certificate, for one job; lists and events go without."""
    result = services.index.result(job.id) if job.state == "succeeded" else None
    shown = ResultView(kind=result.kind, id=str(result.target), links=_links(services, result)) if result else None
    return JobView(
        id=str(job.id),
        state=job.state,
        method=job.method,
        attempt=job.attempt,
        progress=progress_view(services, job.id, job.stage, job.done, job.total),
        result=shown,
        error=Problem(**job.error) if job.error else None,
        learning=_learning(services, job.id) if detail else None,
        certificate=read_report(services.blobs, result.target) if result and detail else None,
        links=_job_links(job),
        created_at=utc(job.created_at),
        finished_at=utc(job.finished_at) if job.finished_at else None,
    )


def _job_links(job: Job) -> dict[str, str]:
    own = f"/jobs/{job.id}"
    learns = {"curve.svg": f"{own}/curve.svg"} if job.recipe.get("tasks") else {}
    return {"self": own, "events": f"{own}/events", **learns}


def progress_view(services: Services, job: Digest, stage: str, done: int, total: int) -> Progress:
    """Of a job that learns with loss and score: those of the last look at the held-out rows up to this step."""
    training = training_of(services, job) if stage == "learn" else None
    points = [point for point in training["curve"] if point["step"] <= done] if training else []
    latest = points[-1] if points else {"loss": None, "score": None}
    return Progress(stage=stage, done=done, total=total, loss=latest["loss"], score=latest["score"])


def training_of(services: Services, job: Digest) -> Mapping[str, Any] | None:
    """How far a job has learned, or how it did; None of one that does not learn, or has not begun to."""
    checkpoint, result = _checkpoint(services, job), services.index.result(job)
    if checkpoint is not None:
        training: Mapping[str, Any] = checkpoint["training"]
        return training
    return (read_report(services.blobs, result.target) or {}).get("training") if result else None


def _learning(services: Services, job: Digest) -> Learning | None:
    found = _checkpoint(services, job)
    return Learning(**found["training"], best=found["table"]) if found else None


def _checkpoint(services: Services, job: Digest) -> Mapping[str, Any] | None:
    """The last one of a job that is under way, failed or cancelled; a succeeded one's certificate has its training."""
    checkpoint = services.jobs.checkpoint(job)
    if checkpoint is None or services.blobs.stat(checkpoint.digest) is None:
        return None
    found: Mapping[str, Any] = read_json(services.blobs, checkpoint.digest)
    return found


def adapter_view(services: Services, record: AdapterRecord) -> AdapterView:
    """An adapter with the first of its names. What a private one is called is no secret here, its files are."""
    names = services.index.names_of(record.id)
    merged = record.source.kind in ("merge", "basis", "conversion", "extract", "ground")
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


def basis_view(services: Services, record: BasisRecord) -> BasisView:
    """A basis that is whole, with the first of its names. As of an adapter: its files are private, not what it is."""
    names = services.index.names_of(record.id)
    report = read_report(services.blobs, record.id) or {}
    totals = report["totals"]
    return BasisView(
        id=str(record.id),
        name=names[0] if names else None,
        base_model=record.base_model,
        modules=record.modules,
        codecs=dict(Counter(module["codec"] for module in report["modules"])) or {"lossless": record.modules},
        input_bytes=totals["input_bytes"],
        size_bytes=totals["size_bytes"],
        file_bytes=totals["file_bytes"],
        recipe=record.recipe,
        extends=report["recipe"].get("extends"),
        tasks=[_task_view(record, task) for task in report["tasks"]],
        links=basis_links(services, record.id),
        created_at=utc(record.created_at),
    )


def _task_view(record: BasisRecord, task: Mapping[str, Any]) -> TaskView:
    parts = ("adapter_model.safetensors", "adapter_config.json")
    links = {part: f"/rmm/{record.id}/tasks/{task['name']}/{part}" for part in parts}
    return TaskView(name=task["name"], input=task["input"], relative_error=task["relative_error"], links=links)


def basis_links(services: Services, basis: Digest) -> dict[str, str]:
    own = {"self": f"/rmm/{basis}", "reconstruct": f"/rmm/{basis}/reconstruct", "extend": f"/rmm/{basis}/extend"}
    if services.blobs.stat(basis) is None:
        return own
    return own | {name: f"/rmm/{basis}/{name}" for name in read_basis(services.blobs, basis).parts}


def reconstruction_view(services: Services, rebuilt: Rebuilt, weights: Mapping[str, float]) -> Reconstruction:
    """The adapter, and what was lost of it."""
    alone = list(weights.values()) == [1.0]
    return Reconstruction(
        adapter=adapter_view(services, rebuilt.record),
        task=next(iter(weights)) if alone else None,
        weights=dict(weights),
        relative_error=rebuilt.report["relative_error"],
        rounding_error=rebuilt.report["rounding_error"],
    )


def data_view(record: FileRecord) -> DataView:
    """A data file. As of an adapter: what a private one is called is no secret here, what it holds is never shown."""
    return DataView(
        id=str(record.id),
        kind=record.kind,
        rows=record.rows,
        columns=list(record.columns),
        size_bytes=record.size_bytes,
        source=record.source or None,
        links={"self": f"/data/{record.id}"},
        created_at=utc(record.created_at),
    )


def _links(services: Services, result: Result) -> dict[str, str]:
    return (adapter_links if result.kind == "adapter" else basis_links)(services, result.target)


def method_view(name: str, parameters: dict[str, Any]) -> MethodView:
    """parameters: the JSON Schema of the method's fields."""
    method = catalogue.find(name)
    return MethodView(
        name=method.name,
        summary=(method.__doc__ or "").strip().partition("\n")[0],
        paper=method.paper,
        version=method.version,
        needs=method.needs,
        memory=method.memory,
        produces=method.produces,
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
