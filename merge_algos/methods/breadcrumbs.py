"""Model breadcrumbs: drop both the outliers and the smallest entries of each task vector, add what is between."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from merge_algos.blocks import BlockMatrix, dense_rows
from merge_algos.entries import check_finite_number, check_fraction
from merge_algos.errors import InvalidParams
from merge_algos.lowrank import LowRankDelta, present
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """Breadcrumbs (Davari and Belilovsky 2023, arXiv:2312.06795), per row of each delta, then the weighted sum.

    gamma: fraction of a row's largest entries that is dropped, in [0, 1).  beta: fraction kept below those, in (0, 1].
    At least one entry of every row is kept. Differs from the paper: masks are per row, the paper's are per layer.
    """

    name = "breadcrumbs"
    paper = "arXiv:2312.06795"
    memory = "dense"
    breaks = MappingProxyType(
        {
            "single adapter": "its largest and its smallest entries are dropped",
            "two copies": "their largest and their smallest entries are dropped",
        }
    )

    beta: float = 0.85
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_finite_number("gamma", self.gamma, least=0.0)
        if self.gamma >= 1.0:
            raise InvalidParams("parameters.gamma", f"must be in [0, 1), not {self.gamma}")

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        here = present(deltas, weights)

        def rows(start: int, stop: int) -> Tensor:
            total = deltas[0].B.new_zeros(stop - start, deltas[0].shape[1])
            for n in here:
                total += weights[n] * self.masked(dense_rows(deltas[n], start, stop))
            return total

        return Merged(BlockMatrix(deltas[0].shape, rows))

    def masked(self, block: Tensor) -> Tensor:
        """(rows, cols) with only the entries of rank first .. last by descending magnitude in their row."""
        columns = block.shape[1]
        first = min(round(self.gamma * columns), columns - 1)
        last = min(columns, first + max(1, round(self.beta * columns)))
        magnitude = block.abs()
        # kthvalue counts from the smallest: rank m from the top is columns - m from the bottom
        upper = magnitude.kthvalue(columns - first, dim=1, keepdim=True).values
        lower = magnitude.kthvalue(columns - last + 1, dim=1, keepdim=True).values
        return block.where((magnitude <= upper) & (magnitude >= lower), 0)
