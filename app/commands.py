"""What the commands of the command line do, in this process or on a server."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console

from app import data_commands, ingest
from app.adapters import describe_shard
from app.client import Client, Refused
from app.console import basis_table, certificate_table, grounded_table, how_to_load, left_out_table, progress_bar, training_table
from app.engine.child import workbench
from app.engine.devices import available
from app.engine.direct import DirectExecutor
from app.engine.local import threads_for
from app.engine.workflow import Run, run_all
from app.errors import InvalidField, UnknownAdapter
from app.grounding.recipe import ground_recipes
from app.learning import local
from app.recipe import Recipe
from app.report import read_report
from app.resolve import pin, resolve
from app.schemas import TASK_NAME, MergeRequest
from app.services import Services
from app.settings import Settings
from storage.digest import Descriptor, Digest
from storage.errors import BadDigest, BadSource
from storage.gc import collect
from storage.index import AdapterRecord
from storage.manifest import named_parts, parts_of
from storage.model_folders import sweep_folders
from storage.sources.hub import HubRef
from storage.verify import verify

_CHUNK_BYTES = 1024 * 1024
_MAX_MANIFEST_BYTES = 4 * 1024 * 1024
_PAGE = 200


@dataclass(frozen=True, slots=True)
class Merged:
    """id: of the adapter or basis.  report: its certificate."""

    id: str
    report: Mapping[str, Any]


def build_request(
    recipe: Path | None,
    sources: Sequence[str],
    weights: Sequence[float],
    parameters: Sequence[str],
    rank: str | None,
    flags: Mapping[str, Any],
    *,
    base_rank: str | None = None,
    extras: str | None = None,
    post: Sequence[str] = (),
) -> dict[str, Any]:
    """The body of POST /merge from a recipe file and flags, the flags winning. Raises InvalidField."""
    request: dict[str, Any] = _read_recipe(recipe) if recipe else {}
    request |= {name: value for name, value in flags.items() if value is not None}
    if sources:
        request["adapters"] = [{"source": source} for source in sources]
    if not request.get("adapters"):
        raise InvalidField("sources", "name at least one adapter, or a recipe with --recipe")
    if rank is not None:
        request["rank"] = parse_rank(rank)
    if base_rank is not None:
        request["base_rank"] = parse_rank(base_rank, "--base-rank")
    if extras is not None:
        request["extras"] = {"from": extras.removeprefix("from:")} if extras.startswith("from:") else extras
    if post:
        request["post"] = [_post_step(text) for text in post]
    parse_request(request)  # what comes from the file is known to have its shape from here on
    if weights:
        if len(weights) != len(request["adapters"]):
            raise InvalidField("--weight", f"{len(weights)} weights for {len(request['adapters'])} adapters")
        request["adapters"] = [{**item, "weight": w} for item, w in zip(request["adapters"], weights, strict=True)]
    if parameters:
        request["parameters"] = request.get("parameters", {}) | dict(_parameter(text) for text in parameters)
    parse_request(request)
    return request


def merge_here(settings: Settings, request: Mapping[str, Any], output: Path, console: Console, *, token: str | None) -> Merged:
    """Merge in this process and save the result."""
    settings, request = local.base_here(settings, request)
    services = Services.open(settings)
    stored = [{**item, "source": _here(services, item["source"])} for item in _with_names(request["adapters"])]
    tasks = local.tasks_with(request, lambda file: data_commands.add_here(settings, file))
    recipe = resolve(parse_request({**request, "adapters": stored, "tasks": tasks}), services, token=token)
    if recipe_name := request.get("name"):
        services.index.request_name(recipe_name, recipe.digest)
    return run_here(services, recipe, output, console)


def run_here(services: Services, recipe: Recipe, output: Path, console: Console) -> Merged:
    """The result of a recipe, made in this process unless it exists, and saved."""
    known = services.index.result(recipe.digest)
    if known is not None and ingest.complete(services, known.target):
        artefact = known.target
    else:
        settings = services.settings
        executor = DirectExecutor(workbench(services, available(settings.devices)[0], threads_for(settings, 1)))
        with progress_bar(console) as report:
            artefact = run_all(Run(services, recipe, executor, report, stop=lambda: False))
    save(services, artefact, output)
    return Merged(str(artefact), read_report(services.blobs, artefact) or {})


def merge_there(url: str, request: Mapping[str, Any], output: Path, console: Console, *, token: str | None) -> Merged:
    """Merge on a server, follow the job, download the result. Raises Refused if the job fails."""
    with Client.connect(url, token=token) as client:
        local.refuse_directory(request)
        stored = [{**item, "source": _there(client, item["source"])} for item in _with_names(request["adapters"])]
        tasks = local.tasks_with(request, lambda file: str(client.add_data(file)["id"]))
        job = follow(client, client.merge({**request, "adapters": stored, "tasks": tasks}), console)
        save_result(client, job, output)
    return Merged(job["result"]["id"], json.loads((output / "report.json").read_text()))


def follow(client: Client, job: dict[str, Any], console: Console) -> dict[str, Any]:
    """Show a job's progress until it ends; the job as it ended. Raises Refused unless it succeeded."""
    with progress_bar(console) as report:
        for event in client.follow(job["id"]):
            at = event["progress"]
            report(at["stage"], at["done"], at["total"], None if at["score"] is None else -at["score"])
    ended = client.job(job["id"])
    if ended["state"] != "succeeded":
        raise Refused(ended["error"] or {"detail": f"the job was {ended['state']}"})
    return ended


