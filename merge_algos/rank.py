"""How many singular values a result keeps: all, at most a number, or as many as an energy needs."""

from dataclasses import dataclass

from torch import Tensor

from merge_algos.errors import InvalidRank


@dataclass(frozen=True, slots=True)
class RankRule:
    """`max`: at most so many; None for no limit. `energy`: fraction in (0, 1] of the squared norm to keep; None for all.

    The empty rule keeps everything, which is what makes a merge exact. Raises InvalidRank outside these ranges.
    """

    max: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.max is not None and self.max < 1:
            raise InvalidRank(self.max, "must be at least 1")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise InvalidRank(self.energy, "the energy is a fraction in (0, 1]")

    def keeps_all(self, rank: int) -> bool:
        """Whether a delta of this rank is within the rule before any singular value is known."""
        return self.energy is None and (self.max is None or rank <= self.max)

    def pick(self, S: Tensor, total: float | None = None) -> int:
        """Singular values to keep of S (k,), descending: the smallest number that satisfies the energy, capped by `max`.

        total: squared norm of the whole, where S holds only its leading part.
        """
        limit = len(S) if self.max is None else min(self.max, len(S))
        if self.energy is None:
            return limit
        energy = S.double().square().cumsum(0)
        # rounding in the cumulative sum must not cost a rank
        wanted = self.energy * (energy[-1:] if total is None else total) * (1 - 1e-12)
        return min(limit, int((energy < wanted).sum()) + 1) if len(S) else 0
