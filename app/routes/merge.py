"""POST /merge: a recipe becomes a job, or is answered with the job it already was."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Response

from app.engine.queue import JobQueue
from app.recipe import Recipe
from app.resolve import resolve
from app.routes.deps import UsesQueue, UsesServices, UsesToken, require_json
from app.schemas import JobView, MergeRequest, problems
from app.services import Services
from app.views import job_view
from storage.jobs import FINAL, Job

router = APIRouter(tags=["merge"])

Prefer = Annotated[str | None, Header(description="`wait=N`: answer when the job is done, after N seconds at most")]

_POLL_S = 0.1
_MAX_WAIT_S = 60.0


@router.post(
    "/merge",
    status_code=202,
    responses={200: {"model": JobView, "description": "the result exists"}, **problems(401, 403, 409, 415, 502, 507)},
    dependencies=[Depends(require_json)],
)
async def merge(
    request: MergeRequest,
    response: Response,
    services: UsesServices,
    queue: UsesQueue,
    token: UsesToken,
    prefer: Prefer = None,
) -> JobView:
    """Merge adapters. The same request twice is the same job: 202 while it is under way, 200 once its result exists."""
    job = await asyncio.to_thread(submit, request, services, queue, token)
    return await answered(job, response, services, prefer)


async def answered(job: Job, response: Response, services: Services, prefer: str | None) -> JobView:
    """The job, after as long a wait as the caller prefers: 200 if it has succeeded, else 202."""
    job = await _wait(job, services, wait_s(prefer))
    response.status_code = 200 if job.state == "succeeded" else 202
    response.headers["Location"] = f"/jobs/{job.id}"
    return await asyncio.to_thread(job_view, services, job, detail=True)


def submit(request: MergeRequest, services: Services, queue: JobQueue, token: str | None) -> Job:
    return submitted(resolve(request, services, token=token), request.name, services, queue)


def submitted(recipe: Recipe, name: str | None, services: Services, queue: JobQueue) -> Job:
    """The job of a recipe, whose result is to be known by this name as well, if there is one."""
    if name is not None:
        services.index.request_name(name, recipe.digest)
    return queue.submit(recipe)


async def _wait(job: Job, services: Services, seconds: float) -> Job:
    ends_at = asyncio.get_running_loop().time() + seconds
    while job.state not in FINAL and asyncio.get_running_loop().time() < ends_at:
        await asyncio.sleep(_POLL_S)
        current = await asyncio.to_thread(services.jobs.get, job.id)
        job = current or job
    return job


def wait_s(prefer: str | None) -> float:
    """Seconds of RFC 7240's `Prefer: wait=N`, at most a minute; other preferences are ignored, as the RFC asks."""
    for preference in (prefer or "").split(","):
        name, _, value = preference.strip().partition("=")
        if name.lower() == "wait" and value.isascii() and value.isdecimal():
            return min(float(value[:6]), _MAX_WAIT_S)
    return 0.0
