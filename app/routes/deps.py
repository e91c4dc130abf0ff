"""What every route may ask for: the services, the queue, and the caller's Hub token."""

import math
from threading import BoundedSemaphore
from typing import Annotated, cast

from fastapi import Depends, Header, Query, Request

from app.engine.queue import JobQueue
from app.errors import InvalidField, UnsupportedMediaType
from app.services import Services
from storage.digest import Digest
from storage.errors import BadDigest


def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def get_queue(request: Request) -> JobQueue:
    return cast(JobQueue, request.app.state.queue)


def get_slots(request: Request) -> BoundedSemaphore:
    """As many reconstructions at once as do not crowd out the rest of the API."""
    return cast(BoundedSemaphore, request.app.state.slots)


def get_token(x_hub_token: Annotated[str | None, Header(description="your own Hub token; never stored")] = None) -> str | None:
    return x_hub_token or None


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def require_json(request: Request) -> None:
    """Raises UnsupportedMediaType. FastAPI alone would call a form "not an object"."""
    if media_type(request) != "application/json":
        raise UnsupportedMediaType(media_type(request), ("application/json",))


UsesServices = Annotated[Services, Depends(get_services)]
UsesQueue = Annotated[JobQueue, Depends(get_queue)]
UsesSlots = Annotated[BoundedSemaphore, Depends(get_slots)]
UsesToken = Annotated[str | None, Depends(get_token)]
Limit = Annotated[int, Query(ge=1, le=200, description="entries per page")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before")]


def parse_cursor(cursor: str | None) -> tuple[float, str] | None:
    """`<created_at>|<id>`. Raises InvalidField for what `make_cursor` never writes."""
    if cursor is None:
        return None
    created_at, _, identity = cursor.partition("|")
    try:
        seen = float(created_at), str(Digest.parse(identity))
    except (ValueError, BadDigest):
        seen = None
    if seen is None or not math.isfinite(seen[0]):
        raise InvalidField("query.cursor", "it is not the `next` of a page")
    return seen


def make_cursor(created_at: float, identity: Digest) -> str:
    return f"{created_at!r}|{identity}"
