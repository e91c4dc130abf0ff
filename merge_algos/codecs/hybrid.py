"""Shared spaces for what tasks have in common, rank-1 residuals for what is theirs alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize, values
from merge_algos.codecs import truncate, tucker2
from merge_algos.codecs.truncate import Terms, Truncate
from merge_algos.codecs.tucker2 import Joint, Shared
from merge_algos.lowrank import LowRankDelta, concat
from merge_algos.waterline import find_level, meet, worth_keeping

_SIZES = (0.0625, 0.125, 0.25, 0.5)  # of the basis, as fractions of the joint rank


@dataclass(frozen=True)
class Hybrid(Codec):
    """`delta_i = U C_i V^T + B_i A_i`: Tucker-2 (see `tucker2`) and the strongest terms of its residuals over all tasks.

    Bytes go to terms of the basis and of any task alike, wherever they save most error. Both ends are among what is
    compared: no residuals (`tucker2`) and no basis (`truncate`).
    quantize: as for `truncate`; the residual is that of the basis as it was stored.
    """

    name = "hybrid"
    paper = "Tucker 1966, doi:10.1007/BF02289464; Eckart and Young 1936, doi:10.1007/BF02288367"
    grid = (0.5, 1.0, 1.5)

    quantize: Quantize = "auto"

    def __post_init__(self) -> None:
        check_quantize(self.quantize)

    def represent(self, problem: Problem) -> Packed:
        ends = (Truncate(self.quantize).represent(problem), tucker2.Tucker2(self.quantize).represent(problem))
        return best(problem, [*ends, *self._mixed(problem, Joint.of(problem))], Hybrid)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        alone = {label: matrix for label, matrix in own.items() if label in {"B", "A"}}
        common = {label: matrix for label, matrix in own.items() if label not in alone}
        return concat([Truncate.restore(shape, {}, alone), tucker2.restored(shape, shared, common)])

    def _mixed(self, problem: Problem, joint: Joint) -> Iterator[Packed]:
        bases = [joint.basis(size) for size in sorted({max(1, round(joint.most * x)) for x in _SIZES}) if size < joint.most]
        if self.quantize == "auto" and bases:
            yield _water_filled(problem, bases)
        elif bases:
            encoding = "bf16" if self.quantize == "none" else self.quantize
            yield from (packed for shared in bases for packed in _in_one_encoding(problem, shared, encoding))


def _water_filled(problem: Problem, bases: list[Shared]) -> Packed:
    level, shared = min((_prospect(problem, shared) for shared in bases), key=lambda each: each[0])[1:]
    return meet(lambda at: _at_level(problem, shared, at), level, problem.budget_bytes)


def _prospect(problem: Problem, shared: Shared) -> tuple[float, float, Shared]:
    """Estimated loss, and the level that meets the budget."""
    common, alone = Terms.of(shared.problem(0)), Terms.of(_residual(problem, _unquantised(shared)))
    basis_bytes = tucker2.estimator(shared, common, shared.sides())
    terms_bytes = truncate.estimator(problem, alone)
    total = float(common.energy.sum() + alone.energy.sum())
    level = find_level(lambda at: basis_bytes(at) + terms_bytes(at), problem.budget_bytes, total)
    loss = total + level * sum(d * k for d, k in zip(problem.shape, shared.size, strict=True))
    for terms, rows in ((common, shared.size), (alone, problem.shape)):
        kept = worth_keeping(terms.energy, rows, level)
        loss += level * int(kept.sum()) * sum(rows) - float(terms.energy[kept].sum())
    return loss, level, shared


def _at_level(problem: Problem, shared: Shared, level: float) -> Packed:
    common = tucker2.at_level(shared, level)
    return _joined(common, truncate.at_level(_residual(problem, _stored(problem, common)), level))


def _in_one_encoding(problem: Problem, shared: Shared, encoding: str) -> Iterator[Packed]:
    """The basis, where it fits, and as many residual terms as there is room for."""
    common = tucker2.packed(shared, encoding)
    left = problem.budget_bytes - common.size_bytes
    if left >= 0:
        residual = replace(_residual(problem, _stored(problem, common)), budget_bytes=left)
        yield _joined(common, truncate.strongest(residual, Terms.of(residual), encoding))


def _unquantised(shared: Shared) -> list[LowRankDelta]:
    return [LowRankDelta(shared.U @ core.B, core.A @ shared.V.mT) for core in shared.cores]


def _stored(problem: Problem, common: Packed) -> list[LowRankDelta]:
    basis = values(common.shared)
    return [tucker2.restored(problem.shape, basis, values(part)) for part in common.parts]


def _residual(problem: Problem, approximations: list[LowRankDelta]) -> Problem:
    pairs = zip(problem.deltas, approximations, strict=True)
    return replace(
        problem, deltas=tuple(concat([delta, near.to(delta.B.dtype, delta.B.device).scale(-1.0)]) for delta, near in pairs)
    )


def _joined(common: Packed, alone: Packed) -> Packed:
    return Packed(common.shared, [[*a, *b] for a, b in zip(common.parts, alone.parts, strict=True)])
