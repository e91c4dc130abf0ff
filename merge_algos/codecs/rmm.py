"""Reversible Model Merging: per position of the factors, the mean over tasks and p principal directions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_algos.codec import Codec, Fields, Floor, Packed, Problem, Quantize, best, check_quantize, loss, measured, values
from merge_algos.entries import check_flag, check_whole_number
from merge_algos.lowrank import LowRankDelta, canonical
from merge_algos.packing import GROUP, pack, packed_bytes

_BLOCK = 1024  # positions of each side at least, where there are more
_ROUNDS = 3  # of alignment: what later ones gain is lost in the quantisation


Room = tuple[str, int]  # an encoding, and the directions that there is room for


@dataclass(frozen=True, slots=True)
class Settings:
    """What both codecs of this kind are made of: see `Rmm`."""

    quantize: Quantize
    p: int | None
    center: bool
    align: bool


@dataclass(frozen=True)
class Rmm(Codec):
    """RMM (arXiv:2510.14163). A position is a row of B_i or a column of A_i: n vectors of length r.

    Where ranks differ, zeros are added up to the largest.

    p: principal directions per position, exact but for the encoding from min(r, n - 1) on; None for as many as the budget
    allows, and then p is what the budget is spent on.  center: subtract the mean over tasks first.
    align: bring the adapters to one gauge first (see `aligned`); the paper takes factors as they are given.
    quantize: encoding of mean, directions and coefficients; `none` is bf16.  `auto`: the encoding of least measured error
    within the budget, with as many directions as it leaves room for; `none` where p is given. Of wide modules the error is
    measured, and the gauge found, on a block of every so-manyth 64 positions.
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
        return coded(problem, self._settings)

    def floors(self, problem: Problem) -> Sequence[Floor]:
        return floors(problem, self._settings)

    @property
    def _settings(self) -> Settings:
        return Settings(self.quantize, self.p, self.center, self.align)

    @staticmethod
    def restore(shape: tuple[int, int], shared: Fields, own: Fields) -> LowRankDelta:
        return restored(shape, shared, own)


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """P positions. mean: (P, r).  directions: (P, p, r), orthonormal rows.  coefficients: (P, n, p)."""

    mean: Tensor
    directions: Tensor
    coefficients: Tensor

    def leading(self, p: int) -> "Basis":
        return Basis(self.mean, self.directions[:, :p], self.coefficients[:, :, :p])

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
    """The same deltas, `(B_i Q_i)(Q_i^T A_i)`, in the gauge that p directions fit best, judged on a block of the positions.

    Balanced factors first, then in turn: fit the basis; orthogonal Procrustes `Q_i` from the SVD of `B_i^T B^_i + A_i A^_i^T`.
    """
    balanced = [canonical(delta) for delta in deltas]
    return _turned(balanced, _gauge(_block(balanced), p, center))


def _gauge(deltas: Sequence[LowRankDelta], p: int, center: bool) -> Tensor:
    """(n, r, r), orthogonal."""
    given = X = positions(deltas)
    for _ in range(_ROUNDS):
        fit = principal(X, p, center=center).vectors()
        U, _S, Vh = torch.linalg.svd(torch.einsum("pnr,pns->nrs", given, fit))
        turn: Tensor = U @ Vh
        X = torch.einsum("pnr,nrs->pns", given, turn)
    return turn


def _turned(deltas: Sequence[LowRankDelta], gauge: Tensor) -> list[LowRankDelta]:
    turns = [Q[: delta.rank] for delta, Q in zip(deltas, gauge, strict=True)]
    return [LowRankDelta(delta.B @ Q, Q.mT @ delta.A) for delta, Q in zip(deltas, turns, strict=True)]


def _block(deltas: Sequence[LowRankDelta]) -> list[LowRankDelta]:
    """Some rows of every B and columns of every A: whole groups of 64, all of a side that has few."""
    rows, columns = (_sampled(d) for d in deltas[0].shape)
    return [LowRankDelta(delta.B[rows], delta.A[:, columns]) for delta in deltas]


