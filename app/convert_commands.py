"""What `braid convert` does, in this process or on a server."""

import shutil
from pathlib import Path
from typing import get_args

from app import ingest
from app.adapters import read_manifest
from app.client import WEIGHTS, Client
from app.commands import adapter_here, adapter_there, save
from app.convert import Format, convert
from app.errors import InvalidField
from app.services import Services
from app.settings import Settings
from storage.digest import Digest


def format_of(text: str) -> Format:
    """Raises InvalidField."""
    known: dict[str, Format] = {name: name for name in get_args(Format)}
    if text not in known:
        raise InvalidField("--to", f"{text[:100]!r} is none of {', '.join(known)}")
    return known[text]


def convert_here(settings: Settings, source: str, output: Path, to: Format, *, token: str | None) -> None:
    """Save the adapter in that format: one file, or for `peft` a directory."""
    _check_output(output, to)
    services = Services.open(settings)
    record = adapter_here(services, source, token=token)
    ingest.check_access(services, record, token=token)
    made = convert(services, record, to)
    if to == "peft":
        save(services, made.id, output)
    else:
        _save_file(services, made.id, output)


def convert_there(url: str, source: str, output: Path, to: Format, *, token: str | None) -> None:
    """The same on a server. Raises Refused."""
    _check_output(output, to)
    with Client.connect(url, token=token) as client:
        adapter = adapter_there(client, source)
        if to != "peft":
            client.download(f"/adapters/{adapter}/{WEIGHTS}?format={to}", output)
            return
        output.mkdir(parents=True, exist_ok=True)
        for part in ("adapter_config.json", WEIGHTS):
            client.download(f"/adapters/{adapter}/{part}?format={to}", output / part)


def _save_file(services: Services, adapter: Digest, output: Path) -> None:
    shutil.copyfile(services.blobs.path(read_manifest(services.blobs, adapter).weights.digest), output)


def _check_output(output: Path, to: Format) -> None:
    if to == "peft" and output.is_file():
        raise InvalidField("OUT", f"{output} is a file, and PEFT's format is a directory")
    if to != "peft" and output.is_dir():
        raise InvalidField("OUT", f"{output} is a directory, and {to}'s format is one file")
