"""Jobs: list, look, follow, cancel."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from app import ingest
from app.curve import curve_svg
from app.errors import UnknownJob, UnknownPart
from app.routes.deps import Cursor, Limit, UsesQueue, UsesServices, UsesToken, make_cursor, parse_cursor
from app.schemas import JobList, JobView, problems
from app.services import Services
from app.views import job_view, progress_view, training_of
from storage.digest import Digest
from storage.errors import HubError
from storage.jobs import FINAL, Job, JobEvent

router = APIRouter(tags=["jobs"])

SVG = "image/svg+xml"
_POLL_S = 0.2
_KEEP_ALIVE_S = 15


@router.get("/jobs")
def list_jobs(services: UsesServices, limit: Limit = 50, cursor: Cursor = None) -> JobList:
    """Newest first, a page at a time."""
    found = services.jobs.page(limit=limit + 1, after=parse_cursor(cursor))
    page, more = found[:limit], len(found) > limit
    return JobList(
        data=[job_view(services, job) for job in page], next=make_cursor(page[-1].created_at, page[-1].id) if more else None
    )


@router.get("/jobs/{job_id}")
def show_job(job_id: str, services: UsesServices, token: UsesToken) -> JobView:
    """State, progress, and the certificate or the problem it ended with.

    The certificate of a merge of private adapters is for those who may read them; for others it is null.
    """
    job = _get(services, job_id)
    return job_view(services, job, detail=_may_read_result(services, job, token))


@router.get("/jobs/{job_id}/curve.svg", response_class=Response, responses={200: {"content": {SVG: {}}}, **problems(404)})
def draw_curve(job_id: str, services: UsesServices, token: UsesToken) -> Response:
    """Of a job that learns: its losses against the steps, as a picture, while it runs and afterwards."""
    job = _get(services, job_id)
    training = training_of(services, job.id) if _may_read_result(services, job, token) else None
    if training is None:
        raise UnknownPart("curve.svg")
    return Response(curve_svg(training), media_type=SVG)


@router.delete("/jobs/{job_id}")
def cancel_job(job_id: str, services: UsesServices, queue: UsesQueue) -> JobView:
    """Cancel: what runs is killed. A job that is already final stays as it is, so asking twice is harmless."""
    queue.cancel(_get(services, job_id))
    return job_view(services, _get(services, job_id))


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse)
async def follow_job(
    job_id: str,
    services: UsesServices,
    last_event_id: Annotated[str | None, Header(description="resume after this event")] = None,
) -> EventSourceResponse:
    """Server-sent events: queued, running, progress, and the final state, after which the stream ends."""
    job = await asyncio.to_thread(_get, services, job_id)
    after = int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 16 else 0
    return EventSourceResponse(_events(services, job, after), ping=_KEEP_ALIVE_S)


async def _events(services: Services, job: Job, after: int) -> AsyncIterator[ServerSentEvent]:
    while True:
        # state first: what is logged after it was read is seen in the next round
        current = await asyncio.to_thread(services.jobs.get, job.id) or job
        for event in await asyncio.to_thread(services.jobs.events, job.id, after=after):
            after = event.number
            yield await asyncio.to_thread(_sse, services, job.id, event)
        if current.state in FINAL:
            return
        await asyncio.sleep(_POLL_S)


def _sse(services: Services, job: Digest, event: JobEvent) -> ServerSentEvent:
    """The job as it was at the event; the event that ended it carries its result or problem.

    The job is read anew: it may have ended after the round began, and no later round would tell.
    """
    view = job_view(services, _get(services, str(job)))
    if view.state != event.event or view.attempt != event.attempt:
        state = "running" if event.event == "progress" else event.event
        view = view.model_copy(
            update={"state": state, "attempt": event.attempt, "result": None, "error": None, "finished_at": None}
        )
    progress = progress_view(services, job, event.stage, event.done, event.total)
    shown = view.model_copy(update={"progress": progress})
    return ServerSentEvent(data=shown.model_dump_json(), event=event.event, id=str(event.number))


def _may_read_result(services: Services, job: Job, token: str | None) -> bool:
    result = services.index.result(job.id)
    record = (services.index.get(result.target) or services.index.get_basis(result.target)) if result else None
    try:
        if record is not None:
            ingest.check_access(services, record, token=token)
    except HubError:
        return False
    return True


def _get(services: Services, job_id: str) -> Job:
    job = services.jobs.get(Digest.parse(job_id))
    if job is None:
        raise UnknownJob(job_id)
    return job
