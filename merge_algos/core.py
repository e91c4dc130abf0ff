"""The small matrices in which spectral methods live: `delta_i = U M_i V^T` exactly, with bases shared by all adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algos.lowrank import LowRankDelta, concat, numerical_rank, thin_qr, with_fixed_signs


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """U: (d_out, p), V: (d_in, q), both orthonormal, float64.  M: (n, p, q), one core per adapter."""

    U: Tensor
    V: Tensor
    M: Tensor

    def lift(self, M: Tensor) -> LowRankDelta:
        """The delta `U M V^T` of a core M (p, q), through its SVD: balanced factors."""
        left, S, right = torch.linalg.svd(M, full_matrices=False)
        svd = with_fixed_signs(self.U @ left, S, right @ self.V.mT)
        root = svd.S.sqrt()
        return LowRankDelta(svd.U * root, root[:, None] * svd.Vh)


def core_of(deltas: Sequence[LowRankDelta]) -> Core:
    """Bases of all column and row spaces, strongest direction first, so that they depend on the deltas and not on a gauge.

    deltas: canonical (see lowrank.canonical), at least one of rank above 0.
    """
    whole = concat(deltas)
    U, V = _basis(whole.B.double()), _basis(whole.A.double().mT)
    M = torch.stack([(U.mT @ d.B.double()) @ (d.A.double() @ V) for d in deltas])
    return Core(U, V, M)


def polar(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns on the range of X: `X (X^T X)^-1/2`, pseudo-inverse where X is deficient."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    k = numerical_rank(S)
    nearest: Tensor = U[:, :k] @ Vh[:k]
    return nearest


def _basis(X: Tensor) -> Tensor:
    """Left singular vectors (d, p) of X with singular values above rounding, signs fixed."""
    Q, R = thin_qr(X)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    k = numerical_rank(S)
    return with_fixed_signs(Q @ U[:, :k], S[:k], Vh[:k]).U
