"""Isotropic merging: the sum of the task vectors with all its singular values made equal."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from merge_algos.core import present_cores, restoring
from merge_algos.entries import check_finite_number, weighted
from merge_algos.lowrank import SVD, LowRankDelta, numerical_rank, size_of
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Iso-C (Marczak et al. 2025, arXiv:2502.04959) in the core: singular values of the weighted sum become their mean.

    alpha: factor of the result, or null for `sqrt(n)` of n adapters. A flat spectrum has no small tail to cut, so truncating
    it below R loses much: the certificate says how much. What is kept are the directions that were largest in the sum.
    Differs from the paper: the mean is over the directions that the sum has, not over all min(d_out, d_in), because those it
    has not are arbitrary.
    """

    name = "iso_c"
    version = 2  # 2: a cut takes equal singular values in the order they had, not as rounding has it
    paper = "arXiv:2502.04959"
    breaks = MappingProxyType(
        {
            "single adapter": "its spectrum is flattened too",
            "two copies": "their spectrum is flattened too",
            "linear": "singular vectors of a sum are not a sum",
        }
    )

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_finite_number("alpha", self.alpha)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        core, here = present_cores(deltas, weights)
        total = weighted(list(core.M), here)
        return Merged(core.lift(isotropic(total, size_of(deltas, weights))).scale(restoring(self.alpha, len(here))))


def isotropic(M: Tensor, size: float) -> SVD:
    """`mean(S) U V^T` over the directions of M (p, q) that are more than the rounding of a sum of terms of this size.

    In the order of S: of equal singular values, those go first that were the largest.
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    k = numerical_rank(S, size)
    return SVD(U[:, :k], S[:k].mean().expand(k), Vh[:k])
