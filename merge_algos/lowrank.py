"""A low-rank delta `B A` and its whole algebra, without ever forming the dense matrix.

Kernels 1.1 to 1.4: concatenation is the exact sum; truncation is the best approximation of its rank (Eckart-Young)
from two thin QR factorisations and the SVD of a small core; norms and inner products come from Gram matrices in float64.
What is orthonormal stays a product until somebody asks for its columns, since a cut asks for few of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from merge_algos.errors import ShapeMismatch

# Cholesky-QR loses about eps * cond^2; at this condition that is 1e-8, far below float32 rounding
_CHOLESKY_MAX_CONDITION = 1e4

_BLOCK_ENTRIES = 1 << 16  # of factors are widened at a time: a block of them stays in a cache, which is a fifth faster

_ZERO_RATIO = 1e-6  # a singular value this much below the largest is rounding of float32 factors


@dataclass(frozen=True, slots=True, eq=False)
class SVD:
    """`U diag(S) Vh`: U (d_out, k), S (k,) descending, Vh (k, d_in); the largest entry of each column of U is positive."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def leading(self, k: int) -> "SVD":
        return SVD(self.U[:, :k], self.S[:k], self.Vh[:k])


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Orthonormal columns `X W` (d, p), not formed. X: (d, k), of which a few rows at a time are widened to float64.

    W: (k, p) float64, or None for the identity.
    """

    X: Tensor
    W: Tensor | None = None

    def times(self, M: Tensor) -> Tensor:
        """`X W M` (d, m) of M (p, m)."""
        return _wide_product(self.X, M if self.W is None else self.W @ M)

    def coordinates(self, Y: Tensor) -> Tensor:
        """`W^T X^T Y` (p, m) of Y (d, m). What is opposite has opposite coordinates to the last bit."""
        inner = _products(self.X, Y)
        return inner if self.W is None else self.W.mT @ inner

    def within(self, M: Tensor) -> "Frame":
        """The frame of columns `X W M`; M (p, m) orthonormal."""
        return Frame(self.X, M if self.W is None else self.W @ M)

    @property
    def columns(self) -> Tensor:
        return self.X.double() if self.W is None else _wide_product(self.X, self.W)


@dataclass(frozen=True, slots=True, eq=False)
class CoreSVD:
    """`left U diag(S) Vh right^T` of frames left (d_out, p) and right (d_in, q), S descending: an SVD whose ends are lazy."""

    left: Frame
    U: Tensor
    S: Tensor
    Vh: Tensor
    right: Frame

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left.X), len(self.right.X)

    def leading(self, k: int) -> SVD:
        """The first k singular triplets, signs fixed."""
        return with_fixed_signs(self.left.times(self.U[:, :k]), self.S[:k], self.right.times(self.Vh[:k].mT).mT)

    def scale(self, factor: float) -> "CoreSVD":
        """factor: any finite number; its sign goes to U, so S stays a spectrum."""
        sign = math.copysign(1.0, factor)
        return CoreSVD(self.left, sign * self.U, abs(factor) * self.S, self.Vh, self.right)


@dataclass(frozen=True, slots=True, eq=False)
class LowRankDelta:
    """The update `B @ A` of one linear layer, scaling folded in. B: (d_out, k).  A: (k, d_in).  k = 0 is absence.

    Sums, norms and SVDs take factors of two types; what multiplies B with A needs one.
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
        left = _products(self.B, other.B)  # (k1, k2)
        right = self.gram() if other is self else _products(self.A.mT, other.A.mT)
        return float((left * right).sum().item())

    def norm(self, *, gram: Tensor | None = None) -> float:
        """Frobenius norm. Rounding may leave a cancelling sum a hair below zero, hence the clamp.

        gram: `self.gram()`, half of the work, where it is known.
        """
        return math.sqrt(max(float((_products(self.B, self.B) * (self.gram() if gram is None else gram)).sum()), 0.0))

    def gram(self) -> Tensor:
        """`A A^T` (k, k), accumulated in float64."""
        A = self.A.mT
        return _products(A, A)

    def core_svd(self) -> CoreSVD:
        """Thin SVD in float64 from the factors; k = min(rank, d_out, d_in) singular values."""
        left, RB = thin_qr(self.B)  # (d_out, p), (p, rank)
        right, RA = thin_qr(self.A.mT)  # (d_in, q), (q, rank)
        return lifted(left, RB @ RA.mT, right)  # B A = left (RB RA^T) right^T

    def svd(self) -> SVD:
        """The whole of `core_svd`: U (d_out, k), Vh (k, d_in)."""
        core = self.core_svd()
        return core.leading(len(core.S))


