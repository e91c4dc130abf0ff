"""Pico: the closed form is the one with the SVD, and its invariants hold; what is not true is shown not to be."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import FEW, NONZERO, SAMPLE, SEEDS, Case, cases, close, dense, merged, only, only_one, randn, random_delta, value
from merge_algos import LowRankDelta
from merge_algos.methods.pico import calibrate
from oracles import Given, mean_norm

BASES = ("task_arithmetic", "ties", "tsv")
RESTORES = ("merged", "per_adapter", "none")
every_base = pytest.mark.parametrize("base", BASES)
every_restore = pytest.mark.parametrize("restore", RESTORES)


def pico(case: Case, rank: int | None = None, **parameters: Any) -> torch.Tensor:
    return value("pico", case, rank=rank, parameters=parameters)


def norm_of_adapters(case: Case) -> float:
    return mean_norm([Given(0, d.B, d.A, 1.0) for d in case.deltas if d.rank])


# --- the closed form


@FEW
@given(case=cases())
def test_the_closed_form_is_the_damping_of_left_singular_vectors(case: Case) -> None:
    B = torch.cat([d.B for d in case.deltas], 1)
    U, S, _ = torch.linalg.svd(B, full_matrices=False)
    a = 1 / (1 + (len(case.deltas) - 1) * S.square() / S.square().sum())
    expected = B + U * (a - 1) @ U.mT @ B
    got = torch.cat([d.B for d in calibrate(case.deltas)[0]], 1)
    assert float((got - expected).norm()) <= 1e-13 * float(B.norm())


def test_calibrating_leaves_A_alone() -> None:
    assert all(c.A is d.A for c, d in zip(calibrate(SAMPLE.deltas)[0], SAMPLE.deltas, strict=True))


# --- invariants


@every_base
@every_restore
@FEW
@given(seed=SEEDS, r=st.integers(1, 6))
def test_one_adapter_is_left_as_it_is(base: str, restore: str, seed: int, r: int) -> None:
    delta = random_delta(seed, (9, 7), r)
    got = pico(only_one(delta), base=base, restore=restore, density=1.0)
    assert close(got, dense(delta), float(dense(delta).norm()))


@every_base
@pytest.mark.parametrize("rank", [None, 1, 3])
@FEW
@given(case=cases(NONZERO))
def test_what_is_shipped_has_the_mean_norm_of_the_adapters(base: str, rank: int | None, case: Case) -> None:
    assert float(pico(case, rank, base=base).norm()) == pytest.approx(norm_of_adapters(case), rel=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.7])
def test_scale_is_the_size_beside_that_mean(scale: float) -> None:
    assert float(pico(SAMPLE, scale=scale).norm()) == pytest.approx(scale * norm_of_adapters(SAMPLE), rel=1e-9)


@every_base
@pytest.mark.parametrize("factor", [1e-3, 0.5, 40.0])
def test_a_common_factor_of_the_weights_cancels(base: str, factor: float) -> None:
    scaled = SAMPLE.with_weights([factor * w for w in SAMPLE.weights])
    assert close(pico(scaled, base=base), pico(SAMPLE, base=base), SAMPLE.scale)


@every_base
@every_restore
def test_it_is_homogeneous_in_the_adapters(base: str, restore: str) -> None:
    larger = Case(SAMPLE.shape, tuple(d.scale(3.0) for d in SAMPLE.deltas), SAMPLE.weights)
    assert close(pico(larger, base=base, restore=restore), 3 * pico(SAMPLE, base=base, restore=restore), 3 * SAMPLE.scale)


def turned(case: Case, seed: int) -> Case:
    """Every adapter in another orthogonal gauge: rotations, permutations and signs among them."""
    Qs = [torch.linalg.qr(randn(seed + n, d.rank, d.rank)).Q for n, d in enumerate(case.deltas)]
    pairs = zip(case.deltas, Qs, strict=True)
    return Case(case.shape, tuple(LowRankDelta(d.B @ Q, Q.mT @ d.A) for d, Q in pairs), case.weights)


@pytest.mark.parametrize("canonicalise", [True, False])
@FEW
@given(case=cases(NONZERO), seed=SEEDS)
def test_an_orthogonal_gauge_does_not_matter(canonicalise: bool, case: Case, seed: int) -> None:
    got, expected = (pico(each, canonicalise=canonicalise) for each in (turned(case, seed), case))
    assert close(got, expected, case.scale, tolerance=1e-8)


@pytest.mark.parametrize(("canonicalise", "same"), [(True, True), (False, False)])
def test_another_balance_of_the_factors_matters_unless_they_are_canonical(canonicalise: bool, same: bool) -> None:
    first = SAMPLE.deltas[0]
    other = Case(SAMPLE.shape, (LowRankDelta(10 * first.B, first.A / 10), *SAMPLE.deltas[1:]), SAMPLE.weights)
    got, expected = (pico(each, canonicalise=canonicalise) for each in (other, SAMPLE))
    assert close(got, expected, SAMPLE.scale, tolerance=1e-3) == same


def test_per_adapter_gives_every_calibrated_delta_its_own_norm_back() -> None:
    apart = orthogonal_adapters()
    assert float(pico(apart, restore="per_adapter").norm()) == pytest.approx(math.hypot(*norms(apart)), rel=1e-9)


def test_without_restoring_the_result_is_only_damped() -> None:
    apart = orthogonal_adapters()
    assert 0.3 * math.hypot(*norms(apart)) < float(pico(apart, restore="none").norm()) < math.hypot(*norms(apart))


def test_directions_that_nobody_shares_are_damped_too() -> None:
    # s_j measures energy, not sharing: one adapter much larger than the other is flattened though they are orthogonal
    apart = orthogonal_adapters()
    S = torch.linalg.svdvals(pico(apart, restore="none"))[:4]
    before = torch.linalg.svdvals(value("task_arithmetic", apart))[:4]
    assert float((S / before).min()) < 0.9 * float((S / before).max())


def orthogonal_adapters() -> Case:
    """Two adapters that share neither a left nor a right direction, of weight 1."""
    U, V = torch.linalg.qr(randn(0, 12, 4)).Q, torch.linalg.qr(randn(1, 9, 4)).Q
    S = torch.tensor([4.0, 2.0], dtype=torch.float64)
    return Case((12, 9), tuple(LowRankDelta(U[:, n : n + 2] * S, V[:, n : n + 2].mT) for n in (0, 2)), (1.0, 1.0))


def norms(case: Case) -> list[float]:
    return [float(dense(d).norm()) for d in case.deltas]


# --- the report


def report(case: Case, **parameters: Any) -> dict[str, Any]:
    return dict(only(merged("pico", case, parameters=parameters))[1].diagnostics)


def test_copies_of_one_direction_are_all_of_the_energy() -> None:
    single = random_delta(0, (9, 7), 1)
    found = report(Case((9, 7), (single,) * 3, (1.0,) * 3))
    assert (found["s_max"], found["a_min"]) == (pytest.approx(1.0), pytest.approx(1 / 3))
    assert found["effective_rank"] == pytest.approx(1.0, abs=1e-6)


def test_the_effective_rank_of_equal_directions_is_their_number() -> None:
    U, V = torch.linalg.qr(randn(0, 12, 4)).Q, torch.linalg.qr(randn(1, 9, 4)).Q
    equal = Case((12, 9), tuple(LowRankDelta(U[:, n : n + 2], V[:, n : n + 2].mT) for n in (0, 2)), (1.0, 1.0))
    assert report(equal)["effective_rank"] == pytest.approx(4.0)


def test_the_overlap_of_copies_is_all_but_chance() -> None:
    case = Case((12, 9), (SAMPLE.deltas[0],) * 2, (1.0, 1.0))
    assert report(case)["overlap_beyond_chance"] == pytest.approx(1 - 3 / 12)


def test_the_overlap_of_random_adapters_is_chance() -> None:
    found = [
        report(Case((40, 30), (random_delta(2 * seed, (40, 30), 4), random_delta(2 * seed + 999, (40, 30), 4)), (1.0, 1.0)))
        for seed in range(60)
    ]
    assert sum(each["overlap_beyond_chance"] for each in found) / 60 == pytest.approx(0.0, abs=0.02)


def test_the_reported_gamma_brings_the_norm_back() -> None:
    unrestored = float(pico(SAMPLE, restore="none").norm())
    assert report(SAMPLE)["gamma"] == pytest.approx(norm_of_adapters(SAMPLE) / unrestored, rel=1e-9)
