"""What `braid extract` does, in this process or on a server."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from app import base_models, commands
from app.client import Client
from app.commands import Merged
from app.errors import InvalidField
from app.extract.request import resolve_extraction
from app.schemas import ExtractRequest
from app.services import Services
from app.settings import Settings


def build_request(
    rank: int | None, energy: float | None, heavy_tail: int | None, most: int | None, **flags: Any
) -> dict[str, Any]:
    """The body of POST /extract from flags; flags: as fields, None where not given. Raises InvalidField."""
    rules = {"rank": rank, "energy": energy, "heavy_tail": heavy_tail}
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise InvalidField("--rank", "give one of --rank, --energy and --heavy-tail")
    if most is not None and rank is not None:
        raise InvalidField("--max-rank", "--rank is the most already")
    request = {name: value for name, value in flags.items() if value is not None}
    request["rank"] = rank if rank is not None else given | ({"max": most} if most is not None else {})
    _parse(request)
    return request


def extract_here(settings: Settings, request: Mapping[str, Any], output: Path, console: Console, *, token: str | None) -> Merged:
    """Extract in this process and save the result."""
    services = Services.open(settings)
    models = {field: _here(services, request[field], field) for field in ("base", "tuned")}
    recipe = resolve_extraction(_parse({**request, **models}), services, token=token)
    if name := request.get("name"):
        services.index.request_name(name, recipe.digest)
    return commands.run_here(services, recipe, output, console)


def extract_there(url: str, request: Mapping[str, Any], output: Path, console: Console, *, token: str | None) -> Merged:
    """Extract on a server, follow the job, download the result. Raises Refused if the job fails."""
    with Client.connect(url, token=token) as client:
        job = commands.follow(client, client.extract(request), console)
        commands.save_result(client, job, output)
    return Merged(job["result"]["id"], json.loads((output / "report.json").read_text()))


def _parse(body: Mapping[str, Any]) -> ExtractRequest:
    """Raises InvalidField naming the first wrong field."""
    try:
        return ExtractRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidField(".".join(map(str, first["loc"])), first["msg"]) from None


def _here(services: Services, source: str, field: str) -> str:
    """Who works in a process of their own is the operator, and may name any directory: it becomes the id of what is in it."""
    if not Path(source).is_dir():
        return source
    folder = Path(source).resolve()
    allowed = replace(services, settings=services.settings.model_copy(update={"bases_dir": folder.parent}))
    return base_models.pin(allowed, f"dir:{folder.name}", token=None, field=field)
