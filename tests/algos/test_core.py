"""The small matrices that spectral methods share, canonical factors, and who counts as present."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import FEW, NONZERO, Case, cases, close, dense, randn, random_delta, regauged
from merge_algos import LowRankDelta
from merge_algos.core import Core, core_of, polar
from merge_algos.lowrank import (
    canonical,
    from_svd,
    is_rounding,
    mean_norm,
    numerical_rank,
    present,
    shared_A,
    size_of,
    weighted_sum,
)


def core(case: Case) -> Core:
    return core_of([canonical(d) for d in case.deltas if d.rank])


# --- the core


@FEW
@given(case=cases())
def test_cores_lifted_are_the_deltas(case: Case) -> None:
    whole = core(case)
    deltas = [d for d in case.deltas if d.rank]
    lifted = [whole.U.columns @ M @ whole.V.columns.mT for M in whole.M]
    assert all(close(got, dense(d), case.scale) for got, d in zip(lifted, deltas, strict=True))


@FEW
@given(case=cases())
def test_lifting_a_core_is_multiplying_it_by_the_bases(case: Case) -> None:
    whole = core(case)
    svd = whole.lift(whole.M[0])
    assert close(dense(from_svd(svd, len(svd.S))), whole.U.columns @ whole.M[0] @ whole.V.columns.mT, case.scale)


@FEW
@given(case=cases())
def test_both_bases_are_orthonormal(case: Case) -> None:
    bases = [frame.columns for frame in (core(case).U, core(case).V)]
    assert all(torch.allclose(X.mT @ X, torch.eye(X.shape[1], dtype=X.dtype), atol=1e-9) for X in bases)


@FEW
@given(case=cases(), seed=st.integers(0, 2**32))
def test_the_core_does_not_depend_on_the_gauge(case: Case, seed: int) -> None:
    turned = Case(case.shape, tuple(regauged(d, seed + n) for n, d in enumerate(case.deltas)), case.weights)
    assert torch.allclose(core(turned).M, core(case).M, atol=1e-7 * case.scale)


def test_copies_have_the_core_of_one() -> None:
    delta = random_delta(0, (9, 7), 3)
    assert core_of([canonical(delta)] * 4).M.shape == (4, 3, 3)


def test_a_core_of_nothing_is_empty() -> None:
    assert core_of([LowRankDelta.zero(9, 7)] * 2).M.shape == (2, 0, 0)


# --- polar factors


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_polar_factor_is_orthonormal_and_makes_a_symmetric_product(k: int) -> None:
    X = randn(0, 12, k)
    Q = polar(X)
    H = Q.mT @ X
    assert torch.allclose(Q.mT @ Q, torch.eye(k, dtype=X.dtype)) and torch.allclose(H, H.mT)
    assert bool((torch.linalg.eigvalsh(H) > 0).all())


def test_the_polar_factor_of_what_is_deficient_is_a_partial_isometry() -> None:
    X = randn(0, 12, 3)
    Q = polar(torch.cat([X, X], 1))
    assert torch.allclose(torch.linalg.svdvals(Q)[:3], torch.ones(3, dtype=X.dtype)) and float(torch.linalg.svdvals(Q)[3]) < 1e-9


# --- canonical factors


@FEW
@given(case=cases(), seed=st.integers(0, 2**32))
def test_canonical_factors_are_the_same_from_every_gauge(case: Case, seed: int) -> None:
    one, other = canonical(case.deltas[0]), canonical(regauged(case.deltas[0], seed))
    assert torch.allclose(one.B, other.B, atol=1e-6) and torch.allclose(one.A, other.A, atol=1e-6)


def test_canonical_factors_keep_the_dtype() -> None:
    assert canonical(random_delta(0, (9, 7), 3).to(torch.float32)).A.dtype == torch.float32


def test_canonical_factors_have_no_more_rank_than_the_delta() -> None:
    delta = random_delta(0, (9, 7), 3)
    assert canonical(LowRankDelta(torch.cat([delta.B] * 2, 1), torch.cat([delta.A] * 2))).rank == 3


@pytest.mark.parametrize("of", [LowRankDelta.zero(9, 7), LowRankDelta(torch.zeros(9, 3), torch.ones(3, 7))])
def test_the_canonical_zero_has_rank_0(of: LowRankDelta) -> None:
    assert canonical(of).rank == 0


# --- counting


SOME, ZERO, ABSENT = random_delta(0, (9, 7), 3), LowRankDelta(torch.zeros(9, 2), torch.ones(2, 7)), LowRankDelta.zero(9, 7)


def test_present_is_who_has_the_module_and_a_weight() -> None:
    assert present([SOME, ABSENT, SOME, ZERO, SOME], [1.0, 1.0, 0.0, 1.0, -1.0]) == (0, 3, 4)


def test_the_mean_norm_is_over_those_present() -> None:
    assert mean_norm([SOME, ABSENT, SOME, ZERO], [1.0, 1.0, 0.0, 1.0]) == pytest.approx(float(dense(SOME).norm()) / 2)


def test_the_mean_norm_of_nobody_is_0() -> None:
    assert mean_norm([SOME, ABSENT], [0.0, 1.0]) == 0.0


@FEW
@given(case=cases(NONZERO))
def test_the_sum_is_never_larger_than_the_size_of_its_terms(case: Case) -> None:
    size = size_of(case.deltas, case.weights)
    assert weighted_sum(case.deltas, case.weights).norm() <= size * (1 + 1e-9)


def test_what_cancels_is_rounding() -> None:
    pair, weights = [SOME, regauged(SOME, 3)], [1.0, -1.0]
    assert is_rounding(weighted_sum(pair, weights).norm(), pair, weights)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_what_is_small_without_cancelling_is_not_rounding(scale: float) -> None:
    assert not is_rounding(scale * SOME.norm(), [SOME], [scale])


@pytest.mark.parametrize(
    ("S", "size", "rank"), [([], None, 0), ([0.0], None, 0), ([1.0, 1e-5, 1e-7], None, 2), ([1.0, 0.1], 1e6, 0)]
)
def test_the_numerical_rank_is_what_is_more_than_rounding(S: list[float], size: float | None, rank: int) -> None:
    assert numerical_rank(torch.tensor(S), size) == rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_weight_is_not_rounded_to_the_type_of_the_factors(dtype: torch.dtype) -> None:
    pair, weights = [SOME.to(dtype), regauged(SOME, 3).to(dtype)], [0.3, 70000.0]
    terms = [delta.scale(weight) for delta, weight in zip(pair, weights, strict=True)]
    assert torch.equal(weighted_sum(pair, weights).B, torch.cat([term.B for term in terms], 1))


def test_a_single_adapter_shares_its_A_with_nobody() -> None:
    assert shared_A([SOME, ABSENT]) is None
