"""Merging as a plain Python call: adapters in, adapter and certificate out; no service, no base model, no files.

`merge_module` is the whole life of one module: method, cut to rank, cast, and what each step cost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge_algos import methods
from merge_algos.adapter import Adapter, common_base, union
from merge_algos.errors import InvalidParams, InvalidWeights, NonFiniteResult, TooFewAdapters
from merge_algos.lowrank import LowRankDelta, distance, from_svd
from merge_algos.protocol import MergeMethod, ModuleContext
from merge_algos.rank import RankRule


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One line of the certificate.

    rank_in: rank the method produced before any cut; rank_out: what is shipped.  norm: Frobenius norm of the uncut result.
    relative_error, retained_energy: of the cut alone, as fractions of the norm and squared norm.
    rounding_error: of the cast alone, relative to what was cast.
    """

    module: str
    rank_in: int
    rank_out: int
    exact: bool
    norm: float
    relative_error: float
    retained_energy: float
    rounding_error: float
    diagnostics: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A delta within its rank rule. norm: before the cut.  lost: fraction of the squared norm that was cut away."""

    delta: LowRankDelta
    norm: float
    lost: float
    exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class ModuleResult:
    delta: LowRankDelta
    report: ModuleReport


@dataclass(frozen=True, slots=True, eq=False)
class MergeResult:
    adapter: Adapter
    reports: tuple[ModuleReport, ...]


def merge(
    adapters: Sequence[Adapter],
    *,
    method: str = "task_arithmetic",
    weights: Sequence[float] | None = None,
    rank: int | RankRule | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    parameters: Mapping[str, Any] | None = None,
) -> MergeResult:
    """Merge whole adapters in memory. weights: one per adapter, default 1 each.  rank: None for exact.

    Raises the errors of `merge_algos.errors`: unknown methods and parameters, weights that are not finite, different
    base models, one module with two shapes.
    """
    chosen = build(method, parameters or {})
    given = check_weights([1.0] * len(adapters) if weights is None else weights, len(adapters))
    check_count(chosen, len(adapters))
    rule = rank if isinstance(rank, RankRule) else RankRule(max=rank)
    results = [
        merge_module(chosen, [a.delta(name, shape) for a in adapters], given, ModuleContext(name, seed, rule), dtype)
        for name, shape in union(adapters).items()
    ]
    merged = Adapter(common_base([a.base_model for a in adapters]), {r.report.module: r.delta for r in results})
    return MergeResult(merged, tuple(r.report for r in results))


def merge_module(
    method: MergeMethod,
    deltas: Sequence[LowRankDelta],
    weights: Sequence[float],
    context: ModuleContext,
    dtype: torch.dtype,
) -> ModuleResult:
    """One module from inputs to what is shipped. deltas: any float dtype; the arithmetic is float32 or wider.

    Raises NonFiniteResult if the factors overflow float32 or `dtype`.
    """
    merged = method.merge([_widened(d) for d in deltas], weights, context)
    _check_finite(merged.delta, context.module)  # before the cut, whose SVD knows no infinity
    cut = reduce(merged.delta, context.rank)
    shipped = cut.delta.to(dtype)
    _check_finite(shipped, context.module)
    kept_norm = cut.norm * math.sqrt(1.0 - cut.lost)
    report = ModuleReport(
        module=context.module,
        rank_in=merged.delta.rank,
        rank_out=shipped.rank,
        exact=cut.exact,
        norm=cut.norm,
        relative_error=math.sqrt(cut.lost),
        retained_energy=1.0 - cut.lost,
        rounding_error=distance(cut.delta, shipped) / kept_norm if kept_norm else 0.0,
        diagnostics=merged.diagnostics,
    )
    return ModuleResult(shipped, report)


def reduce(delta: LowRankDelta, rule: RankRule) -> Cut:
    """The best approximation within the rule; `delta` itself if the rule keeps everything.

    A rank above min(d_out, d_in) is never shipped: the surplus is redundant, so cutting it loses nothing.
    """
    if rule.keeps_all(delta.rank) and delta.rank <= min(delta.shape):
        return Cut(delta, delta.norm(), 0.0, exact=True)
    svd = delta.svd()
    k = rule.pick(svd.S)
    energy = svd.S.square()
    total = float(energy.sum())
    lost = float(energy[k:].sum()) / total if total else 0.0
    return Cut(from_svd(svd, k), math.sqrt(total), lost, exact=k == len(svd.S))


def build(method: str, parameters: Mapping[str, Any]) -> MergeMethod:
    """The method with these parameters. Raises UnknownMethod, or InvalidParams naming the field."""
    chosen = methods.find(method)
    known = getattr(chosen, "__dataclass_fields__", {})
    for field in parameters:
        if field not in known:
            raise InvalidParams(
                f"parameters.{field[:100]}", f"{method} has no such parameter; it has {', '.join(known) or 'none'}"
            )
    return chosen(**parameters)


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    if len(weights) != count:
        raise InvalidWeights(f"{len(weights)} weights for {count} adapters")
    if not all(math.isfinite(w) for w in weights):
        raise InvalidWeights("every weight must be a finite number")
    return tuple(float(w) for w in weights)


def check_count(method: MergeMethod, count: int) -> None:
    if count < max(1, method.min_adapters):
        raise TooFewAdapters(method.name, max(1, method.min_adapters), count)


def _check_finite(delta: LowRankDelta, module: str) -> None:
    if not (delta.B.isfinite().all() and delta.A.isfinite().all()):
        raise NonFiniteResult(module, str(delta.B.dtype).removeprefix("torch."))


def _widened(delta: LowRankDelta) -> LowRankDelta:
    return delta if delta.B.dtype == torch.float64 else delta.to(torch.float32)
