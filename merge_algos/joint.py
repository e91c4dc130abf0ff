"""Several deltas in bases of their joint column and row spaces, and the parts of these spaces that most of them need.

Everything is done on small matrices, (P, r) and (Q, r): P and Q are at most the sum of the ranks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_algos.codec import Problem
from merge_algos.lowrank import LowRankDelta, canonical, concat, thin_qr
from merge_algos.waterline import Columns, Sizes

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
        deltas = [canonical(delta) for delta in problem.deltas]
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

    def sizes(self, fractions: Sequence[float]) -> list[tuple[int, int]]:
        """(p, q) at which both sides lose about the same: some fraction of one, and as much of the other as goes with it."""
        tails = [_tails(*self._leading(*sides)) for sides in (self._sides(), self._sides()[::-1])]
        pairs = set()
        for here, there, turned in ((tails[0], tails[1], False), (tails[1], tails[0], True)):
            for fraction in fractions:
                size = max(1, round(fraction * (len(here) - 1)))
                other = max(1, int((there > here[size] + _NEGLIGIBLE * there[0]).sum()))
                pairs.add((other, size) if turned else (size, other))
        return sorted(pairs)

    def basis(self, p: int, q: int) -> "Shared":
        """The p and q directions that hold most of all deltas."""
        B, A = self._sides()
        V = self._leading(A, B)[0][:, :q]
        for _ in range(_ROUNDS if (p, q) != self.most else 1):
            U = self._leading(B, [V.mT @ X for X in A])[0][:, :p]
            V = self._leading(A, [U.mT @ X for X in B])[0][:, :q]
        return Shared(self, U, V, tuple(LowRankDelta(U.mT @ d.B, d.A @ V) for d in self.small))

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        return [delta.B for delta in self.small], [delta.A.mT for delta in self.small]

    def _leading(self, factors: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvectors (P, P) and eigenvalues of `sum_i w_i F_i (O_i^T O_i) F_i^T`, largest first. F_i: (P, r), O_i: (m, r)."""
        pairs = zip(self.importance, factors, others, strict=True)
        stacked = torch.cat([w**0.5 * here @ torch.linalg.qr(there).R.mT for w, here, there in pairs], 1)
        energies, vectors = torch.linalg.eigh(stacked @ stacked.mT)
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

    def problem(self) -> Problem:
        """The cores as deltas of their own."""
        return Problem(self.size, self.cores, self.joint.importance, 0)

    def beyond(self) -> Problem:
        """What the basis does not hold, as deltas in the joint bases."""
        inside = [LowRankDelta(self.U @ core.B, core.A @ self.V.mT) for core in self.cores]
        rest = tuple(concat([delta, part.scale(-1.0)]) for delta, part in zip(self.joint.small, inside, strict=True))
        return Problem(self.joint.most, rest, self.joint.importance, 0)

    def sides(self) -> tuple[Columns, Columns]:
        """U and V whole, with the weight of noise in each column: the energy of all cores in its row or column."""
        left, right = self._weights()
        return Columns(self.whole_U, left), Columns(self.whole_V, right)

    def sizes(self, *, counted: bool) -> tuple[Sizes, Sizes]:
        """Of `sides`, without forming them: counted on some rows, or as expected."""
        columns = (Columns(X, weight) for X, weight in zip((self.U, self.V), self._weights(), strict=True))
        bases = (self.joint.QB, self.joint.QA)
        left, right = (c.sampled(Q) if counted else c.expected(len(Q)) for c, Q in zip(columns, bases, strict=True))
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


def _tails(_vectors: Tensor, energies: Tensor) -> Tensor:
    """(P + 1,): the energy that is lost when the leading 0, 1, .. P directions are kept."""
    summed = energies.clamp(min=0).flip(0).cumsum(0).flip(0)
    return torch.cat([summed, summed.new_zeros(1)])
