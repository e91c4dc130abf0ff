"""Truncation: of every adapter the strongest rank-1 terms, as many and as precise as the bytes allow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize, values
from merge_algos.lowrank import LowRankDelta
from merge_algos.packing import Field, pack, packed_bytes, rice_bytes
from merge_algos.waterline import FIXED, Columns, Outlook, Sizes, find_level, is_short, meet, refit, worth_keeping


@dataclass(frozen=True)
class Truncate(Codec):
    """Eckart and Young 1936 per adapter; which terms are kept is decided over all adapters at once, by energy.

    quantize: `none` (bf16), `int8`, `int6`, `int4`: as many terms as fit in that encoding.  `auto`: entropy-coded
    steps set by reverse water-filling; for short columns, whose headers weigh, whichever of all has the least measured error.
    There are no shared bytes.
    """

    name = "truncate"
    paper = "Eckart and Young 1936, doi:10.1007/BF02288367"
    grid = (0.25, 0.5, 0.75, 1.0, 1.5)

    quantize: Quantize = "auto"

    def __post_init__(self) -> None:
        check_quantize(self.quantize)

    @staticmethod
    def prepare(problem: Problem) -> "Terms":
        return Terms.of(problem.canonical, problem.importance)

    def represent(self, problem: Problem, terms: "Terms") -> Packed:
        if self.quantize != "auto":
            return strongest(problem, terms, _ENCODING.get(self.quantize, self.quantize))
        filled = water_filled(problem, terms)
        if not is_short(problem.shape):
            return filled
        return best(problem, [filled, *(strongest(problem, terms, encoding) for encoding in FIXED)], Truncate)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        return LowRankDelta(own["B"], own["A"].mT) if own else LowRankDelta.zero(*shape)


_ENCODING = {"none": "bf16"}


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """All rank-1 terms of all deltas. deltas: canonical.  energy: (K,), importance times squared singular value.

    owner: (K,), whose each term is.  B: (d_out, K), A: (d_in, K): balanced factors, terms as columns.
    """

    deltas: Sequence[LowRankDelta]
    energy: Tensor
    owner: Tensor
    B: Columns
    A: Columns

    @classmethod
    def of(cls, deltas: Sequence[LowRankDelta], weights: Sequence[float]) -> "Terms":
        """deltas: canonical.  weights: the importance of each."""
        S = torch.cat([delta.B.square().sum(0) for delta in deltas])  # balanced: each column of B has squared norm S
        owner = torch.cat([torch.full((delta.rank,), n) for n, delta in enumerate(deltas)])
        importance = torch.tensor(weights, dtype=torch.float64)[owner].to(S)
        weight = importance * S
        B, A = torch.cat([delta.B for delta in deltas], 1), torch.cat([delta.A.mT for delta in deltas], 1)
        return cls(deltas, importance * S.square(), owner, Columns(B, weight), Columns(A, weight))

    def of_task(self, n: int, kept: Tensor) -> Tensor:
        """(K,) boolean: which of the kept terms are task n's."""
        return kept & (self.owner == n).to(kept.device)


def strongest(problem: Problem, terms: Terms, encoding: str) -> Packed:
    """As many of the terms of most energy as fit, all in one encoding."""
    order = terms.energy.argsort(descending=True, stable=True)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _size(problem, terms.owner[order[:middle].cpu()], encoding) <= problem.budget_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    kept = torch.zeros_like(terms.energy, dtype=torch.bool)
    kept[order[:low]] = True
    return Packed((), [_part(terms, terms.of_task(n, kept), encoding) for n in range(len(problem.deltas))])


def _size(problem: Problem, owners: Tensor, encoding: str) -> int:
    counts = torch.bincount(owners, minlength=len(problem.deltas)).tolist()
    return sum(packed_bytes(count * d, encoding) for count in counts for d in problem.shape)


def _part(terms: Terms, kept: Tensor, encoding: str) -> Sequence[Field]:
    if not bool(kept.any()):
        return ()
    return pack("B", terms.B.X[:, kept], encoding), pack("A", terms.A.X[:, kept], encoding)


def water_filled(problem: Problem, terms: Terms) -> Packed:
    """Every stored entry with the same weighted noise, the level of which is the lowest that the budget allows."""
    size = estimator(problem, terms, (terms.B.sampled(), terms.A.sampled()))
    floor = find_level(size, problem.budget_bytes, float(terms.energy.sum()), outlook(problem, terms).level(problem.budget_bytes))
    return meet(lambda level: at_level(problem, terms, level, floor), floor, problem.budget_bytes)


def outlook(problem: Problem, terms: Terms) -> Outlook:
    return Outlook(float(terms.energy.sum()), (), ((terms.energy.cpu().numpy(), problem.shape),))


def kept_at(terms: Terms, rows: tuple[int, int], floor: float) -> Tensor:
    """(K,) boolean: the terms worth their bits at this level."""
    return worth_keeping(terms.energy, rows, floor)


def estimator(problem: Problem, terms: Terms, sides: tuple[Sizes, Sizes]) -> Callable[[float], int]:
    """level -> bytes of the terms that are worth keeping. sides: of all terms' B and A."""
    owner = terms.owner.numpy()

    def size(level: float) -> int:
        kept = kept_at(terms, problem.shape, level).cpu().numpy()
        bits = [side.bits(level) for side in sides]
        return sum(rice_bytes(side[kept & (owner == n)]) for n in range(len(problem.deltas)) for side in bits)

    return size


def at_level(problem: Problem, terms: Terms, level: float, floor: float) -> Packed:
    """The terms worth their bits at `floor`, at `level`: ranks that do not move while the level is being fitted."""
    kept = kept_at(terms, problem.shape, floor)
    return Packed((), [fitted(terms, n, terms.of_task(n, kept), level) for n in range(len(problem.deltas))])


def fitted(terms: Terms, n: int, kept: Tensor, level: float, labels: tuple[str, str] = ("B", "A")) -> Sequence[Field]:
    """The kept terms of task n: B rounded, then A refitted to what B has become, and rounded."""
    if not bool(kept.any()):
        return ()
    B = terms.B.at(kept).pack(labels[0], level)
    stored = values([B])[labels[0]].to(terms.B.X)
    A = Columns(refit(terms.deltas[n].B, terms.deltas[n].A, stored).mT, terms.B.weight[kept])
    return B, A.pack(labels[1], level)
