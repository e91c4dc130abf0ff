"""Reversible Model Merging against its paper, written out one position at a time, and what is special about it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import SEEDS, dense, random_delta
from merge_algos import LowRankDelta
from merge_algos.codec import distinct, measured
from merge_algos.codecs.rmm import Rmm, aligned, positions, principal
from merge_algos.codecs.rmm_aligned import RmmAligned
from merge_algos.errors import InvalidParams
from merge_algos.survey import decode_all

SHAPE = (9, 7)
both = pytest.mark.parametrize("codec", [Rmm, RmmAligned])


def some(count: int, rank: int, seed: int = 0) -> list[LowRankDelta]:
    return [random_delta(seed + 2 * n, SHAPE, rank) for n in range(count)]


def oracle(deltas: list[LowRankDelta], p: int) -> list[Tensor]:
    """The paper (arXiv:2510.14163), position by position: mean of the tasks' vectors, PCA, and back. Dense (d_out, d_in)."""
    B, A = [d.B.clone() for d in deltas], [d.A.clone() for d in deltas]
    for i in range(SHAPE[0]):
        for n, x in enumerate(_through_basis([d.B[i] for d in deltas], p)):
            B[n][i] = x
    for j in range(SHAPE[1]):
        for n, x in enumerate(_through_basis([d.A[:, j] for d in deltas], p)):
            A[n][:, j] = x
    return [b @ a for b, a in zip(B, A, strict=True)]


def _through_basis(vectors: list[Tensor], p: int) -> list[Tensor]:
    mean = sum(vectors[1:], vectors[0]) / len(vectors)
    V = torch.linalg.svd(torch.stack([x - mean for x in vectors])).Vh[:p]
    return [mean + V.T @ (V @ (x - mean)) for x in vectors]


def fitted(deltas: list[LowRankDelta], p: int) -> Tensor:
    return principal(positions(deltas), p).vectors()


