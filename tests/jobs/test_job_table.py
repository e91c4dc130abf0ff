"""The job table over SQLite: what each method promises, and that locks do not surprise."""

import itertools
import subprocess
import sys

import pytest
from sqlalchemy import Engine, func, select

from indexing import JOB, OTHER, PROBLEM, begin, record
from storage.database import reading
from storage.digest import Descriptor, Digest
from storage.index import Index, Result
from storage.jobs import FINAL, Jobs, State
from storage.schema import job_events


def shard(seed: str = "shard") -> Descriptor:
    return Descriptor(Digest.of(seed.encode()), 10, "application/json")


def events(jobs: Jobs, job: Digest = JOB) -> list[str]:
    return [event.event for event in jobs.events(job)]


def state(jobs: Jobs, job: Digest = JOB) -> State:
    known = jobs.get(job)
    assert known is not None
    return known.state


# jobs


def test_a_submitted_job_is_queued(jobs: Jobs) -> None:
    begin(jobs)
    assert (state(jobs), events(jobs)) == ("queued", ["queued"])


def test_submitting_an_attempt_again_changes_nothing(jobs: Jobs) -> None:
    begin(jobs)
    jobs.progress(JOB, 1, stage="merge", done=1, total=4)
    begin(jobs)
    assert (state(jobs), events(jobs)) == ("running", ["queued", "running"])


def test_an_older_attempt_cannot_be_submitted(jobs: Jobs) -> None:
    begin(jobs, attempt=2)
    begin(jobs, attempt=1)
    assert (jobs.get(JOB) or pytest.fail()).attempt == 2


def test_a_new_attempt_starts_from_nothing(jobs: Jobs) -> None:
    begin(jobs)
    jobs.progress(JOB, 1, stage="merge", done=3, total=4)
    jobs.finish(JOB, 1, "failed", PROBLEM)
    begin(jobs, attempt=2)
    job = jobs.get(JOB)
    assert job is not None
    assert (job.attempt, job.state, job.done, job.error, job.finished_at) == (2, "queued", 0, None, None)


def test_a_new_attempt_keeps_the_moment_of_the_first(jobs: Jobs) -> None:
    begin(jobs)
    created = (jobs.get(JOB) or pytest.fail()).created_at
    jobs.finish(JOB, 1, "cancelled")
    begin(jobs, attempt=2)
    assert (jobs.get(JOB) or pytest.fail()).created_at == created


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_straggler_reports_nothing(jobs: Jobs, attempt: int) -> None:
    begin(jobs, attempt=2)
    jobs.progress(JOB, attempt, stage="merge", done=1, total=4)
    assert state(jobs) == "queued"


@pytest.mark.parametrize("attempt", [1, 3])
def test_a_straggler_finishes_nothing(jobs: Jobs, attempt: int) -> None:
    begin(jobs, attempt=2)
    assert not jobs.finish(JOB, attempt, "failed", PROBLEM)
    assert state(jobs) == "queued"


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FINAL, FINAL)))
def test_a_final_state_never_changes(jobs: Jobs, first: State, second: State) -> None:
    begin(jobs)
    assert jobs.finish(JOB, 1, first)
    assert not jobs.finish(JOB, 1, second, PROBLEM)
    assert (state(jobs), events(jobs)) == (first, ["queued", first])


@pytest.mark.parametrize("final", FINAL)
def test_progress_after_the_end_is_ignored(jobs: Jobs, final: State) -> None:
    begin(jobs)
    jobs.finish(JOB, 1, final)
    jobs.progress(JOB, 1, stage="merge", done=1, total=4)
    assert (state(jobs), events(jobs)) == (final, ["queued", final])


def test_a_job_that_is_not_there_takes_no_progress_and_no_end(jobs: Jobs) -> None:
    jobs.progress(JOB, 1, stage="merge", done=1, total=4)
    assert (jobs.finish(JOB, 1, "failed"), jobs.get(JOB), events(jobs)) == (False, None, [])


def test_a_failure_keeps_its_problem(jobs: Jobs) -> None:
    begin(jobs)
    jobs.finish(JOB, 1, "failed", PROBLEM)
    assert (jobs.get(JOB) or pytest.fail()).error == PROBLEM


def test_a_thousand_steps_are_at_most_a_line_per_cent(jobs: Jobs) -> None:
    begin(jobs)
    for done in range(1001):
        jobs.progress(JOB, 1, stage="merge", done=done, total=1000)
    assert events(jobs).count("progress") == 100


def test_a_change_of_stage_is_logged(jobs: Jobs) -> None:
    begin(jobs)
    for stage in ("fetch", "merge", "assemble"):
        jobs.progress(JOB, 1, stage=stage, done=0, total=1)
    assert [event.stage for event in jobs.events(JOB)] == ["queued", "fetch", "merge", "assemble"]


