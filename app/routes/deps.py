"""What every route may ask for: the services, the queue, and the caller's Hub token."""

from typing import Annotated, cast

from fastapi import Depends, Header, Query, Request

from app.engine.queue import JobQueue
from app.services import Services
from storage.digest import Digest


def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


def get_queue(request: Request) -> JobQueue:
    return cast(JobQueue, request.app.state.queue)


def get_token(x_hub_token: Annotated[str | None, Header(description="your own Hub token; never stored")] = None) -> str | None:
    return x_hub_token or None


UsesServices = Annotated[Services, Depends(get_services)]
UsesQueue = Annotated[JobQueue, Depends(get_queue)]
UsesToken = Annotated[str | None, Depends(get_token)]
Limit = Annotated[int, Query(ge=1, le=200, description="entries per page")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before")]


def parse_cursor(cursor: str | None) -> tuple[float, str] | None:
    """`<created_at>|<id>`. Raises BadDigest for anything that we did not hand out."""
    if cursor is None:
        return None
    created_at, _, identity = cursor.partition("|")
    try:
        return float(created_at), str(Digest.parse(identity))
    except ValueError:
        return 0.0, str(Digest.parse(cursor))


def make_cursor(created_at: float, identity: Digest) -> str:
    return f"{created_at!r}|{identity}"
