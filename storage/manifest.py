"""Manifests: which blobs an adapter, basis or base model is made of, and where from. A digest of one is an identity."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from storage.base_files import own_name
from storage.digest import Descriptor, Digest

MEDIA_MANIFEST = "application/vnd.braid.adapter.v1+json"
MEDIA_BASIS = "application/vnd.braid.basis.v1+json"
MEDIA_BASE = "application/vnd.braid.base.v1+json"
MEDIA_TENSORS = "application/vnd.safetensors"
MEDIA_JSON = "application/json"
MEDIA_MARKDOWN = "text/markdown; charset=utf-8"


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN and Inf."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter came from. reference: `hub:org/name@commit`, a digest of what was asked for (merge, basis,
    extract, conversion, ground), or empty for an upload.
    """

    kind: Literal["hub", "upload", "merge", "basis", "extract", "conversion", "ground"]
    reference: str = ""


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """The parts of one adapter and its provenance. `inputs`: manifests it was made from, in the recipe's order.

    config: None of a single file that has none.  licence: as the card at the pinned commit names it, so that a merge can pass
    it on.
    """

    base_model: str
    config: Descriptor | None
    weights: Descriptor
    source: Source
    licence: str | None = None
    inputs: tuple[Digest, ...] = ()
    report: Descriptor | None = None
    card: Descriptor | None = None
    coefficients: Descriptor | None = None

    @property
    def parts(self) -> dict[str, Descriptor]:
        """File name as downloaded -> blob."""
        named = {
            "adapter_config.json": self.config,
            "adapter_model.safetensors": self.weights,
            "report.json": self.report,
            "README.md": self.card,
            "coefficients.json": self.coefficients,
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
            config=parts.get("adapter_config.json"),
            weights=parts["adapter_model.safetensors"],
            source=Source(**document["source"]),
            licence=document["licence"],
            inputs=tuple(Digest.parse(text) for text in document["inputs"]),
            report=parts.get("report.json"),
            card=parts.get("README.md"),
            coefficients=parts.get("coefficients.json"),
        )


@dataclass(frozen=True, slots=True)
class BasisManifest:
    """The parts of one reversible basis. tasks: their names.  inputs: one adapter each, in that order.

    contents: what lies where in `tensors`, and what each task lost.  recipe: the digest of what it was made by.
    """

    base_model: str
    tasks: tuple[str, ...]
    tensors: Descriptor
    contents: Descriptor
    report: Descriptor
    recipe: str
    inputs: tuple[Digest, ...]

    @property
    def parts(self) -> dict[str, Descriptor]:
        """File name as downloaded -> blob."""
        return {"basis.safetensors": self.tensors, "basis.json": self.contents, "report.json": self.report}

    def to_bytes(self) -> bytes:
        return canonical_json(
            {
                "schema": 1,
                "base_model": self.base_model,
                "tasks": list(self.tasks),
                "parts": {name: part.to_json() for name, part in self.parts.items()},
                "recipe": self.recipe,
                "inputs": [str(digest) for digest in self.inputs],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        document: Mapping[str, Any] = json.loads(data)
        parts = {name: Descriptor.from_json(part) for name, part in document["parts"].items()}
        return cls(
            base_model=document["base_model"],
            tasks=tuple(document["tasks"]),
            tensors=parts["basis.safetensors"],
            contents=parts["basis.json"],
            report=parts["report.json"],
            recipe=document["recipe"],
            inputs=tuple(Digest.parse(text) for text in document["inputs"]),
        )


@dataclass(frozen=True, slots=True)
class BaseManifest:
    """The files of one base model, by names from `base_files` alone. source: `hub:org/name@commit` or `dir:<folder>`."""

    files: Mapping[str, Descriptor]
    source: str

    @property
    def parts(self) -> dict[str, Descriptor]:
        """File name -> blob."""
        return dict(self.files)

    def to_bytes(self) -> bytes:
        parts = {own_name(name): part.to_json() for name, part in self.files.items()}
        return canonical_json({"schema": 1, "parts": parts, "source": self.source})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises NoBaseModel for a name that is not one of ours."""
        document: Mapping[str, Any] = json.loads(data)
        files = {own_name(name): Descriptor.from_json(part) for name, part in document["parts"].items()}
        return cls(files, document["source"])


def named_parts(manifest: bytes) -> dict[str, Descriptor]:
    """File name -> blob, of a manifest of any kind."""
    return {name: Descriptor.from_json(part) for name, part in json.loads(manifest)["parts"].items()}


def parts_of(manifest: bytes) -> tuple[Descriptor, ...]:
    """The blobs of a manifest of any kind."""
    return tuple(named_parts(manifest).values())
