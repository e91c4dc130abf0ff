"""What `braid data` does, in this process or on a server."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from app import data
from app.client import Client
from app.console import data_table
from app.errors import InvalidField
from app.services import Services
from app.settings import Settings
from app.views import data_view

_CHUNK_BYTES = 1024 * 1024
_PAGE = 200


def add_here(settings: Settings, file: Path) -> str:
    """The id of the data file, now in this store. Raises InvalidField, and what `data.add` raises."""
    return str(data.add(Services.open(settings), _chunks(_existing(file))).id)


def add_there(url: str, file: Path) -> str:
    """The same on a server. Raises InvalidField, Refused."""
    with Client.connect(url) as client:
        return str(client.add_data(_existing(file))["id"])


def list_here(settings: Settings, console: Console) -> None:
    console.print(data_table(_all(Services.open(settings))))


def list_there(url: str, console: Console) -> None:
    """Raises Refused."""
    with Client.connect(url) as client:
        console.print(data_table(client.list_data()))


def _all(services: Services) -> Iterator[Mapping[str, Any]]:
    after = None
    while page := services.materials.page_of_files(limit=_PAGE, after=after):
        yield from (data_view(record).model_dump(mode="json") for record in page)
        after = (page[-1].created_at, str(page[-1].id))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise InvalidField("FILE", f"{file} is no file")
    return file


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
