"""Jobs as the outside sees them: state, progress, an event log to follow, finished shards, and how far training came.

States: queued -> running -> succeeded | failed | cancelled. A final state never changes; asking again for a failed or
cancelled recipe starts its next attempt.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import JSON, Connection, Engine, Row, delete, func, insert, select, tuple_, update

from storage.database import reading
from storage.digest import Descriptor, Digest
from storage.index import AdapterRecord, BasisRecord, publish
from storage.schema import checkpoints, job_events, jobs, shards

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")
RETRIABLE: tuple[State, ...] = ("failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Job:
    """One job. done/total count what `stage` says: adapters fetched, modules merged.  Times in seconds since the epoch."""

    id: Digest
    attempt: int
    state: State
    method: str
    stage: str
    done: int
    total: int
    error: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    created_at: float
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's log. number: ascending over all jobs, so a reader resumes after the last one it saw."""

    number: int
    event: str
    attempt: int
    stage: str
    done: int
    total: int
    at: float


@dataclass(frozen=True, slots=True)
class Jobs:
    """Rows about jobs. Every write names the attempt it belongs to, so a straggler of an older one changes nothing."""

    engine: Engine

    def submit(self, job: Digest, attempt: int, *, method: str, recipe: Mapping[str, Any], state: State = "queued") -> None:
        """Create the job, or begin this attempt of it; an attempt that has begun is left as it is."""
        begun = {"attempt": attempt, "state": state, "stage": "queued", "done": 0, "total": 0, "finished_at": None}
        with self.engine.begin() as connection:
            known = connection.scalar(select(jobs.c.attempt).where(jobs.c.id == str(job)))
            if known is None:
                row = {"id": str(job), "method": method, "recipe": dict(recipe), "created_at": time.time(), **begun}
                connection.execute(insert(jobs).values(row))
            elif known < attempt:
                connection.execute(update(jobs).where(jobs.c.id == str(job)).values(error=JSON.NULL, **begun))
            else:
                return
            _log(connection, job, state)

    def progress(self, job: Digest, attempt: int, *, stage: str, done: int, total: int) -> None:
        """Move a job that is not final to running at this point. The log takes a line per whole per cent, not per call."""
        with self.engine.begin() as connection:
            before = connection.execute(select(jobs).where(jobs.c.id == str(job))).first()
            if before is None or before.attempt != attempt or before.state in FINAL:
                return
            connection.execute(_this(job, attempt).values(state="running", stage=stage, done=done, total=total))
            if before.state == "queued":
                _log(connection, job, "running")
            elif before.stage != stage or _per_cent(before.done, total) != _per_cent(done, total):
                _log(connection, job, "progress")

    def finish(self, job: Digest, attempt: int, state: State, error: Mapping[str, Any] | None = None) -> bool:
        """Give the attempt its final state; False if it has one already, or is not the job's last."""
        with self.engine.begin() as connection:
            return _finish(connection, job, attempt, state, error)

    def succeed(self, job: Digest, attempt: int, result: AdapterRecord | BasisRecord, inputs: Sequence[Digest]) -> bool:
        """Finish with this result, drop shards and checkpoint, all or nothing; False, and nothing is published, as for `finish`.

        One transaction, so that a job cancelled in this moment has no result, and a succeeded one has never none.
        """
        with self.engine.begin() as connection:
            won = _finish(connection, job, attempt, "succeeded")
            if won:
                publish(connection, job, result, inputs)
                connection.execute(delete(shards).where(shards.c.recipe == str(job)))
                connection.execute(delete(checkpoints).where(checkpoints.c.recipe == str(job)))
            return won

    def get(self, job: Digest) -> Job | None:
        with reading(self.engine) as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == str(job))).first()
        return _job(row) if row else None

    def page(self, *, limit: int, after: tuple[float, str] | None = None, states: Sequence[State] = ()) -> list[Job]:
        """Newest first; `after` is (created_at, id) of the last one seen."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        if after is not None:
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < tuple_(*after))
        if states:
            query = query.where(jobs.c.state.in_(states))
        with reading(self.engine) as connection:
            return [_job(row) for row in connection.execute(query)]

    def count_by_state(self) -> dict[State, int]:
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with reading(self.engine) as connection:
            counted = {row[0]: row[1] for row in connection.execute(query)}
        return {state: counted.get(state, 0) for state in get_args(State)}

    def events(self, job: Digest, *, after: int = 0) -> list[JobEvent]:
        columns = [c for c in job_events.c if c.name != "job"]
        query = select(*columns).where(job_events.c.job == str(job), job_events.c.number > after).order_by(job_events.c.number)
        with reading(self.engine) as connection:
            return [JobEvent(**row._mapping) for row in connection.execute(query)]

    def add_shard(self, recipe: Digest, number: int, shard: Descriptor) -> None:
        row = {"recipe": str(recipe), "number": number, **shard.to_json()}
        with self.engine.begin() as connection:
            connection.execute(delete(shards).where(shards.c.recipe == str(recipe), shards.c.number == number))
            connection.execute(insert(shards).values(row))

    def shards(self, recipe: Digest) -> dict[int, Descriptor]:
        """Number -> blob of every shard that an earlier run of this recipe has finished."""
        with reading(self.engine) as connection:
            rows = connection.execute(select(shards).where(shards.c.recipe == str(recipe)))
            return {row.number: Descriptor.from_json(dict(row._mapping)) for row in rows}

    def drop_shards(self, recipe: Digest) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(shards).where(shards.c.recipe == str(recipe)))

    def live_shards(self) -> tuple[Descriptor, ...]:
        """Shards of jobs that may still use them: a lease against garbage collection."""
        active = select(jobs.c.id).where(jobs.c.state.not_in(FINAL))
        with reading(self.engine) as connection:
            rows = connection.execute(select(shards).where(shards.c.recipe.in_(active)))
            return tuple(Descriptor.from_json(dict(row._mapping)) for row in rows)

    def set_checkpoint(self, recipe: Digest, state: Descriptor) -> None:
        """Where the training of this recipe stands now; it takes the place of the one before."""
        with self.engine.begin() as connection:
            connection.execute(delete(checkpoints).where(checkpoints.c.recipe == str(recipe)))
            connection.execute(insert(checkpoints).values(recipe=str(recipe), **state.to_json()))

    def checkpoint(self, recipe: Digest) -> Descriptor | None:
        """What an earlier run of this recipe left, failed and cancelled ones included; success drops it."""
        with reading(self.engine) as connection:
            row = connection.execute(select(checkpoints).where(checkpoints.c.recipe == str(recipe))).first()
        return Descriptor.from_json(dict(row._mapping)) if row else None

    def live_checkpoints(self) -> tuple[Descriptor, ...]:
        """Those of jobs that have not succeeded: a failed or cancelled one goes on from there when it is asked for again."""
        unfinished = select(jobs.c.id).where(jobs.c.state != "succeeded")
        with reading(self.engine) as connection:
            rows = connection.execute(select(checkpoints).where(checkpoints.c.recipe.in_(unfinished)))
            return tuple(Descriptor.from_json(dict(row._mapping)) for row in rows)


def _this(job: Digest, attempt: int) -> Any:
    return update(jobs).where(jobs.c.id == str(job), jobs.c.attempt == attempt)


def _finish(connection: Connection, job: Digest, attempt: int, state: State, error: Mapping[str, Any] | None = None) -> bool:
    change = _this(job, attempt).where(jobs.c.state.not_in(FINAL))
    value = JSON.NULL if error is None else dict(error)
    changed = connection.execute(change.values(state=state, error=value, finished_at=time.time())).rowcount > 0
    if changed:
        _log(connection, job, state)
    return changed


def _log(connection: Connection, job: Digest, event: str) -> None:
    row = connection.execute(select(jobs).where(jobs.c.id == str(job))).one()
    line = {"job": row.id, "attempt": row.attempt, "event": event, "stage": row.stage, "done": row.done, "total": row.total}
    connection.execute(insert(job_events).values(at=time.time(), **line))


def _per_cent(done: int, total: int) -> int:
    return 100 * done // max(total, 1)


def _job(row: Row[Any]) -> Job:
    return Job(**{**row._mapping, "id": Digest.parse(row.id)})
