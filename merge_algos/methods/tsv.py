"""Task singular vectors: keep every adapter's own singular triplets, but make them orthogonal to each other's."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from merge_algos.core import Core, polar, present_cores, restoring
from merge_algos.entries import check_finite_number
from merge_algos.lowrank import LowRankDelta
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Tsv(MergeMethod):
    """TSV-Merge (Gargiulo et al. 2024, arXiv:2412.00081): `alpha U' S V'^T`, U' and V' the polar factors of all triplets.

    alpha: factor of the result, or null for `sqrt(n)` of n adapters (the paper's 1 belongs to a sum at weight 1). An adapter
    keeps triplets to its own rank (the paper cuts full-rank task vectors to a share of 1/T); a weight multiplies its
    singular values. Rank at most R.
    """

    name = "tsv"
    paper = "arXiv:2412.00081"
    breaks = MappingProxyType(
        {
            "two copies": "two equal sets of directions cannot both be kept and be orthogonal",
        }
    )

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_finite_number("alpha", self.alpha)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        core, here = present_cores(deltas, weights)
        return Merged(core.lift(restoring(self.alpha, len(here)) * orthogonalised(core, here)))


def orthogonalised(core: Core, weights: Sequence[float]) -> Tensor:
    """`polar([U_1 ..]) diag([S_1 ..]) polar([V_1 ..])^T` (p, q) over the SVDs of the weighted cores."""
    U, S, V = zip(*(core.triplets(n, weight) for n, weight in enumerate(weights)), strict=True)
    return (polar(torch.cat(U, 1)) * torch.cat(S)) @ polar(torch.cat(V, 1)).mT
