"""Tucker-2: column and row spaces that all tasks share, and a small core for each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize, values
from merge_algos.codecs.truncate import Terms, fitted, kept_at
from merge_algos.joint import Joint, Ladder, Shared
from merge_algos.lowrank import LowRankDelta, canonical
from merge_algos.packing import Field, pack, packed_bytes, rice_bytes
from merge_algos.waterline import FIXED, find_level, is_short, meet


@dataclass(frozen=True)
class Tucker2(Codec):
    """Tucker 1966 in two modes: `delta_i = U C_i V^T`, HOSVD to begin with, then HOOI (De Lathauwer, De Moor, Vandewalle 2000).

    The HOOI runs on factors, weighted by importance. A core of more entries than its factors is stored as its strongest
    rank-1 terms, which also keeps a decoded adapter at the rank it had.
    quantize: `none` (bf16), `int8`, `int6`, `int4`: as large a basis as fits.  `auto`: the size of basis that promises least,
    entropy-coded steps set by reverse water-filling; for short columns also the others, by measured error.
    """

    name = "tucker2"
    paper = "Tucker 1966, doi:10.1007/BF02289464; De Lathauwer, De Moor and Vandewalle 2000, doi:10.1137/S0895479898346995"
    grid = (0.5, 1.0, 1.5)

    quantize: Quantize = "auto"

    def __post_init__(self) -> None:
        check_quantize(self.quantize)

    @staticmethod
    def prepare(problem: Problem) -> Ladder:
        return Ladder.of(problem)

    def represent(self, problem: Problem, ladder: Ladder) -> Packed:
        joint = ladder.joint
        if self.quantize != "auto":
            return best(problem, _largest(problem, joint, "bf16" if self.quantize == "none" else self.quantize), Tucker2)
        filled = water_filled(problem, ladder)
        if not is_short(problem.shape):
            return filled
        return best(problem, [filled, *(p for encoding in FIXED for p in _largest(problem, joint, encoding))], Tucker2)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        return restored(shape, shared, own)


def restored(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
    """The smaller product with the core is formed, so the rank is that of the core."""
    if not own:
        return LowRankDelta.zero(*shape)
    U, V = shared["U"], shared["V"]
    if "core" in own:
        return LowRankDelta(U, own["core"] @ V.mT) if U.shape[1] <= V.shape[1] else LowRankDelta(U @ own["core"], V.mT)
    return LowRankDelta(U @ own["left"], (V @ own["right"]).mT)


def water_filled(problem: Problem, ladder: Ladder) -> Packed:
    """The size of basis that promises least, every stored entry with the same weighted noise."""
    inside = ladder.inside()
    size = min(inside, key=lambda size: inside[size].promise(problem.budget_bytes))
    shared = ladder.joint.basis(*size)
    near = inside[size].level(problem.budget_bytes)
    level = find_level(estimator(shared), problem.budget_bytes, shared.energy, near)
    return meet(lambda at: at_level(shared, at, level), level, problem.budget_bytes)


def _largest(problem: Problem, joint: Joint, encoding: str) -> Iterator[Packed]:
    """The largest basis that fits, all in one encoding."""
    low, high = 0, max(joint.most)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _size(problem, joint.at_most(middle), encoding) <= problem.budget_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    if low:
        yield packed(joint.basis(*joint.at_most(low)), encoding)


def _size(problem: Problem, size: tuple[int, int], encoding: str) -> int:
    """Of `packed`, before it is made."""
    shared = sum(packed_bytes(d * k, encoding) for d, k in zip(problem.shape, size, strict=True))
    ranks = [min(delta.rank, *size) for delta in problem.deltas]
    return shared + sum(packed_bytes(entries, encoding) for rank in ranks for entries in _core_entries(size, rank, max(ranks)))


def _core_entries(size: tuple[int, int], rank: int, largest: int) -> tuple[int, ...]:
    """Of each matrix of a core: one, where it takes no more than the factors of the largest rank would."""
    p, q = size
    return (p * q,) if p * q <= largest * (p + q) else (p * rank, q * rank)


def packed(shared: Shared, encoding: str) -> Packed:
    """All of it in one encoding, the cores refitted to the basis as stored."""
    U, V = pack("U", shared.whole_U, encoding), pack("V", shared.whole_V, encoding)
    fit = _refitted(shared, U, V)
    largest = max(min(core.rank, *core.shape) for core in fit)
    return Packed((U, V), [_core(core, largest, encoding) for core in fit])


def _core(core: LowRankDelta, largest: int, encoding: str) -> Sequence[Field]:
    if len(_core_entries(core.shape, 0, largest)) == 1:
        return (pack("core", core.to_dense(), encoding),)
    terms = canonical(core)
    return pack("left", terms.B, encoding), pack("right", terms.A.mT, encoding)


def _refitted(shared: Shared, U: Field, V: Field) -> list[LowRankDelta]:
    stored = values([U, V])
    return shared.refitted(stored["U"].to(shared.U), stored["V"].to(shared.V))


def terms_of(deltas: Sequence[LowRankDelta], importance: Sequence[float]) -> Terms:
    return Terms.of([canonical(delta) for delta in deltas], importance)


def estimator(shared: Shared) -> Callable[[float], int]:
    """level -> bytes of the basis and of the cores' terms."""
    terms, whole = terms_of(shared.cores, shared.joint.importance), shared.sizes()
    small = [side.sampled() for side in (terms.B, terms.A)]

    def size(level: float) -> int:
        kept = kept_at(terms, shared.size, level).cpu().numpy()
        fields = [side.bits(level) for side in whole] + [side.bits(level)[kept] for side in small]
        return sum(rice_bytes(bits) for bits in fields) + 8 * len(shared.cores) if kept.any() else 0

    return size


def at_level(shared: Shared, level: float, floor: float) -> Packed:
    """The basis, then the cores refitted to it as stored. Nothing where no core has a term worth its bits at level `floor`."""
    U, V = (side.pack(label, level) for side, label in zip(shared.sides(), ("U", "V"), strict=True))
    cores = _refitted(shared, U, V)
    terms = terms_of(cores, shared.joint.importance)
    kept = kept_at(terms, shared.size, floor)
    if not bool(kept.any()):
        return Packed((), [()] * len(cores))
    own = [fitted(terms, n, terms.of_task(n, kept), level, ("left", "right")) for n in range(len(cores))]
    return Packed((U, V), own)
