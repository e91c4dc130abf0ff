"""Reversible Model Merging: per position of the factors, the mean over tasks and p principal directions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algos.codec import Codec, Fields, Packed, Problem, Quantize, best, check_quantize
from merge_algos.entries import check_flag, check_whole_number
from merge_algos.lowrank import LowRankDelta, canonical
from merge_algos.packing import pack, packed_bytes

_ROUNDS = 3  # of alignment: what later ones gain is lost in the quantisation


@dataclass(frozen=True)
class Rmm(Codec):
    """RMM (arXiv:2510.14163). A position is a row of B_i or a column of A_i: n vectors of length r.

    Where ranks differ, zeros are added up to the largest.

    p: principal directions per position, exact but for the encoding from min(r, n - 1) on; None for as many as the budget
    allows, and then p is what the budget is spent on.  center: subtract the mean over tasks first.
    align: bring the adapters to one gauge first (see `aligned`); the paper takes factors as they are given.
    quantize: encoding of mean, directions and coefficients; `none` is bf16.  `auto`: the encoding of least measured error
    within the budget, with as many directions as it leaves room for; `none` where p is given.
    Differs from the paper, which does not quantise. Importance does not turn the directions.
    """

    name = "rmm"
    paper = "arXiv:2510.14163"
    grid = (1.0,)

    quantize: Quantize = "auto"
    p: int | None = None
    center: bool = True
    align: bool = False

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        check_flag("center", self.center)
        check_flag("align", self.align)
        if self.p is not None:
            check_whole_number("p", self.p, least=0)

    def represent(self, problem: Problem, prepared: None) -> Packed:
        prepare = aligned if self.align else lambda deltas, p, center: deltas
        return coded(problem, self.quantize, self.p, self.center, prepare)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        return restored(shape, shared, own)


Prepare = Callable[[Sequence[LowRankDelta], int, bool], Sequence[LowRankDelta]]


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """P positions. mean: (P, r).  directions: (P, p, r), orthonormal rows.  coefficients: (P, n, p)."""

    mean: Tensor
    directions: Tensor
    coefficients: Tensor

    def vectors(self) -> Tensor:
        """(P, n, r): what the basis says the tasks are."""
        return self.mean[:, None] + self.coefficients @ self.directions


def positions(deltas: Sequence[LowRankDelta]) -> Tensor:
    """(P, n, r): rows of B, then columns of A, P = d_out + d_in; ranks padded with zeros to the largest."""
    r = max(delta.rank for delta in deltas)
    rows = [torch.cat([delta.B, delta.A.mT]) for delta in deltas]
    return torch.stack([torch.nn.functional.pad(X, (0, r - X.shape[1])) for X in rows], 1)


def principal(X: Tensor, p: int, *, center: bool = True) -> Basis:
    """The best p directions at each position. X: (P, n, r) float64.  p: at most min(n, r)."""
    mean = X.mean(1) if center else X.new_zeros(X.shape[0], X.shape[2])
    centred = X - mean[:, None]
    if X.shape[2] <= X.shape[1]:
        directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors.mT.flip(1)[:, :p]  # (P, p, r)
    else:
        # the Gram of the tasks is the smaller one; QR makes rows of zero length orthonormal too
        left = torch.linalg.eigh(centred @ centred.mT).eigenvectors.flip(2)[:, :, :p]  # (P, n, p)
        directions = torch.linalg.qr(centred.mT @ left).Q.mT
    return Basis(mean, directions, centred @ directions.mT)


def aligned(deltas: Sequence[LowRankDelta], p: int, center: bool) -> Sequence[LowRankDelta]:
    """The same deltas, `(B_i Q_i)(Q_i^T A_i)`, in the gauge that p directions fit best.

    Balanced factors first, then in turn: fit the basis; orthogonal Procrustes `Q_i` from the SVD of `B_i^T B^_i + A_i A^_i^T`.
    """
    X = positions([canonical(delta) for delta in deltas])
    for _ in range(_ROUNDS):
        fit = principal(X, p, center=center).vectors()
        U, _S, Vh = torch.linalg.svd(torch.einsum("pnr,pns->nrs", X, fit))
        X = torch.einsum("pnr,nrs->pns", X, U @ Vh)
    d_out = deltas[0].shape[0]
    return [LowRankDelta(X[:d_out, n], X[d_out:, n].mT) for n in range(len(deltas))]


def coded(problem: Problem, quantize: Quantize, p: int | None, center: bool, prepare: Prepare) -> Packed:
    """p None: as many directions as the budget allows. prepare: the gauge in which p directions are fitted."""
    tried = _encodings(problem, quantize, p, center, prepare)
    return next(tried) if p is not None else best(problem, tried, Rmm)


def most_directions(problem: Problem, center: bool) -> int:
    """From this p on the basis is exact."""
    return min(max(delta.rank for delta in problem.deltas), len(problem.deltas) - bool(center))


def restored(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
    """One task's factors, of the largest rank, from its coefficients."""
    if not shared:
        return LowRankDelta.zero(*shape)
    mean, coefficients = shared["mean"], own["coefficients"]
    P, p = coefficients.shape
    X = mean
    if p:
        spanned = (coefficients[:, None] @ shared["directions"].reshape(P, p, -1))[:, 0]  # (P, r)
        X = mean + spanned if mean.shape[1] else spanned
    return LowRankDelta(X[: shape[0]], X[shape[0] :].mT)


def _encodings(problem: Problem, quantize: Quantize, p: int | None, center: bool, prepare: Prepare) -> Iterator[Packed]:
    every = ("bf16", "int8", "int6", "int4")
    chosen = every[: 1 if p is not None else None] if quantize == "auto" else ("bf16" if quantize == "none" else quantize,)
    most = most_directions(problem, center)
    rooms = [(e, _room(problem, e, most, center) if p is None else min(p, most)) for e in chosen]
    gauges = {room: positions(prepare(problem.deltas, room, center)) for _, room in rooms if room >= 0}
    yield from (_pack(principal(gauges[room], room, center=center), e, center) for e, room in rooms if room in gauges)


def _room(problem: Problem, encoding: str, most: int, center: bool) -> int:
    """The most directions that fit, -1 if not even the mean does."""
    fitting = (p for p in range(most, -1, -1) if _size(problem, encoding, p, center) <= problem.budget_bytes)
    return next(fitting, -1)


def _size(problem: Problem, encoding: str, p: int, center: bool) -> int:
    """`[p(r + n) + r] / (r n)` of n deltas of rank r, in entries."""
    P, n, r = sum(problem.shape), len(problem.deltas), max(delta.rank for delta in problem.deltas)
    shared = packed_bytes(P * r * bool(center), encoding) + packed_bytes(P * p * r, encoding)
    return shared + n * packed_bytes(P * p, encoding)


def _pack(basis: Basis, encoding: str, center: bool) -> Packed:
    P = len(basis.mean)
    mean = pack("mean", basis.mean if center else basis.mean[:, :0], encoding)
    directions = pack("directions", basis.directions.reshape(P, -1), encoding)
    own = [(pack("coefficients", basis.coefficients[:, n], encoding),) for n in range(basis.coefficients.shape[1])]
    return Packed((mean, directions), own)