def concat(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """The exact sum of at least one delta: `[B_1 | B_2 ..] [A_1 ; A_2 ..]`. Raises ShapeMismatch if shapes differ."""
    for delta in deltas:
        if delta.shape != deltas[0].shape:
            raise ShapeMismatch("sum", deltas[0].shape, delta.shape)
    return LowRankDelta(torch.cat([d.B for d in deltas], 1), torch.cat([d.A for d in deltas], 0))


def weighted_sum(deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> LowRankDelta:
    """`sum_i w_i delta_i` of at least one delta, exactly; a term of weight 0 costs no rank.

    Where all terms share A (LoRA-FA, VeRA), the B are added instead, so the sum stays at their rank.
    """
    here = present(deltas, weights)
    if not here:
        return LowRankDelta.zero(*deltas[0].shape, like=deltas[0].B)
    A = shared_A([deltas[n] for n in here])
    if A is not None:
        return LowRankDelta(torch.stack([deltas[n].B * weights[n] for n in here]).sum(0), A)
    whole = concat([deltas[n] for n in here])
    columns = torch.tensor([weight for n in here for weight in [weights[n]] * deltas[n].rank], dtype=torch.float64)
    wide = torch.promote_types(whole.B.dtype, torch.float32)  # a narrow B is multiplied by the weight, not by what it rounds to
    return LowRankDelta(whole.B.mul_(columns.to(whole.B.device, wide)), whole.A)


def shared_A(deltas: Sequence[LowRankDelta]) -> Tensor | None:
    """The A that all deltas of rank above 0 have in common, byte for byte (LoRA-FA, VeRA), or None."""
    given = [delta.A for delta in deltas if delta.rank]
    same = len(given) > 1 and all(A.shape == given[0].shape and bool(torch.equal(A, given[0])) for A in given[1:])
    return given[0] if same else None


def canonical(delta: LowRankDelta) -> LowRankDelta:
    """Balanced SVD factors with fixed signs, in the delta's dtype: one gauge for all factorisations of the same delta."""
    svd = delta.core_svd()
    return from_svd(svd, numerical_rank(svd.S)).to(delta.B.dtype)


def numerical_rank(S: Tensor, size: float | None = None) -> int:
    """How many singular values S (k,), descending, are more than the rounding of float32 factors.

    size: what that rounding is relative to, where it is not the largest of S: a sum that cancels is smaller than its terms.
    """
    return int((_ZERO_RATIO * (S.max() if size is None else size) < S).sum()) if len(S) else 0


def is_rounding(norm: float, deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> bool:
    """Whether a norm is no more than what rounding leaves of terms that cancel."""
    return norm <= _ZERO_RATIO * size_of(deltas, weights)


def size_of(deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> float:
    """`sum_i |w_i| ||delta_i||`: how large the weighted sum can be, and what its rounding is relative to."""
    return sum(abs(weight) * delta.norm() for delta, weight in zip(deltas, weights, strict=True) if weight != 0.0)


def present(deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> tuple[int, ...]:
    """Positions of the adapters that count: those that target the module and have a weight that is not 0."""
    return tuple(n for n, (delta, weight) in enumerate(zip(deltas, weights, strict=True)) if delta.rank and weight != 0.0)


def mean_norm(deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> float:
    """Mean Frobenius norm of the adapters that are present; 0 if there is none."""
    norms = [deltas[n].norm() for n in present(deltas, weights)]
    return sum(norms) / len(norms) if norms else 0.0


def from_svd(svd: SVD | CoreSVD, k: int) -> LowRankDelta:
    """The leading k terms, `sqrt(S)` on both factors: balanced, so neither overflows a narrow dtype before the other."""
    kept = svd.leading(k)
    root = kept.S.sqrt()
    return LowRankDelta(kept.U * root, root[:, None] * kept.Vh)


def distance(left: LowRankDelta, right: LowRankDelta, *, gram: Tensor | None = None) -> float:
    """`||left - right||` for equal ranks and nearly equal factors, without cancellation: dB A' + B dA, both small.

    A term whose difference is zero is left out: a merge often hands A on untouched, which halves the rank.
    gram: `left.gram()`, most of the work in that case, where it is known.
    """
    dtype = torch.promote_types(left.B.dtype, left.A.dtype)
    dB, dA = _difference(right.B, left.B, dtype), _difference(right.A, left.A, dtype)
    if dA is None:
        return 0.0 if dB is None else LowRankDelta(dB, left.A).norm(gram=gram)
    of_A = LowRankDelta(left.B, dA)
    return (of_A if dB is None else concat([LowRankDelta(dB, left.A + dA), of_A])).norm()


def _difference(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`X - Y` in this dtype, or None if it is zero."""
    if X is Y:
        return None
    wide = X.to(dtype)
    difference = wide - Y if wide is X else wide.sub_(Y)  # in the memory that was taken anyway
    return None if _is_zero(difference) else difference


def _products(X: Tensor, Y: Tensor) -> Tensor:
    """`X^T Y` (k1, k2) in float64, of X (d, k1) and Y (d, k2)."""
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
    for rows in _blocks(X):
        wide = X[rows].double()
        total.addmm_(wide.mT, wide if Y is X else Y[rows].double())
    return total


def _blocks(X: Tensor) -> Iterator[slice]:
    """Of the rows of X."""
    step = max(1, _BLOCK_ENTRIES // max(1, X.shape[1]))
    return (slice(start, start + step) for start in range(0, len(X), step))


def all_finite(X: Tensor) -> bool:
    """The sum is finite only if every entry is, and costs no mask; where it overflows, the mask decides."""
    return math.isfinite(float(X.sum())) or bool(X.isfinite().all())


def _wide_product(X: Tensor, M: Tensor) -> Tensor:
    """`X M` (d, m) in float64, of X (d, k) and M (k, m) float64."""
    product = M.new_empty(len(X), M.shape[1])
    for rows in _blocks(X):
        torch.mm(X[rows].double(), M, out=product[rows])
    return product


def _is_zero(X: Tensor) -> bool:
    """Several times faster than `any`, which makes a mask."""
    return not X.numel() or all(float(end) == 0.0 for end in X.aminmax())


def lifted(left: Frame, core: Tensor, right: Frame) -> CoreSVD:
    """The SVD of `left core right^T`; core (p, q)."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return CoreSVD(left, U, S, Vh, right)


def thin_qr(X: Tensor) -> tuple[Frame, Tensor]:
    """X (d, k) = Q (d, p) R (p, k) float64, p = min(d, k). Cholesky of the Gram where safe, Householder elsewhere."""
    L, failed = torch.linalg.cholesky_ex(_products(X, X))
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)  # (k, k)
    # the pivots alone would not do: Kahan's matrix has pivots of 1 and any condition. Row norms: scaled columns cost nothing
    condition = (inverse * L.norm(dim=1)).norm()
    if failed or not bool(condition < _CHOLESKY_MAX_CONDITION):
        Q, R = torch.linalg.qr(X.double())
        return Frame(Q), R
    return Frame(X, inverse.mT), L.mT


def with_fixed_signs(U: Tensor, S: Tensor, Vh: Tensor) -> SVD:
    sign = signs_of(U)
    return SVD(U * sign, S, sign[:, None] * Vh)


def signs_of(U: Tensor) -> Tensor:
    """(k,) of +1 and -1 that make the largest entry of each column of U (d, k) positive."""
    if U.numel() == 0:
        return U.new_ones(U.shape[1])
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
