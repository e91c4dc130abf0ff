"""The small matrices in which spectral methods live: `delta_i = U M_i V^T` exactly, with bases shared by all adapters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algos.lowrank import (
    SVD,
    CoreSVD,
    Frame,
    LowRankDelta,
    canonical,
    concat,
    lifted,
    numerical_rank,
    present,
    signs_of,
    thin_qr,
)


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """U: (d_out, p), V: (d_in, q), both orthonormal, float64.

    halves: per adapter its factors in these bases, b (p, r_i) and a (q, r_i), both with orthogonal columns: `M_i = b a^T`.
    """

    U: Frame
    V: Frame
    halves: tuple[tuple[Tensor, Tensor], ...]

    @property
    def M(self) -> Tensor:
        """(n, p, q), one core per adapter."""
        return torch.stack([b @ a.mT for b, a in self.halves])

    def triplets(self, n: int, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The SVD of `weight M_n`: (p, r), (r,) not below zero, (q, r). Its factors have it already, but for their norms."""
        b, a = self.halves[n]
        left, right = (half.norm(dim=0).clamp(min=torch.finfo(half.dtype).tiny) for half in (b, a))
        return math.copysign(1.0, weight) * b / left, abs(weight) * left * right, a / right

    def lift(self, M: Tensor | SVD) -> CoreSVD:
        """The delta `U M V^T` of a core M (p, q). The triplets of an SVD keep their order, even where values are equal."""
        return lifted(self.U, M, self.V) if isinstance(M, Tensor) else CoreSVD(self.U, M.U, M.S, M.Vh, self.V)


def present_cores(deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> tuple[Core, list[float]]:
    """The core of the adapters that are present, whatever their gauge, and their weights."""
    here = present(deltas, weights)
    return core_of([canonical(deltas[n]) for n in here]), [weights[n] for n in here]


def core_of(deltas: Sequence[LowRankDelta]) -> Core:
    """Bases of all column and row spaces, strongest direction first, so that they depend on the deltas and not on a gauge.

    deltas: canonical (see lowrank.canonical), at least one of rank above 0.
    """
    whole = concat(deltas)
    U, V = _basis(whole.B.double()), _basis(whole.A.double().mT)
    return Core(U, V, tuple((U.coordinates(d.B.double()), V.coordinates(d.A.double().mT)) for d in deltas))


def restoring(alpha: float | None, count: int) -> float:
    """alpha, or `sqrt(count)`: at weights 1/n, n unrelated adapters sum to 1/sqrt(n) of the norm of one."""
    return count**0.5 if alpha is None else alpha


def polar(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns on the range of X: `X (X^T X)^-1/2`, pseudo-inverse where X is deficient."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    k = numerical_rank(S)
    nearest: Tensor = U[:, :k] @ Vh[:k]
    return nearest


def _basis(X: Tensor) -> Frame:
    """Left singular vectors (d, p) of X with singular values above rounding, signs fixed."""
    Q, R = thin_qr(X)
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    U = U[:, : numerical_rank(S)]
    return Q.within(U * signs_of(Q.times(U)))
