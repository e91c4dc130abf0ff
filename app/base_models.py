"""Base models in: from the Hub or the operator's own directories into the store, and out again as a directory to load."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from app import ingest
from app.errors import UnknownBaseModel
from app.services import Services
from storage import base_files
from storage.base_files import CONFIG, GGUF, INDEX
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.errors import BadSource, BlobTooLarge, InvalidTensorFile, NoBaseModel
from storage.index import now
from storage.manifest import MEDIA_BASE, MEDIA_JSON, MEDIA_TENSORS, BaseManifest
from storage.materials import BaseRecord
from storage.model_folders import make_folder
from storage.sources.hub import HubListing, HubRef
from storage.tensors import read_header

_CHUNK_BYTES = 1024 * 1024
_MAX_JSON_BYTES = 64 * 1024 * 1024
_GGUF_MAGIC = b"GGUF"
PART = "#"  # between the source of a base model and what names some of its tensors, where the store holds those alone


def pin(services: Services, source: str, *, token: str | None, field: str = "base_model") -> str:
    """The base model as a recipe names it, which this caller may read: `hub:…@commit` or `sha256:…`.

    A directory is read now, for it may change; so is what only this caller's token can read, for that is not kept.
    Raises BadSource, UnknownBaseModel, NoBaseModel, PickleOnly, InvalidTensorFile, BlobTooLarge and the Hub's errors.
    """
    kind, _, rest = source.partition(":")
    match kind:
        case "hub":
            return _pin_hub(services, model_ref(source), token)
        case "dir":
            return str(_import_directory(services, _inside(services, rest, source), source))
        case "sha256":
            return str(_known(services, Digest.parse(source), token))
    raise BadSource(source, f"{field} must begin with hub:, dir: or sha256:")


def obtain(services: Services, pinned: str) -> Digest:
    """The manifest of a pinned base model, fetched with the operator's token if it is not here. Raises as `pin`."""
    known = held(services, pinned)
    if known is not None:
        return known
    if not pinned.startswith("hub:"):
        raise UnknownBaseModel(pinned)
    listing, chosen = choose(services, model_ref(pinned), token=None)
    return import_whole(services, listing, chosen, token=None)


def held(services: Services, pinned: str) -> Digest | None:
    """The manifest of a pinned base model, if all of it is in the store."""
    if pinned.startswith("hub:"):
        return _held(services, model_ref(pinned))
    digest = Digest.parse(pinned)
    return digest if ingest.complete(services, digest) else None


def folder(services: Services, base: Digest) -> Path:
    """A directory with the files of a base model under their own names; read-only. Raises BlobNotFound, NoBaseModel."""
    return make_folder(services.layout, services.blobs, base, read(services, base).files)


def read(services: Services, base: Digest) -> BaseManifest:
    """Raises BlobNotFound, NoBaseModel."""
    with services.blobs.open(base) as stream:
        return BaseManifest.from_bytes(stream.read())


def restrictions(services: Services, base: Digest) -> tuple[str, ...]:
    """What a result learned on this base is restricted by. One that was forgotten counts as private if it is from the Hub."""
    return ingest.restrictions(services, [base])


def restricted_by(services: Services, pinned: str) -> tuple[str, ...]:
    """The same of a pinned base model, of which the store may hold some tensors alone, or nothing any more."""
    whole = held(services, pinned)
    if whole is not None or not pinned.startswith("hub:"):
        return restrictions(services, whole or Digest.parse(pinned))
    parts = services.materials.bases_from(f"{pinned}{PART}")
    if not parts:
        return (ingest.guard(pinned, CONFIG),)
    return tuple(dict.fromkeys(source for part in parts for source in part.restricted))


def _pin_hub(services: Services, ref: HubRef, token: str | None) -> str:
    whole = services.materials.base_from(str(ref))
    known = (whole,) if whole is not None else services.materials.bases_from(f"{ref}{PART}")
    if any(not base.restricted for base in known):
        return str(ref)
    listing, chosen = choose(services, ref, token=token)
    if listing.restricted and token is not None:
        import_whole(services, listing, chosen, token=token)
    return str(listing.ref)


def choose(services: Services, ref: HubRef, *, token: str | None) -> tuple[HubListing, dict[str, str]]:
    """The listing and, by our names, the files that make the base model; the caller may read them."""
    listing = services.hub.listing(ref, token=token)
    chosen = base_files.choose([name for name in listing.names if "/" not in name], str(ref))
    if listing.restricted:
        services.hub.check_access(listing.ref, file=chosen[_first_weights(chosen)], token=token)
    return listing, chosen


def import_whole(services: Services, listing: HubListing, chosen: Mapping[str, str], *, token: str | None) -> Digest:
    """Every file of a base model, into the store. chosen: as of `choose`.  Raises BlobTooLarge and the Hub's errors."""
    known = _held(services, listing.ref)
    if known is not None:
        return known
    limit_bytes = services.settings.max_base_bytes
    if sum(listing.names[theirs].size_bytes for theirs in chosen.values()) > limit_bytes:
        raise BlobTooLarge(limit_bytes)
    files = {
        ours: services.hub.fetch(listing, listing.names[theirs], services.blobs, media_type=_media_type(ours), token=token)
        for ours, theirs in chosen.items()
    }
    return record(services, files, str(listing.ref), guards(listing, chosen))


