"""Several deltas in bases of their joint column and row spaces, and the parts of these spaces that most of them need.

Everything is done on small matrices, (P, r) and (Q, r): P and Q are at most the sum of the ranks.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from merge_algos.codec import Problem
from merge_algos.lowrank import LowRankDelta, concat, thin_qr
from merge_algos.packing import Array
from merge_algos.waterline import Columns, Outlook, Sizes

_SIZES = (0.0625, 0.125, 0.25, 0.5, 1.0)  # of a basis, as fractions of the joint rank
_ROUNDS = 3  # of HOOI; the HOSVD it begins with is within a factor sqrt(2) of the best
_NEGLIGIBLE = 1e-12  # of the energy: directions that hold less are rounding


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Orthonormal QB (d_out, P), QA (d_in, Q) that hold all deltas exactly; small: the deltas in these bases, (P, Q)."""

    QB: Tensor
    QA: Tensor
    small: tuple[LowRankDelta, ...]
    importance: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem) -> "Joint":
        deltas = problem.canonical
        whole = concat(deltas)
        (QB, RB), (QA, RA) = thin_qr(whole.B), thin_qr(whole.A.mT)
        ends = list(itertools.accumulate((delta.rank for delta in deltas), initial=0))
        small = tuple(LowRankDelta(RB[:, a:b], RA[:, a:b].mT) for a, b in itertools.pairwise(ends))
        return cls(QB.columns, QA.columns, small, problem.importance)

    @property
    def most(self) -> tuple[int, int]:
        """A basis of this size is exact."""
        return self.QB.shape[1], self.QA.shape[1]

    @property
    def energy(self) -> float:
        """The loss of storing nothing."""
        return sum(w * delta.norm() ** 2 for w, delta in zip(self.importance, self.small, strict=True))

    def at_most(self, size: int) -> tuple[int, int]:
        return min(size, self.most[0]), min(size, self.most[1])

    def basis(self, p: int, q: int) -> "Shared":
        """The p and q directions that hold most of all deltas."""
        B, A = self.padded()
        V = self.leading(A, B)[0][:, :q]
        for _ in range(_ROUNDS if (p, q) != self.most else 1):
            U = self.leading(B, V.mT @ A)[0][:, :p]
            V = self.leading(A, U.mT @ B)[0][:, :q]
        return Shared(self, U, V, tuple(LowRankDelta(U.mT @ d.B, d.A @ V) for d in self.small))

    def padded(self) -> tuple[Tensor, Tensor]:
        """(n, P, r) and (n, Q, r): the factors of all deltas, with zeros up to the largest rank."""
        r = max(delta.rank for delta in self.small)
        sides = ([delta.B for delta in self.small], [delta.A.mT for delta in self.small])
        B, A = (torch.stack([torch.nn.functional.pad(X, (0, r - X.shape[1])) for X in side]) for side in sides)
        return B, A

    def leading(self, factors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors (P, P) and eigenvalues of `sum_i w_i F_i (O_i^T O_i) F_i^T`, largest first. F: (n, P, r), O: (n, m, r)."""
        weights = torch.tensor(self.importance, dtype=factors.dtype, device=factors.device)
        weighted = factors @ (others.mT @ others * weights[:, None, None])  # (n, P, r)
        n, P, r = factors.shape
        gram = weighted.permute(1, 0, 2).reshape(P, n * r) @ factors.permute(1, 0, 2).reshape(P, n * r).mT
        energies, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        return vectors.flip(1), energies.flip(0)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """U: (P, p), V: (Q, q), orthonormal, in the joint bases.  cores: (p, q), low-rank, one per delta."""

    joint: Joint
    U: Tensor
    V: Tensor
    cores: tuple[LowRankDelta, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.U.shape[1], self.V.shape[1]

    @property
    def energy(self) -> float:
        """The loss of storing nothing."""
        return self.joint.energy

    @property
    def whole_U(self) -> Tensor:
        """(d_out, p)."""
        return self.joint.QB @ self.U

    @property
    def whole_V(self) -> Tensor:
        """(d_in, q)."""
        return self.joint.QA @ self.V

    def beyond(self) -> list[LowRankDelta]:
        """What the basis does not hold, as deltas in the joint bases."""
        inside = [LowRankDelta(self.U @ core.B, core.A @ self.V.mT) for core in self.cores]
        return [concat([delta, part.scale(-1.0)]) for delta, part in zip(self.joint.small, inside, strict=True)]

    def sides(self) -> tuple[Columns, Columns]:
        """U and V whole, with the weight of noise in each column: the energy of all cores in its row or column."""
        left, right = self._weights()
        return Columns(self.whole_U, left), Columns(self.whole_V, right)

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Of `sides`, counted on some rows without forming the others."""
        columns = (Columns(X, weight) for X, weight in zip((self.U, self.V), self._weights(), strict=True))
        left, right = (c.sampled(Q) for c, Q in zip(columns, (self.joint.QB, self.joint.QA), strict=True))
        return left, right

    def refitted(self, U: Tensor, V: Tensor) -> list[LowRankDelta]:
        """The cores that are best for the whole U and V as they were stored."""
        left, right = _pseudo_inverse(U) @ self.joint.QB, _pseudo_inverse(V) @ self.joint.QA
        return [LowRankDelta(left @ delta.B, delta.A @ right.mT) for delta in self.joint.small]

    def _weights(self) -> tuple[Tensor, Tensor]:
        left = [(c.B @ (c.A @ c.A.mT) * c.B).sum(1) for c in self.cores]  # (p,): squared norms of the core's rows
        right = [(c.A.mT @ (c.B.mT @ c.B) * c.A.mT).sum(1) for c in self.cores]  # (q,)
        return self._weighted(left), self._weighted(right)

    def _weighted(self, rows: Sequence[Tensor]) -> Tensor:
        total = torch.stack([w * row for w, row in zip(self.joint.importance, rows, strict=True)]).sum(0)
        return total.clamp(min=_NEGLIGIBLE * float(total.max()))


def _pseudo_inverse(X: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(X.mT @ X, hermitian=True) @ X.mT
    return inverse


def _tails(energies: Tensor) -> Tensor:
    """(P + 1,): the energy that is lost when the leading 0, 1, .. P directions are kept."""
    summed = energies.clamp(min=0).flip(0).cumsum(0).flip(0)
    return torch.cat([summed, summed.new_zeros(1)])


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """Bases of several sizes, judged after one round of HOOI; the one that is chosen is refined further.

    whole: the outlook on the deltas' own terms, without any basis.  rungs: (p, q) -> the outlook on the basis, the terms in it
    and, last, those beyond it.
    """

    joint: Joint
    whole: Outlook
    rungs: Mapping[tuple[int, int], Outlook]

    @classmethod
    def of(cls, problem: Problem) -> Self:
        joint = Joint.of(problem)
        B, A = joint.padded()
        (U, left), (V, right) = joint.leading(B, A), joint.leading(A, B)
        turned = _Turned(problem.shape, joint.importance, U.mT @ B, V.mT @ A)
        sizes = _sizes(_tails(left), _tails(right))
        return cls(joint, turned.whole(), {size: turned.refined(joint, size).outlook(size) for size in sizes})

    def inside(self) -> Mapping[tuple[int, int], Outlook]:
        """The same without the terms beyond."""
        return {size: replace(rung, terms=rung.terms[:1]) for size, rung in self.rungs.items()}


def _sizes(left: Tensor, right: Tensor) -> list[tuple[int, int]]:
    """(p, q) at which both sides lose about the same: some fraction of one, and as much of the other as goes with it."""
    pairs = set()
    for here, there, turned in ((left, right, False), (right, left, True)):
        for fraction in _SIZES:
            size = max(1, round(fraction * (len(here) - 1)))
            other = max(1, int((there > here[size] + _NEGLIGIBLE * there[0]).sum()))
            pairs.add((other, size) if turned else (size, other))
    return sorted(pairs)


@dataclass(frozen=True, slots=True, eq=False)
class _Turned:
    """Deltas in the bases of their HOSVD. B: (n, P, r), A: (n, Q, r): the leading p and q rows are the core of that size."""

    shape: tuple[int, int]
    importance: tuple[float, ...]
    B: Tensor
    A: Tensor

    def whole(self) -> Outlook:
        terms = self._energies(self.B.mT @ self.B, self.A.mT @ self.A)
        return Outlook(float(terms.sum()), (), ((terms, self.shape),))

    def refined(self, joint: Joint, size: tuple[int, int]) -> Self:
        """In the bases of this size after a round of HOOI; the directions beyond them are some or other."""
        if size == (self.B.shape[1], self.A.shape[1]):
            return self
        U, _ = joint.leading(self.B, self.A[:, : size[1]])
        B = U.mT @ self.B
        V, _ = joint.leading(self.A, B[:, : size[0]])
        return replace(self, B=B, A=V.mT @ self.A)

    def outlook(self, size: tuple[int, int]) -> Outlook:
        B, A = self.B[:, : size[0]], self.A[:, : size[1]]
        grams, inside = (self.B.mT @ self.B, self.A.mT @ self.A), (B.mT @ B, A.mT @ A)
        (left, right), weights = inside, torch.tensor(self.importance, dtype=B.dtype, device=B.device)
        rows = torch.einsum("n,nps,nps->p", weights, B @ right, B), torch.einsum("n,nqs,nqs->q", weights, A @ left, A)
        columns = tuple((row.clamp(min=0).cpu().numpy(), d) for row, d in zip(rows, self.shape, strict=True))
        beyond = (_bordered(grams[0], left, 1), _bordered(grams[1], right, -1))  # of [B, B inside] and of [A, -A inside]
        terms = ((self._energies(left, right), size), (self._energies(*beyond), self.shape))
        return Outlook(float(self.whole().energy), columns, terms)

    def _energies(self, left: Tensor, right: Tensor) -> Array:
        """(n k,): importance times squared singular values of deltas whose factors have these Grams (n, k, k)."""
        values, vectors = torch.linalg.eigh(left)
        root = vectors * values.clamp(min=0).sqrt()[:, None]
        squared = torch.linalg.eigvalsh(root.mT @ right @ root).clamp(min=0)
        weights = torch.tensor(self.importance, dtype=squared.dtype, device=squared.device)
        energies: Array = (weights[:, None] * squared).ravel().cpu().numpy()
        return energies


def _bordered(whole: Tensor, inside: Tensor, sign: int) -> Tensor:
    cross = sign * inside
    return torch.cat([torch.cat([whole, cross], 2), torch.cat([cross, inside], 2)], 1)
