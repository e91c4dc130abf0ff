"""What a merge method is: a frozen dataclass whose fields are its parameters, and one pure function of deltas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

from merge_algos.blocks import BlockMatrix
from merge_algos.codec import Encoded
from merge_algos.lowrank import CoreSVD, LowRankDelta
from merge_algos.rank import RankRule


@dataclass(frozen=True, slots=True)
class ModuleContext:
    """What a method may know beside the deltas: the module's name, the recipe's seed, and the rank it will be cut to.

    known: of the whole adapters, what the rounds of a survey have settled so far; None before the first, and where the method
    asks for none.
    """

    module: str
    seed: int
    rank: RankRule
    known: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """One module's result, before it is cut to the requested rank.

    delta: factors, an SVD whose ends are lazy, or a BlockMatrix from a method that works on entries.  norm: the Frobenius
    norm that what is shipped must have (rescaled after the cut), or None to leave it.  diagnostics go into the certificate,
    so they must be JSON.
    """

    delta: LowRankDelta | CoreSVD | BlockMatrix
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    norm: float | None = None


class Method(Protocol):
    """What methods of both kinds say of themselves, and how they look at whole adapters.

    name: as in a recipe.  paper: arXiv identifier or citation.  version: raised when results change, because it is part of
    a recipe's identity.  memory: "factors" if no dense block is ever formed, "dense" if rows of the deltas are, and the
    result has full rank.  needs: what beside the adapters.  min_adapters, max_adapters: other numbers are refused.
    default_weight: of every adapter where a caller gives none; None for 1/n.  produces: one adapter, or a basis of all.
    unsettled, survey, pool, settle: for a method that has to see all modules before it merges one. A round is
    `known = settle(pool of survey of each module, known)`, and there are as many as `unsettled(known)` asks for.
    breaks: laws of the contract suite (tests/algos/laws.py) that the method breaks at its default parameters -> why. A method
    states what differs from here.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    memory: ClassVar[Literal["factors", "dense"]] = "factors"
    needs: ClassVar[Literal["nothing", "base", "data"]] = "nothing"
    min_adapters: ClassVar[int] = 1
    max_adapters: ClassVar[int | None] = None
    breaks: ClassVar[Mapping[str, str]] = MappingProxyType({})
    default_weight: ClassVar[float | None] = None
    produces: ClassVar[Literal["adapter", "basis"]] = "adapter"

    @property
    def full_rank(self) -> bool:
        """Whether results have full rank with these parameters, so that a rank or an energy is needed."""
        return self.memory == "dense"

    def unsettled(self, known: Any) -> bool:
        """Whether all modules must be surveyed (once more) before merging. known: None before the first round."""
        return False

    def survey(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Any:
        """One module's findings in this round: JSON, and small, because those of a model travel between processes.

        Takes what a module's merge takes, but perhaps no delta is present. All have one dtype, which may differ from module to
        module. The order of an object's keys is lost on the way, so nothing may depend on it.
        """
        return None

    def pool(self, left: Any, right: Any) -> Any:
        """The findings of both. Associative; `left` is of modules before those of `right`, in natural order."""
        return None

    def settle(self, findings: Any, known: Any) -> Any:
        """What is known of the whole adapters after this round: JSON of some 100 kB at most, since every task is told.

        findings: of all modules.  known: after the round before.  Pure, so that a round can be run again.
        """
        return None


class MergeMethod(Method, Protocol):
    """One file in `merge_algos/methods/`; see `task_arithmetic` for the shortest.

    concatenates: whether the result is the very factors of all that is present, B scaled. Then A comes in the type it is stored
    in, and goes out as it came; and what is not finite is seen in the result.
    """

    concatenates: ClassVar[bool] = False

    def merge(self, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
        """deltas: the adapters in the caller's order, scaling folded in, rank 0 where absent.  weights: one each, finite.

        At least one delta is present: of rank above 0 with a weight that is not 0. All have one dtype, float32 or float64,
        but for A where the method concatenates.
        """
        ...


class BasisMethod(Method, Protocol):
    """One file in `merge_algos/bases/`. Its adapters have no weights: each comes back as it was, or nearly."""

    default_weight: ClassVar[float | None] = 1.0
    produces: ClassVar[Literal["adapter", "basis"]] = "basis"

    @property
    def verbatim(self) -> bool:
        """Whether the adapters' own bytes are kept, so that there is nothing to survey or encode."""
        return False

    def check_inputs(self, count: int, rank: int) -> None:
        """Raises InvalidParams for parameters that so many adapters of at most this rank cannot have."""

    def encode(self, deltas: Sequence[LowRankDelta], context: ModuleContext) -> tuple[Encoded, tuple[float, ...]]:
        """One module of the basis, and of each task's delta the measured relative error."""
        ...


class PostStep(Protocol):
    """A change to any method's result, after the cut to its rank: one file in `merge_algos/post/`."""

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1

    def apply(self, merged: LowRankDelta, deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> Merged:
        """merged: what would be shipped.  deltas, weights: what it was merged from."""
        ...
