"""The worker process: takes jobs from the queue, one per device, and runs them as durable workflows."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dbos import DBOS, DBOSPortableJSONSerializer
from filelock import FileLock, Timeout

from app.engine import workflow as stages
from app.engine.devices import available
from app.engine.executor import Stopped, TaskFailed
from app.engine.local import LocalPool, open_pool
from app.engine.queue import APPLICATION_VERSION, QUEUE, WORKFLOW, migrate, workflow_id
from app.engine.workflow import Run
from app.errors import WorkerBusy, WorkerLost, make_problem, problem
from app.recipe import Recipe
from app.services import Services
from app.settings import Settings
from storage.database import connect
from storage.digest import Digest
from storage.jobs import FINAL

log = logging.getLogger(__name__)

_POLL_S = 0.1
_MAX_RECOVERY_ATTEMPTS = 10  # starts of one job that ended in the worker's death; more is the job's own doing
_HOUSEKEEPING_S = 5.0


def run_worker(settings: Settings, *, supervised: bool = False) -> None:
    """Work until told to stop (SIGTERM, SIGINT, or end of standard input if supervised). Raises WorkerBusy.

    Jobs under way when it stops, or is killed, are taken up by the next worker with the same BRAID_WORKER_ID.
    """
    stopped = threading.Event()
    services = Services.open(settings)
    with _only_one(services):
        migrate(services)
        pool = open_pool(settings, available(settings.devices))
        _launch(services, pool)
        _stop_on_signals(stopped, supervised=supervised)
        log.info("worker %s takes jobs on %s", settings.worker_id, ", ".join(pool.devices))
        while not stopped.wait(_HOUSEKEEPING_S):
            _bury_poisoned(services)
        log.info("worker %s stopped", settings.worker_id)
        # No unwinding: to stop is to crash, which is what every job is built to survive. Children end with our pipes.
        os._exit(0)


@contextmanager
def _only_one(services: Services) -> Iterator[None]:
    worker_id = services.settings.worker_id
    try:
        with FileLock(services.layout.locks / f"worker-{worker_id}", timeout=0):
            yield
    except Timeout as error:
        raise WorkerBusy(worker_id) from error


def _launch(services: Services, pool: LocalPool) -> None:
    settings = services.settings
    DBOS(
        config={
            "name": "braid",
            "system_database_engine": connect(f"sqlite:///{services.layout.jobs}"),
            "serializer": DBOSPortableJSONSerializer(),
            "application_version": APPLICATION_VERSION,
            "executor_id": settings.worker_id,
            "run_migrations": False,  # done above, under a lock
            "log_level": "WARNING",
            "notification_listener_polling_interval_sec": _POLL_S,
        }
    )
    _register(services, pool)
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=len(pool.children), polling_interval_sec=_POLL_S, on_conflict="always_update")


def _register(services: Services, pool: LocalPool) -> None:
    """The durable workflow. Its steps take and give JSON, because that is what DBOS keeps of them."""

    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=_MAX_RECOVERY_ATTEMPTS)
    def merge(job: str, attempt: int, document: dict[str, Any]) -> str | None:
        recipe = Recipe.from_json(document)
        services.jobs.submit(Digest.parse(job), attempt, method=recipe.method, recipe=document)
        with pool.lease() as executor:
            run = _run(services, recipe, attempt, executor)
            try:
                return _steps(run)
            except TaskFailed as failure:
                _fail(run, attempt, failure.problem)
            except Stopped:
                log.info("job %s cancelled", job)
            except Exception as error:
                log.exception("job %s failed", job)
                _fail(run, attempt, problem(error))
        return None


def _run(services: Services, recipe: Recipe, attempt: int, executor: Any) -> Run:
    job = recipe.digest

    def report(stage: str, done: int, total: int) -> None:
        services.jobs.progress(job, attempt, stage=stage, done=done, total=total)

    def stop() -> bool:
        known = services.jobs.get(job)
        return known is not None and (known.attempt != attempt or known.state in FINAL)

    return Run(services, recipe, executor, report, stop)


def _steps(run: Run) -> str:
    job = run.recipe.digest
    log.info("job %s started: %s of %d adapters", job, run.recipe.method, len(run.recipe.adapters))
    step = _step
    inputs = [Digest.parse(d) for d in step("fetch", lambda: [str(d) for d in stages.fetch(run)])]
    shards = step("merge", lambda: stages.to_json(stages.merge(run, inputs)))
    adapter = step("assemble", lambda: str(stages.assemble(run, inputs, stages.from_json(shards))))
    step("publish", lambda: _publish(run, Digest.parse(adapter)))
    log.info("job %s succeeded: %s", job, adapter)
    return str(adapter)


def _step(name: str, body: Any) -> Any:
    return DBOS.run_step({"name": name}, body)


def _publish(run: Run, adapter: Digest) -> None:
    stages.publish(run.services, run.recipe, adapter)
    known = run.services.jobs.get(run.recipe.digest)
    if known is not None:
        run.services.jobs.finish(known.id, known.attempt, "succeeded")


def _fail(run: Run, attempt: int, described: Mapping[str, Any]) -> None:
    log.info("job %s failed: %s", run.recipe.digest, described.get("detail"))
    run.services.jobs.finish(run.recipe.digest, attempt, "failed", described)


def _bury_poisoned(services: Services) -> None:
    """Jobs that DBOS gave up on, because every worker that took them died, become failed jobs."""
    lost = problem(WorkerLost(_MAX_RECOVERY_ATTEMPTS))
    for job in services.jobs.page(limit=100, states=("running", "queued")):
        status = DBOS.get_workflow_status(workflow_id(str(job.id), job.attempt))
        if status is not None and status.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
            services.jobs.finish(job.id, job.attempt, "failed", lost)
        elif status is not None and status.status == "ERROR":
            described = make_problem(500, "internal-error", "the workflow ended unexpectedly; the worker's log has the details")
            services.jobs.finish(job.id, job.attempt, "failed", described)


def _stop_on_signals(stopped: threading.Event, *, supervised: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    if supervised:
        threading.Thread(target=_stop_at_end_of_input, args=(stopped,), daemon=True).start()


def _stop_at_end_of_input(stopped: threading.Event) -> None:
    """A supervised worker holds the other end of its supervisor's pipe, so it ends when the supervisor is killed."""
    sys.stdin.read()
    stopped.set()
