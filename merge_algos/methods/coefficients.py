"""Anisotropic scaling with coefficients at hand: what a learned merge leaves behind, applied again without data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_algos.entries import check_finite_number
from merge_algos.errors import InvalidParams
from merge_algos.learn.method import scaled_sum
from merge_algos.lowrank import LowRankDelta
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class Coefficients(MergeMethod):
    """`sum_i w_i B_i diag(lambda_i) A_i` (aTLAS, arXiv:2407.02880) with lambda from a table, as `coefficients.json` holds it.

    table: of each adapter, in order, block -> a number, or one for each of its ranks. A block is a module, a module's name
    without layer numbers, or `*`; the most particular one counts. Empty: every coefficient is 1. The adapters' weights
    multiply. Blocks of several numbers refer to the adapter's own factors, so a re-factored adapter needs another table.
    """

    name = "coefficients"
    paper = "arXiv:2407.02880"
    default_weight = 1.0

    table: Sequence[Mapping[str, float | Sequence[float]]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.table, Sequence) or not all(isinstance(own, Mapping) for own in self.table):
            raise InvalidParams("parameters.table", "must be a list of objects, one for each adapter")
        values = [value for own in self.table for value in own.values()]
        for number in (number for value in values for number in (value if isinstance(value, list | tuple) else (value,))):
            check_finite_number("table", number)

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        table = self.table or [{"*": 1.0}] * len(deltas)
        if len(table) != len(deltas):
            raise InvalidParams("parameters.table", f"is for {len(table)} adapters, not {len(deltas)}")
        return scaled_sum(deltas, weights, context, table)
