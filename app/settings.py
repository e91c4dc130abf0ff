"""Operator settings: read once from the environment, passed on as one frozen value. Nothing else reads the environment."""

import os
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Every field is an environment variable with the prefix BRAID_; the README's table lists them all."""

    model_config = SettingsConfigDict(env_prefix="BRAID_", frozen=True, extra="ignore")

    data_dir: Path = Field(default=Path.home() / ".braid", description="where blobs, the index and the job database live")
    host: str = Field(default="127.0.0.1", description="address the API listens on")
    port: int = Field(default=8000, ge=0, le=65535, description="port the API listens on; 0 takes a free one")
    hub_endpoint: str = Field(default="https://huggingface.co", description="the Hub that `hub:` sources are pulled from")
    hub_token: SecretStr | None = Field(
        default=None, description="the operator's Hub token; callers send their own in X-Hub-Token"
    )
    hub_timeout_s: float = Field(default=20.0, gt=0, description="longest wait for one read from the Hub, seconds")
    hub_deadline_s: float = Field(
        default=1800.0, gt=0, description="longest time for one file from the Hub, retries included, seconds"
    )
    devices: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda:\d+(,cuda:\d+)*)$", description="auto, cpu, or cuda:0,cuda:1; one job slot each"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads per job slot; 0 shares the cores among the slots")
    worker_id: str = Field(
        default="worker-1",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="stable name of a worker: after a crash it takes up its own jobs; those of one that stays away go to others",
    )
    max_upload_bytes: int = Field(default=4 * 1024**3, gt=0, description="largest adapter accepted, uploaded or pulled, bytes")
    bases_dir: Path | None = Field(default=None, description="base models of the operator: what `dir:` sources are below")
    max_base_bytes: int = Field(
        default=64 * 1024**3, gt=0, description="largest base model accepted, all its files together, bytes"
    )
    shard_bytes: int = Field(default=32 * 1024**2, gt=0, description="merged bytes per checkpoint: what a crash can cost")
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="log level of API and workers")

    def to_environment(self) -> dict[str, str]:
        """The environment in which another process of ours reads these very settings."""
        values = {f"BRAID_{name.upper()}": _text(getattr(self, name)) for name in type(self).model_fields}
        return {**os.environ, **{name: value for name, value in values.items() if value is not None}}


def _text(value: object) -> str | None:
    if value is None:
        return None
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
