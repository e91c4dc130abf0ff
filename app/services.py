"""The wiring: the only place that picks implementations."""

from dataclasses import dataclass
from typing import Self

from app.settings import Settings
from storage.blobs import BlobStore
from storage.database import connect, upgrade
from storage.files import FileBlobs
from storage.index import Index
from storage.jobs import Jobs
from storage.layout import Layout
from storage.materials import Materials
from storage.sources.hub import Hub

_ORPHAN_AGE_S = 3600.0  # longer than any live writer pauses between two chunks


@dataclass(frozen=True, slots=True)
class Services:
    """What routes, tasks and commands work with. Opening it migrates the index and sweeps up after killed writers."""

    settings: Settings
    layout: Layout
    blobs: BlobStore
    index: Index
    jobs: Jobs
    materials: Materials
    hub: Hub

    @classmethod
    def open(cls, settings: Settings) -> Self:
        layout = Layout(settings.data_dir)
        layout.locks.mkdir(parents=True, exist_ok=True)
        engine = connect(f"sqlite:///{layout.index}")
        upgrade(engine, layout.locks / "migrate")
        blobs = FileBlobs(settings.data_dir)
        blobs.sweep(older_than_s=_ORPHAN_AGE_S)
        return cls(settings, layout, blobs, Index(engine), Jobs(engine), Materials(engine), hub(settings))


def hub(settings: Settings) -> Hub:
    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    return Hub(settings.hub_endpoint, token, timeout_s=settings.hub_timeout_s, deadline_s=settings.hub_deadline_s)
