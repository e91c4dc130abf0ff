"""What a merge method is: a frozen dataclass whose fields are its parameters, and one pure function of deltas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from merge_algos.lowrank import LowRankDelta
from merge_algos.rank import RankRule


@dataclass(frozen=True, slots=True)
class ModuleContext:
    """What a method may know beside the deltas: the module's name, the recipe's seed, and the rank it will be cut to."""

    module: str
    seed: int
    rank: RankRule


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """One module's result; `diagnostics` go into the certificate as they are, so they must be JSON values."""

    delta: LowRankDelta
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


class MergeMethod(Protocol):
    """One file in `merge_algos/methods/`; see `task_arithmetic` for the shortest.

    name: as in a recipe.  paper: arXiv identifier or citation.  version: raised when results change, because it is part of
    a recipe's identity.  memory: "factors" if no dense block is ever formed.  needs: what beside the adapters.
    min_adapters: fewer are refused.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int]
    memory: ClassVar[Literal["factors", "dense"]]
    needs: ClassVar[Literal["nothing", "base", "data"]]
    min_adapters: ClassVar[int]

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        """deltas: the adapters in the caller's order, scaling folded in, rank 0 where absent.  weights: one each, finite."""
        ...
