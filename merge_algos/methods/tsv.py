"""Task singular vectors: keep every adapter's own singular triplets, but make them orthogonal to each other's."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from merge_algos.core import polar, present_cores
from merge_algos.entries import check_finite_number
from merge_algos.lowrank import LowRankDelta, numerical_rank
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Tsv(MergeMethod):
    """TSV-Merge (Gargiulo et al. 2024, arXiv:2412.00081): `alpha U' S V'^T`, U' and V' the polar factors of all triplets.

    alpha: factor of the result. An adapter keeps triplets to its own rank (the paper cuts full-rank task vectors to a
    share of 1/T); a weight multiplies its singular values. Rank at most R.
    """

    name = "tsv"
    paper = "arXiv:2412.00081"
    breaks = MappingProxyType(
        {
            "two copies": "two equal sets of directions cannot both be kept and be orthogonal",
        }
    )

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_finite_number("alpha", self.alpha)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        core, here = present_cores(deltas, weights)
        merged = orthogonalised([weight * M for weight, M in zip(here, core.M, strict=True)])
        return Merged(core.lift(self.alpha * merged))


def orthogonalised(matrices: Sequence[Tensor]) -> Tensor:
    """`polar([U_1 ..]) diag([S_1 ..]) polar([V_1 ..])^T` over the SVDs of matrices (p, q)."""
    svds = [torch.linalg.svd(M, full_matrices=False) for M in matrices]
    ranks = [numerical_rank(S) for _, S, _ in svds]
    U = torch.cat([U[:, :k] for (U, _, _), k in zip(svds, ranks, strict=True)], 1)
    S = torch.cat([S[:k] for (_, S, _), k in zip(svds, ranks, strict=True)])
    V = torch.cat([Vh[:k].mT for (_, _, Vh), k in zip(svds, ranks, strict=True)], 1)
    return (polar(U) * S) @ polar(V).mT
