"""The laws of every merge method, whoever wrote it: each is tested on every registered method against its oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laws import (
    DTYPES,
    LAWS,
    MODULE,
    ORACLES,
    SAMPLE,
    TIGHT,
    Case,
    cases,
    close,
    dense,
    disowned,
    every_method,
    few,
    loaded,
    merged,
    obeying,
    one_module,
    only,
    random_delta,
    regauged,
    value,
)
from merge_algos import Adapter, RankRule, merge
from merge_algos.methods import registry

# --- the suite itself


def test_every_registered_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(registry())


@every_method
def test_a_method_disowns_only_laws_that_exist(method: str) -> None:
    assert disowned(registry()[method]) <= LAWS.keys()


@every_method
def test_the_registry_knows_a_method_by_its_own_name(method: str) -> None:
    assert registry()[method].name == method


def test_the_registry_is_sorted() -> None:
    assert list(registry()) == sorted(registry())


# --- the value


@every_method
@few
@given(case=cases())
def test_the_result_is_the_oracles(method: str, case: Case) -> None:
    expected = ORACLES[method]([dense(d) for d in case.deltas], case.weights)
    assert close(value(method, case), expected, case.scale)


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_inputs_are_merged_in_float32(method: str, dtype: torch.dtype) -> None:
    narrow = Case(SAMPLE.shape, tuple(d.to(dtype) for d in SAMPLE.deltas), SAMPLE.weights)
    expected = ORACLES[method]([dense(d) for d in narrow.deltas], narrow.weights)
    assert close(value(method, narrow, dtype=torch.float32), expected, narrow.scale, tolerance=1e-6)


@obeying("gauge")
@few
@given(case=cases(), seed=st.integers(0, 2**32))
def test_the_gauge_of_the_inputs_does_not_matter(method: str, case: Case, seed: int) -> None:
    turned = Case(case.shape, tuple(regauged(d, seed + n) for n, d in enumerate(case.deltas)), case.weights)
    assert close(value(method, turned), value(method, case), case.scale, tolerance=1e-8)


@obeying("gauge")
@few
@given(case=cases(), scaling=st.floats(0.01, 100))
def test_a_configured_scaling_is_the_same_as_a_larger_B(method: str, case: Case, scaling: float) -> None:
    folded = Case(case.shape, tuple(loaded(d, scaling) for d in case.deltas), case.weights)
    plain = Case(case.shape, tuple(loaded(d.scale(scaling), 1.0) for d in case.deltas), case.weights)
    assert close(value(method, folded), value(method, plain), case.scale * scaling, tolerance=1e-5)


@obeying("identity")
@few
@given(case=cases())
def test_one_adapter_at_weight_1_comes_back(method: str, case: Case) -> None:
    present = next(d for d in case.deltas if d.rank)
    single = Case(case.shape, (present,), (1.0,))
    assert close(value(method, single), dense(present), single.scale)


@obeying("average")
@few
@given(case=cases())
def test_two_copies_at_weight_one_half_give_the_adapter_back(method: str, case: Case) -> None:
    present = next(d for d in case.deltas if d.rank)
    twice = Case(case.shape, (present, present), (0.5, 0.5))
    assert close(value(method, twice), dense(present), twice.scale)


@obeying("permutation")
@few
@given(case=cases(), data=st.data())
def test_permuting_adapters_with_their_weights_changes_nothing(method: str, case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(case.deltas))))
    permuted = Case(case.shape, tuple(case.deltas[n] for n in order), tuple(case.weights[n] for n in order))
    assert close(value(method, permuted), value(method, case), case.scale)


@obeying("absence")
@few
@given(case=cases(), seed=st.integers(0, 2**32))
def test_an_adapter_at_weight_0_is_as_if_it_were_absent(method: str, case: Case, seed: int) -> None:
    extra = random_delta(seed, case.shape, 3)
    more = Case(case.shape, (extra, *case.deltas), (0.0, *case.weights))
    assert close(value(method, more), value(method, case), case.scale)


@every_method
def test_disjoint_target_modules_each_come_out_as_the_oracle_says(method: str) -> None:
    first, second = random_delta(0, (6, 5), 2), random_delta(2, (7, 4), 3)
    result = merge(
        [one_module(first, "a"), one_module(second, "b")], method=method, weights=[0.5, -2.0], dtype=torch.float64
    ).adapter.deltas
    expected = ORACLES[method]([torch.zeros(7, 4, dtype=torch.float64), dense(second)], [0.5, -2.0])
    assert list(result) == ["a", "b"] and close(dense(result["b"]), expected, 10.0)


# --- purity


@every_method
@pytest.mark.parametrize("rank", [None, 2])
def test_the_inputs_are_not_changed(method: str, rank: int | None) -> None:
    before = [(d.B.clone(), d.A.clone()) for d in SAMPLE.deltas]
    merged(method, SAMPLE, rank=rank)
    pairs = zip(SAMPLE.deltas, before, strict=True)
    assert all(torch.equal(d.B, B) and torch.equal(d.A, A) for d, (B, A) in pairs)


@every_method
@pytest.mark.parametrize("rank", [None, 2])
def test_the_same_seed_gives_the_same_bytes(method: str, rank: int | None) -> None:
    first, second = (merged(method, SAMPLE, rank=rank, seed=7).adapter.deltas[MODULE] for _ in range(2))
    assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A)


@every_method
def test_the_global_generator_is_neither_read_nor_moved(method: str) -> None:
    state = torch.get_rng_state()
    merged(method, SAMPLE, rank=2)
    assert torch.equal(torch.get_rng_state(), state)


# --- rank and shape


@every_method
@few
@given(case=cases(), rank=st.integers(1, 12))
def test_the_result_has_at_most_the_rank_asked_for(method: str, case: Case, rank: int) -> None:
    assert merged(method, case, rank=rank).adapter.deltas[MODULE].rank <= min(rank, *case.shape)


@every_method
@few
@given(case=cases(), rank=st.none() | st.integers(1, 12))
def test_the_result_has_the_modules_shape(method: str, case: Case, rank: int | None) -> None:
    assert merged(method, case, rank=rank).adapter.deltas[MODULE].shape == case.shape


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 2])
def test_both_factors_have_the_dtype_asked_for(method: str, dtype: torch.dtype, rank: int | None) -> None:
    delta = merged(method, SAMPLE, rank=rank, dtype=dtype).adapter.deltas[MODULE]
    assert (delta.B.dtype, delta.A.dtype) == (dtype, dtype)


@every_method
@few
@given(case=cases(), rank=st.integers(1, 12))
def test_a_cut_is_the_best_approximation_of_its_rank(method: str, case: Case, rank: int) -> None:
    uncut = value(method, case)
    tail = torch.linalg.svdvals(uncut)[rank:].norm()
    assert float((uncut - value(method, case, rank=rank)).norm()) == pytest.approx(float(tail), abs=TIGHT * case.scale)


# --- the certificate


@every_method
@few
@given(case=cases(), rank=st.integers(1, 12))
def test_the_reported_truncation_error_is_the_measured_one(method: str, case: Case, rank: int) -> None:
    uncut = value(method, case)
    shipped, report = only(merged(method, case, rank=rank))
    measured = float((uncut - shipped).norm())
    assert report.relative_error * report.norm == pytest.approx(measured, abs=1e-7 * case.scale)


@every_method
@pytest.mark.parametrize("rank", [1, 2, 5, RankRule(energy=0.8), RankRule(energy=0.99, max=4)])
def test_the_reported_retained_energy_is_the_measured_one(method: str, rank: int | RankRule) -> None:
    uncut = value(method, SAMPLE)
    shipped, report = only(merged(method, SAMPLE, rank=rank))
    assert report.retained_energy == pytest.approx(float(shipped.square().sum() / uncut.square().sum()), rel=TIGHT)


@every_method
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999])
def test_an_energy_rule_keeps_that_energy(method: str, energy: float) -> None:
    assert only(merged(method, SAMPLE, rank=RankRule(energy=energy)))[1].retained_energy >= energy


@every_method
@few
@given(case=cases())
def test_the_reported_norm_is_the_measured_one(method: str, case: Case) -> None:
    uncut, report = only(merged(method, case))
    assert report.norm == pytest.approx(float(uncut.norm()), rel=1e-6, abs=1e-7 * case.scale)


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 2])
def test_the_reported_rounding_error_is_the_measured_one(method: str, dtype: torch.dtype, rank: int | None) -> None:
    unrounded = value(method, SAMPLE, rank=rank)
    shipped, report = only(merged(method, SAMPLE, rank=rank, dtype=dtype))
    assert report.rounding_error == pytest.approx(float((shipped - unrounded).norm() / unrounded.norm()), rel=1e-6)


@every_method
def test_the_truncation_error_does_not_depend_on_the_dtype(method: str) -> None:
    errors = {only(merged(method, SAMPLE, rank=2, dtype=dtype))[1].relative_error for dtype in DTYPES}
    assert len(errors) == 1


@every_method
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_the_reported_rank_is_the_one_shipped(method: str, rank: int | None) -> None:
    result = merged(method, SAMPLE, rank=rank)
    assert result.reports[0].rank_out == result.adapter.deltas[MODULE].rank


@every_method
def test_an_uncut_result_is_reported_exact_and_without_loss(method: str) -> None:
    report = only(merged(method, SAMPLE))[1]
    assert (report.exact, report.relative_error, report.retained_energy) == (True, 0.0, 1.0)


@every_method
def test_modules_are_reported_in_natural_order(method: str) -> None:
    names = ["layers.10.q", "layers.2.q", "layers.2.k"]
    adapter = Adapter("org/base", {name: random_delta(0, (6, 5), 2) for name in names})
    result = merge([adapter, adapter], method=method)
    assert [r.module for r in result.reports] == ["layers.2.k", "layers.2.q", "layers.10.q"]


@every_method
def test_weights_default_to_1_each(method: str) -> None:
    case = Case(SAMPLE.shape, SAMPLE.deltas, (1.0, 1.0, 1.0))
    assert torch.equal(only(merge(case.adapters, method=method, dtype=torch.float64))[0], value(method, case))
