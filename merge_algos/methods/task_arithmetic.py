"""Task arithmetic: the weighted sum of task vectors, the reference that every other method is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from merge_algos.lowrank import LowRankDelta, concat
from merge_algos.protocol import Merged, ModuleContext


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """`sum_i w_i delta_i` (Ilharco et al. 2023, arXiv:2212.04089), exact as a concatenation of factors.

    Negative weights subtract. A term of weight 0 is left out, so it costs no rank. Differs from the paper in nothing;
    the requested rank is applied afterwards, as for every method.
    """

    name: ClassVar[str] = "task_arithmetic"
    paper: ClassVar[str] = "arXiv:2212.04089"
    version: ClassVar[int] = 1
    memory: ClassVar[Literal["factors", "dense"]] = "factors"
    needs: ClassVar[Literal["nothing", "base", "data"]] = "nothing"
    min_adapters: ClassVar[int] = 1

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        terms = [delta.scale(weight) for delta, weight in zip(deltas, weights, strict=True) if weight != 0.0]
        absent = LowRankDelta.zero(*deltas[0].shape, like=deltas[0].B)
        return Merged(concat([absent, *terms]))
