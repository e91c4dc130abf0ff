"""Adapters: import, upload, list, download, forget."""

import asyncio
import base64
import json
from collections.abc import Iterator
from threading import BoundedSemaphore
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from app import ingest
from app.adapters import read_manifest
from app.convert import Format, convert, held
from app.errors import BadUpload, InvalidField, UnknownAdapter, UnknownPart, UnsupportedMediaType
from app.routes.deps import Cursor, Limit, UsesServices, UsesSlots, UsesToken, make_cursor, media_type, parse_cursor
from app.routes.ranges import settle_range
from app.schemas import AdapterList, AdapterView, Body, ImportRequest, UploadFields, problems
from app.services import Services
from app.views import adapter_view
from storage.digest import Descriptor, Digest
from storage.errors import BadSource
from storage.index import AdapterRecord
from storage.manifest import MEDIA_TENSORS
from storage.sources.hub import HubRef

router = APIRouter(tags=["adapters"])
T = TypeVar("T", bound=Body)

_CHUNK_BYTES = 1024 * 1024
_CONFIG, _WEIGHTS = _PARTS = ("adapter_config.json", "adapter_model.safetensors")
_FIELDS = ("name", "base_model")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ImportRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [_WEIGHTS],
                    "properties": {part: {"type": "string", "format": "binary"} for part in _PARTS}
                    | {field: {"type": "string"} for field in _FIELDS},
                }
            },
        },
    }
}


FILES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, MEDIA_TENSORS: {}, "text/markdown": {}}},
    206: {"description": "the range asked for"},
    304: {"description": "the copy at hand is the file"},
    **problems(401, 403, 416, 502),
}


@router.post(
    "/adapters",
    status_code=201,
    response_model=AdapterView,
    openapi_extra=_BODY,
    responses=problems(401, 403, 415, 502, 507),
)
async def add_adapter(request: Request, response: Response, services: UsesServices, token: UsesToken) -> AdapterView:
    """Import from the Hub (JSON), or upload (multipart): `adapter_model.safetensors`, and `adapter_config.json` if it has one.

    A single file, as kohya's trainers and diffusers write, may come with `base_model`.
    """
    kind = media_type(request)
    if kind == "application/json":
        asked = _parse(await request.body(), ImportRequest)
        record, name = await asyncio.to_thread(_import, services, asked, token), asked.name
    elif kind == "multipart/form-data":
        record, name = await _upload(request, services)
    else:
        raise UnsupportedMediaType(kind, ("application/json", "multipart/form-data"))
    response.headers["Location"] = f"/adapters/{record.id}"
    return await asyncio.to_thread(_named, services, record, name)


@router.get("/adapters")
def list_adapters(services: UsesServices, limit: Limit = 50, cursor: Cursor = None) -> AdapterList:
    """Newest first, a page at a time."""
    found = services.index.page(limit=limit + 1, after=parse_cursor(cursor))
    page, more = found[:limit], len(found) > limit
    following = make_cursor(page[-1].created_at, page[-1].id) if more else None
    return AdapterList(data=[adapter_view(services, record) for record in page], next=following)


@router.get("/adapters/{adapter_id}")
def show_adapter(adapter_id: str, services: UsesServices) -> AdapterView:
    """What it is, where it came from, and links to its files."""
    return adapter_view(services, _get(services, adapter_id))


@router.delete("/adapters/{adapter_id}", status_code=204)
def forget_adapter(adapter_id: str, services: UsesServices) -> None:
    """Forget an adapter, its names and the results that led to it. `braid store gc` frees the bytes."""
    services.index.forget(_get(services, adapter_id).id)


