"""One module of several adapters as a value: what every law and oracle of the merge methods is tried on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from merge_algos import Adapter, LowRankDelta, MergeResult, merge
from merge_algos.merge import ModuleReport
from merge_algos.methods import registry

MODULE = "layers.0.q_proj"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = settings(max_examples=8)  # for each method, and there are many
SEEDS = st.integers(0, 2**32)
WEIGHTS = st.integers(-8, 8).map(lambda quarters: quarters / 4)  # exact in binary, zero among them
NONZERO = WEIGHTS.filter(bool)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_delta(seed: int, shape: tuple[int, int], rank: int) -> LowRankDelta:
    return LowRankDelta(randn(seed, shape[0], rank), randn(seed + 1, rank, shape[1]))


def dense(delta: LowRankDelta) -> Tensor:
    return delta.B.double() @ delta.A.double()


@dataclass(frozen=True)
class Case:
    """Deltas of one module and one weight for each; a delta of rank 0 is an adapter that does not have the module."""

    shape: tuple[int, int]
    deltas: tuple[LowRankDelta, ...]
    weights: tuple[float, ...]

    @property
    def adapters(self) -> list[Adapter]:
        return [one_module(delta) for delta in self.deltas]

    @property
    def scale(self) -> float:
        """What rounding is relative to."""
        return 1.0 + sum((abs(w) + 1) * float(dense(d).norm()) for d, w in zip(self.deltas, self.weights, strict=True))

    def fit(self, method: str) -> "Case":
        """As many adapters as the method takes, absent ones added, and of equal rank for the one that adds factors."""
        chosen = registry()[method]
        absent = LowRankDelta.zero(*self.shape, like=self.deltas[0].B)
        missing = max(0, chosen.min_adapters - len(self.deltas))
        deltas = (*self.deltas, *[absent] * missing)[: chosen.max_adapters]
        weights = (*self.weights, *[0.0] * missing)[: chosen.max_adapters]
        if method == "peft_linear":
            least = min((d.rank for d in deltas if d.rank), default=0)
            deltas = tuple(LowRankDelta(d.B[:, :least], d.A[:least]) for d in deltas)
        return Case(self.shape, deltas, weights)

    def with_weights(self, weights: Sequence[float]) -> "Case":
        return replace(self, weights=tuple(weights))


def only_one(delta: LowRankDelta, weight: float = 1.0) -> Case:
    return Case(delta.shape, (delta,), (weight,))


@st.composite
def cases(draw: st.DrawFn, weights: st.SearchStrategy[float] = WEIGHTS) -> Case:
    """Two to four adapters of one module: unequal ranks, ranks beyond the shape, absent ones, weights of any sign."""
    shape = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    ranks = [draw(st.integers(1, 6)), *draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))]
    seed = draw(SEEDS)
    drawn = draw(st.lists(weights, min_size=len(ranks), max_size=len(ranks)))
    return Case(shape, tuple(random_delta(seed + 2 * n, shape, r) for n, r in enumerate(ranks)), tuple(drawn))


def one_module(delta: LowRankDelta, name: str = MODULE) -> Adapter:
    return Adapter("org/base", {name: delta} if delta.rank else {})


def in_full(method: str, case: Case, parameters: Mapping[str, Any] | None = None) -> int | None:
    """The rank at which nothing is cut: none to ask for, or, where the result has full rank, that of the shape."""
    return min(case.shape) if registry()[method](**(parameters or {})).full_rank else None


def merged(method: str, case: Case, **options: Any) -> MergeResult:
    """Float64 throughout and uncut unless told, so that what is measured is the method and not a cast."""
    rank = options.pop("rank", None) or in_full(method, case, options.get("parameters"))
    return merge(case.adapters, method=method, weights=case.weights, **{"dtype": torch.float64, "rank": rank, **options})


def only(result: MergeResult) -> tuple[Tensor, ModuleReport]:
    (report,) = result.reports
    return dense(result.adapter.deltas[MODULE]), report


def value(method: str, case: Case, **options: Any) -> Tensor:
    """(d_out, d_in): the merge as a dense matrix; zero where no adapter has the module."""
    if not any(delta.rank for delta in case.deltas):
        return torch.zeros(case.shape, dtype=torch.float64)
    return only(merged(method, case, **options))[0]


def close(got: Tensor, expected: Tensor, scale: float, tolerance: float = 1e-9) -> bool:
    return got.shape == expected.shape and float((got - expected).norm()) <= tolerance * scale


def regauged(delta: LowRankDelta, seed: int) -> LowRankDelta:
    """The same delta from other factors: `(B G, G^-1 A)`, G of condition 100."""
    k = delta.rank
    Q, _ = torch.linalg.qr(randn(seed, k, k))
    stretch = torch.logspace(-1, 1, k, dtype=torch.float64)
    return LowRankDelta(delta.B @ Q * stretch, (Q.mT @ delta.A) / stretch[:, None])


# nothing special
SAMPLE = Case((12, 9), tuple(random_delta(n, (12, 9), r) for n, r in enumerate((3, 2, 4))), (0.7, -0.4, 1.1))
SMALL = Case((6, 5), tuple(random_delta(n + 3, (6, 5), 2) for n in range(3)), (0.7, -0.4, 1.1))
