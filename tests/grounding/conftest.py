"""A small Llama with a DoRA and a LoRA on it, written once; and for every test a store of its own with a Hub beside it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import LoraConfig

from app.services import Services
from app.settings import Settings
from doras import TARGETS, dora, write_adapter
from hub_server import HubServer
from llama import write_llama


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: the Llama.  dora, lora: adapters of it."""
    root = tmp_path_factory.mktemp("written")
    write_llama(root / "base")
    write_adapter(root / "base", root / "dora", dora())
    write_adapter(root / "base", root / "lora", LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS), seed=2)
    return root


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    """The same, free to be changed."""
    return Path(shutil.copytree(written, tmp_path / "models"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path, hub: HubServer, models: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data", bases_dir=models, hub_endpoint=hub.endpoint, hub_deadline_s=5, max_base_bytes=20_000_000
    )


@pytest.fixture
def services(settings: Settings) -> Services:
    return Services.open(settings)
