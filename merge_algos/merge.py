"""Merging as a plain Python call: adapters in, adapter and certificate out; no service, no base model, no files.

`merge_module` is the whole life of one module: method, cut to rank, cast, and what each step cost.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from merge_algos import methods, post
from merge_algos.adapter import Adapter, common_base, union
from merge_algos.blocks import BlockMatrix, seed_of, truncated_svd
from merge_algos.errors import InvalidParams, InvalidRank, InvalidWeights, NonFiniteResult, WrongCount
from merge_algos.lowrank import SVD, CoreSVD, LowRankDelta, all_finite, distance, from_svd, is_rounding, present
from merge_algos.protocol import Merged, MergeMethod, Method, ModuleContext, PostStep
from merge_algos.rank import RankRule

M = TypeVar("M", bound=Method)


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
    """A delta within its rank rule. rank_in, norm: before the cut.  lost: fraction of the squared norm that was cut away.

    gram: of the delta, where the norm was computed from it.
    """

    delta: LowRankDelta
    rank_in: int
    norm: float
    lost: float
    exact: bool
    gram: Tensor | None = None


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
    post_steps: Sequence[PostStep] = (),
) -> MergeResult:
    """Merge whole adapters in memory. weights: one per adapter, default 1/n each.  rank: None for exact.

    Raises the errors of `merge_algos.errors`: unknown methods and parameters, weights that are not finite, different
    base models, one module with two shapes, a rank that the method needs or that is impossible.
    """
    chosen = build(method, parameters or {})
    check_count(chosen, len(adapters))
    given = check_weights(default_weights(chosen, len(adapters)) if weights is None else weights, len(adapters))
    rule = rank if isinstance(rank, RankRule) else RankRule(max=rank)
    check_rule(chosen, rule)
    inputs = {name: [a.delta(name, shape) for a in adapters] for name, shape in union(adapters).items()}
    known = _survey(chosen, inputs, given, seed, rule)
    results = [
        merge_module(chosen, deltas, given, ModuleContext(name, seed, rule, known), dtype, post_steps)
        for name, deltas in inputs.items()
    ]
    merged = Adapter(common_base([a.base_model for a in adapters]), {r.report.module: r.delta for r in results})
    return MergeResult(merged, tuple(r.report for r in results))


def _survey(
    method: MergeMethod, inputs: Mapping[str, Sequence[LowRankDelta]], weights: Sequence[float], seed: int, rule: RankRule
) -> Any:
    """What the method knows of all modules after as many rounds as it asks for."""
    known: Any = None
    while inputs and method.unsettled(known):
        context = functools.partial(ModuleContext, seed=seed, rank=rule, known=known)
        findings = (survey_module(method, deltas, weights, context(name)) for name, deltas in inputs.items())
        known = method.settle(functools.reduce(method.pool, findings), known)
    return known


def survey_module(method: Method, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Any:
    """One module's findings, on the very deltas that `merge_module` will merge. Raises NonFiniteResult."""
    widened = _checked(deltas, context)
    return method.survey(widened, weights, context)


def merge_module(
    method: MergeMethod,
    deltas: Sequence[LowRankDelta],
    weights: Sequence[float],
    context: ModuleContext,
    dtype: torch.dtype,
    post_steps: Sequence[PostStep] = (),
) -> ModuleResult:
    """One module from inputs to what is shipped. deltas: any float dtype; the arithmetic is float32 or wider.

    Raises NonFiniteResult if the inputs are not finite, or anything overflows that is computed from them.
    """
    assert not method.unsettled(context.known), f"{method.name} is to survey all modules first"
    as_stored = method.concatenates and not post_steps
    widened = _as_stored(deltas, weights, context) if as_stored else _checked(deltas, context)
    try:
        merged = _merged(method, widened, weights, context)
        cut = reduce(merged.delta, context)
        if not math.isfinite(cut.norm):  # nor is it if an entry is not
            raise NonFiniteResult(context.module, _name(widened[0].B.dtype))
        finished, diagnostics = _finish(cut.delta, merged, widened, weights, post_steps)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        # no SVD of finite numbers fails: something overflowed on the way there
        raise NonFiniteResult(context.module, _name(widened[0].B.dtype)) from error
    return shipped(cut, finished, context.module, dtype, diagnostics)


