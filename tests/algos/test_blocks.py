"""Matrices known by rows of blocks: exact thresholds, measured truncation, and never the whole of a big one at a time."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import MODULE, dense, randn, random_delta
from merge_algos import LowRankDelta, RankRule
from merge_algos.blocks import BLOCK_ENTRIES, BlockMatrix, entries_shared_by, remembered, row_ranges, truncated_svd
from merge_algos.lowrank import SVD
from merge_algos.magnitudes import magnitude_threshold
from merge_algos.merge import build, reduce
from merge_algos.methods import registry
from merge_algos.protocol import ModuleContext

SIZES = st.integers(1, 12)
PRECISIONS = st.sampled_from([torch.float32, torch.float64])
THIN_BLOCKS = st.integers(1, 40)
FULL_RANK = [name for name, chosen in registry().items() if chosen.memory == "dense"]

# --- row blocks


@given(d_out=SIZES, d_in=SIZES, entries=THIN_BLOCKS)
def test_ranges_follow_each_other_from_first_row_to_last(d_out: int, d_in: int, entries: int) -> None:
    rows = [row for start, stop in row_ranges((d_out, d_in), entries) for row in range(start, stop)]
    assert rows == list(range(d_out))


@given(d_out=SIZES, d_in=SIZES, entries=THIN_BLOCKS)
def test_a_range_holds_no_more_than_asked_or_one_row(d_out: int, d_in: int, entries: int) -> None:
    assert all((stop - start) * d_in <= max(entries, d_in) for start, stop in row_ranges((d_out, d_in), entries))


def given_rows(X: Tensor, block_entries: int = BLOCK_ENTRIES) -> BlockMatrix:
    return BlockMatrix((X.shape[0], X.shape[1]), lambda start, stop: X[start:stop], block_entries)


@given(d_out=SIZES, d_in=SIZES, entries=THIN_BLOCKS)
def test_blocks_put_together_are_the_matrix(d_out: int, d_in: int, entries: int) -> None:
    X = randn(0, d_out, d_in)
    assert torch.equal(given_rows(X, entries).to_dense(), X)


@pytest.mark.parametrize(("limit_bytes", "asked"), [(0, 12), (160, 8), (10**6, 4)])
def test_rows_are_remembered_as_far_as_the_limit_goes(limit_bytes: int, asked: int) -> None:
    """Four blocks of two rows, 80 bytes each, walked through three times."""
    X = randn(0, 8, 5)
    matrix, shapes = asked_of(given_rows(X, 10))
    known = remembered(matrix, limit_bytes)
    assert all(torch.equal(known.to_dense(), X) for _ in range(3))
    assert len(shapes) == asked


# --- thresholds


def by_sorting(delta: LowRankDelta, keep: int) -> float:
    return sorted(delta.to_dense().abs().flatten().tolist(), reverse=True)[keep - 1]


def exactly(entries: Tensor) -> LowRankDelta:
    """The delta whose dense matrix is this one, without rounding."""
    return LowRankDelta(torch.eye(len(entries), dtype=entries.dtype), entries)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), d_out=SIZES, d_in=SIZES, dtype=PRECISIONS, data=st.data())
def test_the_threshold_is_that_of_a_full_sort(seed: int, d_out: int, d_in: int, dtype: torch.dtype, data: st.DataObject) -> None:
    delta = random_delta(seed, (d_out, d_in), data.draw(st.integers(1, 4))).to(dtype)
    keep = data.draw(st.integers(1, d_out * d_in))
    assert magnitude_threshold(delta, keep) == by_sorting(delta, keep)


ENTRIES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "ties": lambda dtype: (randn(0, 9, 7) * 2).round().to(dtype),
    "zeros": lambda dtype: torch.zeros(9, 7, dtype=dtype),
    "mostly zeros": lambda dtype: torch.where(randn(0, 9, 7) > 1, randn(1, 9, 7), 0).to(dtype),
    "signed zeros": lambda dtype: torch.tensor([[0.0, -0.0], [-0.0, 1.0]], dtype=dtype),
    "denormals": lambda dtype: torch.arange(63).reshape(9, 7).to(dtype) * torch.finfo(dtype).smallest_normal / 32,
    "neighbours in the last bit": lambda dtype: 1 + torch.arange(63).reshape(9, 7).to(dtype) * torch.finfo(dtype).eps,
    "huge and tiny": lambda dtype: torch.logspace(-30, 30, 63, dtype=torch.float64).reshape(9, 7).to(dtype),
    "all one": lambda dtype: torch.ones(9, 7, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entries", ENTRIES)
def test_thresholds_of_odd_entries_are_those_of_a_full_sort(entries: str, dtype: torch.dtype) -> None:
    delta = exactly(ENTRIES[entries](dtype))
    count = delta.shape[0] * delta.shape[1]
    keeps = sorted({*range(1, count + 1, 5), 2, count - 1, count})
    assert [magnitude_threshold(delta, keep) for keep in keeps] == [by_sorting(delta, keep) for keep in keeps]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), entries=THIN_BLOCKS, keep=st.integers(1, 63))
def test_the_threshold_does_not_depend_on_the_blocks(seed: int, entries: int, keep: int) -> None:
    delta = exactly(randn(seed, 9, 7))
    assert magnitude_threshold(delta, keep, entries) == magnitude_threshold(delta, keep)


# --- truncation

D_OUT, D_IN, K = 640, 520, 24  # beyond what is small enough for the exact SVD


COUNT = torch.arange(min(D_OUT, D_IN), dtype=torch.float64)
SPECTRA = {
    "flat": torch.ones(len(COUNT), dtype=torch.float64),
    "slowly decaying": (1 + COUNT) ** -0.5,
    "decaying": (1 + COUNT) ** -1.5,
    "fast decaying": 0.7**COUNT,
    "a step": torch.where(COUNT < K, 1.0, 0.1).double(),
    "exactly of low rank": torch.where(COUNT < K, 1.0 / (1 + COUNT), 0.0),
    "of lower rank than asked for": torch.where(COUNT < 5, 1.0 / (1 + COUNT), 0.0),
}
LEFT, RIGHT = (torch.linalg.qr(randn(n, size, len(COUNT))).Q for n, size in enumerate((D_OUT, D_IN)))
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def with_spectrum(S: Tensor) -> Tensor:
    """A matrix of these singular values."""
    return LEFT * S @ RIGHT.mT


def as_dense(svd: SVD) -> Tensor:
    return svd.U * svd.S @ svd.Vh


@every_spectrum
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_error_that_follows_from_the_energy_is_the_measured_one(spectrum: str, dtype: torch.dtype) -> None:
    X = with_spectrum(SPECTRA[spectrum]).to(dtype)
    cut = reduce(given_rows(X), ModuleContext(MODULE, 0, RankRule(max=K)))
    measured = float((X.double() - dense(cut.delta)).norm() / X.double().norm())
    assert cut.lost**0.5 == pytest.approx(measured, abs=1e-6)


@every_spectrum
def test_the_energy_is_that_of_the_whole_matrix(spectrum: str) -> None:
    X = with_spectrum(SPECTRA[spectrum])
    assert truncated_svd(given_rows(X), K, seed=0)[1] == pytest.approx(float(X.square().sum()), rel=1e-12)


@every_spectrum
@pytest.mark.parametrize("k", [1, K, 100])
def test_the_sketch_is_within_one_percent_of_the_best_approximation(spectrum: str, k: int) -> None:
    X = with_spectrum(SPECTRA[spectrum])
    error = float((X - as_dense(truncated_svd(given_rows(X), k, seed=0)[0])).norm())
    assert error <= 1.01 * float(SPECTRA[spectrum][k:].norm()) + 1e-9 * float(X.norm())


@every_spectrum
def test_the_vectors_of_the_sketch_are_orthonormal(spectrum: str) -> None:
    svd = truncated_svd(given_rows(with_spectrum(SPECTRA[spectrum])), K, seed=0)[0]
    eye = torch.eye(K, dtype=torch.float64)
    assert torch.allclose(svd.U.mT @ svd.U, eye, atol=1e-9) and torch.allclose(svd.Vh @ svd.Vh.mT, eye, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (30, 20), (512, 512), (2000, 40)], ids=str)
@pytest.mark.parametrize("k", [1, 7])
def test_a_small_matrix_is_cut_exactly(shape: tuple[int, int], k: int) -> None:
    X = randn(0, *shape)
    svd, _ = truncated_svd(given_rows(X), k, seed=0)
    assert torch.allclose(svd.S, torch.linalg.svdvals(X)[:k], rtol=1e-10)


def test_the_same_seed_gives_the_same_bytes() -> None:
    X = given_rows(with_spectrum(SPECTRA["flat"]))
    first, second = (truncated_svd(X, K, seed=3)[0] for _ in range(2))
    assert torch.equal(first.U, second.U) and torch.equal(first.S, second.S) and torch.equal(first.Vh, second.Vh)


def test_another_seed_draws_another_sketch() -> None:
    X = given_rows(with_spectrum(SPECTRA["flat"]))
    first, second = (truncated_svd(X, K, seed=seed)[0] for seed in (0, 1))
    assert not torch.allclose(first.U, second.U)


@pytest.mark.parametrize("block_entries", [1, 10_000, 123_456])
def test_other_blocks_give_the_same_truncation(block_entries: int) -> None:
    X = with_spectrum(SPECTRA["decaying"])
    one, other = (truncated_svd(given_rows(X, size), K, seed=0)[0] for size in (BLOCK_ENTRIES, block_entries))
    assert torch.allclose(as_dense(one), as_dense(other), atol=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.99999])
def test_an_energy_rule_takes_the_smallest_rank_that_keeps_it(energy: float) -> None:
    S = SPECTRA["decaying"]
    cut = reduce(given_rows(with_spectrum(S)), ModuleContext(MODULE, 0, RankRule(energy=energy)))
    kept = S.square().cumsum(0) / S.square().sum()
    assert cut.delta.rank == int((kept < energy).sum()) + 1 and 1 - cut.lost >= energy


def test_a_limit_caps_the_energy() -> None:
    cut = reduce(given_rows(with_spectrum(SPECTRA["flat"])), ModuleContext(MODULE, 0, RankRule(max=10, energy=0.9)))
    assert cut.delta.rank == 10 and 1 - cut.lost == pytest.approx(10 / len(COUNT), rel=1e-2)


def test_a_matrix_of_zeros_loses_nothing() -> None:
    cut = reduce(given_rows(torch.zeros(D_OUT, D_IN)), ModuleContext(MODULE, 0, RankRule(max=4)))
    assert cut.lost == 0.0 and not dense(cut.delta).any()


# --- memory


def asked_of(matrix: BlockMatrix) -> tuple[BlockMatrix, list[tuple[int, ...]]]:
    """The same matrix, and the shapes of all blocks that will have been asked of it."""
    shapes: list[tuple[int, ...]] = []

    def rows(start: int, stop: int) -> Tensor:
        block = matrix.rows(start, stop)
        shapes.append(tuple(block.shape))
        return block

    return replace(matrix, rows=rows), shapes


@pytest.mark.parametrize("method", FULL_RANK)
def test_no_block_of_a_result_is_larger_than_allowed(method: str) -> None:
    deltas = [random_delta(n, (1500, 1100), 2).to(torch.float32) for n in range(2)]
    context = ModuleContext(MODULE, 0, RankRule(max=4))
    matrix, shapes = asked_of(build(method, {}).merge(deltas, [0.5, 0.5], context).delta)  # type: ignore[arg-type]
    reduce(matrix, context)
    assert shapes and all(rows * columns <= BLOCK_ENTRIES < 1500 * 1100 for rows, columns in shapes)


BIG = """
import resource, torch
from merge_algos import Adapter, LowRankDelta, merge, methods
methods.registry()
torch.set_num_threads(1)
def peak_mib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
g = torch.Generator().manual_seed(0)
factors = [(torch.randn(4096, 4, generator=g), torch.randn(4, 4096, generator=g)) for _ in range(4)]
before = peak_mib()
merge([Adapter("base", {"m": LowRankDelta(B, A)}) for B, A in factors], method="ties", rank=4)
print(peak_mib() - before)
"""


def test_a_big_merge_never_holds_the_deltas() -> None:
    # four dense deltas of 4096 x 4096 are 256 MiB of float32
    ran = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True, timeout=240)
    assert float(ran.stdout) < 200


@pytest.mark.parametrize("adapters", [1, 8, 9, 32, 1000])
def test_blocks_of_many_adapters_together_are_as_large_as_those_of_eight(adapters: int) -> None:
    assert entries_shared_by(adapters) == BLOCK_ENTRIES * 8 // max(8, adapters)
    assert adapters * entries_shared_by(adapters) <= 8 * BLOCK_ENTRIES
