"""What Prometheus scrapes: requests as they are answered, jobs as the index has them when asked."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.services import Services


class RequestMetrics:
    """ASGI middleware: a histogram of durations by method, route and status. The route, not the path: paths have no end."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        labels = ("method", "route", "status")
        self.seconds = Histogram("braid_http_request_seconds", "Time to answer a request.", labels, registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.seconds.labels(scope["method"], route, str(status)).observe(time.perf_counter() - started)


class JobMetrics(Collector):
    """Jobs by state, counted when scraped, so that they are right whichever process changed them."""

    def __init__(self, services: Services) -> None:
        self.services = services

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("braid_jobs", "Jobs by state.", labels=("state",))
        for state, count in self.services.jobs.count_by_state().items():
            family.add_metric((state,), count)
        yield family
