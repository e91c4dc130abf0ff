"""Rows for the tests of the index and the job table."""

from storage.digest import Digest
from storage.index import AdapterRecord
from storage.jobs import Jobs
from storage.manifest import Source

JOB, OTHER = Digest.of(b"recipe"), Digest.of(b"other recipe")
RECIPE = {"method": "task_arithmetic"}
PROBLEM = {"type": "urn:braid:problem:worker-lost", "detail": "it died"}


def record(
    seed: str = "adapter", *, restricted: tuple[str, ...] = (), source: Source = Source("upload"), at: float = 1.0
) -> AdapterRecord:
    return AdapterRecord(Digest.of(seed.encode()), "org/base", 6, 4, 1000, source, "mit", restricted, at)


def begin(jobs: Jobs, job: Digest = JOB, attempt: int = 1) -> None:
    jobs.submit(job, attempt, method="task_arithmetic", recipe=RECIPE)
