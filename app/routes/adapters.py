"""Adapters: import, upload, list, download, forget."""

import asyncio
import base64
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from app import ingest
from app.adapters import read_manifest
from app.errors import BadUpload, UnknownAdapter, UnknownPart, UnsupportedMediaType
from app.routes.deps import Cursor, Limit, UsesServices, UsesToken, make_cursor, parse_cursor
from app.schemas import AdapterList, AdapterView, ImportRequest
from app.services import Services
from app.views import adapter_view
from storage.digest import Descriptor, Digest
from storage.errors import BadSource
from storage.index import AdapterRecord
from storage.sources.hub import HubRef

router = APIRouter(tags=["adapters"])

_CHUNK_BYTES = 1024 * 1024
_PARTS = ("adapter_config.json", "adapter_model.safetensors")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ImportRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": list(_PARTS),
                    "properties": {part: {"type": "string", "format": "binary"} for part in _PARTS}
                    | {"name": {"type": "string"}},
                }
            },
        },
    }
}


class Part(StrEnum):
    """The files of an adapter. Only these are ever looked up, whatever the path says."""

    weights = "adapter_model.safetensors"
    config = "adapter_config.json"
    report = "report.json"
    card = "README.md"


@router.post("/adapters", status_code=201, response_model=AdapterView, openapi_extra=_BODY)
async def add_adapter(request: Request, response: Response, services: UsesServices, token: UsesToken) -> AdapterView:
    """Import from the Hub (JSON), or upload `adapter_config.json` and `adapter_model.safetensors` (multipart)."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        asked = _parse(await request.body())
        record, name = await asyncio.to_thread(_import, services, asked, token), asked.name
    elif media_type == "multipart/form-data":
        record, name = await _upload(request, services)
    else:
        raise UnsupportedMediaType(media_type)
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


@router.get("/adapters/{adapter_id}/{part}", response_class=FileResponse)
@router.head("/adapters/{adapter_id}/{part}", response_class=FileResponse)
def download(
    adapter_id: str,
    part: Part,
    services: UsesServices,
    token: UsesToken,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """One file. The ETag is its sha256; ranges work; a private source is checked again with the caller's token."""
    record = _get(services, adapter_id)
    ingest.check_access(services, record, token=token)
    blob = read_manifest(services.blobs, record.id).parts.get(part.value)
    if blob is None:
        raise UnknownPart(part.value)
    headers = _headers(blob, private=bool(record.restricted))
    if _matches(if_none_match, headers["etag"]):
        return Response(status_code=304, headers=headers)
    path = services.blobs.path(blob.digest)
    return FileResponse(path, media_type=blob.media_type, headers=headers, filename=part.value)


def _parse(body: bytes) -> ImportRequest:
    try:
        return ImportRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


def _import(services: Services, asked: ImportRequest, token: str | None) -> AdapterRecord:
    kind, _, rest = asked.source.partition(":")
    if kind != "hub":
        raise BadSource(asked.source, "only hub: sources are imported; upload files as multipart/form-data")
    return ingest.obtain(services, HubRef.parse(rest), token=token)


async def _upload(request: Request, services: Services) -> tuple[AdapterRecord, str | None]:
    try:
        async with request.form(max_files=len(_PARTS), max_fields=1) as form:
            files = [_file(form, part) for part in _PARTS]
            name = form.get("name")
            checked = _parse_name(name) if isinstance(name, str) else None
            record = await asyncio.to_thread(ingest.import_upload, services, *(_chunks(file.file) for file in files))
            return record, checked
    except MultiPartException as error:
        raise BadUpload(error.message) from error


def _parse_name(name: str) -> str | None:
    return _parse(ImportRequest.model_construct(source="upload", name=name).model_dump_json().encode()).name


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
