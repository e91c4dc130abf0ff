"""Shared spaces for what tasks have in common, rank-1 residuals for what is theirs alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize, values
from merge_algos.codecs import truncate, tucker2
from merge_algos.codecs.truncate import Truncate
from merge_algos.codecs.tucker2 import Tucker2
from merge_algos.joint import Ladder, Shared
from merge_algos.lowrank import LowRankDelta, concat
from merge_algos.waterline import FIXED, find_level, is_short, meet

_CLEARLY = 0.97  # a promise of less gain than this is not worth the search


@dataclass(frozen=True)
class Hybrid(Codec):
    """`delta_i = U C_i V^T + B_i A_i`: Tucker-2 (see `tucker2`) and the strongest terms of its residuals over all tasks.

    Bytes go to the basis, to terms in it, and to terms of any one task alike, wherever they save most error. The residual
    is that of the basis as it was stored.
    quantize: as for `tucker2`; in a fixed encoding, of a few sizes of the basis that of least measured error.
    """

    name = "hybrid"
    paper = "Tucker 1966, doi:10.1007/BF02289464; Eckart and Young 1936, doi:10.1007/BF02288367"
    grid = (0.5, 1.0, 1.5)

    quantize: Quantize = "auto"

    def __post_init__(self) -> None:
        check_quantize(self.quantize)

    prepare = staticmethod(Tucker2.prepare)

    def stand_in(self, problem: Problem, ladder: Ladder) -> str | None:
        """Truncation or Tucker-2, where the best basis is none or has nothing beyond it."""
        return _plan(problem, ladder) if self.quantize == "auto" and not is_short(problem.shape) else None

    def represent(self, problem: Problem, ladder: Ladder) -> Packed:
        if self.quantize == "auto" and not is_short(problem.shape):
            return _water_filled(problem, ladder)
        bases = [ladder.joint.basis(*size) for size in list(ladder.rungs)[:-1]]
        if self.quantize != "auto":
            return best(problem, _in_one_encoding(problem, bases, "bf16" if self.quantize == "none" else self.quantize), Hybrid)
        filled = _water_filled(problem, ladder)
        return best(problem, [filled, *(p for encoding in FIXED for p in _in_one_encoding(problem, bases, encoding))], Hybrid)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        alone = {label: matrix for label, matrix in own.items() if label in {"B", "A"}}
        common = {label: matrix for label, matrix in own.items() if label not in alone}
        return concat([Truncate.restore(shape, {}, alone), tucker2.restored(shape, shared, common)])


def _plan(problem: Problem, ladder: Ladder) -> str | None:
    """Which codec this one is here: no basis, or none of its terms beyond, promises no more loss than both together."""
    mixed = min(rung.promise(problem.budget_bytes) for rung in ladder.rungs.values())
    shared = min(rung.promise(problem.budget_bytes) for rung in ladder.inside().values())
    alone = ladder.whole.promise(problem.budget_bytes)
    return None if mixed < _CLEARLY * min(shared, alone) else "tucker2" if shared < alone else "truncate"


def _water_filled(problem: Problem, ladder: Ladder) -> Packed:
    plan = _plan(problem, ladder)
    if plan is not None:
        return (
            tucker2.water_filled(problem, ladder)
            if plan == "tucker2"
            else truncate.water_filled(problem, Truncate.prepare(problem))
        )
    size = min(ladder.rungs, key=lambda size: ladder.rungs[size].promise(problem.budget_bytes))
    shared = ladder.joint.basis(*size)
    near = ladder.rungs[size].level(problem.budget_bytes)
    level = find_level(_estimator(problem, shared), problem.budget_bytes, shared.energy, near)
    return meet(lambda at: _at_level(problem, shared, at, level), level, problem.budget_bytes)


def _estimator(problem: Problem, shared: Shared) -> Callable[[float], int]:
    """level -> bytes of the basis, the terms in it and those beyond it."""
    alone, bases = tucker2.terms_of(shared.beyond(), problem.importance), (shared.joint.QB, shared.joint.QA)
    B, A = (side.sampled(Q) for side, Q in zip((alone.B, alone.A), bases, strict=True))
    basis_bytes, terms_bytes = tucker2.estimator(shared), truncate.estimator(problem, alone, (B, A))
    return lambda level: basis_bytes(level) + terms_bytes(level)


def _at_level(problem: Problem, shared: Shared, level: float, floor: float) -> Packed:
    common = tucker2.at_level(shared, level, floor)
    residual = tucker2.terms_of(_residual(problem, common), problem.importance)
    return _joined(common, truncate.at_level(problem, residual, level, floor))


def _in_one_encoding(problem: Problem, bases: list[Shared], encoding: str) -> Iterator[Packed]:
    """Every other basis, where it fits, and as many residual terms as it leaves room for."""
    for common in (tucker2.packed(shared, encoding) for shared in bases[::2]):
        left = problem.budget_bytes - common.size_bytes
        if left >= 0:
            residual = tucker2.terms_of(_residual(problem, common), problem.importance)
            yield _joined(common, truncate.strongest(replace(problem, budget_bytes=left), residual, encoding))


def _residual(problem: Problem, common: Packed) -> list[LowRankDelta]:
    """What the basis as stored leaves of every delta."""
    basis = values(common.shared)
    stored = [tucker2.restored(problem.shape, basis, values(part)).to(problem.deltas[0].B.dtype) for part in common.parts]
    return [concat([d, s.scale(-1.0)]) for d, s in zip(problem.canonical, stored, strict=True)]


def _joined(common: Packed, alone: Packed) -> Packed:
    return Packed(common.shared, [[*a, *b] for a, b in zip(common.parts, alone.parts, strict=True)])
