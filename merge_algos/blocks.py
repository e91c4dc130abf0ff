"""Matrices that exist only as blocks of rows: what entry-wise methods return instead of a dense delta.

Every pass over such a matrix forms a few rows at a time; those of a result are remembered up to a limit, because each costs
the rows of all adapters. The way to a low-rank delta is a randomised SVD by subspace
iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4 on M^T M), which needs one pass per iteration,
or the exact SVD where the matrix is small. What was cut away is measured, not estimated.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_algos.lowrank import SVD, LowRankDelta, with_fixed_signs

BLOCK_ENTRIES = 1 << 20  # 4 MiB of float32
_SMALL_ENTRIES = 1 << 18  # up to 512 x 512 the exact SVD is as fast as the sketch
_OVERSAMPLING = 16
_ITERATIONS = 3
_REMEMBERED_BYTES = 128 << 20  # of each module in hand: all of 4096 x 4096 in float32, three quarters of 11008 x 4096


@dataclass(frozen=True, slots=True, eq=False)
class BlockMatrix:
    """A (d_out, d_in) matrix, float32 or float64, given by its rows.

    rows: (start, stop) -> (stop - start, d_in), the same at every call; asked only for the ranges of `row_ranges`, so a
    random method may seed each range on its own.  block_entries: how many entries of it exist at a time.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    block_entries: int = BLOCK_ENTRIES

    def blocks(self) -> Iterator[Tensor]:
        for start, stop in row_ranges(self.shape, self.block_entries):
            yield self.rows(start, stop)

    def to_dense(self) -> Tensor:
        """(d_out, d_in). For tests and small matrices."""
        return torch.cat(list(self.blocks()))


def entries_shared_by(adapters: int) -> int:
    """Entries of a block where one of each of so many adapters exists at a time: 32 MiB of float32 together, at most."""
    return BLOCK_ENTRIES * 8 // max(8, adapters)


def remembered(matrix: BlockMatrix, limit_bytes: int = _REMEMBERED_BYTES) -> BlockMatrix:
    """The same matrix, whose first rows are formed once only, as many as fit the limit."""
    known: dict[int, Tensor] = {}
    room = limit_bytes

    def rows(start: int, stop: int) -> Tensor:
        nonlocal room
        if start in known:
            return known[start]
        block = matrix.rows(start, stop)
        if block.nbytes <= room:
            known[start], room = block, room - block.nbytes
        return block

    return replace(matrix, rows=rows)


def row_ranges(shape: tuple[int, int], block_entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of at most `block_entries` entries, at least one row."""
    d_out, d_in = shape
    step = max(1, block_entries // d_in)
    for start in range(0, d_out, step):
        yield start, min(start + step, d_out)


def dense_rows(delta: LowRankDelta, start: int, stop: int) -> Tensor:
    """(stop - start, d_in): these rows of `B A`, and never more."""
    return delta.B[start:stop] @ delta.A


def truncated_svd(matrix: BlockMatrix, k: int, *, seed: int) -> tuple[SVD, float]:
    """The leading k singular triplets, float64, and the squared Frobenius norm of the whole matrix.

    Exact where the matrix is small or k is near its rank; else k + 16 sketched columns and 3 passes of iteration. The
    sketch is drawn from `seed` on the CPU, so a device changes nothing.
    """
    d_out, d_in = matrix.shape
    width = min(k + _OVERSAMPLING, d_in, d_out)
    if d_out * d_in <= _SMALL_ENTRIES or 2 * width >= min(d_out, d_in):
        return _exact_svd(matrix, k)
    matrix = remembered(matrix)
    V = torch.randn(d_in, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for _ in range(_ITERATIONS):
        V = torch.linalg.qr(_gram_times(matrix, V)).Q
    Y, energy = _times(matrix, V)  # (d_out, width)
    U, S, Wh = torch.linalg.svd(Y, full_matrices=False)
    return with_fixed_signs(U[:, :k], S[:k], Wh[:k] @ V.mT), energy


def seed_of(*parts: object) -> int:
    """63 bits from the recipe's seed, the module, the adapter's position ..: the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _exact_svd(matrix: BlockMatrix, k: int) -> tuple[SVD, float]:
    U, S, Vh = torch.linalg.svd(matrix.to_dense().double(), full_matrices=False)
    return with_fixed_signs(U[:, :k], S[:k], Vh[:k]), float(S.square().sum())


def _gram_times(matrix: BlockMatrix, V: Tensor) -> Tensor:
    """`M^T M V` (d_in, width), float64, in one pass: each block is used on both sides while it is there.

    The products have the precision of the blocks: an iteration only turns the basis, what it finds is measured afterwards.
    """
    total = torch.zeros_like(V)
    for block in matrix.blocks():
        total = total.to(block.device) + block.mT @ (block @ V.to(block))
    return total


def _times(matrix: BlockMatrix, V: Tensor) -> tuple[Tensor, float]:
    """`M V` in float64, and the squared norm of M: their difference is the error, which float32 would drown."""
    parts, energy = [], 0.0
    for block in matrix.blocks():
        wide = block.double()
        parts.append(wide @ V)
        energy += float(wide.square().sum())
    return torch.cat(parts), energy
