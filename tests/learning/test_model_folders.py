"""Base models as directories, and what garbage collection leaves of them and of checkpoints."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app import base_models, ingest
from app.commands import collect_garbage
from app.errors import UnknownBaseModel
from app.services import Services
from based import obtained, tiny, write
from storage.digest import Digest
from storage.errors import BlobNotFound


@pytest.fixture
def base(services: Services, bases_dir: Path) -> Digest:
    write(bases_dir / "a", tiny())
    return obtained(services, "dir:a")


def test_a_folder_is_the_same_for_everyone_at_once(services: Services, base: Digest) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: base_models.folder(services, base), range(32)))
    assert set(folders) == {services.layout.model(base).absolute()}
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(tiny())
    assert list(services.layout.models.glob(".tmp-*")) == []


def test_a_link_that_leads_elsewhere_is_made_anew(services: Services, base: Digest) -> None:
    link = base_models.folder(services, base) / "model.safetensors"
    link.unlink()
    link.symlink_to("/nowhere")
    assert (base_models.folder(services, base) / "model.safetensors").read_bytes() == tiny()["model.safetensors"]


def test_a_folder_whose_blob_is_gone_is_an_error_until_it_is_back(services: Services, base: Digest) -> None:
    base_models.folder(services, base)
    services.blobs.delete(Digest.of(tiny()["model.safetensors"]))
    with pytest.raises(BlobNotFound):
        base_models.folder(services, base)
    with pytest.raises(UnknownBaseModel):
        base_models.obtain(services, str(base))
    assert obtained(services, "dir:a") == base
    assert (base_models.folder(services, base) / "model.safetensors").read_bytes() == tiny()["model.safetensors"]


def test_garbage_collection_keeps_a_base_with_all_its_files(services: Services, base: Digest) -> None:
    folder = base_models.folder(services, base)
    collect_garbage(services.settings, 0)
    assert ingest.complete(services, base) and all(path.exists() for path in folder.iterdir())


def test_a_forgotten_base_is_collected_with_its_folder(services: Services, base: Digest) -> None:
    folder = base_models.folder(services, base)
    assert services.materials.forget(base)
    collect_garbage(services.settings, 0)
    assert list(services.blobs.digests()) == [] and not folder.exists()


def test_what_a_job_under_way_was_promised_is_kept(services: Services, base: Digest) -> None:
    recipe = {"adapters": [], "learn": {"base_model": str(base), "data": [{"source": "hub:org/x"}]}}
    services.jobs.submit(Digest.of(b"job"), 1, method="x", recipe=recipe)
    services.materials.forget(base)
    collect_garbage(services.settings, 0)
    assert ingest.complete(services, base)
    services.jobs.finish(Digest.of(b"job"), 1, "failed")
    collect_garbage(services.settings, 0)
    assert not ingest.complete(services, base)


def test_a_checkpoint_is_kept_until_its_job_succeeds(services: Services) -> None:
    job = Digest.of(b"job")
    state = services.blobs.put([b"state"], media_type="application/vnd.safetensors")
    services.jobs.submit(job, 1, method="x", recipe={"adapters": []})
    services.jobs.set_checkpoint(job, state)
    services.jobs.finish(job, 1, "cancelled")
    collect_garbage(services.settings, 0)
    assert services.blobs.stat(state.digest) == 5
    services.jobs.submit(job, 2, method="x", recipe={"adapters": []})
    assert services.jobs.checkpoint(job) == state
