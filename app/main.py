"""The application: routers, lifespan, error handlers, limits and metrics. No logic."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from app.routes import adapters, health, jobs, merge, methods
from app.schemas import Problem
from app.services import Services
from app.settings import Settings

log = logging.getLogger(__name__)

_PROBLEM = "application/problem+json"
_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": "a problem (RFC 9457)"} for code in (400, 404, 413, 422)
}


def create_app(settings: Settings) -> FastAPI:
    """The API over one data directory. It enqueues and answers; the worker computes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.services = Services.open(settings)
        app.state.queue = JobQueue.open(app.state.services)
        app.state.metrics.register(JobMetrics(app.state.services))
        yield
        app.state.queue.close()

    app = FastAPI(
        title="Braid", summary="Merge LoRA adapters, certified.", version="0.1.0", lifespan=lifespan, responses=_RESPONSES
    )
    app.state.metrics = CollectorRegistry()
    for module in (merge, jobs, adapters, methods, health):
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
    app.add_exception_handler(Exception, _answer)


async def _answer(_request: Request, error: Exception) -> JSONResponse:
    return _respond(problem(error))


async def _answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    """Every field that is wrong, by its path; values are not repeated, they may be NaN or a secret."""
    assert isinstance(error, RequestValidationError)
    wrong = [{"field": ".".join(str(part) for part in e["loc"]), "detail": e["msg"]} for e in error.errors()]
    malformed = any(e["type"] in {"json_invalid", "missing_body"} for e in error.errors())
    detail = "; ".join(f"{e['field']}: {e['detail']}" for e in wrong[:5])
    return _respond(make_problem(400 if malformed else 422, "invalid-request", detail, errors=wrong))


async def _answer_http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = {404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}.get(error.status_code, "bad-request")
    return _respond(make_problem(error.status_code, kind, str(error.detail)), error.headers)


def _respond(described: dict[str, object], headers: object = None) -> JSONResponse:
    status = described["status"]
    assert isinstance(status, int)
    return JSONResponse(
        described, status_code=status, media_type=_PROBLEM, headers=headers if isinstance(headers, dict) else None
    )
