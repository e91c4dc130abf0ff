"""Isotropic merging in common and task-specific subspaces: Iso-C whose weakest common directions make room for each task."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from merge_algos.core import polar, present_cores, restoring
from merge_algos.entries import check_finite_number, check_fraction
from merge_algos.lowrank import SVD, LowRankDelta, numerical_rank, size_of
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class IsoCts(MergeMethod):
    """Iso-CTS (Marczak et al. 2025, arXiv:2502.04959) in the core.

    The leading `common` fraction of the summed core's directions is kept; every task adds the leading directions of its
    own core beyond that subspace, an equal share of what is left; both bases are made orthonormal and all singular values
    their mean. A cut keeps those that were largest, unless tasks share directions beyond the common ones.
    common: in (0, 1].  alpha: factor of the result, or null for `sqrt(n)` of n adapters.
    """

    name = "iso_cts"
    version = 2  # 2: a cut takes equal singular values in the order they had, not as rounding has it
    paper = "arXiv:2502.04959"
    breaks = MappingProxyType(
        {
            "single adapter": "its spectrum is flattened too",
            "two copies": "their spectrum is flattened too",
            "linear": "singular vectors of a sum are not a sum",
        }
    )

    common: float = 0.8
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_fraction("common", self.common)
        if self.alpha is not None:
            check_finite_number("alpha", self.alpha)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        core, here = present_cores(deltas, weights)
        tasks = [weight * M for weight, M in zip(here, core.M, strict=True)]
        return Merged(core.lift(self._merge_cores(tasks, size_of(deltas, weights))).scale(restoring(self.alpha, len(here))))

    def _merge_cores(self, tasks: Sequence[Tensor], size: float) -> Tensor | SVD:
        """tasks: weighted cores (p, q).  size: what the rounding of their sum is relative to."""
        total = torch.stack(list(tasks)).sum(0)
        whole = min(total.shape)
        shared = max(1, round(self.common * whole))
        share = (whole - shared) // len(tasks)
        common = _leading(total, shared, size)
        left = common[0]  # (p, at most shared)
        parts = [common, *(_leading(M - left @ (left.mT @ M), share, size) for M in tasks)]
        S = torch.cat([part[1] for part in parts])
        order = S.argsort(descending=True, stable=True)  # of values made equal, those go first that were the largest
        U, V = (polar(torch.cat([part[side] for part in parts], 1)[:, order]) for side in (0, 2))
        mean = S.sum() / max(len(S), 1)
        return SVD(U, mean.expand(len(S)), V.mT) if _is_orthonormal(U) and _is_orthonormal(V) else mean * (U @ V.mT)


def _is_orthonormal(X: Tensor) -> bool:
    """Of what `polar` returns: whether no column was redundant, as those of tasks that share directions are."""
    return float(X.square().sum()) > X.shape[1] - 0.5


def _leading(M: Tensor, k: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """U (p, j), S (j,), V (q, j) of the leading singular triplets that are more than rounding, j <= k."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    j = min(k, numerical_rank(S, size))
    return U[:, :j], S[:j], Vh[:j].mT