@pytest.mark.parametrize(("count", "rank"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("p", [0, 1, 2])
def test_it_is_what_the_paper_says(count: int, rank: int, p: int) -> None:
    deltas, vectors = some(count, rank), fitted(some(count, rank), p)
    for n, expected in enumerate(oracle(deltas, p)):
        B, A = vectors[: SHAPE[0], n], vectors[SHAPE[0] :, n].mT
        assert float((B.mm(A) - expected).norm()) < 1e-9 * float(expected.norm())


@pytest.mark.parametrize(("count", "rank"), [(3, 5), (5, 3), (1, 4), (4, 4)])
def test_it_is_exact_at_full_p(count: int, rank: int) -> None:
    X = positions(some(count, rank))
    assert float((principal(X, min(rank, count - 1)).vectors() - X).norm()) < 1e-9 * float(X.norm())


@both
def test_only_the_encoding_is_lost_at_full_p(codec: type[Rmm] | type[RmmAligned]) -> None:
    deltas = some(4, 3)
    for delta, decoded in zip(deltas, decode_all(codec(p=3).fit(deltas, 0)), strict=True):
        assert float((dense(delta) - dense(decoded)).norm()) < 0.01 * float(dense(delta).norm())


@given(seed=SEEDS, count=st.integers(2, 6), rank=st.integers(1, 5))
def test_more_directions_never_fit_factors_worse(seed: int, count: int, rank: int) -> None:
    X = positions(some(count, rank, seed))
    errors = [float((principal(X, p).vectors() - X).norm()) for p in range(min(rank, count) + 1)]
    assert all(after <= before + 1e-9 * float(X.norm()) for before, after in pairwise(errors))


@pytest.mark.parametrize(("count", "rank"), [(4, 3), (8, 8), (2, 5)])
@pytest.mark.parametrize("p", [0, 1])
def test_the_size_is_the_papers(count: int, rank: int, p: int) -> None:
    size_bytes = Rmm(p=p, quantize="none").fit(some(count, rank), 0).size_bytes
    assert size_bytes == 2 * sum(SHAPE) * (p * (rank + count) + rank)


@both
@pytest.mark.parametrize("count", [1, 3])
def test_equal_adapters_are_exact_without_any_direction(codec: type[Rmm] | type[RmmAligned], count: int) -> None:
    delta = random_delta(1, SHAPE, 3).to(torch.bfloat16)  # so that the encoding loses nothing either
    given = [delta] * count
    decoded = decode_all(Rmm(p=0).fit(given, 0))
    assert all(torch.equal(dense(x), dense(delta)) for x in decoded)
    assert codec(p=0).fit(given, 0).size_bytes == 2 * 3 * sum(SHAPE)


def test_equal_factors_are_exact_without_any_direction() -> None:
    X = positions([random_delta(1, SHAPE, 3)] * 4)
    assert float((principal(X, 0).vectors() - X).norm()) < 1e-12


def test_alignment_leaves_every_delta_as_it_is() -> None:
    deltas = some(4, 3)
    for delta, turned in zip(deltas, aligned(deltas, 1, True), strict=True):
        assert float((dense(delta) - dense(turned)).norm()) < 1e-9 * float(dense(delta).norm())


def test_alignment_undoes_a_rotation_of_the_factors() -> None:
    delta = random_delta(0, SHAPE, 3)
    Q, _ = torch.linalg.qr(random_delta(5, (3, 3), 3).B)
    near = LowRankDelta(delta.B @ Q + 1e-3, Q.mT @ delta.A)
    given, turned = [delta, near], aligned([delta, near], 0, True)
    before, after = (float((positions(row) - principal(positions(row), 0).vectors()).norm()) for row in (given, turned))
    assert after < 0.1 * before


def test_align_makes_rmm_the_aligned_codec() -> None:
    deltas = some(4, 3)
    assert torch.equal(Rmm(align=True).fit(deltas, 400).shared, RmmAligned().fit(deltas, 400).shared)


@both
@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_a_block_is_coded_as_in_its_place_so_no_error_is_below_that_of_its_block(
    codec: type[Rmm] | type[RmmAligned], fraction: float
) -> None:
    deltas = [random_delta(2 * n, (2048, 3072), 2) for n in range(3)]
    budget = int(fraction * 3 * 2 * 2 * (2048 + 3072))
    for quantize in ("int8", "int4", "auto"):
        chosen = codec(quantize=quantize)
        _, problem = distinct(deltas, budget)
        encoded, floors = chosen.fit(deltas, budget), chosen.floors(problem)
        errors = [measured(d, x) for d, x in zip(deltas, decode_all(encoded), strict=True)]
        met = [f for f in floors if f.size_bytes == encoded.size_bytes]
        assert met and all(0.05 * e < least <= e for e, least in zip(errors, met[0].errors, strict=True))


@both
@pytest.mark.parametrize("shape", [(300, 2048), (2048, 2050)])
def test_of_other_shapes_nothing_is_said_beforehand(codec: type[Rmm] | type[RmmAligned], shape: tuple[int, int]) -> None:
    _, problem = distinct([random_delta(2 * n, shape, 2) for n in range(3)], 10_000)
    assert not codec().floors(problem)


def test_without_a_centre_the_mean_is_not_stored() -> None:
    deltas = some(4, 3)
    assert Rmm(p=2, center=False).fit(deltas, 0).size_bytes == 2 * sum(SHAPE) * 2 * (3 + 4)
    exact = decode_all(Rmm(p=3, center=False).fit(deltas, 0))
    assert all(float((dense(d) - dense(x)).norm()) < 0.01 * float(dense(d).norm()) for d, x in zip(deltas, exact, strict=True))


def test_without_a_centre_and_directions_there_is_nothing() -> None:
    assert not any(dense(x).any() for x in decode_all(Rmm(p=0, center=False).fit(some(3, 2), 0)))


def test_unequal_ranks_are_padded() -> None:
    _, problem = distinct([random_delta(0, SHAPE, 2), random_delta(2, SHAPE, 4)], 0)
    assert positions(problem.deltas).shape == (sum(SHAPE), 2, 4)


@both
@pytest.mark.parametrize("p", [-1, 1.5, True, "2"])
def test_a_p_that_is_no_count_is_refused(codec: type[Rmm] | type[RmmAligned], p: object) -> None:
    with pytest.raises(InvalidParams, match=r"parameters\.p"):
        codec(p=p)  # type: ignore[arg-type]