def test_a_reader_resumes_after_the_event_it_saw_last(jobs: Jobs) -> None:
    begin(jobs)
    begin(jobs, OTHER)
    jobs.progress(JOB, 1, stage="merge", done=0, total=1)
    seen = jobs.events(JOB)
    assert jobs.events(JOB, after=seen[0].number) == seen[1:]


def test_pages_of_jobs_are_newest_first_and_miss_none(jobs: Jobs) -> None:
    for n in range(7):
        begin(jobs, Digest.of(bytes([n])))
    first = jobs.page(limit=3)
    second = jobs.page(limit=10, after=(first[-1].created_at, str(first[-1].id)))
    assert [job.id for job in [*first, *second]] == [Digest.of(bytes([n])) for n in reversed(range(7))]


def test_a_page_may_be_of_some_states_only(jobs: Jobs) -> None:
    begin(jobs)
    begin(jobs, OTHER)
    jobs.finish(OTHER, 1, "failed")
    assert [job.id for job in jobs.page(limit=9, states=("queued", "running"))] == [JOB]


def test_every_state_is_counted(jobs: Jobs) -> None:
    begin(jobs)
    begin(jobs, OTHER)
    jobs.finish(OTHER, 1, "failed")
    assert jobs.count_by_state() == {"queued": 1, "running": 0, "succeeded": 0, "failed": 1, "cancelled": 0}


# a job and its result


def test_succeeding_publishes_and_ends_the_job(jobs: Jobs, index: Index) -> None:
    begin(jobs)
    assert jobs.succeed(JOB, 1, record(), [OTHER])
    assert (state(jobs), index.result(JOB), index.inputs(record().id)) == ("succeeded", Result("adapter", record().id), (OTHER,))


def test_succeeding_gives_the_names_asked_for(jobs: Jobs, index: Index) -> None:
    begin(jobs)
    index.request_name("me/x", JOB)
    jobs.succeed(JOB, 1, record(), [])
    assert index.resolve_name("me/x") == record().id


def test_succeeding_again_changes_nothing(jobs: Jobs) -> None:
    begin(jobs)
    jobs.succeed(JOB, 1, record(), [])
    assert not jobs.succeed(JOB, 1, record(), [])
    assert events(jobs) == ["queued", "succeeded"]


def test_a_cancelled_job_publishes_nothing(jobs: Jobs, index: Index) -> None:
    begin(jobs)
    jobs.finish(JOB, 1, "cancelled")
    assert not jobs.succeed(JOB, 1, record(), [])
    assert (state(jobs), index.result(JOB), index.get(record().id)) == ("cancelled", None, None)


def test_a_straggler_publishes_nothing(jobs: Jobs, index: Index) -> None:
    begin(jobs, attempt=2)
    assert not jobs.succeed(JOB, 1, record(), [])
    assert (state(jobs), index.result(JOB)) == ("queued", None)


# shards


def test_a_shard_is_remembered_by_its_number(jobs: Jobs) -> None:
    jobs.add_shard(JOB, 3, shard())
    assert jobs.shards(JOB) == {3: shard()}


def test_a_shard_added_again_replaces(jobs: Jobs) -> None:
    jobs.add_shard(JOB, 3, shard())
    jobs.add_shard(JOB, 3, shard("again"))
    assert jobs.shards(JOB) == {3: shard("again")}


def test_dropping_shards_leaves_those_of_other_recipes(jobs: Jobs) -> None:
    jobs.add_shard(JOB, 0, shard())
    jobs.add_shard(OTHER, 0, shard())
    jobs.drop_shards(JOB)
    assert (jobs.shards(JOB), jobs.shards(OTHER)) == ({}, {0: shard()})


def test_success_drops_the_shards(jobs: Jobs) -> None:
    begin(jobs)
    jobs.add_shard(JOB, 0, shard())
    jobs.succeed(JOB, 1, record(), [])
    assert jobs.shards(JOB) == {}


@pytest.mark.parametrize(("ends", "live"), [(None, 1), ("cancelled", 0), ("failed", 0)])
def test_shards_are_leased_while_their_job_may_use_them(jobs: Jobs, ends: State | None, live: int) -> None:
    begin(jobs)
    jobs.add_shard(JOB, 0, shard())
    if ends is not None:
        jobs.finish(JOB, 1, ends)
    assert len(jobs.live_shards()) == live


# many writers

WRITER = """
import sys
from storage.database import connect
from storage.digest import Digest
from storage.jobs import Jobs

jobs, me = Jobs(connect(sys.argv[1])), Digest.of(sys.argv[2].encode())
jobs.submit(me, 1, method="m", recipe={})
for done in range(1, 51):
    jobs.progress(me, 1, stage="merge", done=done, total=50)
"""


def test_eight_processes_write_without_a_locked_database(engine: Engine, jobs: Jobs) -> None:
    command = [sys.executable, "-c", WRITER, str(engine.url)]
    writers = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in range(8)]
    assert [writer.communicate()[1] for writer in writers] == [""] * 8
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(job_events)) == 8 * 51
