"""Kinds whose delta depends on the base model's weight: beside it, it is PEFT's; without it, they are refused by name."""

import re
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from kind_cases import GROUNDED, LINEAR, glora, lora, peanut
from making import PREFIX, Made
from merge_algos import formats
from merge_algos.errors import ShapeMismatch, UnsupportedAdapter
from merge_algos.formats.spec import AdapterSpec
from merge_algos.lowrank import LowRankDelta
from test_kinds import read
from tiny import Case, as_matrices, quietly, zoo

grounded_case = pytest.mark.parametrize("case", GROUNDED, ids=str)


def described(made: Made) -> AdapterSpec:
    return formats.describe(made.config, {name: tuple(tensor.shape) for name, tensor in made.tensors.items()})


def of_the_base(model: nn.Module) -> dict[str, Tensor]:
    """Module -> its weight as its delta is laid out."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(".weight") and tensor.ndim > 1}
    return as_matrices(weights, model)


def ingested(made: Made, weights: Mapping[str, Tensor]) -> dict[str, Tensor | LowRankDelta]:
    found = {}
    for module in described(made).modules:
        whole = formats.completed(module, tuple(weights[module.name].shape))
        tensors = {role: made.tensors[name] for role, name in whole.tensors.items()}
        own = formats.ground(whole, tensors, weights[module.name]) if whole.needs_base else formats.load(whole, tensors)
        found[module.name] = own
    return found


def dense(delta: Tensor | LowRankDelta) -> Tensor:
    return delta.to(torch.float64).to_dense() if isinstance(delta, LowRankDelta) else delta.double()


def of_peft(case: Case, directory: Path) -> dict[str, Tensor]:
    """Module -> what PEFT's merge adds to the base as it was before PEFT wrapped it.

    In float32, because PiSSA begins in no wider type.
    """
    before = of_the_base(case.model())
    loaded = quietly(lambda: peft.PeftModel.from_pretrained(case.model(), directory))
    merged = of_the_base(quietly(loaded.merge_and_unload))
    differences = {name: merged[name].double() - W.double() for name, W in before.items()}
    return {name: delta for name, delta in differences.items() if bool(delta.any())}


@grounded_case
def test_beside_the_base_weight_the_delta_is_pefts(case: Case, tmp_path: Path) -> None:
    directory = case.save(tmp_path)
    ours, theirs = ingested(read(directory), of_the_base(case.model())), of_peft(case, directory)
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert (dense(ours[name]) - delta).norm() <= 1e-5 * delta.norm(), name


@grounded_case
def test_the_rank_is_at_most_what_the_header_tells(case: Case, tmp_path: Path) -> None:
    made, weights = read(case.save(tmp_path)), of_the_base(case.model())
    deltas = ingested(made, weights)
    for module in described(made).modules:
        r = formats.completed(module, tuple(weights[module.name].shape)).r
        assert int(torch.linalg.matrix_rank(dense(deltas[module.name]), rtol=1e-5)) <= r


@grounded_case
def test_without_the_base_it_is_refused_by_module(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    module = next(module for module in described(made).modules if module.needs_base)
    with pytest.raises(UnsupportedAdapter, match="base_model") as refused:
        formats.load(module, {role: made.tensors[name] for role, name in module.tensors.items()})
    assert module.name in refused.value.subject


def test_dora_without_its_magnitude_is_refused(tmp_path: Path) -> None:
    made = read(lora("DoRA", target_modules=LINEAR, use_dora=True).save(tmp_path))
    tensors = {name: tensor for name, tensor in made.tensors.items() if "up.lora_magnitude" not in name}
    with pytest.raises(UnsupportedAdapter, match=r"module up.*lora_magnitude_vector"):
        described(Made(tensors, made.config))


def test_a_magnitude_without_dora_is_refused(tmp_path: Path) -> None:
    made = read(lora("DoRA", target_modules=LINEAR, use_dora=True).save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=r"lora_magnitude_vector.*use_dora"):
        described(Made(made.tensors, {**made.config, "use_dora": False}))


def test_a_magnitude_of_another_width_is_refused(tmp_path: Path) -> None:
    made = read(lora("DoRA", target_modules=LINEAR, use_dora=True).save(tmp_path))
    name = next(name for name in made.tensors if "up.lora_magnitude" in name)
    for shape in ((3,), (4, 5), (20, 1), (1, 20)):
        with pytest.raises(ShapeMismatch, match=re.escape(name)):
            described(Made({**made.tensors, name: torch.ones(shape)}, made.config))


@pytest.mark.parametrize("begun", ["pissa_niter_4", "corda", "lora_ga", "loftq", "unheard of"])
def test_a_beginning_that_is_lost_is_refused_by_name(begun: str, tmp_path: Path) -> None:
    made = read(lora("plain", target_modules=LINEAR).save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=begun):
        described(Made(made.tensors, {**made.config, "init_lora_weights": begun}))


def test_pissa_of_a_weight_that_does_not_say_where_it_began_is_refused(tmp_path: Path) -> None:
    made = read(lora("PiSSA", target_modules=["square"], init_lora_weights="pissa").save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match="singular values 4 and 5"):
        ingested(made, {"square": torch.eye(12)})


def test_a_beginning_of_what_is_not_two_plain_factors_is_refused() -> None:
    tensors = {f"{PREFIX}up.lora_A.weight": torch.ones(4, 12), f"{PREFIX}up.lora_B.weight": torch.ones(20, 4)}
    latent = {f"{PREFIX}up.default_lora_latent_mapping.weight": torch.ones(4, 4)}
    with pytest.raises(UnsupportedAdapter, match="no known meaning"):
        described(Made(tensors | latent, {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"}))


def test_a_magnitude_under_two_names_is_refused(tmp_path: Path) -> None:
    made = read(lora("DoRA", target_modules=LINEAR, use_dora=True).save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=r"up\.lora_magnitude_vector.*twice"):
        described(Made({**made.tensors, f"{PREFIX}up.lora_magnitude_vector.weight": torch.ones(20)}, made.config))


def test_peft_trains_as_many_butterflies_as_were_asked_for(tmp_path: Path) -> None:
    """Else the cases above would prove one factor several times."""
    (case,) = (case for case in GROUNDED if str(case) == "BOFT: four factors")
    assert {len(R) for name, R in read(case.save(tmp_path)).tensors.items() if name.endswith("boft_R")} == {4}


@pytest.mark.parametrize(("factors", "blocks", "side"), [(2, 3, 4), (2, 4, 3), (3, 6, 2)])
def test_butterflies_that_do_not_fit_are_refused(factors: int, blocks: int, side: int) -> None:
    tensors = {f"{PREFIX}up.boft_R": torch.ones(factors, blocks, side, side), f"{PREFIX}up.boft_s": torch.ones(20, 1)}
    with pytest.raises(UnsupportedAdapter, match=rf"up\.boft_R.*no {factors} butterfly factors"):
        described(Made(tensors, {"peft_type": "BOFT"}))


def test_reflections_that_gram_schmidt_leaves_nothing_of_are_refused() -> None:
    u = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    made = Made({f"{PREFIX}square.hra_u": torch.cat([u, u], 1)}, {"peft_type": "HRA", "r": 4, "apply_GS": True})
    with pytest.raises(UnsupportedAdapter, match=r"square\.hra_u.*sum of those before"):
        ingested(made, {"square": torch.eye(12)})


def test_more_reflections_than_inputs_are_refused() -> None:
    with pytest.raises(UnsupportedAdapter, match="13 reflections of 12"):
        described(Made({f"{PREFIX}square.hra_u": torch.ones(12, 13)}, {"peft_type": "HRA", "r": 13}))


@grounded_case
def test_numbers_of_half_the_width_are_computed_with_in_float32(case: Case, tmp_path: Path) -> None:
    made, weights = read(case.save(tmp_path)), of_the_base(case.model())
    halved = {name: tensor.bfloat16() for name, tensor in made.tensors.items()}
    ours = ingested(Made(halved, made.config), weights)
    widened = ingested(Made({name: tensor.float() for name, tensor in halved.items()}, made.config), weights)
    for name, delta in widened.items():
        assert (dense(ours[name]) - dense(delta)).norm() <= 1e-6 * dense(delta).norm(), name


RANKED = [case for case in GROUNDED if case.kind not in {"OFT", "BOFT"} and "one number" not in case.label]


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_a_rank_other_than_the_configured_is_refused(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    with pytest.raises(ShapeMismatch):
        described(Made(made.tensors, {**made.config, "r": 11, "rank_pattern": {}}))


@grounded_case
def test_one_unknown_tensor_beside_it_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=r"tensor base_model\.model\.up\.novelty"):
        described(Made({**made.tensors, f"{PREFIX}up.novelty": torch.ones(2)}, made.config))


@grounded_case
def test_a_flag_of_the_future_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match="a_flag_of_the_future"):
        described(Made(made.tensors, {**made.config, "a_flag_of_the_future": 3}))


@grounded_case
def test_an_adapter_that_lacks_a_tensor_of_several_is_refused(case: Case, tmp_path: Path) -> None:
    made = read(case.save(tmp_path))
    modules = [set(module.tensors.values()) for module in described(made).modules]
    for name in [name for tensors in modules for name in tensors if len(tensors) > 1]:
        rest = {other: tensor for other, tensor in made.tensors.items() if other != name}
        with pytest.raises((UnsupportedAdapter, ShapeMismatch)):
            described(Made(rest, made.config))


def test_a_generalised_lora_of_biases_is_refused_by_name(tmp_path: Path) -> None:
    made = read(Case("", "", zoo, lambda: peft.GloraConfig(target_modules=LINEAR, r=3)).save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match=r"glora_C\.Xd.*changes the bias"):
        described(made)


def test_zeros_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    case = glora("factors")
    made = read(case.save(tmp_path))
    name = next(name for name in made.tensors if name.endswith("glora_E.zeros"))
    with pytest.raises(UnsupportedAdapter, match=re.escape(name)):
        ingested(Made({**made.tensors, name: torch.ones(16)}, made.config), of_the_base(case.model()))


def test_a_projection_that_only_rounding_decides_is_refused_by_name() -> None:
    p = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    tensors = {f"{PREFIX}square.deft_P": torch.cat([p, p], 1), f"{PREFIX}square.deft_R": torch.ones(4, 12)}
    with pytest.raises(UnsupportedAdapter, match=r"square\.deft_P.*rounding"):
        ingested(Made(tensors, {"peft_type": "DEFT", "r": 4, "decomposition_method": "qr"}), {"square": torch.eye(12)})


def test_an_activation_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    made = read(peanut("no depth").save(tmp_path))
    with pytest.raises(UnsupportedAdapter, match="act_fn 'quick_gelu'"):
        described(Made(made.tensors, {**made.config, "act_fn": "quick_gelu"}))
