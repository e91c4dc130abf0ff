"""The API's side of DBOS: put a job in the queue, take it out again. Nothing is computed here."""

from dataclasses import dataclass
from typing import Self

from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from filelock import FileLock

from app.ingest import complete
from app.recipe import Recipe
from app.services import Services
from storage.database import connect
from storage.jobs import FINAL, RETRIABLE, Job

QUEUE = "merges"
WORKFLOW = "merge"
# pinned: DBOS would otherwise derive it from the source text and orphan pending jobs at every upgrade
APPLICATION_VERSION = "braid-1"


@dataclass(frozen=True, slots=True)
class JobQueue:
    """Jobs in, cancellations in. Opening it creates the job database if this process is the first to need it."""

    services: Services
    client: DBOSClient

    @classmethod
    def open(cls, services: Services) -> Self:
        url = f"sqlite:///{services.layout.jobs}"
        migrate(services)
        return cls(services, DBOSClient(system_database_engine=connect(url), serializer=DBOSPortableJSONSerializer()))

    def submit(self, recipe: Recipe) -> Job:
        """The job of this recipe: the one that is under way or done, or a new attempt if there is none or it failed.

        The workflow is enqueued before the job is recorded: a crash between the two loses nothing, because the worker
        records a job it does not find. A job under way is enqueued again, which does nothing unless a power cut took the
        last commits of one database and not of the other.
        """
        jobs, digest = self.services.jobs, recipe.digest
        known = jobs.get(digest)
        attempt = 1 if known is None else known.attempt + self._must_run_again(known)
        if known is None or attempt > known.attempt or known.state not in FINAL:
            self.client.enqueue(
                {
                    "workflow_name": WORKFLOW,
                    "queue_name": QUEUE,
                    "workflow_id": workflow_id(str(digest), attempt),
                    "app_version": APPLICATION_VERSION,
                },
                str(digest),
                attempt,
                recipe.to_json(),
            )
            jobs.submit(digest, attempt, method=recipe.method, recipe=recipe.to_json())
        return jobs.get(digest) or self.submit(recipe)

    def _must_run_again(self, job: Job) -> bool:
        """A job that failed or was cancelled, or whose result has been deleted since or lost a blob."""
        if job.state in RETRIABLE:
            return True
        result = self.services.index.result(job.id)
        return job.state == "succeeded" and (result is None or not complete(self.services, result.target))

    def cancel(self, job: Job) -> None:
        """Stop a job that is not final: the worker sees its state and kills what runs. Cancelling again does nothing."""
        if self.services.jobs.finish(job.id, job.attempt, "cancelled"):
            self.client.cancel_workflow(workflow_id(str(job.id), job.attempt))

    def close(self) -> None:
        self.client.destroy()


def workflow_id(job: str, attempt: int) -> str:
    """DBOS answers for ever with the outcome of an id, so every attempt has its own."""
    return f"{job}.{attempt}"


def migrate(services: Services) -> None:
    """Create or upgrade the job database, one process at a time."""
    with FileLock(services.layout.locks / "migrate-jobs"):
        url = f"sqlite:///{services.layout.jobs}"
        connect(url).connect().close()  # makes the file WAL before DBOS opens it its own way
        DBOS.migrate(url)
