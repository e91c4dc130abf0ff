"""The application: routers, lifespan, error handlers, limits and metrics. No logic."""

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from threading import BoundedSemaphore
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from app.engine.queue import JobQueue
from app.errors import STATUS, make_problem, problem
from app.limits import BodyLimit
from app.metrics import JobMetrics, RequestMetrics
from app.routes import adapters, data, extract, health, jobs, merge, methods, rmm
from app.schemas import problems
from app.services import Services
from app.settings import Settings

log = logging.getLogger(__name__)

_RECONSTRUCTIONS = 2  # at once
_KINDS = {404: "not-found", 405: "method-not-allowed", 413: "body-too-large", 416: "range-not-satisfiable"}


class ProblemResponse(JSONResponse):
    """RFC 9457, in ASCII: what a caller sent and reads back here may be text that no encoding can hold."""

    media_type = "application/problem+json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def create_app(settings: Settings) -> FastAPI:
    """The API over one data directory. It enqueues and answers; the worker computes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = Services.open(settings)
        app.state.queue = JobQueue.open(app.state.services)
        app.state.slots = BoundedSemaphore(_RECONSTRUCTIONS)
        app.state.metrics.register(JobMetrics(app.state.services))
        yield
        app.state.queue.close()

    app = FastAPI(
        title="Braid",
        summary="Merge LoRA adapters, certified.",
        version="0.1.0",
        lifespan=lifespan,
        responses=problems(400, 404, 413, 422),
    )
    app.state.metrics = CollectorRegistry()
    for module in (merge, extract, jobs, adapters, data, rmm, methods, health):
        app.include_router(module.router)
    app.add_middleware(BodyLimit, upload_bytes=settings.max_upload_bytes)
    app.add_middleware(RequestMetrics, registry=app.state.metrics)
    _handle_errors(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    for kind in STATUS:
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(OSError, _answer_system)
    app.add_exception_handler(Exception, _answer)


async def _answer(_request: Request, error: Exception) -> ProblemResponse:
    return _respond(problem(error))


async def _answer_invalid(_request: Request, error: Exception) -> ProblemResponse:
    """Every field that is wrong, by its path; values are not repeated, they may be NaN or a secret."""
    assert isinstance(error, RequestValidationError)
    wrong = [{"field": ".".join(str(part) for part in e["loc"]), "detail": e["msg"]} for e in error.errors()]
    malformed = any(e["type"] == "json_invalid" for e in error.errors())
    detail = "; ".join(f"{e['field']}: {e['detail']}" for e in wrong[:5])
    return _respond(make_problem(400 if malformed else 422, "invalid-request", detail, errors=wrong))


async def _answer_http(_request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)
    kind = _KINDS.get(error.status_code, "bad-request")
    return _respond(make_problem(error.status_code, kind, str(error.detail)), error.headers)


async def _answer_system(_request: Request, error: Exception) -> ProblemResponse:
    """A full disk, wherever it shows, is an answer; anything else the system refuses is a defect of ours and is logged."""
    described = problem(error)
    if described["status"] == 500:
        raise error
    return _respond(described)


def _respond(described: dict[str, Any], headers: Mapping[str, str] | None = None) -> ProblemResponse:
    return ProblemResponse(described, status_code=described["status"], headers=headers)
