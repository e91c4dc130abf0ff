"""Shared spaces for what tasks have in common, rank-1 residuals for what is theirs alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize, values
from merge_algos.codecs import truncate, tucker2
from merge_algos.codecs.truncate import Terms, Truncate
from merge_algos.joint import Joint, Shared
from merge_algos.lowrank import LowRankDelta, concat
from merge_algos.waterline import FIXED, find_level, is_short, meet

_SIZES = (0.0625, 0.125, 0.25, 0.5)  # of the basis, as fractions of the joint rank


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

    def represent(self, problem: Problem) -> Packed:
        joint = Joint.of(problem)
        bases = [joint.basis(*size) for size in joint.sizes(_SIZES)]
        if self.quantize != "auto":
            return best(problem, _in_one_encoding(problem, bases, "bf16" if self.quantize == "none" else self.quantize), Hybrid)
        filled = _water_filled(problem, bases)
        if not is_short(problem.shape):
            return filled
        return best(problem, [filled, *(p for encoding in FIXED for p in _in_one_encoding(problem, bases, encoding))], Hybrid)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        alone = {label: matrix for label, matrix in own.items() if label in {"B", "A"}}
        common = {label: matrix for label, matrix in own.items() if label not in alone}
        return concat([Truncate.restore(shape, {}, alone), tucker2.restored(shape, shared, common)])


def _water_filled(problem: Problem, bases: list[Shared]) -> Packed:
    shared = min(bases, key=lambda each: _promise(problem, each))
    level = find_level(_estimator(problem, shared, counted=True), problem.budget_bytes, shared.energy)
    return meet(lambda at: _at_level(problem, shared, at, level), level, problem.budget_bytes)


def _promise(problem: Problem, shared: Shared) -> float:
    """The loss to expect of this basis and the terms beyond it."""
    level = find_level(_estimator(problem, shared, counted=False), problem.budget_bytes, shared.energy)
    common, alone = Terms.of(shared.problem()), Terms.of(shared.beyond())
    return shared.energy + tucker2.gain(problem, shared, common, level) + truncate.gain(problem, alone, level)


def _estimator(problem: Problem, shared: Shared, *, counted: bool) -> Callable[[float], int]:
    """level -> bytes of the basis, the terms in it and those beyond it."""
    alone, bases = Terms.of(shared.beyond()), (shared.joint.QB, shared.joint.QA)
    pairs = list(zip((alone.B, alone.A), bases, strict=True))
    B, A = (side.sampled(Q) if counted else side.expected(len(Q)) for side, Q in pairs)
    basis_bytes, terms_bytes = tucker2.estimator(shared, counted=counted), truncate.estimator(problem, alone, (B, A))
    return lambda level: basis_bytes(level) + terms_bytes(level)


def _at_level(problem: Problem, shared: Shared, level: float, floor: float) -> Packed:
    common = tucker2.at_level(shared, level, floor)
    residual = Terms.of(_residual(problem, common))
    return _joined(common, truncate.at_level(problem, residual, level, floor))


def _in_one_encoding(problem: Problem, bases: list[Shared], encoding: str) -> Iterator[Packed]:
    """Every other basis, where it fits, and as many residual terms as it leaves room for."""
    for common in (tucker2.packed(shared, encoding) for shared in bases[::2]):
        left = problem.budget_bytes - common.size_bytes
        if left >= 0:
            residual = replace(_residual(problem, common), budget_bytes=left)
            yield _joined(common, truncate.strongest(residual, Terms.of(residual), encoding))


def _residual(problem: Problem, common: Packed) -> Problem:
    """What the basis as stored leaves of every delta."""
    basis = values(common.shared)
    stored = [tucker2.restored(problem.shape, basis, values(part)).to(problem.deltas[0].B.dtype) for part in common.parts]
    return replace(problem, deltas=tuple(concat([d, s.scale(-1.0)]) for d, s in zip(problem.deltas, stored, strict=True)))


def _joined(common: Packed, alone: Packed) -> Packed:
    return Packed(common.shared, [[*a, *b] for a, b in zip(common.parts, alone.parts, strict=True)])
