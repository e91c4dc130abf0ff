"""The manifest of an adapter: which blobs it is made of, where it came from. Its digest is the adapter's identity."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from storage.digest import Descriptor, Digest

MEDIA_MANIFEST = "application/vnd.braid.adapter.v1+json"
MEDIA_TENSORS = "application/vnd.safetensors"
MEDIA_JSON = "application/json"
MEDIA_MARKDOWN = "text/markdown; charset=utf-8"


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN and Inf."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter came from. reference: `hub:org/name@commit`, the recipe's digest, or empty for an upload."""

    kind: Literal["hub", "upload", "merge"]
    reference: str = ""


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """The parts of one adapter and its provenance. `inputs`: manifests it was merged from, in the recipe's order.

    licence: as the card at the pinned commit names it, so that a merge can pass it on.
    """

    base_model: str
    config: Descriptor
    weights: Descriptor
    source: Source
    licence: str | None = None
    inputs: tuple[Digest, ...] = ()
    report: Descriptor | None = None
    card: Descriptor | None = None

    @property
    def parts(self) -> dict[str, Descriptor]:
        """File name as downloaded -> blob."""
        named = {
            "adapter_config.json": self.config,
            "adapter_model.safetensors": self.weights,
            "report.json": self.report,
            "README.md": self.card,
        }
        return {name: part for name, part in named.items() if part is not None}

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "schema": 1,
                "base_model": self.base_model,
                "parts": {name: part.to_json() for name, part in self.parts.items()},
                "source": {"kind": self.source.kind, "reference": self.source.reference},
                "licence": self.licence,
                "inputs": [str(digest) for digest in self.inputs],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        document: Mapping[str, Any] = json.loads(data)
        parts = {name: Descriptor.from_json(part) for name, part in document["parts"].items()}
        return cls(
            base_model=document["base_model"],
            config=parts["adapter_config.json"],
            weights=parts["adapter_model.safetensors"],
            source=Source(**document["source"]),
            licence=document["licence"],
            inputs=tuple(Digest.parse(text) for text in document["inputs"]),
            report=parts.get("report.json"),
            card=parts.get("README.md"),
        )
