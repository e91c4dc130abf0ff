"""Adapters in: from the Hub or an upload to a checked, recorded manifest; and who may have what came from a private place."""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol

from app.adapters import check
from app.bases import read_basis
from app.services import Services
from merge_algos.formats.spec import AdapterSpec
from storage.base_files import is_weights
from storage.digest import Descriptor, Digest
from storage.index import AdapterRecord, BasisRecord, now
from storage.manifest import MEDIA_JSON, MEDIA_MANIFEST, MEDIA_TENSORS, AdapterManifest, BasisManifest, Source, parts_of
from storage.sources.hub import HubRef, HubSnapshot
from storage.sources.hub_snapshot import WEIGHTS

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_THE_ONE_FILE = "*"  # no name of a file on a Hub


def pinned(services: Services, ref: HubRef, *, token: str | None) -> HubSnapshot | HubRef:
    """The reference at a commit, after the Hub has confirmed that this caller may read it.

    A public adapter already imported at that very commit is answered from the index, so it works while the Hub is down.
    """
    known = services.index.find_source(str(ref))
    if known is not None and not known.restricted:
        return ref
    return services.hub.resolve(ref, token=token)


def obtain(services: Services, ref: HubRef, *, token: str | None) -> AdapterRecord:
    """The adapter a reference names now, which this caller may read; fetched if it is not here yet."""
    found = pinned(services, ref, token=token)
    if isinstance(found, HubSnapshot):
        return import_hub(services, found, token=token)
    return held(services, str(found)) or import_hub(services, services.hub.resolve(found, token=token), token=token)


def held(services: Services, source: str) -> AdapterRecord | None:
    """The adapter imported from this pinned source, if all of it is still in the store."""
    known = services.index.find_source(source)
    return known if known is not None and complete(services, known.id) else None


def import_hub(services: Services, snapshot: HubSnapshot, *, token: str | None = None) -> AdapterRecord:
    """Fetch, check and record one adapter; an import that was done before is answered from the index.

    Raises the Hub's errors, and whatever `adapters.check` finds in the files.
    """
    known = held(services, str(snapshot.ref))
    if known is not None:
        return known
    limit_bytes = services.settings.max_upload_bytes
    fetch = partial(services.hub.fetch, snapshot, blobs=services.blobs, token=token)
    config = fetch(snapshot.config, media_type=MEDIA_JSON, limit_bytes=_MAX_CONFIG_BYTES) if snapshot.config else None
    weights = fetch(snapshot.weights, media_type=MEDIA_TENSORS, limit_bytes=limit_bytes)
    source = Source("hub", str(snapshot.ref))
    restricted = (_asked_for(str(snapshot.ref), with_config=config is not None),) if snapshot.restricted else ()
    known_base = snapshot.base_model if config is None else None
    return _record(services, config, weights, source, otherwise=known_base, licence=snapshot.licence, restricted=restricted)


def _asked_for(source: str, *, with_config: bool) -> str:
    """The source as `Restricted` has it. A folder's one file may have any name, so it is looked for again."""
    return source if with_config or HubRef.parse(source.removeprefix("hub:")).is_file else f"{source}#{_THE_ONE_FILE}"


def import_upload(
    services: Services, config: Iterable[bytes] | None, weights: Iterable[bytes], *, base_model: str | None = None
) -> AdapterRecord:
    """Store, check and record an uploaded adapter. config: None of a single file, of which `base_model` may say what its
    metadata does not, or other than it. Raises BlobTooLarge, StoreFull, and what `adapters.check` finds.
    """
    blobs, limit_bytes = services.blobs, services.settings.max_upload_bytes
    stored_config = blobs.put(config, media_type=MEDIA_JSON, limit_bytes=_MAX_CONFIG_BYTES) if config is not None else None
    stored_weights = blobs.put(weights, media_type=MEDIA_TENSORS, limit_bytes=limit_bytes)
    return _record(services, stored_config, stored_weights, Source("upload"), base_model=base_model)


class Restricted(Protocol):
    """A record of anything that came, in part, from private or gated places.

    restricted: `hub:<reference>@<commit>` of adapters; with `#*` where the adapter is the only file there, and of anything else
    with `#` and the file there to ask for.
    """

    @property
    def restricted(self) -> tuple[str, ...]: ...


