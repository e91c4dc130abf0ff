"""Task arithmetic: the weighted sum of task vectors, the reference that every other method is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from merge_algos.lowrank import LowRankDelta, weighted_sum
from merge_algos.protocol import Merged, MergeMethod, ModuleContext


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """`sum_i w_i delta_i` (Ilharco et al. 2023, arXiv:2212.04089), exact as a concatenation of factors.

    Negative weights subtract. A term of weight 0 is left out, so it costs no rank. Differs from the paper in nothing;
    the requested rank is applied afterwards, as for every method.
    """

    name = "task_arithmetic"
    paper = "arXiv:2212.04089"
    concatenates = True

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        return Merged(weighted_sum(deltas, weights))
