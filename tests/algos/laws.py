"""What the contract suite of merge methods is made of: the oracles, the laws, and random cases to try them on.

A method that by its nature breaks a law says so in a class variable, `disobeys = frozenset({"average"})`, with the law's
name from LAWS; the other laws hold for all. A new method needs an entry in ORACLES and nothing else here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from merge_algos import Adapter, LowRankDelta, MergeResult, merge
from merge_algos.formats import peft
from merge_algos.merge import ModuleReport
from merge_algos.methods import registry

MODULE = "layers.0.q_proj"
TIGHT = 1e-9
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + weight * delta
    return total


# name -> the method on dense float64 deltas (all zeros where an adapter is absent), as slow and as plain as it can be
ORACLES: Mapping[str, Callable[[Sequence[Tensor], Sequence[float]], Tensor]] = {"task_arithmetic": weighted_sum}

# laws that some methods cannot obey, and why
LAWS = {
    "gauge": "looks at factors, not at deltas",
    "identity": "one adapter at weight 1 does not come back, by design",
    "average": "two copies at weight 1/2 are not one adapter",
    "permutation": "the order of adapters means something",
    "absence": "not linear: an adapter at weight 0 still counts",
    "growth": "its result does not grow with the weights, so no weight overflows",
}


def obeying(law: str) -> pytest.MarkDecorator:
    """Parametrise over the methods that do not disown the law."""
    assert law in LAWS
    return pytest.mark.parametrize("method", [n for n, c in registry().items() if law not in disowned(c)])


def disowned(method: type) -> frozenset[str]:
    return getattr(method, "disobeys", frozenset())


every_method = pytest.mark.parametrize("method", registry())
few = settings(max_examples=30)  # for each method, and there will be many


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_delta(seed: int, shape: tuple[int, int], rank: int) -> LowRankDelta:
    return LowRankDelta(randn(seed, shape[0], rank), randn(seed + 1, rank, shape[1]))


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
        return 1.0 + sum(abs(w) * float(dense(d).norm()) for d, w in zip(self.deltas, self.weights, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    ranks = draw(st.lists(st.integers(0, 6), min_size=2, max_size=4).filter(any))
    seed = draw(st.integers(0, 2**32))
    weights = draw(st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)))
    return Case(shape, tuple(random_delta(seed + 2 * n, shape, r) for n, r in enumerate(ranks)), tuple(weights))


def one_module(delta: LowRankDelta, name: str = MODULE) -> Adapter:
    return Adapter("org/base", {name: delta} if delta.rank else {})


def dense(delta: LowRankDelta) -> Tensor:
    return delta.B.double() @ delta.A.double()


def merged(method: str, case: Case, **options: object) -> MergeResult:
    """Float64 throughout unless told, so that what is measured is the method and not a cast."""
    given_options = {"dtype": torch.float64, **options}
    return merge(case.adapters, method=method, weights=case.weights, **given_options)  # type: ignore[arg-type]


def only(result: MergeResult) -> tuple[Tensor, ModuleReport]:
    (report,) = result.reports
    return dense(result.adapter.deltas[MODULE]), report


def value(method: str, case: Case, **options: object) -> Tensor:
    return only(merged(method, case, **options))[0]


def close(got: Tensor, expected: Tensor, scale: float, tolerance: float = TIGHT) -> bool:
    return got.shape == expected.shape and float((got - expected).norm()) <= tolerance * scale


SAMPLE = Case((12, 9), tuple(random_delta(n, (12, 9), r) for n, r in enumerate((3, 2, 4))), (0.7, -0.4, 1.1))  # nothing special


def regauged(delta: LowRankDelta, seed: int) -> LowRankDelta:
    """The same delta from other factors: `(B G, G^-1 A)`, G of condition 100."""
    k = delta.rank
    Q, _ = torch.linalg.qr(randn(seed, k, k))
    stretch = torch.logspace(-1, 1, k, dtype=torch.float64)
    return LowRankDelta(delta.B @ Q * stretch, (Q.mT @ delta.A) / stretch[:, None])


def loaded(delta: LowRankDelta, scaling: float) -> LowRankDelta:
    """The delta as a file with this alpha / r gives it."""
    spec = peft.ModuleSpec(MODULE, *delta.shape, delta.rank, scaling, *peft.factor_names(MODULE))
    return peft.load(spec, delta.A, delta.B)
