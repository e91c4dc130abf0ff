"""Restore the norm: a merge of nearly orthogonal adapters is smaller than each of them; scale it back up, module by module."""

from collections.abc import Sequence
from dataclasses import dataclass

from merge_algos.entries import check_finite_number
from merge_algos.lowrank import LowRankDelta, mean_norm
from merge_algos.protocol import Merged, PostStep


@dataclass(frozen=True)
class RestoreNorm(PostStep):
    """The Frobenius norm of every module becomes `scale` times the mean norm of the adapters present there.

    scale: 1 for the size of one adapter. A result that is zero stays zero.
    """

    name = "restore_norm"
    paper = "Braid; the last step of arXiv:2604.16826 on its own"

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite_number("scale", self.scale)

    def apply(self, merged: LowRankDelta, deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> Merged:
        return Merged(merged, norm=self.scale * mean_norm(deltas, weights))
