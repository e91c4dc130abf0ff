"""Manifests: what is written is what is read, and the bytes are the identity."""

import dataclasses

import pytest

from storage.digest import Descriptor, Digest
from storage.manifest import AdapterManifest, BasisManifest, Source, named_parts, parts_of


def descriptor(text: str) -> Descriptor:
    return Descriptor(Digest.of(text.encode()), len(text), "application/json")


BASIS = BasisManifest(
    base_model="org/base",
    tasks=("zeta", "alpha", "ü"),
    tensors=descriptor("tensors"),
    contents=descriptor("contents"),
    report=descriptor("report"),
    recipe=str(Digest.of(b"recipe")),
    inputs=(Digest.of(b"2"), Digest.of(b"1"), Digest.of(b"2")),
)
ADAPTER = AdapterManifest("org/base", descriptor("config"), descriptor("weights"), Source("upload"))
SINGLE = AdapterManifest("org/base", None, descriptor("weights"), Source("upload"))


def test_a_basis_comes_back_as_it_was_with_its_tasks_in_order() -> None:
    assert BasisManifest.from_bytes(BASIS.to_bytes()) == BASIS


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "org/other"},
        {"tasks": ("alpha", "zeta", "ü")},
        {"tensors": descriptor("other")},
        {"contents": descriptor("other")},
        {"report": descriptor("other")},
        {"recipe": "sha256:other"},
        {"inputs": BASIS.inputs[::-1][:2]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_differs_makes_another_identity(change: dict[str, object]) -> None:
    assert dataclasses.replace(BASIS, **change).to_bytes() != BASIS.to_bytes()


@pytest.mark.parametrize("manifest", [ADAPTER, SINGLE], ids=["peft", "single"])
def test_an_adapter_comes_back_as_it_was(manifest: AdapterManifest) -> None:
    assert AdapterManifest.from_bytes(manifest.to_bytes()) == manifest


def test_the_identity_of_an_adapter_with_a_config_is_what_it_always_was() -> None:
    assert Digest.of(ADAPTER.to_bytes()).hex.startswith("e8b56fe39f7ef5c3")


@pytest.mark.parametrize("manifest", [BASIS, ADAPTER, SINGLE], ids=["basis", "adapter", "single"])
def test_the_parts_of_either_kind_can_be_listed_without_knowing_which(manifest: BasisManifest | AdapterManifest) -> None:
    assert named_parts(manifest.to_bytes()) == manifest.parts
    assert set(parts_of(manifest.to_bytes())) == set(manifest.parts.values())
