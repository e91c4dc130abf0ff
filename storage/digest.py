"""The identity of bytes: a digest we computed ourselves, and the descriptor that carries it with size and media type."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from storage.errors import BadDigest

_SHAPE = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """sha256 of some bytes. `hex`: 64 lower-case digits; written `sha256:<hex>`. Raises BadDigest for anything else."""

    hex: str

    def __post_init__(self) -> None:
        if _SHAPE.fullmatch(f"sha256:{self.hex}") is None:
            raise BadDigest(self.hex)

    @classmethod
    def parse(cls, text: str) -> Self:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise BadDigest(text)
        return cls(match[1])

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(hashlib.sha256(data).hexdigest())

    def __str__(self) -> str:
        return f"sha256:{self.hex}"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where bytes are found and what they are: media type, digest and size, as in the OCI image specification."""

    digest: Digest
    size_bytes: int
    media_type: str

    def to_json(self) -> dict[str, Any]:
        return {"digest": str(self.digest), "media_type": self.media_type, "size_bytes": self.size_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(Digest.parse(data["digest"]), int(data["size_bytes"]), str(data["media_type"]))
