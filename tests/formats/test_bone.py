"""Bone, as MiSS was called before PEFT 0.19. bone/: files that PEFT 0.17.1 wrote, and what its merge added to the base.

The adapters are on the layers `down` and `square` of `tiny.zoo()`, every trained number drawn at random.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from making import Made
from merge_algos.errors import UnsupportedAdapter
from test_grounded import dense, described, ingested, of_the_base
from test_kinds import read
from tiny import zoo

FILES = Path(__file__).parent / "bone"


@pytest.mark.parametrize("variant", ["plain", "uneven", "bat"])
def test_the_delta_is_what_pefts_merge_added(variant: str) -> None:
    expected = load_file(FILES / variant / "delta.safetensors")
    found = ingested(read(FILES / variant), of_the_base(zoo()))
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (dense(found[name]) - delta.double()).norm() <= 1e-6 * delta.norm(), name


def test_only_bat_needs_the_base_weights() -> None:
    needs = {variant: {module.needs_base for module in described(read(FILES / variant)).modules} for variant in ("plain", "bat")}
    assert needs == {"plain": {False}, "bat": {True}}


@pytest.mark.parametrize("peft_type", ["BONE", "MISS"])
def test_a_variant_that_nobody_knows_is_refused_by_name(peft_type: str) -> None:
    made = read(FILES / "plain")
    with pytest.raises(UnsupportedAdapter, match="init_weights 'cat'"):
        described(Made(made.tensors, {**made.config, "peft_type": peft_type, "init_weights": "cat"}))