def check_access(services: Services, record: Restricted, *, token: str | None) -> None:
    """Ask the Hub again whether this caller may read every private or gated source that this was made from.

    Raises the Hub's errors. The caller's token is used if there is one, else the operator's: what a fresh import would use.
    """
    for source in record.restricted:
        reference, _, file = source.removeprefix("hub:").partition("#")
        if file == _THE_ONE_FILE:
            services.hub.resolve(HubRef.parse(reference), token=token)
        else:
            services.hub.check_access(HubRef.parse(reference), file=file or WEIGHTS, token=token)


def complete(services: Services, artefact: Digest) -> bool:
    """Whether a manifest of any kind and all its parts are in the store: a cache hit is verified, not assumed."""
    if services.blobs.stat(artefact) is None:
        return False
    with services.blobs.open(artefact) as stream:
        parts = parts_of(stream.read())
    return all(services.blobs.stat(part.digest) == part.size_bytes for part in parts)


def describe_merged(services: Services, manifest: AdapterManifest, digest: Digest, spec: AdapterSpec) -> AdapterRecord:
    """The index row of a merge result: as restricted as all its inputs together."""
    return describe(manifest, digest, spec, restrictions(services, manifest.inputs))


def describe_basis(
    services: Services, manifest: BasisManifest, digest: Digest, modules: int, extends: Digest | None
) -> BasisRecord:
    """The index row of a basis: as restricted as its inputs, and as what it extends, whose inputs may be gone.

    Raises BlobNotFound, as `restrictions`.
    """
    earlier = restrictions(services, [extends]) if extends else ()
    known = read_basis(services.blobs, extends).inputs if extends else ()
    own = restrictions(services, manifest.inputs[len(known) :])
    return BasisRecord(
        id=digest,
        base_model=manifest.base_model,
        tasks=manifest.tasks,
        modules=modules,
        size_bytes=manifest.tensors.size_bytes,
        recipe=manifest.recipe,
        restricted=tuple(dict.fromkeys((*earlier, *own))),
        created_at=now(),
    )


def guard(source: str, file: str) -> str:
    """What `check_access` asks the Hub for: a source, and a file there that only those may read who may read it all."""
    return f"{source}#{file}"


def restrictions(services: Services, inputs: Iterable[Digest]) -> tuple[str, ...]:
    """All that any of these adapters, bases and base models is restricted by. Raises BlobNotFound where nobody knows any more.

    One that was forgotten while a job uses it counts as private wherever it came from the Hub: its record, which knew better,
    is gone, and its manifest names the source.
    """
    return tuple(dict.fromkeys(source for parent in inputs for source in _restrictions(services, parent)))


def _restrictions(services: Services, parent: Digest) -> tuple[str, ...]:
    record = services.index.get(parent) or services.index.get_basis(parent) or services.materials.base(parent)
    if record is not None:
        return record.restricted
    with services.blobs.open(parent) as stream:
        manifest = json.load(stream)
    match manifest.get("source"):
        case str(source):  # a base model's
            weights = next(name for name in manifest["parts"] if is_weights(name))
            return (guard(source, weights),) if source.startswith("hub:") else ()
        case {"kind": "hub", "reference": reference}:
            return (_asked_for(str(reference), with_config="adapter_config.json" in manifest["parts"]),)
    return restrictions(services, [Digest.parse(text) for text in manifest["inputs"]])


def _record(
    services: Services,
    config: Descriptor | None,
    weights: Descriptor,
    source: Source,
    *,
    base_model: str | None = None,
    otherwise: str | None = None,
    licence: str | None = None,
    restricted: tuple[str, ...] = (),
) -> AdapterRecord:
    """base_model: instead of what the files say.  otherwise: where they say none."""
    spec = check(services.blobs, config, weights)
    spec = replace(spec, base_model=base_model or spec.base_model or otherwise or "")
    manifest = AdapterManifest(spec.base_model, config, weights, source, licence)
    stored = services.blobs.put([manifest.to_bytes()], media_type=MEDIA_MANIFEST)
    record = describe(manifest, stored.digest, spec, restricted)
    services.index.add(record)
    return record


def describe(manifest: AdapterManifest, digest: Digest, spec: AdapterSpec, restricted: tuple[str, ...]) -> AdapterRecord:
    """The index row of an adapter. restricted: Hub sources whose access is checked again before it is handed out."""
    return AdapterRecord(
        id=digest,
        base_model=spec.base_model,
        modules=len(spec.modules),
        rank=spec.rank,
        size_bytes=manifest.weights.size_bytes,
        source=manifest.source,
        licence=manifest.licence,
        restricted=restricted,
        created_at=now(),
    )
