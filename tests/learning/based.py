"""Small base models for tests, and the two steps by which they get into a store."""

from pathlib import Path

import torch
from safetensors.torch import save

from app import base_models
from app.services import Services
from storage.digest import Digest


def tiny(seed: int = 0) -> dict[str, bytes]:
    """The smallest folder that counts as a base model."""
    return {"config.json": b'{"model_type": "bert"}', "model.safetensors": save({"w": torch.full((2, 2), float(seed))})}


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def pinned(services: Services, source: str, token: str | None = None) -> str:
    return base_models.pin(services, source, token=token)


def obtained(services: Services, source: str, token: str | None = None) -> Digest:
    return base_models.obtain(services, pinned(services, source, token))
