"""Every merge method is what its naive dense oracle says, with every parameter away from its default."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from cases import FEW, MODULE, NONZERO, SAMPLE, Case, cases, close, dense, merged, only, random_delta, value
from merge_algos.blocks import seed_of
from merge_algos.methods import registry
from oracles import ORACLES, Call, Given, chances, summed, svd

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in registry()),
    ("breadcrumbs", {"beta": 0.3, "gamma": 0.4}),
    ("breadcrumbs", {"beta": 1.0, "gamma": 0.0}),
    ("core_space", {"inner": "tsv", "lam": 0.5}),
    ("core_space", {"inner": "iso", "lam": -2.0}),
    ("core_space", {"inner": "ties", "density": 0.6, "lam": 1.5}),
    ("ctm", {"iterations": 0}),
    ("dare", {"density": 0.8, "combine": "ties"}),
    ("dare", {"density": 1.0}),
    ("della", {"density": 0.6, "window": 0.2, "combine": "sum", "lam": 0.5}),
    ("della", {"density": 1.0, "window": 0.0}),
    ("iso_c", {"alpha": 0.3}),
    ("iso_cts", {"common": 0.5, "alpha": 2.0}),
    ("iso_cts", {"common": 0.1}),
    ("knots", {"combine": "sum"}),
    ("knots", {"combine": "dare", "density": 0.5}),
    ("knots", {"density": 0.7, "lam": 0.3}),
    ("lego", {"canonical": "balanced"}),
    ("lego", {"canonical": "raw"}),
    ("magnitude_prune", {"density": 0.1}),
    ("magnitude_prune", {"density": 1.0}),
    ("np_lora", {"mu": 0.0}),
    ("np_lora", {"mu": 1e9}),
    *(
        ("pico", {"base": base, "restore": restore, "scale": 0.7, "density": 0.6})
        for base in ("task_arithmetic", "ties", "tsv")
        for restore in ("merged", "per_adapter", "none")
    ),
    ("spectral", {"power": 0.0, "scale": 2.0}),
    ("spectral", {"power": 1.0, "scale": 0.5}),
    ("ties", {"density": 0.5, "lam": 2.0}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.3, "trim": "model"}),  # one module is the whole model; for more see test_survey
    ("tsv", {"alpha": 0.25}),
]
every_variant = pytest.mark.parametrize(("method", "parameters"), VARIANTS, ids=str)


def present(case: Case) -> list[Given]:
    """The adapters that count, as the oracles take them."""
    numbered = enumerate(zip(case.deltas, case.weights, strict=True))
    return [Given(n, d.B, d.A, w) for n, (d, w) in numbered if d.rank and w]


def expected(method: str, case: Case, parameters: dict[str, Any], **call: Any) -> torch.Tensor:
    return ORACLES[method](present(case), Call(MODULE, **call), **parameters)


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(registry())


@pytest.mark.parametrize("method", registry())
def test_every_parameter_is_tried_away_from_its_default(method: str) -> None:
    tried = {name for variant, parameters in VARIANTS if variant == method for name in parameters}
    assert tried | {"canonicalise", "table"} >= set(registry()[method].__dataclass_fields__)


@every_variant
@FEW
@given(case=cases())
def test_the_result_is_the_oracles(method: str, parameters: dict[str, Any], case: Case) -> None:
    fitted = case.fit(method)
    assume(present(fitted))
    got = value(method, fitted, parameters=parameters, seed=5)
    assert close(got, expected(method, fitted, parameters, seed=5), fitted.scale, tolerance=1e-7)


@pytest.mark.parametrize("method", ["ctm", "lego", "pico", "spectral"])
@FEW
@given(case=cases(NONZERO), rank=st.integers(1, 8))
def test_a_method_that_looks_at_the_rank_is_the_oracles_at_that_rank(method: str, case: Case, rank: int) -> None:
    got = value(method, case, rank=rank)
    assert close(got, expected(method, case, {}, rank=rank), case.scale, tolerance=1e-7)


FLAT = [("iso_c", {}), ("iso_cts", {"common": 1.0}), ("core_space", {"inner": "iso"}), ("spectral", {"power": 0.0})]


@pytest.mark.parametrize(("method", "parameters"), FLAT, ids=str)
@FEW
@given(case=cases(NONZERO), rank=st.integers(1, 8))
def test_a_flat_spectrum_is_cut_to_the_directions_that_the_sum_has_most_of(
    method: str, parameters: dict[str, Any], case: Case, rank: int
) -> None:
    U, S, V = svd(summed(present(case)))
    kept = min(rank, len(S))
    gaps = -S.diff(append=torch.zeros(1))  # (k,): how much larger a value is than the next
    assume(kept and min(S[-1], gaps[kept - 1]) > 1e-3 * case.scale)
    got = value(method, case, rank=rank, parameters=parameters)
    assert close(got, got.norm() / kept**0.5 * U[:, :kept] @ V[:, :kept].mT, case.scale, tolerance=1e-7)


def test_iso_cts_of_tasks_that_share_what_is_their_own_is_the_oracles() -> None:
    twice, other = (random_delta(n, SAMPLE.shape, 3) for n in range(2))
    case, parameters = Case(SAMPLE.shape, (twice, twice, other), (0.5, 0.25, 1.0)), {"common": 0.1}
    assert close(value("iso_cts", case, parameters=parameters), expected("iso_cts", case, parameters), case.scale)


# --- methods that draw


RANDOM = [
    ("dare", {"density": 0.3}),
    ("dare", {"density": 0.7}),
    ("della", {"combine": "sum"}),
    ("della", {"combine": "sum", "density": 0.2, "window": 0.1}),
    ("knots", {"combine": "dare", "density": 0.5}),
]
every_draw = pytest.mark.parametrize(("method", "parameters"), RANDOM, ids=str)


@every_draw
def test_the_mean_over_seeds_is_the_merge_without_dropping(method: str, parameters: dict[str, Any]) -> None:
    count = 250
    drawn = torch.stack([value(method, SAMPLE, parameters=parameters, seed=seed) for seed in range(count)])
    error = drawn.std(0) / count**0.5
    beyond = (drawn.mean(0) - expected("task_arithmetic", SAMPLE, {})).abs() / error
    assert float(beyond.max()) < 4.5 and 0.6 < float(beyond.square().mean()) < 1.5  # standard errors


@every_draw
def test_another_seed_draws_another_mask(method: str, parameters: dict[str, Any]) -> None:
    first, second = (value(method, SAMPLE, parameters=parameters, seed=seed) for seed in (0, 1))
    assert not close(first, second, SAMPLE.scale, tolerance=1e-2)


LARGE = Case((200, 150), (random_delta(0, (200, 150), 4),), (1.0,))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_entries_multiplied_by_exactly_one_over_the_density(density: float) -> None:
    got, whole = value("dare", LARGE, parameters={"density": density}), dense(LARGE.deltas[0])
    kept = got.abs() > 1e-9 * whole.abs().max()
    assert torch.allclose(got[kept], whole[kept] / density, rtol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_fraction_it_was_asked_for(density: float) -> None:
    kept = value("dare", LARGE, parameters={"density": density}).abs() > 1e-9
    assert float(kept.double().mean()) == pytest.approx(density, abs=4 * (0.25 / kept.numel()) ** 0.5)


def test_della_keeps_entries_multiplied_by_one_over_their_own_chance() -> None:
    got, whole = value("della", LARGE, parameters={"combine": "sum"}), dense(LARGE.deltas[0])
    kept = got.abs() > 1e-9 * whole.abs().max()
    assert torch.allclose(got[kept], (whole / chances(whole, 0.5, 0.4))[kept], rtol=1e-5)


@pytest.mark.parametrize(("quarter", "fraction"), [(0, 0.35), (1, 0.45), (2, 0.55), (3, 0.65)])
def test_della_keeps_the_larger_entries_of_a_row_more_often(quarter: int, fraction: float) -> None:
    got, whole = value("della", LARGE, parameters={"combine": "sum"}), dense(LARGE.deltas[0])
    order = whole.abs().argsort(1)[:, quarter * 150 // 4 : (quarter + 1) * 150 // 4]
    kept = got.gather(1, order).abs() > 1e-9
    assert float(kept.double().mean()) == pytest.approx(fraction, abs=4 * (0.25 / kept.numel()) ** 0.5)


def test_masks_differ_from_adapter_to_adapter_and_from_module_to_module() -> None:
    seeds = [seed_of(seed, module, n, start) for seed in (0, 1) for module in ("a", "b") for n in (0, 1) for start in (0, 8)]
    assert len(set(seeds)) == len(seeds)


# --- what some methods are to others


@FEW
@given(case=cases())
def test_core_space_with_tsv_inside_is_tsv(case: Case) -> None:
    inner = value("core_space", case, parameters={"inner": "tsv"})
    assert close(inner, value("tsv", case, parameters={"alpha": 1.0}), case.scale, tolerance=1e-7)


@FEW
@given(case=cases())
def test_knots_that_adds_is_task_arithmetic(case: Case) -> None:
    assert close(value("knots", case, parameters={"combine": "sum"}), value("task_arithmetic", case), case.scale)


@FEW
@given(case=cases(NONZERO))
def test_ctm_at_full_rank_is_task_arithmetic(case: Case) -> None:
    assert close(value("ctm", case, rank=max(case.shape)), value("task_arithmetic", case), case.scale)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_iterating_makes_the_shared_basis_of_ctm_no_worse(rank: int) -> None:
    errors = [compression_error(iterations, rank) for iterations in (0, 1, 2, 10)]
    assert errors == sorted(errors, reverse=True)


def compression_error(iterations: int, rank: int) -> float:
    report = only(merged("ctm", SAMPLE, rank=rank, parameters={"iterations": iterations}))[1]
    return float(report.diagnostics["compression_error"])


def test_np_lora_without_projection_is_task_arithmetic() -> None:
    case = SAMPLE.fit("np_lora")
    assert close(value("np_lora", case, parameters={"mu": 0.0}), value("task_arithmetic", case), case.scale)


def test_np_lora_at_full_strength_leaves_nothing_where_the_first_reads() -> None:
    case = SAMPLE.fit("np_lora").with_weights([1.0, 1.0])
    second = value("np_lora", case, parameters={"mu": 1e12}) - dense(case.deltas[0])
    assert float((second @ case.deltas[0].A.mT).norm()) < 1e-9 * case.scale


def test_breadcrumbs_never_leave_a_row_empty() -> None:
    single = random_delta(0, (4, 3), 2)
    got = value("breadcrumbs", Case((4, 3), (single,), (1.0,)), parameters={"beta": 0.01, "gamma": 0.99})
    assert [int((row.abs() > 1e-9).sum()) for row in got] == [1, 1, 1, 1]


def test_peft_linear_is_what_peft_computes() -> None:
    weights, model = [0.7, -0.4], torch.nn.Sequential(torch.nn.Linear(9, 12, bias=False))
    case = Case((12, 9), tuple(random_delta(n, (12, 9), 3) for n in range(2)), tuple(weights))
    peft_model = get_peft_model(model, LoraConfig(r=3, lora_alpha=3, target_modules=["0"]), adapter_name="a0")
    peft_model.add_adapter("a1", LoraConfig(r=3, lora_alpha=3, target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    for n, delta in enumerate(case.deltas):
        layer.lora_A[f"a{n}"].weight.data, layer.lora_B[f"a{n}"].weight.data = delta.A.float(), delta.B.float()
    peft_model.base_model.add_weighted_adapter(["a0", "a1"], weights, "merged", combination_type="linear")
    assert close(value("peft_linear", case), layer.get_delta_weight("merged").double().detach(), case.scale, tolerance=1e-6)