def save_result(client: Client, job: Mapping[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for part, link in job["result"]["links"].items():
        if "." in part:  # a file, not an action
            client.download(link, output / Path(part).name)


def show(merged: Merged, output: Path, console: Console) -> None:
    """The certificate as a table, and how to go on with what was saved."""
    if merged.report.get("kind") == "basis":
        console.print(basis_table(merged.report))
        console.print(f"\nSaved in [bold]{output}[/bold]. Get one task back with:\n")
        command = f"braid reconstruct {merged.id} {merged.report['tasks'][0]['name']} -o {merged.report['tasks'][0]['name']}"
        console.print(command, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(certificate_table(merged.report))
    if merged.report.get("grounded"):
        console.print(grounded_table(merged.report["grounded"]))
    if merged.report.get("left_out"):
        console.print(left_out_table(merged.report["left_out"]))
    if "training" in merged.report:
        console.print(training_table(merged.report["training"]))
    tell_how_to_load(output, console)


def tell_how_to_load(output: Path, console: Console) -> None:
    config = json.loads((output / "adapter_config.json").read_text())
    console.print(f"\nSaved in [bold]{output}[/bold]. Load it with:\n")
    shown = how_to_load(output, config["base_model_name_or_path"], config["task_type"])
    console.print(shown, markup=False, highlight=False, soft_wrap=True)


def import_here(settings: Settings, source: str, name: str | None, base_model: str | None, *, token: str | None) -> str:
    """The id of the adapter in a file, in a directory or on the Hub, now in this store. Raises BadSource, and their errors."""
    _check_base_model(source, base_model)
    services = Services.open(settings)
    if not _is_local(source) and not source.startswith("hub:"):
        raise BadSource(source, "it is no file, and neither a directory nor hub:org/name[/subfolder][@revision]")
    adapter = adapter_here(services, source, base_model, token=token).id
    if name is not None:
        services.index.set_name(name, adapter)
    return str(adapter)


def import_there(url: str, source: str, name: str | None, base_model: str | None, *, token: str | None) -> str:
    """The same on a server, which what is local is uploaded to. Raises Refused."""
    _check_base_model(source, base_model)
    with Client.connect(url, token=token) as client:
        added = client.upload(Path(source), name, base_model) if _is_local(source) else client.import_hub(source, name)
    return str(added["id"])


def adapter_here(services: Services, source: str, base_model: str | None = None, *, token: str | None) -> AdapterRecord:
    """The adapter of any source, brought into the store if it is not there. Raises the errors of sources."""
    if source.startswith("hub:"):
        return ingest.obtain(services, HubRef.parse(source.removeprefix("hub:")), token=token)
    adapter = pin(_here(services, source, base_model), services, token=token, field="source")
    record = services.index.get(Digest.parse(adapter))
    if record is None:
        raise UnknownAdapter(source)
    return record


def adapter_there(client: Client, source: str) -> str:
    """The id of the same on a server. Raises Refused."""
    return str(client.import_hub(source)["id"]) if source.startswith("hub:") else _there(client, source)


def _check_base_model(source: str, base_model: str | None) -> None:
    if base_model is not None and not Path(source).is_file():
        raise InvalidField("--base-model", "only of a single file; a directory's adapter_config.json and the Hub name their own")


def _is_local(source: str) -> bool:
    return Path(source).is_dir() or Path(source).is_file()


def collect_garbage(settings: Settings, grace_s: float) -> str:
    """Everything an adapter, base model, data file or a job under way refers to is live; the rest goes, once it is old enough."""
    services = Services.open(settings)
    collected = collect(services.blobs, live=set(_live(services)), grace_s=grace_s)
    sweep_folders(services.layout)
    return f"removed {len(collected.deleted)} blobs ({collected.freed_bytes} bytes), kept {len(collected.kept)}"


def verify_store(settings: Settings, console: Console) -> int:
    """Names every damaged blob; how many there are."""
    damaged = 0
    for blob in verify(Services.open(settings).blobs):
        if not blob.ok:
            damaged += 1
            console.print(f"damaged: {blob.digest}", style="red")
    console.print("all blobs are what their names say" if not damaged else f"{damaged} damaged blobs")
    return damaged


def parse_request(body: Mapping[str, Any]) -> MergeRequest:
    """Raises InvalidField naming the first wrong field."""
    try:
        return MergeRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidField(".".join(map(str, first["loc"])), first["msg"]) from None


def _live(services: Services) -> Iterator[Digest]:
    yield from services.materials.files()
    for artefact in (*services.index.artefacts(), *services.materials.bases(), *_in_use(services)):
        yield artefact
        yield from _parts(services, artefact)
    yield from (checkpoint.digest for checkpoint in services.jobs.live_checkpoints())
    for shard in (*services.jobs.live_shards(), *_of_groundings(services)):
        yield shard.digest
        if services.blobs.stat(shard.digest) is not None:
            yield describe_shard(services.blobs, shard)[0].digest


def _in_use(services: Services) -> Iterator[Digest]:
    """All that recipes of jobs under way name: it may have been forgotten since, but the job was promised it."""
    yield from (digest for recipe in _under_way(services) for digest in _digests(recipe))


def _of_groundings(services: Services) -> Iterator[Descriptor]:
    """Shards of what jobs under way ground first, which is no job of its own."""
    for recipe in (recipe for recipe in _under_way(services) if recipe.get("base_model")):
        for grounding in ground_recipes(Recipe.from_json(recipe)):
            yield from services.jobs.shards(grounding.digest).values()


def _under_way(services: Services) -> Iterator[Mapping[str, Any]]:
    after = None
    while page := services.jobs.page(limit=_PAGE, after=after, states=("queued", "running")):
        yield from (job.recipe for job in page)
        after = (page[-1].created_at, str(page[-1].id))


def _digests(value: Any) -> Iterator[Digest]:
    """Every digest written anywhere in a recipe."""
    if isinstance(value, str) and value.startswith("sha256:"):
        with suppress(BadDigest):
            yield Digest.parse(value)
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _digests(each)


def _parts(services: Services, artefact: Digest) -> Iterator[Digest]:
    """What a manifest consists of; nothing for a data file, which a recipe may name as well."""
    size_bytes = services.blobs.stat(artefact)
    if size_bytes is None or size_bytes > _MAX_MANIFEST_BYTES:
        return
    with services.blobs.open(artefact) as stream, suppress(ValueError, KeyError, TypeError, AttributeError, BadDigest):
        yield from [part.digest for part in parts_of(stream.read())]


def _with_names(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An adapter from a directory or file is called as that, where that is a name and nobody else's."""
    found = [_called(Path(item["source"])) for item in items]
    usable = [name if name and re.fullmatch(TASK_NAME, name) and found.count(name) == 1 else None for name in found]
    taken = {item.get("name") for item in items}
    return [
        {**item, "name": name} if name and name not in taken and not item.get("name") else dict(item)
        for item, name in zip(items, usable, strict=True)
    ]


def _called(place: Path) -> str | None:
    return place.resolve().name if place.is_dir() else place.stem if place.is_file() else None


def _here(services: Services, source: str, base_model: str | None = None) -> str:
    """A directory or file becomes the id of the adapter in it; any other source stays."""
    directory = Path(source)
    if directory.is_file():
        return str(ingest.import_upload(services, None, _chunks(directory), base_model=base_model).id)
    if not directory.is_dir():
        return source
    parts = ("adapter_config.json", "adapter_model.safetensors")
    for part in parts:
        if not (directory / part).is_file():
            raise InvalidField("sources", f"{directory} has no {part}")
    return str(ingest.import_upload(services, *(_chunks(directory / part) for part in parts)).id)


def _there(client: Client, source: str) -> str:
    return str(client.upload(Path(source))["id"]) if _is_local(source) else source


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def save(services: Services, artefact: Digest, output: Path) -> None:
    """The files of an adapter or a basis, in a directory."""
    output.mkdir(parents=True, exist_ok=True)
    with services.blobs.open(artefact) as stream:
        parts = named_parts(stream.read())
    for name, part in parts.items():
        shutil.copyfile(services.blobs.path(part.digest), output / name)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())  # YAML holds JSON
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidField("--recipe", f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise InvalidField("--recipe", f"{path} is not an object")
    return document


def _parameter(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise InvalidField("--parameter", f"{text!r} is not name=value")
    return name, yaml.safe_load(value)


def _post_step(text: str) -> dict[str, Any]:
    """`name` or `name:parameter=value,parameter=value`."""
    name, _, given = text.partition(":")
    return {"name": name, "parameters": dict(_parameter(part) for part in given.split(",") if part)}


def parse_rank(text: str, flag: str = "--rank") -> int | dict[str, float]:
    """`32`, `energy:0.99` or `energy:0.99:64`, as in a request. Raises InvalidField."""
    kind, *numbers = text.split(":")
    try:
        if kind == "energy":
            return {"energy": float(numbers[0])} | ({"max": int(numbers[1])} if len(numbers) > 1 else {})
        return int(text)
    except (ValueError, IndexError) as error:
        raise InvalidField(flag, f"{text!r} is neither a number nor energy:0.99 nor energy:0.99:64") from error
