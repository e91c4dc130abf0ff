"""How precisely to store each column of several factors, given a number of bytes for all of them.

Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): with entropy-coded uniform quantisers the
least total error for the bytes gives every stored entry the same weighted noise `level`, and leaves out components whose
energy would not pay for their bits. So one number, the level, fixes every step and every rank, and a search over it meets
the budget.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from merge_algos.packing import Array, Field, pack_rice, rice_bits, rice_bytes

_SAMPLED_ROWS = 512
_FINEST = 1e-15  # of the energy, per entry: below it steps are finer than what float32 factors hold
_HALVINGS = 18
_SHAPING_BITS = 0.35  # a Rice-coded Gaussian takes 0.5 log2(variance / noise) and this
_COARSER = 1.03


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """X: (d, k) float64.  weight: (k,), by how much the squared noise of an entry of each column counts in the loss."""

    X: Tensor
    weight: Tensor

    def at(self, kept: Tensor) -> "Columns":
        """kept: (k,) boolean, or indices."""
        return Columns(self.X[:, kept], self.weight[kept])

    def steps(self, level: float) -> Tensor:
        """(k,): uniform noise over a step has variance step^2 / 12."""
        return (12 * level / self.weight).sqrt()

    def pack(self, label: str, level: float) -> Field:
        return pack_rice(label, self.X, self.steps(level))

    def bits(self, level: float) -> Array:
        """(k,): estimated from every so-manyth row of long columns."""
        stride = max(1, len(self.X) // _SAMPLED_ROWS)
        sampled = self.X[::stride]
        return rice_bits(sampled, self.steps(level)) * (len(self.X) / max(1, len(sampled)))

    def bytes(self, level: float) -> int:
        """Of all columns as one field, estimated."""
        return rice_bytes(self.bits(level))


def worth_keeping(energy: Tensor, rows: tuple[int, int], level: float) -> Tensor:
    """(k,) boolean: which rank-1 terms lower the loss by more than the bits of both their vectors are worth.

    energy: (k,), each term's squared norm times its importance.  rows: lengths of the two vectors.
    The worth of a bit is the slope of the error at this level, `2 ln 2 level`.
    """
    cost = torch.zeros_like(energy)
    for d in rows:
        bits = 0.5 * (energy / (d * level)).log2().clamp(min=0) + _SHAPING_BITS
        cost += d * level * (1 + 2 * math.log(2) * bits)
    return energy > cost


def find_level(size_bytes: Callable[[float], int], budget_bytes: int, energy: float) -> float:
    """The lowest level whose size is within the budget, to about 1 part in 10^4 of a bit. energy: the loss of storing nothing."""
    low, high = math.log2(_FINEST * energy), math.log2(4 * energy)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if size_bytes(2**middle) <= budget_bytes else (middle, high)
    return float(2**high)


def coarser(level: float) -> float:
    """The next level to try where the estimate was too low."""
    return level * _COARSER


def refit(target: Tensor, other: Tensor, stored: Tensor) -> Tensor:
    """X (k, d) that makes `stored X` nearest to `target other`. target: (m, r).  other: (r, d).  stored: (m, k).

    What rounding took from one factor's span the other can still take up.
    """
    solution: Tensor = torch.linalg.pinv(stored.mT @ stored, hermitian=True) @ (stored.mT @ target) @ other
    return solution


def total_bytes(*bits: Array) -> int:
    """Size of one rice field for each of these."""
    return sum(rice_bytes(np.asarray(each)) for each in bits)
