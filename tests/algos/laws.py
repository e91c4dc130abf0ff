"""The laws of every merge method, each as one number: by how much a method deviates from it on a case.

A method that by its nature breaks a law says so in a class variable, `breaks = {"two copies": reason}`. What it does not
name it obeys on every case that can be drawn; what it names it really breaks, on one of two samples.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from cases import Case, dense, only_one, regauged, value
from merge_algos import LowRankDelta


def gauge(method: str, case: Case) -> Tensor:
    """It does not matter how an adapter is factored."""
    turned = Case(case.shape, tuple(regauged(d, n) for n, d in enumerate(case.deltas)), case.weights)
    return value(method, turned) - value(method, case)


def single_adapter(method: str, case: Case) -> Tensor:
    """One adapter at weight 1 comes back."""
    present = next(d for d in case.deltas if d.rank)
    return value(method, only_one(present).fit(method)) - dense(present)


def two_copies(method: str, case: Case) -> Tensor:
    """Two copies at weight 1/2 are the adapter."""
    present = next(d for d in case.deltas if d.rank)
    return value(method, Case(case.shape, (present, present), (0.5, 0.5))) - dense(present)


def opposites(method: str, case: Case) -> Tensor:
    """A copy at weight 1 and one at weight -1 leave nothing: rounding is not blown up to the size of an adapter."""
    present = next(d for d in case.deltas if d.rank)
    return value(method, Case(case.shape, (present, present), (1.0, -1.0)))


def permutation(method: str, case: Case) -> Tensor:
    """The order of the adapters, each with its weight, means nothing."""
    turned = Case(case.shape, case.deltas[::-1], case.weights[::-1])
    return value(method, turned) - value(method, case)


def zero_weight(method: str, case: Case) -> Tensor:
    """An adapter at weight 0 is as if it were absent."""
    weights = (0.0, *case.weights[1:])
    absent = Case(case.shape, (LowRankDelta.zero(*case.shape, like=case.deltas[0].B), *case.deltas[1:]), weights)
    return value(method, case.with_weights(weights)) - value(method, absent)


def weight_scale(method: str, case: Case) -> Tensor:
    """Twice the weights are twice the result."""
    return value(method, case.with_weights([2 * w for w in case.weights])) - 2 * value(method, case)


def linear(method: str, case: Case) -> Tensor:
    """The merges at weights u and v add up to the merge at u + v. None is 0, since leaving out is not a small change."""
    u, v = [abs(w) + 0.25 for w in case.weights], [abs(w) / 2 + n + 1 for n, w in enumerate(case.weights)]
    both = [a + b for a, b in zip(u, v, strict=True)]
    parts = value(method, case.with_weights(u)) + value(method, case.with_weights(v))
    return value(method, case.with_weights(both)) - parts


Law = Callable[[str, Case], Tensor]
LAWS: Mapping[str, Law] = {
    "gauge": gauge,
    "single adapter": single_adapter,
    "two copies": two_copies,
    "opposites": opposites,
    "permutation": permutation,
    "zero weight": zero_weight,
    "weight scale": weight_scale,
    "linear": linear,
}


def deviation(law: str, method: str, case: Case) -> float:
    """Frobenius norm, relative to the size of what went in."""
    fitted = case.fit(method)
    return float(LAWS[law](method, fitted).norm()) / fitted.scale
