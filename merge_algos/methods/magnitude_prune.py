"""Magnitude pruning: each task vector keeps its largest entries, then all are added."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from merge_algos.blocks import BlockMatrix, dense_rows
from merge_algos.entries import at_least, check_fraction, kept
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.magnitudes import magnitude_threshold
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class MagnitudePrune(MergeMethod):
    """`sum_i w_i trim(delta_i, density)`: magnitude pruning (Han et al. 2015, arXiv:1506.02626) of deltas.

    The trimming of TIES without its election; PEFT's `magnitude_prune`, but on deltas instead of factors.

    density: fraction of entries kept per adapter and module, in (0, 1].
    """

    name = "magnitude_prune"
    paper = "arXiv:1506.02626"
    memory = "dense"
    breaks = MappingProxyType(
        {
            "single adapter": "its smaller entries are trimmed away",
            "two copies": "their smaller entries are trimmed away",
        }
    )

    density: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("density", self.density)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        keep = kept(deltas[0].shape[0] * deltas[0].shape[1], self.density)
        terms = [(deltas[n], weights[n], magnitude_threshold(deltas[n], keep)) for n in present(deltas, weights)]

        def rows(start: int, stop: int) -> Tensor:
            total = deltas[0].B.new_zeros(stop - start, deltas[0].shape[1])
            for delta, weight, threshold in terms:
                total += weight * at_least(dense_rows(delta, start, stop), threshold)
            return total

        return Merged(BlockMatrix(deltas[0].shape, rows))
