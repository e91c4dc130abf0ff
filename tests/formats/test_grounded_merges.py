"""Every kind that needs the base model, merged alone at weight 1 by the engine beside a checkpoint of it: PEFT's own merge."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from app.commands import save
from app.services import Services
from app.settings import Settings
from doras import added, certificate, recipe_of, run
from kind_cases import CASES, GROUNDED, lora
from merge_algos import formats
from merge_algos.errors import UnsupportedAdapter
from test_grounded import of_peft, of_the_base
from test_kinds import read
from tiny import Case, as_matrices, llama

WIDTHS = [case for case in CASES if case.guided]  # their files do not say how wide a layer is


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services.open(Settings(data_dir=tmp_path / "data", bases_dir=tmp_path / "bases"))


def write_base(case: Case, folder: Path) -> None:
    model = case.model()
    folder.mkdir(parents=True)
    kind = {"GPT2Model": "gpt2", "LlamaModel": "llama"}.get(type(model).__name__, "zoo")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


def merged(services: Services, case: Case, tmp_path: Path) -> dict[str, Tensor]:
    """Module -> delta of the result, as the model's layers have it; beside the base with nothing cut."""
    write_base(case, tmp_path / "bases" / "base")
    recipe = recipe_of(services, added(services, case.save(tmp_path / "in")), base_model="dir:base", base_rank={"energy": 1.0})
    adapter = run(services, recipe)
    assert certificate(services, adapter)["grounded"][0]["relative_error"] <= 1e-5
    save(services, adapter, tmp_path / "out")
    made = read(tmp_path / "out")
    return {name: delta.to_dense().double() for name, delta in formats.read(made.config, made.tensors).deltas.items()}


@pytest.mark.parametrize("case", GROUNDED, ids=str)
def test_beside_its_base_it_is_pefts_merge(services: Services, case: Case, tmp_path: Path) -> None:
    found, theirs = merged(services, case, tmp_path), of_peft(case, tmp_path / "in")
    assert found.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert (found[name] - delta).norm() <= 2e-5 * delta.norm(), name


def test_an_adapter_that_counts_layers_in_its_own_way_is_no_adapter_of_the_base(services: Services, tmp_path: Path) -> None:
    case = lora("layers", llama, target_modules=["q_proj"], use_dora=True, layer_replication=[[0, 1], [0, 2]])
    with pytest.raises(UnsupportedAdapter, match="layer_replication"):
        merged(services, case, tmp_path)


@pytest.mark.parametrize("case", WIDTHS, ids=str)
def test_the_base_says_how_wide_its_layers_are(services: Services, case: Case, tmp_path: Path) -> None:
    found, theirs = merged(services, case, tmp_path), as_matrices(case.deltas(tmp_path / "in"), case.model())
    assert found.keys() == theirs.keys() and of_the_base(case.model()).keys() >= theirs.keys()
    for name, delta in theirs.items():
        assert (found[name] - delta).norm() <= 2e-5 * delta.norm(), name
