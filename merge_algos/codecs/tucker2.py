"""Tucker-2: column and row spaces that all tasks share, and a small core for each."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize, values
from merge_algos.codecs.truncate import Terms, fitted
from merge_algos.lowrank import LowRankDelta, canonical, concat, thin_qr
from merge_algos.packing import Field, pack, packed_bytes
from merge_algos.waterline import FIXED, Columns, find_level, is_short, meet, worth_keeping

_ROUNDS = 3
_SIZES = (0.125, 0.25, 0.5, 1.0)  # of the basis, as fractions of the joint rank, that `auto` considers


@dataclass(frozen=True)
class Tucker2(Codec):
    """Tucker 1966 in two modes: `delta_i = U C_i V^T`, HOSVD to begin with, then HOOI (De Lathauwer, De Moor, Vandewalle 2000).

    The HOOI runs on factors, weighted by importance. A core of more entries than its factors is stored as its strongest
    rank-1 terms, which also keeps a decoded adapter at the rank it had.
    quantize: `none` (bf16), `int8`, `int6`, `int4`: as large a basis as fits.  `auto`: also sizes and entropy-coded steps by
    reverse water-filling; the least measured error within the budget.
    """

    name = "tucker2"
    paper = "Tucker 1966, doi:10.1007/BF02289464; De Lathauwer, De Moor and Vandewalle 2000, doi:10.1137/S0895479898346995"
    grid = (0.5, 1.0, 1.5)

    quantize: Quantize = "auto"

    def __post_init__(self) -> None:
        check_quantize(self.quantize)

    def represent(self, problem: Problem) -> Packed:
        joint = Joint.of(problem)
        if self.quantize == "auto":
            return best(problem, _encodings(problem, joint), Tucker2)
        return best(problem, _largest(problem, joint, "bf16" if self.quantize == "none" else self.quantize), Tucker2)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        return restored(shape, shared, own)


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Orthonormal QB (d_out, P), QA (d_in, Q) that hold all deltas exactly; small: the deltas in these bases, (P, Q)."""

    QB: Tensor
    QA: Tensor
    small: tuple[LowRankDelta, ...]
    importance: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem) -> "Joint":
        deltas = [canonical(delta) for delta in problem.deltas]
        whole = concat(deltas)
        (QB, RB), (QA, RA) = thin_qr(whole.B), thin_qr(whole.A.mT)
        ends = list(itertools.accumulate((delta.rank for delta in deltas), initial=0))
        small = tuple(LowRankDelta(RB[:, a:b], RA[:, a:b].mT) for a, b in itertools.pairwise(ends))
        return cls(QB, QA, small, problem.importance)

    @property
    def most(self) -> int:
        """The basis of this size is exact."""
        return max(self.QB.shape[1], self.QA.shape[1])

    def basis(self, size: int) -> "Shared":
        """The `size` directions on each side that hold most of all deltas."""
        U, V = (
            torch.eye(self.QB.shape[1]).to(self.QB),
            self._leading([d.B for d in self.small], [d.A.mT for d in self.small], size),
        )
        for _ in range(_ROUNDS if size < self.most else 1):
            U = self._leading([V.mT @ d.A.mT for d in self.small], [d.B for d in self.small], size)
            V = self._leading([U.mT @ d.B for d in self.small], [d.A.mT for d in self.small], size)
        cores = tuple(LowRankDelta(U.mT @ d.B, d.A @ V) for d in self.small)
        return Shared(self.QB @ U, self.QA @ V, cores, self.importance)

    def _leading(self, others: Sequence[Tensor], factors: Sequence[Tensor], size: int) -> Tensor:
        """Leading eigenvectors (P, size) of `sum_i w_i F_i (O_i^T O_i) F_i^T`: F_i (P, r) here, O_i (m, r) the other side."""
        roots = [w**0.5 * F @ torch.linalg.qr(other).R.mT for w, F, other in zip(self.importance, factors, others, strict=True)]
        stacked = torch.cat(roots, 1)
        return torch.linalg.eigh(stacked @ stacked.mT).eigenvectors.flip(1)[:, :size]


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """U: (d_out, p), V: (d_in, q).  cores: (p, q), low-rank."""

    U: Tensor
    V: Tensor
    cores: tuple[LowRankDelta, ...]
    importance: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.U.shape[1], self.V.shape[1]

    def sides(self) -> tuple[Columns, Columns]:
        """U and V with the weight of noise in each column: the energy of all cores in its row or column."""
        left = [(c.B @ (c.A @ c.A.mT) * c.B).sum(1) for c in self.cores]  # (p,): squared norms of the core's rows
        right = [(c.A.mT @ (c.B.mT @ c.B) * c.A.mT).sum(1) for c in self.cores]  # (q,)
        return _columns(self.U, self._weighted(left)), _columns(self.V, self._weighted(right))

    def _weighted(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack([w * row for w, row in zip(self.importance, rows, strict=True)]).sum(0)

    def refitted(self, U: Tensor, V: Tensor) -> "Shared":
        """The cores that are best for U and V as they were stored."""
        left, right = _pseudo_inverse(U) @ self.U, _pseudo_inverse(V) @ self.V
        return replace(self, U=U, V=V, cores=tuple(LowRankDelta(left @ c.B, c.A @ right.mT) for c in self.cores))

    def problem(self, budget_bytes: int) -> Problem:
        """The cores as deltas of their own."""
        return Problem(self.size, self.cores, self.importance, budget_bytes)


def restored(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
    if not own:
        return LowRankDelta.zero(*shape)
    U, V = shared["U"], shared["V"]
    if "core" in own:
        return LowRankDelta(U, own["core"] @ V.mT) if U.shape[1] <= V.shape[1] else LowRankDelta(U @ own["core"], V.mT)
    return LowRankDelta(U @ own["left"], (V @ own["right"]).mT)


def _columns(X: Tensor, energy: Tensor) -> Columns:
    return Columns(X, energy.clamp(min=1e-30 * float(energy.max()) if energy.numel() else 0.0))


def _pseudo_inverse(X: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(X.mT @ X, hermitian=True) @ X.mT
    return inverse


def _encodings(problem: Problem, joint: Joint) -> Iterator[Packed]:
    yield from water_filled(problem, joint)
    for encoding in FIXED if is_short(problem.shape) else ():
        yield from _largest(problem, joint, encoding)


def _largest(problem: Problem, joint: Joint, encoding: str) -> Iterator[Packed]:
    """The largest basis that fits, all in one encoding."""
    ranks = [delta.rank for delta in joint.small]
    low, high = 0, joint.most
    while low < high:
        middle = (low + high + 1) // 2
        p, q = (min(middle, Q.shape[1]) for Q in (joint.QB, joint.QA))
        low, high = (middle, high) if _size(problem, (p, q), ranks, encoding) <= problem.budget_bytes else (low, middle - 1)
    if low:
        yield packed(joint.basis(low), encoding)


def packed(shared: Shared, encoding: str) -> Packed:
    """All of it in one encoding, the cores refitted to the basis as stored."""
    U, V = pack("U", shared.U, encoding), pack("V", shared.V, encoding)
    stored = values([U, V])
    fit = shared.refitted(stored["U"].to(shared.U), stored["V"].to(shared.V))
    return Packed((U, V), [_core(fit, n, encoding) for n in range(len(fit.cores))])


def _size(problem: Problem, size: tuple[int, int], ranks: Sequence[int], encoding: str) -> int:
    p, q = size
    kept = [min(r, p, q) for r in ranks]
    dense = p * q <= max(kept) * (p + q)
    own = [
        packed_bytes(p * q, encoding) if dense else packed_bytes(p * k, encoding) + packed_bytes(q * k, encoding) for k in kept
    ]
    shared = packed_bytes(problem.shape[0] * p, encoding) + packed_bytes(problem.shape[1] * q, encoding)
    return shared + sum(own)


def _core(shared: Shared, n: int, encoding: str) -> Sequence[Field]:
    p, q = shared.size
    if p * q <= max(min(core.rank, p, q) for core in shared.cores) * (p + q):
        return (pack("core", shared.cores[n].to_dense(), encoding),)
    core = canonical(shared.cores[n])
    return pack("left", core.B, encoding), pack("right", core.A.mT, encoding)


def sizes(joint: Joint) -> list[int]:
    return sorted({max(1, round(joint.most * fraction)) for fraction in _SIZES})


def water_filled(problem: Problem, joint: Joint) -> Iterator[Packed]:
    """Of a few sizes of the basis the one that promises least, every stored entry with the same weighted noise."""
    total = sum(w * delta.norm() ** 2 for w, delta in zip(joint.importance, joint.small, strict=True))
    prospects = [prospect(problem, joint.basis(size), total) for size in sizes(joint)]
    _, level, shared = min(prospects, key=lambda each: each[0])
    yield meet(lambda at: at_level(shared, at), level, problem.budget_bytes)


def prospect(problem: Problem, shared: Shared, total: float) -> tuple[float, float, Shared]:
    """Estimated loss, and the level that meets the budget. total: the loss of storing nothing."""
    terms, sides = Terms.of(shared.problem(0)), shared.sides()
    size = estimator(shared, terms, sides)
    level = find_level(size, problem.budget_bytes, total)
    kept = worth_keeping(terms.energy, shared.size, level)
    entries = sum(problem.shape[k] * shared.size[k] for k in (0, 1)) + int(kept.sum()) * sum(shared.size)
    return total - float(terms.energy[kept].sum()) + level * entries, level, shared


def estimator(shared: Shared, terms: Terms, sides: tuple[Columns, Columns]) -> Callable[[float], int]:
    """level -> bytes of the basis and of the cores' terms."""
    whole, small = [side.sampled() for side in sides], [terms.B.sampled(), terms.A.sampled()]

    def size(level: float) -> int:
        kept = worth_keeping(terms.energy, shared.size, level).cpu().numpy()
        fields = [side.bytes(level) for side in whole] + [side.bytes(level, kept) for side in small]
        return sum(fields) + 8 * len(shared.cores) if kept.any() else 0

    return size


def at_level(shared: Shared, level: float) -> Packed:
    """The basis, then the cores refitted to it as stored. Nothing where no core has a term worth its bits."""
    U, V = (side.pack(label, level) for side, label in zip(shared.sides(), ("U", "V"), strict=True))
    stored = values([U, V])
    fit = shared.refitted(stored["U"].to(shared.U), stored["V"].to(shared.V))
    terms = Terms.of(fit.problem(0))
    kept = worth_keeping(terms.energy, fit.size, level)
    if not bool(kept.any()):
        return Packed((), [()] * len(fit.cores))
    own = [fitted(terms, n, terms.of_task(n, kept), level) for n in range(len(fit.cores))]
    return Packed((U, V), [[replace(f, label={"B": "left", "A": "right"}[f.label]) for f in fields] for fields in own])
