"""Reversible bases: what they hold, one task or a mix out of them, one adapter more into them."""

import asyncio
from threading import BoundedSemaphore
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import FileResponse

from app import ingest
from app.bases import read_basis
from app.engine.queue import JobQueue
from app.errors import InvalidField, UnknownBasis, UnknownPart
from app.reconstruct import Rebuilt, held, reconstruct
from app.resolve import resolve_extension
from app.routes.adapters import FILES, send, send_part
from app.routes.deps import Cursor, Limit, UsesQueue, UsesServices, UsesSlots, UsesToken, make_cursor, parse_cursor, require_json
from app.schemas import BasisList, BasisView, ExtendRequest, JobView, Reconstruction, ReconstructRequest, problems
from app.services import Services
from app.views import basis_view, job_view, reconstruction_view
from merge_algos.rank import RankRule
from storage.digest import Digest
from storage.index import BasisRecord
from storage.jobs import Job

router = APIRouter(prefix="/rmm", tags=["bases"])


@router.get("")
def list_bases(services: UsesServices, limit: Limit = 50, cursor: Cursor = None) -> BasisList:
    """Newest first, a page at a time."""
    found = services.index.page_of_bases(limit=limit + 1, after=parse_cursor(cursor))
    page, more = found[:limit], len(found) > limit
    following = make_cursor(page[-1].created_at, page[-1].id) if more else None
    whole = [record for record in page if ingest.complete(services, record.id)]  # one that lost blobs cannot be described
    return BasisList(data=[basis_view(services, record) for record in whole], next=following)


@router.get("/{basis_id}")
def show_basis(basis_id: str, services: UsesServices) -> BasisView:
    """Its tasks with what each lost, and its bytes beside those of the adapters it was made from."""
    return basis_view(services, _get(services, basis_id))


@router.delete("/{basis_id}", status_code=204)
def forget_basis(basis_id: str, services: UsesServices) -> None:
    """Forget a basis and the results that led to it. `braid store gc` frees the bytes."""
    digest = Digest.parse(basis_id)
    if services.index.get_basis(digest) is None:
        raise UnknownBasis(basis_id)
    services.index.forget(digest)


@router.post("/{basis_id}/reconstruct", dependencies=[Depends(require_json)], responses=problems(401, 403, 415, 502, 507))
def reconstruct_adapter(
    basis_id: str, asked: ReconstructRequest, services: UsesServices, slots: UsesSlots, token: UsesToken
) -> Reconstruction:
    """The adapter of one task, or a mix: the exact weighted sum of what the basis holds, or its best approximation at a rank."""
    basis = _get(services, basis_id)
    ingest.check_access(services, basis, token=token)
    weights = _weights(asked)
    rebuilt = _rebuilt(services, slots, basis, weights, _rank(asked))
    if asked.name is not None:
        services.index.set_name(asked.name, rebuilt.record.id)
    return reconstruction_view(services, rebuilt, weights)


@router.post(
    "/{basis_id}/extend",
    status_code=202,
    responses={200: {"model": JobView, "description": "the result exists"}, **problems(401, 403, 409, 415, 502, 507)},
    dependencies=[Depends(require_json)],
)
async def extend(
    basis_id: str, asked: ExtendRequest, response: Response, services: UsesServices, queue: UsesQueue, token: UsesToken
) -> JobView:
    """A new basis with one adapter more. What the basis already holds stays byte for byte, so no task loses anything."""
    job = await asyncio.to_thread(_extend, services, queue, basis_id, asked, token)
    response.status_code = 200 if job.state == "succeeded" else 202
    response.headers["Location"] = f"/jobs/{job.id}"
    return await asyncio.to_thread(job_view, services, job, detail=True)


@router.get("/{basis_id}/tasks/{task}/{part}", response_class=FileResponse, responses=FILES)
@router.head("/{basis_id}/tasks/{task}/{part}", response_class=FileResponse, responses=FILES)
def download_task(
    request: Request,
    basis_id: str,
    task: str,
    part: str,
    services: UsesServices,
    slots: UsesSlots,
    token: UsesToken,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """One file of one task's adapter, which is reconstructed if it was not before."""
    basis = _get(services, basis_id)
    ingest.check_access(services, basis, token=token)
    rebuilt = _rebuilt(services, slots, basis, {task: 1.0}, RankRule())
    return send_part(request, services, rebuilt.record, part, if_none_match)


@router.get("/{basis_id}/{part}", response_class=FileResponse, responses=FILES)
@router.head("/{basis_id}/{part}", response_class=FileResponse, responses=FILES)
def download_basis(
    request: Request,
    basis_id: str,
    part: str,
    services: UsesServices,
    token: UsesToken,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """`basis.safetensors`, `basis.json` (what lies where in it) or `report.json`."""
    basis = _get(services, basis_id)
    ingest.check_access(services, basis, token=token)
    blob = read_basis(services.blobs, basis.id).parts.get(part)
    if blob is None:
        raise UnknownPart(part)
    return send(request, services, blob, part, if_none_match, private=bool(basis.restricted))


def _rebuilt(
    services: Services, slots: BoundedSemaphore, basis: BasisRecord, weights: dict[str, float], rule: RankRule
) -> Rebuilt:
    """What is in the store is answered at once; only work waits for its turn."""
    known = held(services, basis, weights, rule)
    if known is not None:
        return known
    with slots:
        return reconstruct(services, basis, weights, rule)


def _extend(services: Services, queue: JobQueue, basis_id: str, asked: ExtendRequest, token: str | None) -> Job:
    basis = _get(services, basis_id)
    ingest.check_access(services, basis, token=token)
    return queue.submit(resolve_extension(basis, asked, services, token=token))


def _weights(asked: ReconstructRequest) -> dict[str, float]:
    if (asked.task is None) == (asked.weights is None):
        raise InvalidField("task", "give either task or weights")
    if asked.task is not None:
        if asked.rank is not None:
            raise InvalidField("rank", "a task comes back at its own rank; for another, ask for weights")
        return {asked.task: 1.0}
    if not asked.weights:
        raise InvalidField("weights", "name at least one task")
    return {task: float(weight) for task, weight in asked.weights.items()}


def _rank(asked: ReconstructRequest) -> RankRule:
    if asked.rank is None or isinstance(asked.rank, int):
        return RankRule(max=asked.rank)
    return RankRule(max=asked.rank.max, energy=asked.rank.energy)


def _get(services: Services, basis_id: str) -> BasisRecord:
    record = services.index.get_basis(Digest.parse(basis_id))
    if record is None or not ingest.complete(services, record.id):
        raise UnknownBasis(basis_id)
    return record
