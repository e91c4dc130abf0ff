"""For operators: is it alive, can it work, what does it do."""

from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.errors import NotReady
from app.routes.deps import UsesQueue, UsesServices
from app.schemas import Health, problems

router = APIRouter(tags=["operations"])


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses=problems(503))
def readyz(services: UsesServices, queue: UsesQueue) -> Health:
    """The index, the job database and the store can be used; else 503 naming the part."""
    checks: dict[str, Callable[[], object]] = {
        "index": lambda: services.jobs.page(limit=1),
        "job database": queue.client.check_connection,
        "store": lambda: services.blobs.put([b""], media_type="application/octet-stream"),
    }
    for part, check in checks.items():
        try:
            check()
        except Exception as error:
            raise NotReady(part, type(error).__name__) from error
    return Health(status="ok")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(generate_latest(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)