def _sampled(d: int) -> Tensor:
    position = torch.arange(d)
    return position[position // GROUP % max(1, d // _BLOCK) == 0]


def coded(problem: Problem, settings: Settings) -> Packed:
    """p None: as many directions as the budget allows."""
    rooms = _rooms(problem, settings)
    groups = [rooms]
    if not _is_wide(problem.shape):
        groups = [[room] for room in rooms]  # a gauge for each encoding costs little here
    elif len(rooms) > 1:
        groups = [[_best_room(problem, rooms, settings)]]
    gauge = _fewest(rooms) if _is_wide(problem.shape) and rooms else None
    tried = (packed for group in groups for packed in _in_gauge(problem, group, gauge, settings))
    return next(tried) if settings.p is not None else best(problem, tried, Rmm)


def _in_gauge(problem: Problem, rooms: Sequence[Room], gauge: int | None, settings: Settings) -> Iterator[Packed]:
    """gauge: the number of directions it is made for, None for that of the rooms."""
    deltas: Sequence[LowRankDelta] = problem.deltas
    if settings.align and rooms:
        deltas = aligned(problem.canonical, _fewest(rooms) if gauge is None else gauge, settings.center)
    return _packed(deltas, rooms, settings.center)


def _best_room(problem: Problem, rooms: Sequence[Room], settings: Settings) -> Room:
    """Of least loss in the block."""
    block = _in_block(problem, rooms, settings)
    losses = [(loss(block, packed, Rmm), n) for n, packed in enumerate(_packed(block.deltas, rooms, settings.center))]
    return rooms[min(losses)[1]]


def _in_block(problem: Problem, rooms: Sequence[Room], settings: Settings) -> Problem:
    """The block in its gauge."""
    given = _block(problem.canonical if settings.align else problem.deltas)
    if settings.align and rooms:
        given = _turned(given, _gauge(given, _fewest(rooms), settings.center))
    return replace(problem, shape=given[0].shape, deltas=tuple(given))


def _is_wide(shape: tuple[int, int]) -> bool:
    return any(len(_sampled(d)) < d for d in shape)


def floors(problem: Problem, settings: Settings) -> Sequence[Floor]:
    """Of each encoding the size, and the error in a block of every delta, which the whole error cannot be below.

    Positions are coded each by itself and entries in groups of 64 positions, so a block of whole groups is coded as it would
    be in its place; the gauge comes from that block anyway. None where groups run from one column into the next.
    """
    if settings.p is not None or any(d % GROUP or len(_sampled(d)) == d for d in problem.shape):
        return ()
    rooms = _rooms(problem, settings)
    block = _in_block(problem, rooms, settings)
    tried = _packed(block.deltas, rooms, settings.center)
    decoded = ([Rmm.restore(block.shape, values(x.shared), values(part)) for part in x.parts] for x in tried)
    errors = (tuple(measured(d, back) for d, back in zip(block.deltas, each, strict=True)) for each in decoded)
    return [Floor(_size(problem, *room, settings.center), e) for room, e in zip(rooms, errors, strict=True)]


def _fewest(rooms: Sequence[Room]) -> int:
    """One gauge for all encodings: the fewer directions there are, the more it matters."""
    return min(p for _, p in rooms)


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


def _rooms(problem: Problem, settings: Settings) -> list[Room]:
    """Encodings, and how many directions each has room for."""
    every, most = ("bf16", "int8", "int6", "int4"), most_directions(problem, settings.center)
    quantize = "none" if settings.quantize == "auto" and settings.p is not None else settings.quantize
    chosen = every if quantize == "auto" else ("bf16" if quantize == "none" else quantize,)
    if settings.p is not None:
        return [(encoding, min(settings.p, most)) for encoding in chosen]
    rooms = [(encoding, _room(problem, encoding, most, settings.center)) for encoding in chosen]
    return [(encoding, p) for encoding, p in rooms if p >= 0]


def _packed(deltas: Sequence[LowRankDelta], rooms: Sequence[Room], center: bool) -> Iterator[Packed]:
    if rooms:
        basis = principal(positions(deltas), max(p for _, p in rooms), center=center)
        yield from (_pack(basis.leading(p), encoding, center) for encoding, p in rooms)


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
