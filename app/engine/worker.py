"""The worker process: takes jobs from the queue, one per device, and runs them as durable workflows."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from dbos import DBOS, DBOSPortableJSONSerializer
from filelock import FileLock, Timeout
from setproctitle import setproctitle

from app.engine import workflow as stages
from app.engine.devices import available
from app.engine.executor import Stopped, TaskFailed
from app.engine.local import LocalPool, open_pool
from app.engine.processes import Supervisor, end_with_supervisor
from app.engine.queue import APPLICATION_VERSION, QUEUE, WORKFLOW, migrate, workflow_id
from app.engine.workflow import Run
from app.errors import WorkerBusy, WorkerLost, make_problem, problem
from app.recipe import Recipe
from app.services import Services
from app.settings import Settings
from storage.database import connect
from storage.digest import Digest
from storage.jobs import FINAL, Job

log = logging.getLogger(__name__)

_POLL_S = 0.2  # of the queue: what a job may wait for an idle worker
_MAX_RECOVERY_ATTEMPTS = 10  # starts of one job that ended in the worker's death; more is the job's own doing
_HOUSEKEEPING_S = 5.0
_PAGE = 200
_UNEXPECTED = make_problem(500, "internal-error", "the workflow ended unexpectedly; the worker's log has the details")
_ENDED: Mapping[str, Mapping[str, Any]] = {
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": problem(WorkerLost(_MAX_RECOVERY_ATTEMPTS)),
    **dict.fromkeys(("ERROR", "SUCCESS", "CANCELLED"), _UNEXPECTED),
}


def main(settings: Settings, connection: str) -> None:
    """Work until told to stop (SIGTERM, SIGINT, or the end of the supervisor). Raises WorkerBusy.

    Jobs under way when it stops, or is killed, are taken up by the next worker with the same BRAID_WORKER_ID, or by any other
    that finds this one gone.
    connection: the number of the descriptor over which the supervisor starts its children.
    """
    setproctitle(f"braid worker {settings.worker_id}")
    end_with_supervisor()
    services = Services.open(settings)
    with _only_one(services, settings.worker_id):
        migrate(services)
        pool = open_pool(settings, available(settings.devices), Supervisor.inherited(int(connection)).launch)
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # until here they simply end us, whatever we wait for
            signal.signal(number, lambda *_: stopped.set())
        # No unwinding from here: to stop is to crash, which is what every job is built to survive. Children end with our
        # pipes. Returning would free our name for another worker while DBOS's threads still run our jobs.
        os._exit(_work(services, pool, stopped))


def _work(services: Services, pool: LocalPool, stopped: threading.Event) -> int:
    """Exit code: 0 if told to stop."""
    worker_id = services.settings.worker_id
    try:
        _launch(services, pool)
        log.info("worker %s takes jobs on %s", worker_id, ", ".join(pool.devices))
        while not stopped.wait(_HOUSEKEEPING_S):
            _bury(services)
            _adopt(services)
    except Exception:
        log.exception("worker %s gives up", worker_id)
        return 1
    log.info("worker %s stopped", worker_id)
    return 0


@contextmanager
def _only_one(services: Services, worker_id: str) -> Iterator[None]:
    """Raises WorkerBusy if a worker of that name runs."""
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
                return _steps(run, attempt)
            except TaskFailed as failure:
                _fail(run, attempt, failure.problem)
            except Stopped:
                log.info("job %s cancelled", job)
        return None


def _run(services: Services, recipe: Recipe, attempt: int, executor: Any) -> Run:
    job = recipe.digest

    def report(stage: str, done: int, total: int) -> None:
        services.jobs.progress(job, attempt, stage=stage, done=done, total=total)

    def stop() -> bool:
        known = services.jobs.get(job)
        return known is not None and (known.attempt != attempt or known.state in FINAL)

    return Run(services, recipe, executor, report, stop)


def _steps(run: Run, attempt: int) -> str:
    job = run.recipe.digest
    log.info("job %s started: %s", job, run.recipe.method)
    step = _step
    fetched = [Digest.parse(d) for d in step("fetch", lambda: [str(d) for d in stages.fetch(run)])]
    # no step of DBOS: its outcome is kept in the index, where other jobs find it as well
    run, inputs = replace(run, origins=tuple(fetched)), _told(_outcome(lambda: stages.ground(run, fetched)))
    checkpoint = step("learn", lambda: stages.learn(run, inputs)) if run.recipe.tasks else None
    table = stages.learned_table(run.services, checkpoint) if checkpoint else None
    known = table or stages.survey(run, inputs, partial(step, "survey"))
    shards = step("merge", lambda: stages.to_json(stages.merge(run, inputs, known)))
    adapter = step("assemble", lambda: str(stages.assemble(run, inputs, stages.from_json(shards), checkpoint, known)))
    if step("publish", lambda: stages.publish(run.services, run.recipe, Digest.parse(adapter), attempt=attempt)):
        log.info("job %s succeeded: %s", job, adapter)
    return str(adapter)


def _step(name: str, body: Callable[[], Any]) -> Any:
    """What the body gives. Raises Stopped, and TaskFailed for any other error.

    A problem is kept as the step's outcome: an error that DBOS kept would come back from a crash as one of its own.
    """
    return _told(DBOS.run_step({"name": name}, lambda: _outcome(body)))


def _told(outcome: Mapping[str, Any]) -> Any:
    """Raises TaskFailed for a problem."""
    if "problem" in outcome:
        raise TaskFailed(outcome["problem"])
    return outcome["done"]


def _outcome(body: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"done": body()}
    except Stopped:
        raise
    except TaskFailed as failure:
        return {"problem": failure.problem}
    except Exception as error:
        described = problem(error)
        ours = described["status"] == 500
        log.log(logging.ERROR if ours else logging.INFO, "step failed: %s", error, exc_info=ours)
        return {"problem": described}


def _fail(run: Run, attempt: int, described: Mapping[str, Any]) -> None:
    if run.services.jobs.finish(run.recipe.digest, attempt, "failed", described):
        log.info("job %s failed: %s", run.recipe.digest, described.get("detail"))


def _bury(services: Services) -> None:
    """Jobs that are not final though their workflow has ended become failed jobs, to be asked for again.

    DBOS gave up because every worker that took them died; or a power cut took the last commits of one database only.
    A workflow ends after its job, so this never overtakes a job that is about to end well.
    """
    for page in _active(services):
        known = {workflow_id(str(job.id), job.attempt): job for job in page}
        found = DBOS.list_workflows(workflow_ids=list(known), status=list(_ENDED), load_input=False, load_output=False)
        for status in found:
            job = known[status.workflow_id]
            services.jobs.finish(job.id, job.attempt, "failed", _ENDED[status.status])


def _adopt(services: Services) -> None:
    """Put back into the queue what a worker left that is gone: it may never come back under its name."""
    pending = partial(DBOS.list_workflows, name=WORKFLOW, status="PENDING", load_input=False, load_output=False)
    for name in sorted({workflow.executor_id or "" for workflow in pending()} - {"", services.settings.worker_id}):
        with suppress(WorkerBusy), _only_one(services, name):
            for workflow in pending(executor_id=name):
                log.info("worker %s is gone; what it left is taken up: %s", name, workflow.workflow_id)
                DBOS.resume_workflow(workflow.workflow_id, queue_name=QUEUE)


def _active(services: Services) -> Iterator[Sequence[Job]]:
    """All jobs that are not final, a page at a time."""
    after = None
    while page := services.jobs.page(limit=_PAGE, after=after, states=("running", "queued")):
        yield page
        after = (page[-1].created_at, str(page[-1].id))
