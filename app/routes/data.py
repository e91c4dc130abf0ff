"""Data files: upload, list, forget."""

import asyncio
from collections.abc import Iterator
from typing import BinaryIO

from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile

from app import data
from app.errors import BadUpload, UnsupportedMediaType
from app.routes.deps import Cursor, Limit, UsesServices, make_cursor, media_type, parse_cursor
from app.schemas import DataList, DataView, problems
from app.services import Services
from app.views import data_view
from storage.digest import Digest
from storage.materials import FileRecord

router = APIRouter(tags=["data"])

_CHUNK_BYTES = 1024 * 1024
_FIELD = "file"
_FORM = {"type": "object", "required": [_FIELD], "properties": {_FIELD: {"type": "string", "format": "binary"}}}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@router.post("/data", status_code=201, response_model=DataView, openapi_extra=_BODY, responses=problems(415, 501, 507))
async def add_data(request: Request, response: Response, services: UsesServices) -> DataView:
    """Upload JSONL, Parquet or a classification head (multipart, field `file`). What it is, its bytes tell, not its name."""
    kind = media_type(request)
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(kind, ("multipart/form-data",))
    record = await _upload(request, services)
    response.headers["Location"] = f"/data/{record.id}"
    return data_view(record)


@router.get("/data")
def list_data(services: UsesServices, limit: Limit = 50, cursor: Cursor = None) -> DataList:
    """Newest first, a page at a time."""
    found = services.materials.page_of_files(limit=limit + 1, after=parse_cursor(cursor))
    page, more = found[:limit], len(found) > limit
    following = make_cursor(page[-1].created_at, page[-1].id) if more else None
    return DataList(data=[data_view(record) for record in page], next=following)


@router.get("/data/{data_id}")
def show_data(data_id: str, services: UsesServices) -> DataView:
    """What it is, how many rows it has, and how its columns are called."""
    return data_view(data.get(services, Digest.parse(data_id)))


@router.delete("/data/{data_id}", status_code=204)
def forget_data(data_id: str, services: UsesServices) -> None:
    """Forget a data file. `braid store gc` frees the bytes once no job uses them."""
    services.materials.forget(data.get(services, Digest.parse(data_id)).id)


async def _upload(request: Request, services: Services) -> FileRecord:
    async with request.form(max_files=1, max_fields=0) as form:
        found = form.get(_FIELD)
        if len(form) != 1 or not isinstance(found, UploadFile):
            raise BadUpload(f"the form holds the file {_FIELD!r} and nothing else")
        return await asyncio.to_thread(data.add, services, _chunks(found.file))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
