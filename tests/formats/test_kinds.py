"""Every kind, as real PEFT writes it: its delta is PEFT's, and merged alone it is the same adapter."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kind_cases import CASES, GROUNDED, guide, shapes
from making import Made
from merge_algos import formats
from merge_algos.formats import kinds
from serving import Server
from tiny import Case, as_matrices

# one of each kind, and those whose modules differ in rank, which is what this profile keeps
COMPACT = [case for n, case in enumerate(CASES) if "pattern" in case.label or case.kind not in {c.kind for c in CASES[:n]}]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def read(directory: Path) -> Made:
    config = json.loads((directory / "adapter_config.json").read_text())
    return Made(load_file(directory / "adapter_model.safetensors"), config)


def ingested(case: Case, made: Made) -> dict[str, Tensor]:
    """Module, as the model calls it, -> dense delta as we read it."""
    known = shapes(case.model()) if case.guided else None
    deltas = formats.read(made.config, made.tensors, known).deltas
    return {of_model(case, name): delta.to_dense().double() for name, delta in deltas.items() if delta.rank}


def of_model(case: Case, module: str) -> str:
    owner, bracket, expert = module.partition("[")
    return case.names.get(owner, owner.replace(".base_layer", "")) + bracket + expert


def test_every_kind_of_peft_has_a_proof() -> None:
    assert {case.kind for case in (*CASES, *GROUNDED)} == {name for name, kind in kinds.registry().items() if kind.peft_types}


@every_case
def test_the_delta_is_pefts(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    ours, theirs = ingested(case, made), as_matrices(case.deltas(tmp_path), case.model())
    assert ours.keys() == theirs.keys()
    for name, merged in theirs.items():
        delta = merged / 2 if name in case.twice else merged
        assert (ours[name] - delta).norm() <= 1e-5 * delta.norm(), name


@every_case
def test_the_rank_is_the_one_that_the_header_tells(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    spec = formats.describe(made.config, {name: tuple(tensor.shape) for name, tensor in made.tensors.items()})
    deltas = formats.read(made.config, made.tensors, shapes(case.model()) if case.guided else None).deltas
    assert {m.name: m.r for m in spec.modules} == {name: delta.rank for name, delta in deltas.items()}


@every_case
def test_loading_changes_no_tensor(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    ingested(case, made)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.tensors.items())


@pytest.mark.parametrize(("case", "profile"), [(c, "portable") for c in CASES] + [(c, "compact") for c in COMPACT], ids=str)
def test_merged_alone_it_is_the_same_adapter_to_peft(case: Case, profile: str, server: Server, tmp_path: Path) -> None:
    original = case.save(tmp_path / "original")
    inputs, weights = [server.add(read(original))], [1.0]
    if case.guided:
        inputs.append(server.add(read(guide(case).save(tmp_path / "guide"))))
        weights.append(0.0)
    job = server.merge(*inputs, weights=weights, dtype="float32", profile=profile)
    assert job["state"] == "succeeded", job["error"]
    merged = case.through_peft(server.download(job["result"]["id"], tmp_path / "merged"))
    expected, bare = case.through_peft(original), case.through_base()
    effect = (expected - bare).norm()
    assert (merged - expected).norm() <= 1e-5 * effect
    assert effect > 1e-3 * bare.norm()
