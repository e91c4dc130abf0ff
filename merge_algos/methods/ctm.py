"""Core Tucker merging: one pair of bases of the output rank for all adapters, their small cores added."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algos.core import present_cores
from merge_algos.entries import check_whole_number, weighted
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Ctm(MergeMethod):
    """CTM (arXiv:2606.03723): compress all adapters into a shared Tucker-2 basis of exactly the output rank, merge the cores.

    The rank is the requested one, else half the sum of the ranks, but no less than the largest. Bases start at the truncated
    HOSVD and are improved by `iterations` of HOOI; what the compression loses of the adapters is in the diagnostics as
    `compression_error`. At a rank, task arithmetic loses less of the sum itself: these bases serve all adapters.
    """

    name = "ctm"
    paper = "arXiv:2606.03723"

    iterations: int = 10

    def __post_init__(self) -> None:
        check_whole_number("iterations", self.iterations, least=0)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        core, shares = present_cores(deltas, weights)
        ranks = [deltas[n].rank for n in present(deltas, weights)]
        r = context.rank.max or max(sum(ranks) // 2, *ranks)
        U, V = tucker2(core.M, r, self.iterations)
        small = U.mT @ core.M @ V  # (n, r, r), less where the core is smaller
        energy = core.M.square().sum()
        lost = (energy - small.square().sum()).clamp(min=0) / energy.clamp(min=torch.finfo(torch.float64).tiny)
        merged = U @ weighted(list(small), shares) @ V.mT
        return Merged(core.lift(merged), {"compression_error": float(lost.sqrt())})


def tucker2(M: Tensor, r: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U (p, r), V (q, r) that keep most of the stack M (n, p, q) in `U^T M_i V`; of p or q columns if r is more."""
    U, V = _leading(M @ M.mT, r), _leading(M.mT @ M, r)
    for _ in range(iterations):
        U = _leading(M @ V @ V.mT @ M.mT, r)
        V = _leading(M.mT @ U @ U.mT @ M, r)
    return U, V


def _leading(grams: Tensor, r: int) -> Tensor:
    """Leading r eigenvectors of the sum of grams (n, p, p)."""
    vectors: Tensor = torch.linalg.eigh(grams.sum(0)).eigenvectors.flip(1)[:, :r]
    return vectors