@router.get("/adapters/{adapter_id}/{part}", response_class=FileResponse, responses=FILES)
@router.head("/adapters/{adapter_id}/{part}", response_class=FileResponse, responses=FILES)
def download(
    request: Request,
    adapter_id: str,
    part: str,
    services: UsesServices,
    slots: UsesSlots,
    token: UsesToken,
    to: Annotated[Format | None, Query(alias="format", description="as it came, if not given")] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """One file. The ETag is its sha256; ranges work; a private source is checked again with the caller's token.

    In another format it is made at the first request and stays the same from then on.
    """
    record = _get(services, adapter_id)
    ingest.check_access(services, record, token=token)
    return send_part(request, services, _in_format(services, slots, record, to), part, if_none_match)


def _in_format(services: Services, slots: BoundedSemaphore, record: AdapterRecord, to: Format | None) -> AdapterRecord:
    """What is in the store is answered at once; only work waits for its turn."""
    known = record if to is None else held(services, record, to)
    if known is not None or to is None:
        return known or record
    with slots:
        return convert(services, record, to)


def send_part(request: Request, services: Services, record: AdapterRecord, part: str, if_none_match: str | None) -> Response:
    """One file of an adapter that this caller may read. Raises UnknownPart."""
    blob = read_manifest(services.blobs, record.id).parts.get(part)
    if blob is None:
        raise UnknownPart(part)
    return send(request, services, blob, part, if_none_match, private=bool(record.restricted))


def send(
    request: Request, services: Services, blob: Descriptor, name: str, if_none_match: str | None, *, private: bool
) -> Response:
    """A blob as a download, or that the caller's copy is still good."""
    headers = _headers(blob, private=private)
    if _matches(if_none_match, headers["etag"]):
        return Response(status_code=304, headers=headers)
    settle_range(request, blob.size_bytes, etag=headers["etag"])
    path = services.blobs.path(blob.digest)
    return FileResponse(path, media_type=blob.media_type, headers=headers, filename=name)


def _parse(body: bytes, model: type[T]) -> T:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def _import(services: Services, asked: ImportRequest, token: str | None) -> AdapterRecord:
    kind, _, rest = asked.source.partition(":")
    if kind != "hub":
        raise BadSource(asked.source, "only hub: sources are imported; upload files as multipart/form-data")
    return ingest.obtain(services, HubRef.parse(rest), token=token)


async def _upload(request: Request, services: Services) -> tuple[AdapterRecord, str | None]:
    async with request.form(max_files=len(_PARTS), max_fields=len(_FIELDS)) as form:
        _refuse_unknown(form)
        weights = _file(form, _WEIGHTS)
        config = _file(form, _CONFIG) if _CONFIG in form else None
        asked = _said(form)
        if config is not None and asked.base_model is not None:
            raise InvalidField("base_model", f"{_CONFIG} names it")
        files = (_chunks(config.file) if config else None, _chunks(weights.file))
        record = await asyncio.to_thread(ingest.import_upload, services, *files, base_model=asked.base_model)
        return record, asked.name


def _refuse_unknown(form: FormData) -> None:
    for field in form:
        if field not in {*_PARTS, *_FIELDS}:
            raise BadUpload(f"the field {field[:100]!r} is unknown; there are {', '.join((*_PARTS, *_FIELDS))}")


def _said(form: FormData) -> UploadFields:
    found = {field: form[field] for field in _FIELDS if field in form}
    for field, value in found.items():
        if isinstance(value, UploadFile):
            raise BadUpload(f"{field} is text, not a file")
    return _parse(json.dumps(found).encode(), UploadFields)


def _file(form: FormData, part: str) -> UploadFile:
    found = form.get(part)
    if not isinstance(found, UploadFile):
        raise BadUpload(f"the file {part} is missing")
    return found


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _named(services: Services, record: AdapterRecord, name: str | None) -> AdapterView:
    if name is not None:
        services.index.set_name(name, record.id)
    return adapter_view(services, record)


def _headers(blob: Descriptor, *, private: bool) -> dict[str, str]:
    digest = base64.b64encode(bytes.fromhex(blob.digest.hex)).decode()
    return {
        "etag": f'"{blob.digest.hex}"',
        "repr-digest": f"sha-256=:{digest}:",
        "cache-control": f"{'private' if private else 'public'}, max-age=31536000, immutable",
        "x-content-type-options": "nosniff",
    }


def _matches(if_none_match: str | None, etag: str) -> bool:
    """RFC 9110: any of the listed tags, weak or not, or `*`."""
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in tags or "*" in tags


def _get(services: Services, adapter_id: str) -> AdapterRecord:
    record = services.index.get(Digest.parse(adapter_id))
    if record is None or services.blobs.stat(record.id) is None:
        raise UnknownAdapter(adapter_id)
    return record
