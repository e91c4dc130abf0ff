"""A low-rank delta `B A` and its whole algebra, without ever forming the dense matrix.

Kernels 1.1 to 1.4: concatenation is the exact sum; truncation is the best approximation of its rank (Eckart-Young)
from two thin QR factorisations and the SVD of a small core; norms and inner products come from Gram matrices in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from merge_algos.errors import ShapeMismatch

# Cholesky-QR loses about eps * cond^2; at this condition that is 1e-8, far below float32 rounding
_CHOLESKY_MAX_CONDITION = 1e4


@dataclass(frozen=True, slots=True, eq=False)
class SVD:
    """`U diag(S) Vh`: U (d_out, k), S (k,) descending, Vh (k, d_in); the largest entry of each column of U is positive."""

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta:
    """The update `B @ A` of one linear layer, scaling folded in. B: (d_out, k).  A: (k, d_in).  k = 0 is absence.

    Raises ShapeMismatch if the inner dimensions differ. No operation changes its operands.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ShapeMismatch("delta", (*self.B.shape[-1:], -1), tuple(self.A.shape))

    @classmethod
    def zero(cls, d_out: int, d_in: int, *, like: Tensor | None = None) -> Self:
        """The rank-0 delta: what an adapter contributes to a module that it does not target."""
        new = torch.zeros if like is None else like.new_zeros
        return cls(new((d_out, 0)), new((0, d_in)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Columns of B: an upper bound of the matrix rank."""
        return self.B.shape[1]

    def scale(self, factor: float) -> "LowRankDelta":
        """`factor * B A`. Only B carries it, so A keeps its bytes through a merge."""
        return LowRankDelta(self.B * factor, self.A)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "LowRankDelta":
        return LowRankDelta(self.B.to(device, dtype), self.A.to(device, dtype))

    def to_dense(self) -> Tensor:
        """(d_out, d_in). For tests and small matrices: the one door to the dense product."""
        return self.B @ self.A

    def inner(self, other: "LowRankDelta") -> float:
        """Frobenius inner product `<B1 A1, B2 A2>`, accumulated in float64."""
        left = self.B.double().mT @ other.B.double()  # (k1, k2)
        right = self.A.double() @ other.A.double().mT  # (k1, k2)
        return float((left * right).sum().item())

    def norm(self) -> float:
        """Frobenius norm. Rounding may leave a cancelling sum a hair below zero, hence the clamp."""
        return math.sqrt(max(self.inner(self), 0.0))

    def svd(self) -> SVD:
        """Thin SVD in float64 from the factors; k = min(rank, d_out, d_in) singular values."""
        QB, RB = _thin_qr(self.B.double())  # (d_out, p), (p, rank)
        QA, RA = _thin_qr(self.A.double().mT)  # (d_in, q), (q, rank)
        U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)  # core (p, q): B A = QB core QA^T
        return _with_fixed_signs(QB @ U, S, Vh @ QA.mT)


def concat(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """The exact sum of at least one delta: `[B_1 | B_2 ..] [A_1 ; A_2 ..]`. Raises ShapeMismatch if shapes differ."""
    for delta in deltas:
        if delta.shape != deltas[0].shape:
            raise ShapeMismatch("sum", deltas[0].shape, delta.shape)
    return LowRankDelta(torch.cat([d.B for d in deltas], 1), torch.cat([d.A for d in deltas], 0))


def from_svd(svd: SVD, k: int) -> LowRankDelta:
    """The leading k terms, `sqrt(S)` on both factors: balanced, so neither overflows a narrow dtype before the other."""
    root = svd.S[:k].sqrt()
    return LowRankDelta(svd.U[:, :k] * root, root[:, None] * svd.Vh[:k])


def distance(left: LowRankDelta, right: LowRankDelta) -> float:
    """`||left - right||` for equal ranks and nearly equal factors, without cancellation: dB A' + B dA, both small.

    A term whose difference is zero is left out: a merge often hands A on untouched, which halves the rank.
    """
    dB, dA = right.B.to(left.B.dtype) - left.B, right.A.to(left.A.dtype) - left.A
    terms = [LowRankDelta(dB, left.A + dA)] * bool(dB.any()) + [LowRankDelta(left.B, dA)] * bool(dA.any())
    return concat(terms).norm() if terms else 0.0


def _thin_qr(X: Tensor) -> tuple[Tensor, Tensor]:
    """X (d, k) float64 = Q (d, p) R (p, k), p = min(d, k). Cholesky of the Gram where safe, Householder elsewhere."""
    L, failed = torch.linalg.cholesky_ex(X.mT @ X)
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)  # (k, k)
    # the pivots alone would not do: Kahan's matrix has pivots of 1 and any condition. Row norms: scaled columns cost nothing
    condition = (inverse * L.norm(dim=1)).norm()
    if failed or not bool(condition < _CHOLESKY_MAX_CONDITION):
        Q, R = torch.linalg.qr(X)
        return Q, R
    return X @ inverse.mT, L.mT


def _with_fixed_signs(U: Tensor, S: Tensor, Vh: Tensor) -> SVD:
    if U.numel() == 0:
        return SVD(U, S, Vh)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))  # (1, k)
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return SVD(U * sign, S, sign.mT * Vh)
