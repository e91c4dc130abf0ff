"""Data in: uploads and splits of Hub datasets, as checked and recorded blobs; and their columns out."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from app import data_formats, ingest
from app.errors import InvalidData, InvalidField, UnknownData, UnknownSplit
from app.services import Services
from storage.digest import Descriptor, Digest
from storage.errors import BadSource, BlobTooLarge
from storage.index import now
from storage.materials import FileRecord
from storage.sources.hub import HubListing, HubRef

MEDIA_DATA = "application/octet-stream"
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
# after the library `datasets`, narrowed to what is read here; the first that fits counts
_PLACES = (
    r"data/{}-[A-Za-z0-9_.-]+\.parquet",
    r"{}-[A-Za-z0-9_.-]+\.parquet",
    r"{}\.(parquet|jsonl)",
    r"data/{}\.(parquet|jsonl)",
    r"{}/[A-Za-z0-9_.-]+\.parquet",
)
_MOST_FILES = 1000
_SHOWN = 20


def add(services: Services, chunks: Iterable[bytes]) -> FileRecord:
    """Store, recognise and record one file. Raises BlobTooLarge, StoreFull, and what `data_formats.recognise` finds."""
    stored = services.blobs.put(chunks, media_type=MEDIA_DATA, limit_bytes=services.settings.max_upload_bytes)
    return _record(services, stored, source="", restricted=())


def get(services: Services, data: Digest) -> FileRecord:
    """Raises UnknownData for a file that is not known, or no longer here."""
    record = services.materials.file(data)
    if record is None or services.blobs.stat(data) != record.size_bytes:
        raise UnknownData(str(data))
    return record


def read_columns(services: Services, data: Digest, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Column -> its value in every row. Raises BlobNotFound, MissingColumn, InvalidData, NotInstalled."""
    return data_formats.read(services.blobs.path(data), columns)


def pin(services: Services, source: str, split: str, *, token: str | None) -> str:
    """The data as a recipe names it, which this caller may read: `sha256:…`, or `hub:datasets/…@commit` that has the split.

    Raises BadSource, UnknownData, UnknownSplit, InvalidData, BlobTooLarge and the Hub's errors.
    """
    if source.startswith("sha256:"):
        record = _with_rows(services, Digest.parse(source))
        ingest.check_access(services, record, token=token)
        return str(record.id)
    ref = _dataset_ref(source)
    held = _held(services, ref, split)
    if held and not any(record.restricted for record in held):
        return str(ref)
    listing, paths = _choose(services, ref, split, token=token)
    if listing.restricted and token is not None:
        _import(services, listing, paths, split, token=token)
    return str(listing.ref)


def obtain(services: Services, pinned: str, split: str) -> tuple[Digest, ...]:
    """The files of a pinned source in order, fetched with the operator's token if they are not here. Raises as `pin`."""
    if pinned.startswith("sha256:"):
        return (_with_rows(services, Digest.parse(pinned)).id,)
    ref = _dataset_ref(pinned)
    held = _held(services, ref, split)
    if held:
        return tuple(record.id for record in held)
    listing, paths = _choose(services, ref, split, token=None)
    return _import(services, listing, paths, split, token=None)


def split_files(names: Collection[str], split: str, source: str) -> tuple[str, ...]:
    """The files of a split among the names in a dataset's folder, in order. Raises InvalidField, UnknownSplit, InvalidData."""
    if _SPLIT.fullmatch(split) is None:
        raise InvalidField("split", "it is not a plain name of letters, digits and . _ -")
    for place in _PLACES:
        pattern = re.compile(place.format(re.escape(split)))
        found = sorted(name for name in names if pattern.fullmatch(name))
        if found:
            return _whole(found, split)
    offered = sorted(name[:100] for name in names if name.endswith((".parquet", ".jsonl")) and name.isprintable())
    raise UnknownSplit(source, split, tuple(offered[:_SHOWN]))


def _whole(found: Sequence[str], split: str) -> tuple[str, ...]:
    """The same names, unless they say themselves that some are missing."""
    totals = {int(match[1]) for match in (re.search(r"-of-([0-9]{1,6})\b", name) for name in found) if match}
    if len(found) > _MOST_FILES or (totals and totals != {len(found)}):
        raise InvalidData(f"the split {split} has {len(found)} files, and their names say otherwise or they are too many")
    return tuple(found)


def _choose(services: Services, ref: HubRef, split: str, *, token: str | None) -> tuple[HubListing, tuple[str, ...]]:
    listing = services.hub.listing(ref, token=token)
    paths = split_files(listing.names, split, str(ref))
    if sum(listing.names[path].size_bytes for path in paths) > services.settings.max_upload_bytes:
        raise BlobTooLarge(services.settings.max_upload_bytes)
    if listing.restricted:
        services.hub.check_access(listing.ref, file=paths[0], token=token)
    return listing, paths


def _import(
    services: Services, listing: HubListing, paths: Sequence[str], split: str, *, token: str | None
) -> tuple[Digest, ...]:
    restricted = (f"{listing.ref}#{paths[0]}",) if listing.restricted else ()
    records = []
    for number, path in enumerate(paths):
        stored = services.hub.fetch(listing, listing.names[path], services.blobs, media_type=MEDIA_DATA, token=token)
        source = f"{listing.ref}#{split}/{number:05d}-of-{len(paths):05d}"
        records.append(_record(services, stored, source=source, restricted=restricted))
    return tuple(_rows_only(record).id for record in records)


def _held(services: Services, ref: HubRef, split: str) -> tuple[FileRecord, ...]:
    """The files of this split at this commit if all of them are here, else none."""
    found = services.materials.files_from(f"{ref}#{split}/") if ref.is_commit else ()
    whole = [f"{ref}#{split}/{number:05d}-of-{len(found):05d}" for number in range(len(found))]
    if [record.source for record in found] != whole:
        return ()
    return found if all(services.blobs.stat(record.id) == record.size_bytes for record in found) else ()


def _with_rows(services: Services, data: Digest) -> FileRecord:
    return _rows_only(get(services, data))


def _rows_only(record: FileRecord) -> FileRecord:
    if record.kind == "safetensors":
        raise InvalidData("a classification head where rows are due")
    return record


def _record(services: Services, stored: Descriptor, *, source: str, restricted: tuple[str, ...]) -> FileRecord:
    found = data_formats.recognise(services.blobs.path(stored.digest))
    record = FileRecord(stored.digest, found.kind, found.rows, found.columns, stored.size_bytes, restricted, source, now())
    services.materials.add_file(record)
    return services.materials.file(stored.digest) or record


def _dataset_ref(source: str) -> HubRef:
    if not source.startswith("hub:datasets/"):
        raise BadSource(source, "write hub:datasets/org/name[/folder][@revision] or sha256:<data id>")
    return HubRef.parse(source.removeprefix("hub:"))
