"""The tensors of a base model that an adapter needs, and no others where the Hub sends parts of files."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from app import base_models, ingest
from app.grounding.weights import needed
from app.services import Services
from merge_algos.formats.spec import AdapterSpec
from storage.base_files import CONFIG, GGUF, INDEX, WEIGHTS, require_index_of
from storage.digest import Descriptor, Digest
from storage.errors import BlobTooLarge, NoBaseModel
from storage.manifest import MEDIA_JSON, MEDIA_TENSORS, canonical_json
from storage.sources.hub import HubFile, HubListing, Part, RangesIgnored
from storage.tensor_writer import TensorSpec, layout, write
from storage.tensors import LENGTH_BYTES, MAX_HEADER_BYTES, Header, TensorInfo, read_header


def obtain(services: Services, pinned: str, spec: AdapterSpec) -> Digest:
    """A manifest that holds at least the base model's tensors that this adapter needs, fetched with the operator's token.

    Raises BadBase naming a module that has none there, NoBaseModel for weights in GGUF, and what `base_models.pin` raises.
    """
    whole = base_models.held(services, pinned)
    if whole is not None or not pinned.startswith("hub:"):
        return whole or base_models.obtain(services, pinned)
    listing, chosen = base_models.choose(services, base_models.model_ref(pinned), token=None)
    if GGUF in chosen:
        raise NoBaseModel(pinned, "weights in a GGUF are quantised, so nothing exact comes of them; use safetensors")
    try:
        with services.hub.parts(listing) as read:
            return _obtain(_Remote(services, listing, chosen, read), spec)
    except RangesIgnored:
        return base_models.import_whole(services, listing, chosen, token=None)


@dataclass(frozen=True, slots=True)
class _Remote:
    """A base model on the Hub. chosen: our file name -> theirs.  read: gives parts of files."""

    services: Services
    listing: HubListing
    chosen: Mapping[str, str]
    read: Part

    @property
    def source(self) -> str:
        return str(self.listing.ref)

    def file(self, ours: str) -> HubFile:
        return self.listing.names[self.chosen[ours]]

    def fetch(self, ours: str) -> Descriptor:
        """A small file, whole."""
        return self.services.hub.fetch(self.listing, self.file(ours), self.services.blobs, media_type=MEDIA_JSON)

    def header(self, ours: str) -> Header:
        """Raises InvalidTensorFile."""
        file = self.file(ours)
        prefix = b"".join(self.read(file, 0, min(LENGTH_BYTES, file.size_bytes)))
        length = int.from_bytes(prefix, "little")
        stop = LENGTH_BYTES + length if length <= MAX_HEADER_BYTES else 0  # what is too long is refused unread
        rest = b"".join(self.read(file, LENGTH_BYTES, min(stop, file.size_bytes)))
        return read_header(io.BytesIO(prefix + rest), file.size_bytes)

    def holders(self) -> dict[str, str]:
        """Tensor -> the file that holds it. Raises NoBaseModel, InvalidTensorFile."""
        if INDEX not in self.chosen:
            return dict.fromkeys(self.header(WEIGHTS).tensors, WEIGHTS)
        document = base_models.json_object(self.services.blobs, INDEX, self.fetch(INDEX), self.source)
        weight_map = document.get("weight_map")
        require_index_of(weight_map, self.chosen, self.source)
        assert isinstance(weight_map, Mapping)
        return dict(weight_map)


@dataclass(frozen=True, slots=True)
class _Place:
    """One tensor on the Hub. start: of its bytes in the file."""

    file: HubFile
    info: TensorInfo
    start: int

    def read(self, read: Part) -> Iterator[bytes]:
        return read(self.file, self.start, self.start + self.info.size_bytes)


def _obtain(remote: _Remote, spec: AdapterSpec) -> Digest:
    services, holders = remote.services, remote.holders()
    tensors = needed(spec, holders)
    part = f"{base_models.PART}{Digest.of(canonical_json(list(tensors)))}"
    known = services.materials.base_from(f"{remote.source}{part}")
    if known is not None and ingest.complete(services, known.id):
        return known.id
    files = {CONFIG: remote.fetch(CONFIG), WEIGHTS: _put(remote, {tensor: holders[tensor] for tensor in tensors})}
    return base_models.record(services, files, remote.source, base_models.guards(remote.listing, remote.chosen), part=part)


def _put(remote: _Remote, holders: Mapping[str, str]) -> Descriptor:
    """These tensors alone, as one safetensors file. Raises BlobTooLarge before anything is read."""
    headers = {ours: remote.header(ours) for ours in dict.fromkeys(holders.values())}
    places = {tensor: _place(remote, tensor, ours, headers[ours]) for tensor, ours in holders.items()}
    limit_bytes = remote.services.settings.max_base_bytes
    if sum(place.info.size_bytes for place in places.values()) > limit_bytes:
        raise BlobTooLarge(limit_bytes)
    specs = [TensorSpec(tensor, place.info.dtype, place.info.shape) for tensor, place in places.items()]
    chunks = write(layout(specs), lambda tensor: places[tensor].read(remote.read))
    return remote.services.blobs.put(chunks, media_type=MEDIA_TENSORS)


def _place(remote: _Remote, tensor: str, ours: str, header: Header) -> _Place:
    if tensor not in header.tensors:
        raise NoBaseModel(remote.source, f"{INDEX} places {tensor[:100]} in {ours}, which does not hold it")
    info = header.tensors[tensor]
    return _Place(remote.file(ours), info, header.data_start + info.start)
