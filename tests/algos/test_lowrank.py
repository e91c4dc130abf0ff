"""The kernels on factors say what the dense float64 matrix says, for every shape, rank, gauge and degeneracy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merge_algos.errors import ShapeMismatch
from merge_algos.lowrank import LowRankDelta, concat, distance, from_svd
from merge_algos.merge import Cut, reduce
from merge_algos.protocol import ModuleContext
from merge_algos.rank import RankRule

TIGHT = 1e-10  # relative to the size of the terms: float64 with room for a sum
HALVES = (torch.float16, torch.bfloat16)
SIZES = st.integers(1, 12)
RANKS = st.integers(0, 16)  # beyond both sizes
SEEDS = st.integers(0, 2**32)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_delta(seed: int, d_out: int, d_in: int, rank: int, kind: str = "full") -> LowRankDelta:
    B, A = randn(seed, d_out, rank), randn(seed + 1, rank, d_in)
    if kind == "zero columns":
        B[:, ::2] = 0.0
    if kind == "duplicated":
        B, A = B[:, torch.arange(rank) // 2], A[torch.arange(rank) // 2]
    return LowRankDelta(B, A)


KINDS = st.sampled_from(["full", "zero columns", "duplicated"])
DELTAS = st.builds(random_delta, SEEDS, SIZES, SIZES, RANKS, KINDS)


@st.composite
def families(draw: st.DrawFn) -> list[LowRankDelta]:
    """One to four deltas of one shape and any ranks."""
    d_out, d_in = draw(SIZES), draw(SIZES)
    return draw(st.lists(st.builds(random_delta, SEEDS, st.just(d_out), st.just(d_in), RANKS, KINDS), min_size=1, max_size=4))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[LowRankDelta, LowRankDelta]:
    d_out, d_in = draw(SIZES), draw(SIZES)
    first, second = (random_delta(draw(SEEDS), d_out, d_in, draw(RANKS), draw(KINDS)) for _ in range(2))
    return first, second


def cut_to(delta: LowRankDelta, rule: RankRule) -> Cut:
    return reduce(delta, ModuleContext("module", 0, rule))


def dense(delta: LowRankDelta) -> Tensor:
    return delta.B.double() @ delta.A.double()


def size(delta: LowRankDelta) -> float:
    """What rounding is relative to: the factors, since their product may cancel."""
    return float(delta.B.double().norm() * delta.A.double().norm())


def regauged(delta: LowRankDelta, seed: int) -> LowRankDelta:
    """The same delta from other factors: `(B G, G^-1 A)`, G of condition below 100."""
    k = delta.rank
    Q, _ = torch.linalg.qr(randn(seed, k, k))
    stretch = torch.logspace(-1, 1, k, dtype=torch.float64)
    return LowRankDelta(delta.B @ Q * stretch, (Q.mT @ delta.A) / stretch[:, None])


def close(got: Tensor, expected: Tensor, scale: float = 1.0, tolerance: float = TIGHT) -> bool:
    return got.shape == expected.shape and float((got - expected).norm()) <= tolerance * (scale + 1.0)


# --- one delta


@given(DELTAS)
def test_to_dense_is_the_product(delta: LowRankDelta) -> None:
    assert close(delta.to_dense(), dense(delta))


def test_the_zero_delta_is_dense_zero() -> None:
    assert torch.equal(LowRankDelta.zero(3, 5).to_dense(), torch.zeros(3, 5))


def test_the_zero_delta_follows_the_type_it_is_like() -> None:
    assert LowRankDelta.zero(3, 5, like=torch.ones(1, dtype=torch.float64)).A.dtype == torch.float64


@pytest.mark.parametrize(("B", "A"), [((4, 2), (3, 5)), ((4,), (4, 5)), ((4, 2), (2, 5, 1)), ((), (1, 1))])
def test_factors_that_do_not_fit_are_refused(B: tuple[int, ...], A: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch):
        LowRankDelta(torch.zeros(B), torch.zeros(A))


@given(DELTAS, st.floats(-1e3, 1e3))
def test_scale_multiplies_the_dense_matrix(delta: LowRankDelta, factor: float) -> None:
    assert close(dense(delta.scale(factor)), factor * dense(delta), abs(factor) * size(delta))


@given(DELTAS)
def test_scale_leaves_A_as_it_is(delta: LowRankDelta) -> None:
    assert delta.scale(0.3).A is delta.A


# --- sums


@given(families())
def test_concat_is_the_exact_sum(family: list[LowRankDelta]) -> None:
    assert close(dense(concat(family)), sum(map(dense, family)), sum(map(size, family)))


@given(families())
def test_concat_adds_the_ranks(family: list[LowRankDelta]) -> None:
    assert concat(family).rank == sum(d.rank for d in family)


@pytest.mark.parametrize("other", [(5, 4), (4, 5), (5, 5)])
def test_concat_of_two_shapes_is_refused(other: tuple[int, int]) -> None:
    with pytest.raises(ShapeMismatch):
        concat([random_delta(0, 4, 4, 2), random_delta(1, *other, 2)])


# --- inner products and norms


@given(pairs())
def test_inner_is_the_dense_frobenius_product(pair: tuple[LowRankDelta, LowRankDelta]) -> None:
    left, right = pair
    expected = float((dense(left) * dense(right)).sum())
    assert left.inner(right) == pytest.approx(expected, abs=TIGHT * (size(left) * size(right) + 1))


@given(pairs())
def test_inner_is_symmetric(pair: tuple[LowRankDelta, LowRankDelta]) -> None:
    left, right = pair
    assert left.inner(right) == pytest.approx(right.inner(left), abs=TIGHT * (size(left) * size(right) + 1))


@given(DELTAS)
def test_norm_is_the_dense_norm(delta: LowRankDelta) -> None:
    assert delta.norm() == pytest.approx(float(dense(delta).norm()), rel=1e-9, abs=1e-7 * size(delta))


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_of_half_precision_factors_is_accurate(dtype: torch.dtype) -> None:
    delta = random_delta(0, 64, 48, 6).to(dtype)
    assert delta.norm() == pytest.approx(float(dense(delta).norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_inner_of_half_precision_factors_does_not_overflow(dtype: torch.dtype) -> None:
    delta = LowRankDelta(torch.full((8, 2), 6e4, dtype=dtype), torch.full((2, 8), 6e4, dtype=dtype))
    assert delta.norm() == pytest.approx(float(dense(delta).norm()), rel=1e-12)


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4, 1e-5])
def test_norm_of_a_nearly_cancelling_difference_is_right(gap: float) -> None:
    # a Gram matrix in float32 has lost every digit at a gap of 1e-4
    delta = random_delta(3, 96, 80, 8).to(torch.float32)
    near = LowRankDelta((delta.B * (1 + gap * randn(5, 96, 8))).float(), delta.A)
    difference = concat([near, delta.scale(-1.0)])
    assert difference.norm() == pytest.approx(float((dense(near) - dense(delta)).norm()), rel=1e-4)


def test_norm_of_what_cancels_exactly_is_never_negative_under_the_root() -> None:
    delta = random_delta(3, 96, 80, 8)
    assert concat([delta, delta.scale(-1.0)]).norm() <= 1e-7 * size(delta)


@given(DELTAS, SEEDS)
def test_norm_does_not_depend_on_the_gauge(delta: LowRankDelta, seed: int) -> None:
    assert regauged(delta, seed).norm() == pytest.approx(delta.norm(), rel=1e-8, abs=1e-6 * size(delta))


@given(pairs(), SEEDS)
def test_inner_does_not_depend_on_the_gauge(pair: tuple[LowRankDelta, LowRankDelta], seed: int) -> None:
    left, right = pair
    scale = size(left) * size(right) + 1
    assert regauged(left, seed).inner(right) == pytest.approx(left.inner(right), abs=1e-8 * scale)


# --- singular values


@given(DELTAS)
def test_svd_gives_the_delta_back(delta: LowRankDelta) -> None:
    svd = delta.svd()
    assert close(svd.U * svd.S @ svd.Vh, dense(delta), size(delta))


@given(DELTAS)
def test_svd_has_the_singular_values_of_the_dense_matrix(delta: LowRankDelta) -> None:
    S = delta.svd().S
    assert close(S, torch.linalg.svdvals(dense(delta))[: len(S)], size(delta))


@given(DELTAS)
def test_svd_has_as_many_values_as_the_matrix_can_have(delta: LowRankDelta) -> None:
    assert len(delta.svd().S) == min(delta.rank, *delta.shape)


@given(DELTAS)
def test_left_vectors_are_orthonormal(delta: LowRankDelta) -> None:
    U = delta.svd().U
    assert close(U.mT @ U, torch.eye(U.shape[1], dtype=torch.float64), tolerance=1e-7)


@given(DELTAS)
def test_right_vectors_are_orthonormal(delta: LowRankDelta) -> None:
    Vh = delta.svd().Vh
    assert close(Vh @ Vh.mT, torch.eye(len(Vh), dtype=torch.float64), tolerance=1e-7)


@given(DELTAS)
def test_singular_values_descend(delta: LowRankDelta) -> None:
    assert bool((delta.svd().S.diff() <= 0).all())


@given(DELTAS)
def test_the_largest_entry_of_each_left_vector_is_positive(delta: LowRankDelta) -> None:
    U = delta.svd().U
    assert all(column[column.abs().argmax()] > 0 for column in U.mT)


@given(st.builds(random_delta, SEEDS, SIZES, SIZES, st.integers(0, 12)), SEEDS)
def test_singular_values_do_not_depend_on_the_gauge(delta: LowRankDelta, seed: int) -> None:
    assert close(regauged(delta, seed).svd().S, delta.svd().S, size(delta), tolerance=1e-8)


def test_singular_vectors_do_not_depend_on_the_gauge() -> None:
    delta = random_delta(8, 20, 15, 5)
    assert close(regauged(delta, 9).svd().U, delta.svd().U, tolerance=1e-8)


@pytest.mark.parametrize("k", [10, 20, 40])
def test_an_ill_conditioned_factor_whose_pivots_hide_it_has_orthonormal_left_vectors(k: int) -> None:
    # Kahan: unit pivots, condition about 2^k, so that Cholesky of the Gram matrix looks safe and is not
    Q, _ = torch.linalg.qr(randn(0, 200, k))
    kahan = torch.eye(k, dtype=torch.float64) - torch.ones(k, k, dtype=torch.float64).triu(1)
    U = LowRankDelta(Q @ kahan, randn(1, k, 90)).svd().U
    assert close(U.mT @ U, torch.eye(k, dtype=torch.float64), tolerance=1e-7)


def test_columns_of_very_different_size_keep_their_singular_values() -> None:
    # exact by construction: orthonormal directions with sizes from 1e-12 to 1e12
    B, _ = torch.linalg.qr(randn(0, 60, 9))
    A, _ = torch.linalg.qr(randn(1, 50, 9))
    sizes = torch.logspace(12, -12, 9, dtype=torch.float64)
    S = LowRankDelta(B * sizes.sqrt(), sizes.sqrt()[:, None] * A.mT).svd().S
    assert torch.allclose(S[:5], sizes[:5], rtol=1e-9)


@pytest.mark.parametrize("dtype", HALVES)
def test_svd_of_half_precision_factors_is_float64(dtype: torch.dtype) -> None:
    delta = random_delta(0, 30, 20, 4).to(dtype)
    assert close(delta.svd().S, torch.linalg.svdvals(dense(delta))[:4], size(delta))


# --- truncation


@given(DELTAS, st.data())
def test_truncation_error_is_the_tail_of_the_singular_values(delta: LowRankDelta, data: st.DataObject) -> None:
    svd = delta.svd()
    k = data.draw(st.integers(0, len(svd.S)))
    tail = torch.linalg.svdvals(dense(delta))[k:].norm()
    assert (dense(delta) - dense(from_svd(svd, k))).norm() == pytest.approx(float(tail), abs=TIGHT * (size(delta) + 1))


@given(DELTAS, st.data())
def test_truncated_factors_are_balanced(delta: LowRankDelta, data: st.DataObject) -> None:
    svd = delta.svd()
    cut = from_svd(svd, data.draw(st.integers(0, len(svd.S))))
    assert torch.allclose(cut.B.norm(dim=0), cut.A.norm(dim=1), atol=1e-6)


@given(DELTAS, st.integers(1, 16))
def test_reduce_keeps_at_most_the_rank(delta: LowRankDelta, k: int) -> None:
    assert cut_to(delta, RankRule(max=k)).delta.rank <= k


@given(DELTAS, st.integers(1, 16))
def test_reduce_reports_the_energy_it_cut(delta: LowRankDelta, k: int) -> None:
    cut = cut_to(delta, RankRule(max=k))
    error = float((dense(delta) - dense(cut.delta)).norm())
    assert math.sqrt(cut.lost) * float(dense(delta).norm()) == pytest.approx(error, abs=1e-7 * (size(delta) + 1))


@given(DELTAS)
def test_without_a_rule_nothing_is_lost(delta: LowRankDelta) -> None:
    assert close(dense(cut_to(delta, RankRule()).delta), dense(delta), size(delta))


@given(DELTAS)
def test_without_a_rule_the_result_is_called_exact(delta: LowRankDelta) -> None:
    assert cut_to(delta, RankRule()).exact


@given(DELTAS)
def test_no_result_has_more_rank_than_its_shape(delta: LowRankDelta) -> None:
    assert cut_to(delta, RankRule()).delta.rank <= min(delta.shape)


def test_what_fits_the_rule_keeps_its_own_factors() -> None:
    delta = random_delta(0, 9, 8, 4)
    assert cut_to(delta, RankRule(max=4)).delta is delta


def test_what_was_cut_is_not_called_exact() -> None:
    assert not cut_to(random_delta(0, 9, 8, 4), RankRule(max=3)).exact


@pytest.mark.parametrize("rule", [RankRule(), RankRule(max=1), RankRule(energy=0.5), RankRule(max=2, energy=1.0)])
def test_absence_survives_every_rule(rule: RankRule) -> None:
    assert cut_to(LowRankDelta.zero(4, 6), rule).delta.shape == (4, 6)


@pytest.mark.parametrize("rule", [RankRule(max=1), RankRule(energy=0.5)])
def test_a_delta_of_zeros_loses_nothing(rule: RankRule) -> None:
    assert cut_to(LowRankDelta(torch.zeros(4, 3), torch.ones(3, 6)), rule).lost == 0.0


# --- distance


@given(st.builds(random_delta, SEEDS, SIZES, SIZES, RANKS), SEEDS, st.sampled_from([1.0, 1e-3, 1e-8]))
def test_distance_is_the_norm_of_the_dense_difference(delta: LowRankDelta, seed: int, step: float) -> None:
    moved = LowRankDelta(
        delta.B + step * randn(seed, *delta.B.shape),
        delta.A + step * randn(seed + 1, *delta.A.shape),
    )
    expected = float((dense(delta) - dense(moved)).norm())
    assert distance(delta, moved) == pytest.approx(expected, rel=1e-5, abs=1e-13 * (size(delta) + 1))


@pytest.mark.parametrize("changed", ["B", "A", "both", "neither"])
def test_a_gram_that_is_known_changes_no_norm_and_no_distance(changed: str) -> None:
    generator = torch.Generator().manual_seed(3)
    left = LowRankDelta(torch.randn(9, 4, generator=generator), torch.randn(4, 7, generator=generator))
    right = LowRankDelta(left.B + 0.1 * (changed in ("B", "both")), left.A - 0.1 * (changed in ("A", "both")))
    known = left.gram()
    assert (left.norm(gram=known), distance(left, right, gram=known)) == (left.norm(), distance(left, right))
    assert math.isclose(distance(left, right), float((left.to_dense() - right.to_dense()).norm()), rel_tol=1e-5, abs_tol=1e-9)


def test_distance_to_itself_is_zero() -> None:
    delta = random_delta(0, 9, 8, 4)
    assert distance(delta, delta) == 0.0


# --- purity


OPERATIONS = {
    "scale": lambda d: d.scale(2.0),
    "to": lambda d: d.to(torch.float16),
    "to_dense": lambda d: d.to_dense(),
    "inner": lambda d: d.inner(d),
    "norm": lambda d: d.norm(),
    "svd": lambda d: d.svd(),
    "concat": lambda d: concat([d, d]),
    "distance": lambda d: distance(d, d),
    "reduce": lambda d: cut_to(d, RankRule(max=1)),
    "reduce by energy": lambda d: cut_to(d, RankRule(energy=0.5)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_changes_its_operand(operation: str) -> None:
    delta = random_delta(0, 9, 8, 4)
    before = delta.B.clone(), delta.A.clone()
    OPERATIONS[operation](delta)
    assert torch.equal(delta.B, before[0]) and torch.equal(delta.A, before[1])
