"""POST /extract: a LoRA out of a full fine-tune, as a job like a merge."""

import asyncio

from fastapi import APIRouter, Depends, Response

from app.engine.queue import JobQueue
from app.extract.request import resolve_extraction
from app.routes.deps import UsesQueue, UsesServices, UsesToken, require_json
from app.routes.merge import Prefer, answered, submitted
from app.schemas import ExtractRequest, JobView, problems
from app.services import Services
from storage.jobs import Job

router = APIRouter(tags=["extract"])


@router.post(
    "/extract",
    status_code=202,
    responses={200: {"model": JobView, "description": "the result exists"}, **problems(401, 403, 415, 502, 507)},
    dependencies=[Depends(require_json)],
)
async def extract(
    request: ExtractRequest,
    response: Response,
    services: UsesServices,
    queue: UsesQueue,
    token: UsesToken,
    prefer: Prefer = None,
) -> JobView:
    """Extract an adapter: the difference of a fine-tuned model and its base, each linear layer cut to a rank."""
    job = await asyncio.to_thread(_submit, request, services, queue, token)
    return await answered(job, response, services, prefer)


def _submit(request: ExtractRequest, services: Services, queue: JobQueue, token: str | None) -> Job:
    return submitted(resolve_extraction(request, services, token=token), request.name, services, queue)