def guards(listing: HubListing, chosen: Mapping[str, str]) -> tuple[str, ...]:
    """What the Hub is asked again before anyone gets what this base gave. chosen: as of `choose`."""
    return (ingest.guard(str(listing.ref), chosen[_first_weights(chosen)]),) if listing.restricted else ()


def _held(services: Services, ref: HubRef) -> Digest | None:
    known = services.materials.base_from(str(ref))
    return known.id if known is not None and ingest.complete(services, known.id) else None


def _known(services: Services, digest: Digest, token: str | None) -> Digest:
    known = services.materials.base(digest)
    if known is None or PART in known.source or not ingest.complete(services, digest):
        raise UnknownBaseModel(str(digest))
    ingest.check_access(services, known, token=token)
    return digest


def _inside(services: Services, relative: str, source: str) -> Path:
    """The directory of that name below the one the operator allows. Raises BadSource, UnknownBaseModel."""
    root = services.settings.bases_dir
    if root is None:
        raise BadSource(source, "this service reads no directories; its operator may allow one with BRAID_BASES_DIR")
    path = Path(relative)
    if not relative.isprintable() or not path.parts or path.is_absolute() or ".." in path.parts:
        raise BadSource(source, "write dir: and a plain path below the directory that the operator allows")
    try:
        found = _contained(root, root / path, source)
    except (OSError, RuntimeError):  # nothing there, a name too long, a loop of links
        found = None
    if found is None or not found.is_dir():
        raise UnknownBaseModel(source)
    return found


def _contained(root: Path, path: Path, source: str) -> Path:
    """Where the path really leads. Raises BadSource if that is outside, OSError if nowhere."""
    real = path.resolve(strict=True)
    if not real.is_relative_to(root.resolve()):
        raise BadSource(source, f"{path.name[:100]} leads out of the directory that the operator allows")
    return real


def _import_directory(services: Services, directory: Path, source: str) -> Digest:
    chosen = base_files.choose([path.name for path in directory.iterdir() if path.is_file()], source)
    root, left_bytes = services.settings.bases_dir or directory, services.settings.max_base_bytes
    files: dict[str, Descriptor] = {}
    for ours, theirs in chosen.items():
        chunks = _chunks(_contained(root, directory / theirs, source))
        files[ours] = services.blobs.put(chunks, media_type=_media_type(ours), limit_bytes=left_bytes)
        left_bytes -= files[ours].size_bytes
    return record(services, files, source, ())


def record(
    services: Services, files: Mapping[str, Descriptor], source: str, restricted: tuple[str, ...], *, part: str = ""
) -> Digest:
    """Check and record files that are in the store as a base model. part: names the tensors, if they are not all of them."""
    _check(services.blobs, files, source)
    stored = services.blobs.put([BaseManifest(files, source).to_bytes()], media_type=MEDIA_BASE)
    size_bytes = sum(part.size_bytes for part in files.values())
    services.materials.add_base(BaseRecord(stored.digest, f"{source}{part}", size_bytes, restricted, now()))
    return stored.digest


def _check(blobs: BlobStore, files: Mapping[str, Descriptor], source: str) -> None:
    """Headers and lists, before anything reads what they lead to. Raises NoBaseModel, InvalidTensorFile naming the file."""
    for name, part in _weights(files).items():
        (_check_gguf if name == GGUF else _check_safetensors)(blobs, name, part, source)
    for name in (CONFIG, INDEX):
        if name in files:
            document = json_object(blobs, name, files[name], source)
            if name == INDEX:
                base_files.require_index_of(document.get("weight_map"), files, source)


def _check_safetensors(blobs: BlobStore, name: str, part: Descriptor, source: str) -> None:
    try:
        with blobs.open(part.digest) as stream:
            read_header(stream, part.size_bytes)
    except InvalidTensorFile as error:
        raise InvalidTensorFile(f"{name} of {source[:200]}: {error.reason}", error.tensor) from error


def _check_gguf(blobs: BlobStore, name: str, part: Descriptor, source: str) -> None:
    with blobs.open(part.digest) as stream:
        if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise NoBaseModel(source, f"{name} does not begin as a GGUF file does")


def json_object(blobs: BlobStore, name: str, part: Descriptor, source: str) -> Mapping[str, object]:
    """What a stored file of a base model holds. Raises NoBaseModel."""
    with blobs.open(part.digest) as stream:
        raw = stream.read(_MAX_JSON_BYTES + 1)
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict) or len(raw) > _MAX_JSON_BYTES:
        raise NoBaseModel(source, f"its {name} is not a JSON object")
    return parsed


def _weights(files: Mapping[str, Descriptor]) -> dict[str, Descriptor]:
    return {name: part for name, part in files.items() if base_files.is_weights(name)}


def _first_weights(names: Iterable[str]) -> str:
    return next(name for name in names if base_files.is_weights(name))


def model_ref(source: str) -> HubRef:
    ref = HubRef.parse(source.removeprefix("hub:"))
    if ref.kind != "models":
        raise BadSource(source, "a dataset is no base model")
    return ref


def _media_type(name: str) -> str:
    known = {".safetensors": MEDIA_TENSORS, ".json": MEDIA_JSON}
    return known.get(Path(name).suffix, "application/octet-stream")


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