def shipped(
    cut: Cut, finished: LowRankDelta, module: str, dtype: torch.dtype, diagnostics: Mapping[str, Any] | None = None
) -> ModuleResult:
    """A module in the type it is shipped in, and its line of the certificate.

    finished: the delta of `cut`, or what later steps made of it.  Raises NonFiniteResult if it overflows the type.
    """
    cast = finished.to(dtype)
    _check_finite(cast, module)
    as_cut = finished is cut.delta
    kept_norm = cut.norm * math.sqrt(1.0 - cut.lost) if as_cut else finished.norm()
    rounded_away = distance(finished, cast, gram=cut.gram if as_cut else None)
    report = ModuleReport(
        module=module,
        rank_in=cut.rank_in,
        rank_out=cast.rank,
        exact=cut.exact,
        norm=cut.norm,
        relative_error=math.sqrt(cut.lost),
        retained_energy=1.0 - cut.lost,
        rounding_error=rounded_away / kept_norm if kept_norm else 0.0,
        diagnostics=diagnostics or {},
    )
    return ModuleResult(cast, report)


def _merged(method: MergeMethod, deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> Merged:
    """The method's result; of no present adapter the zero delta."""
    if not present(deltas, weights):
        return Merged(LowRankDelta.zero(*deltas[0].shape, like=deltas[0].B))
    merged = method.merge(deltas, weights, context)
    if isinstance(merged.delta, BlockMatrix):
        return dataclasses.replace(merged, delta=_finite_blocks(merged.delta, context.module))
    return merged


def reduce(delta: LowRankDelta | BlockMatrix | CoreSVD, context: ModuleContext) -> Cut:
    """The best approximation within the context's rank rule; `delta` itself if the rule keeps everything.

    A rank above min(d_out, d_in) is never shipped: the surplus is redundant, so cutting it loses nothing.
    """
    if isinstance(delta, BlockMatrix):
        return _reduce_blocks(delta, context)
    if isinstance(delta, LowRankDelta) and context.rank.keeps_all(delta.rank) and delta.rank <= min(delta.shape):
        gram = delta.gram()
        return Cut(delta, delta.rank, delta.norm(gram=gram), 0.0, exact=True, gram=gram)
    svd = delta.core_svd() if isinstance(delta, LowRankDelta) else delta
    rank_in = delta.rank if isinstance(delta, LowRankDelta) else len(svd.S)
    return _cut(svd, context.rank.pick(svd.S), rank_in, float(svd.S.square().sum()))


def _reduce_blocks(matrix: BlockMatrix, context: ModuleContext) -> Cut:
    """As many singular triplets as the rule asks for; for an energy, twice as many as long as they do not hold it."""
    rule, full = context.rank, min(matrix.shape)
    k = min(rule.max or (full if rule.energy is None else 64), full)
    while True:
        svd, energy = truncated_svd(matrix, k, seed=seed_of(context.seed, context.module, "sketch"))
        enough = rule.energy is None or float(svd.S.square().sum()) >= rule.energy * energy * (1 - 1e-12)
        if enough or k == min(rule.max or full, full):
            return _cut(svd, rule.pick(svd.S, energy), full, energy)
        k = min(2 * k, rule.max or full, full)


def _cut(svd: SVD | CoreSVD, k: int, rank_in: int, energy: float) -> Cut:
    """energy: squared norm of everything, of which `svd` may hold a part. What is lost is summed from the small end."""
    beyond = max(0.0, energy - float(svd.S.square().sum())) if rank_in > len(svd.S) else 0.0
    lost = (float(svd.S[k:].square().sum()) + beyond) / energy if energy else 0.0
    return Cut(from_svd(svd, k), rank_in, math.sqrt(energy), min(lost, 1.0), exact=k == len(svd.S) and beyond == 0.0)


def _finish(
    cut: LowRankDelta, merged: Merged, deltas: Sequence[LowRankDelta], weights: Sequence[float], post_steps: Sequence[PostStep]
) -> tuple[LowRankDelta, dict[str, Any]]:
    """What is shipped: the cut at the norm its method wants, then the post-steps; with all their diagnostics."""
    used = (deltas, weights)
    delta, diagnostics = _at_norm(cut, merged, *used)
    for step in post_steps:
        after = step.apply(delta, deltas, weights)
        assert isinstance(after.delta, LowRankDelta)
        delta, own = _at_norm(after.delta, after, *used)
        diagnostics[step.name] = own
    return delta, diagnostics


def _at_norm(
    delta: LowRankDelta, merged: Merged, deltas: Sequence[LowRankDelta], weights: Sequence[float]
) -> tuple[LowRankDelta, dict[str, Any]]:
    """delta: `merged.delta` after the cut. A result that is zero but for rounding is left alone, not blown up."""
    if merged.norm is None:
        return delta, dict(merged.diagnostics)
    norm = delta.norm()
    gamma = 1.0 if is_rounding(norm, deltas, weights) else merged.norm / norm
    return delta.scale(gamma), {**merged.diagnostics, "gamma": gamma}


def build(method: str, parameters: Mapping[str, Any]) -> MergeMethod:
    """The method with these parameters. Raises UnknownMethod, or InvalidParams naming the field."""
    return build_any(methods.find(method), parameters)


def build_any(chosen: type[M], parameters: Mapping[str, Any]) -> M:
    """Raises InvalidParams naming the field."""
    refuse_unknown(chosen, chosen.name, parameters)
    return chosen(**parameters)


def refuse_unknown(chosen: type, name: str, parameters: Mapping[str, Any], *, field: str = "parameters") -> None:
    """Raises InvalidParams naming `field` and the parameter that the class does not have."""
    known = [own.name for own in dataclasses.fields(chosen)]
    for given in parameters:
        if given not in known:
            reason = f"{name} has no such parameter; it has {', '.join(known) or 'none'}"
            raise InvalidParams(f"{field}.{given[:100]}", reason)


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    if len(weights) != count:
        raise InvalidWeights(f"{len(weights)} weights for {count} adapters")
    if not all(math.isfinite(w) for w in weights):
        raise InvalidWeights("every weight must be a finite number")
    return tuple(float(w) for w in weights)


def default_weights(method: Method, count: int) -> tuple[float, ...]:
    return (1.0 / count if method.default_weight is None else method.default_weight,) * count


def check_count(method: Method, count: int) -> None:
    """Raises WrongCount outside the method's numbers of adapters."""
    most = method.max_adapters
    if count < method.min_adapters or (most is not None and count > most):
        raise WrongCount(method.name, method.min_adapters, most, count)


def check_rule(method: Method, rule: RankRule) -> None:
    """Raises InvalidRank if an exact result is asked of a method whose results have full rank, or any of a basis."""
    if method.produces == "basis" and rule != RankRule():
        raise InvalidRank(rule.max, f"{method.name} makes a basis, whose size is a budget: give it as a parameter")
    if method.full_rank and rule == RankRule():
        raise InvalidRank(None, f"a result of {method.name} has full rank, so it needs a rank or an energy")


def build_post(name: str, parameters: Mapping[str, Any]) -> PostStep:
    """The post-step with these parameters. Raises UnknownMethod, or InvalidParams naming the field."""
    chosen = post.find(name)
    refuse_unknown(chosen, name, parameters)
    return chosen(**parameters)


def _checked(deltas: Sequence[LowRankDelta], context: ModuleContext) -> list[LowRankDelta]:
    """All in the dtype of the arithmetic. Raises NonFiniteResult."""
    widened = _widened(deltas)
    for delta in widened:
        _check_finite(delta, context.module)
    return widened


def _as_stored(deltas: Sequence[LowRankDelta], weights: Sequence[float], context: ModuleContext) -> list[LowRankDelta]:
    """The same for a method that concatenates: what is present shows in the result. Raises NonFiniteResult."""
    here = present(deltas, weights)
    for delta in (delta for n, delta in enumerate(deltas) if n not in here):
        _check_finite(delta, context.module)
    return _widened(deltas, keeps_A=True)


def _check_finite(delta: LowRankDelta, module: str) -> None:
    if not (all_finite(delta.B) and all_finite(delta.A)):
        raise NonFiniteResult(module, _name(delta.B.dtype))


def _finite_blocks(matrix: BlockMatrix, module: str) -> BlockMatrix:
    """The same matrix, whose entries are checked block by block, because they are known nowhere else."""

    def rows(start: int, stop: int) -> Tensor:
        block = matrix.rows(start, stop)
        if not all_finite(block):
            raise NonFiniteResult(module, _name(block.dtype))
        return block

    return dataclasses.replace(matrix, rows=rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _widened(deltas: Sequence[LowRankDelta], *, keeps_A: bool = False) -> list[LowRankDelta]:
    """All in one dtype: float64 if any is, else float32. keeps_A: but for A, if that is of one type itself."""
    doubled = any(torch.float64 in (delta.B.dtype, delta.A.dtype) for delta in deltas)
    dtype = torch.float64 if doubled else torch.float32
    as_it_is = keeps_A and len({delta.A.dtype for delta in deltas if delta.rank}) == 1
    return [LowRankDelta(delta.B.to(dtype), delta.A if as_it_is else delta.A.to(dtype)) for delta in deltas]
