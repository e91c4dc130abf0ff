"""Base models, data files and checkpoints as rows: what each method promises."""

import pytest
from sqlalchemy import Engine

from indexing import JOB, OTHER, begin, record
from storage.digest import Descriptor, Digest
from storage.jobs import Jobs
from storage.materials import BaseRecord, FileRecord, Materials

PRIVATE = "hub:org/private@" + "a" * 40
STATE, LATER = (Descriptor(Digest.of(text), 4, "application/vnd.safetensors") for text in (b"step 1", b"step 2"))


@pytest.fixture
def materials(engine: Engine) -> Materials:
    return Materials(engine)


def file(seed: str = "data", *, at: float = 1.0, restricted: tuple[str, ...] = (), source: str = "") -> FileRecord:
    return FileRecord(Digest.of(seed.encode()), "jsonl", 3, ("text", "label", "ü"), 100, restricted, source, at)


def base(seed: str = "base", *, restricted: tuple[str, ...] = (), source: str = "hub:org/base@1") -> BaseRecord:
    return BaseRecord(Digest.of(seed.encode()), source, 5 * 2**40, restricted, 1.0)


# --- data files and base models


def test_a_data_file_comes_back_as_it_was(materials: Materials) -> None:
    materials.add_file(file(restricted=(PRIVATE,)))
    assert materials.file(file().id) == file(restricted=(PRIVATE,))


def test_a_base_model_comes_back_as_it_was(materials: Materials) -> None:
    materials.add_base(base(restricted=(PRIVATE,)))
    assert materials.base(base().id) == materials.base_from(base().source) == base(restricted=(PRIVATE,))


def test_a_base_model_is_no_data_file(materials: Materials) -> None:
    materials.add_base(base())
    assert materials.file(base().id) is None
    assert (materials.files(), materials.bases()) == ((), (base().id,))


def test_what_is_unknown_is_none(materials: Materials) -> None:
    assert (materials.file(JOB), materials.base(JOB), materials.base_from("hub:org/base@1")) == (None, None, None)


def test_adding_again_keeps_the_first_row(materials: Materials) -> None:
    materials.add_file(file(at=1.0))
    materials.add_file(file(at=2.0, source="elsewhere"))
    assert materials.file(file().id) == file(at=1.0)


def test_bytes_that_are_had_freely_are_free(materials: Materials) -> None:
    materials.add_file(file(restricted=(PRIVATE,)))
    materials.add_file(file())
    assert materials.file(file().id) == file()


def test_bytes_that_were_free_stay_free(materials: Materials) -> None:
    materials.add_base(base())
    materials.add_base(base(restricted=(PRIVATE,)))
    assert materials.base(base().id) == base()


def test_files_of_a_source_come_in_their_order(materials: Materials) -> None:
    for number in (2, 0, 1):
        materials.add_file(file(str(number), source=f"hub:datasets/a/b_c@1#train/{number}"))
    materials.add_file(file("like it", source="hub:datasets/a/bxc@1#train/0"))
    found = materials.files_from("hub:datasets/a/b_c@1#train/")
    assert [record.source[-1] for record in found] == ["0", "1", "2"]


def test_pages_are_newest_first_and_lose_nothing(materials: Materials) -> None:
    for number in range(5):
        materials.add_file(file(str(number), at=float(number // 2)))
    seen, after = [], None
    while page := materials.page_of_files(limit=2, after=after):
        seen += page
        after = (page[-1].created_at, str(page[-1].id))
    assert len({record.id for record in seen}) == 5
    assert [record.created_at for record in seen] == [2.0, 1.0, 1.0, 0.0, 0.0]


def test_what_is_forgotten_is_gone_once(materials: Materials) -> None:
    materials.add_file(file())
    materials.add_base(base())
    assert [materials.forget(entry) for entry in (file().id, base().id, file().id, JOB)] == [True, True, False, False]
    assert (materials.files(), materials.bases()) == ((), ())


# --- checkpoints


def test_there_is_no_checkpoint_before_the_first(jobs: Jobs) -> None:
    assert jobs.checkpoint(JOB) is None


def test_a_checkpoint_takes_the_place_of_the_one_before(jobs: Jobs) -> None:
    jobs.set_checkpoint(JOB, STATE)
    jobs.set_checkpoint(JOB, LATER)
    jobs.set_checkpoint(OTHER, STATE)
    assert (jobs.checkpoint(JOB), jobs.checkpoint(OTHER)) == (LATER, STATE)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_checkpoint_outlives_what_can_be_tried_again(jobs: Jobs, state: str) -> None:
    begin(jobs)
    jobs.set_checkpoint(JOB, STATE)
    assert jobs.finish(JOB, 1, state)
    assert (jobs.checkpoint(JOB), jobs.live_checkpoints()) == (STATE, (STATE,))


def test_success_drops_the_checkpoint(jobs: Jobs) -> None:
    begin(jobs)
    jobs.set_checkpoint(JOB, STATE)
    jobs.set_checkpoint(OTHER, LATER)
    assert jobs.succeed(JOB, 1, record(), [])
    assert (jobs.checkpoint(JOB), jobs.checkpoint(OTHER)) == (None, LATER)


def test_a_success_that_comes_too_late_drops_nothing(jobs: Jobs) -> None:
    begin(jobs)
    jobs.set_checkpoint(JOB, STATE)
    jobs.finish(JOB, 1, "cancelled")
    assert not jobs.succeed(JOB, 1, record(), [])
    assert jobs.checkpoint(JOB) == STATE


def test_a_straggler_after_success_keeps_nothing_alive(jobs: Jobs) -> None:
    begin(jobs)
    assert jobs.succeed(JOB, 1, record(), [])
    jobs.set_checkpoint(JOB, STATE)
    assert jobs.live_checkpoints() == ()


def test_a_checkpoint_of_no_job_keeps_nothing_alive(jobs: Jobs) -> None:
    jobs.set_checkpoint(JOB, STATE)
    assert jobs.live_checkpoints() == ()
