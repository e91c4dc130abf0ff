"""How precisely to store each column of several factors, given a number of bytes for all of them.

Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): with entropy-coded uniform quantisers the
least total error for the bytes gives every stored entry the same weighted noise `level`, and leaves out components whose
energy would not pay for their bits. So one number, the level, fixes every step and every rank, and a search over it meets
the budget.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from merge_algos.codec import Packed
from merge_algos.packing import COLUMN_BITS, Array, Field, pack_rice, rice_bits

FIXED = ("bf16", "int8", "int6", "int4")  # encodings that give every entry the same bits

# Groups of 64 cost 0.5 bit more than a Rice code at the same error, whatever the width; a column's header costs 24 bits
_SHORT = 256

_SAMPLED_ROWS = 256
_FINEST = 1e-15  # of the energy, per entry: below it steps are finer than what float32 factors hold
_HALVINGS = 14
_NEAR = 0.4  # octaves
_SHAPING_BITS = 0.35  # a Rice-coded Gaussian takes 0.5 log2(variance / noise) and this
_MOST_CORRECTIONS = 64
_COARSER = 1.01
_FILLED = 0.9995  # of the budget is aimed at, so that the first correction nearly always fits


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

    def sampled(self, lift: Tensor | None = None) -> "Sampled":
        """lift: (d, d'), where X is written in that basis."""
        whole = self.X if lift is None else lift
        rows = whole[:: max(1, len(whole) // _SAMPLED_ROWS)].contiguous()
        return Sampled(Columns(rows if lift is None else rows @ self.X, self.weight), len(whole) / max(1, len(rows)))


class Sizes(Protocol):
    """What columns would take at a level."""

    def bits(self, level: float) -> Array:
        """(k,): of each whole column."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Sampled(Sizes):
    """Sizes by counting codes in every so-manyth row of long columns. stride: what one row stands for."""

    columns: Columns
    stride: float

    def bits(self, level: float) -> Array:
        return rice_bits(self.columns.X, self.columns.steps(level)) * self.stride


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What some columns and some rank-1 terms would take and lose at a level, as if all were Gaussian.

    energy: the loss of storing nothing.  columns: (energies (k,), rows) of what is always kept.  terms: (energies, lengths of
    both vectors) of what is kept where it is worth it; they hold `energy`, the columns do not.
    """

    energy: float
    columns: tuple[tuple[Array, int], ...]
    terms: tuple[tuple[Array, tuple[int, int]], ...]

    def size_bytes(self, level: float) -> int:
        kept = self._kept(level)
        if self.columns and not len(kept[0][0]):  # a basis with nothing in it
            return 0
        bits = sum(float(_expected_bits(energies / rows, rows, level).sum()) for energies, rows in self.columns)
        bits += sum(float(_expected_bits(energies / d, d, level).sum()) for energies, rows in kept for d in rows)
        return int(bits / 8)

    def level(self, budget_bytes: int) -> float:
        return find_level(self.size_bytes, budget_bytes, self.energy)

    def loss(self, level: float) -> float:
        """The energy that is not kept, and the noise of what is."""
        kept = self._kept(level)
        stored = sum(len(energies) * rows for energies, rows in self.columns) if len(kept[0][0]) else 0
        stored += sum(len(energies) * sum(rows) for energies, rows in kept)
        return self.energy + level * stored - sum(float(energies.sum()) for energies, _ in kept)

    def promise(self, budget_bytes: int) -> float:
        return self.loss(self.level(budget_bytes))

    def _kept(self, level: float) -> list[tuple[Array, tuple[int, int]]]:
        return [(energies[_worth(energies, rows, level)], rows) for energies, rows in self.terms]


def worth_keeping(energy: Tensor, rows: tuple[int, int], level: float) -> Tensor:
    """(k,) boolean: which rank-1 terms lower the loss by more than the bits of both their vectors are worth.

    energy: (k,), each term's squared norm times its importance.  rows: lengths of the two vectors.
    The worth of a bit is the slope of the error at this level, `2 ln 2 level`.
    """
    return torch.from_numpy(_worth(energy.cpu().numpy(), rows, level)).to(energy.device)


def _worth(energy: Array, rows: tuple[int, int], level: float) -> Array:
    cost = np.zeros_like(energy)
    for d in rows:
        bits = 0.5 * np.log2(np.maximum(energy / (d * level), 1)) + _SHAPING_BITS
        cost += d * level * (1 + 2 * math.log(2) * bits)
    kept: Array = energy > cost
    return kept


def _expected_bits(variance: Array, rows: int, level: float) -> Array:
    bits: Array = rows * (0.5 * np.log2(np.maximum(variance / level, 1)) + _SHAPING_BITS) + COLUMN_BITS
    return bits


def find_level(size_bytes: Callable[[float], int], budget_bytes: int, energy: float, near: float | None = None) -> float:
    """The lowest level whose size is within the budget, to less than 0.01 bit an entry.

    energy: the loss of storing nothing.  near: where it should be; a look on both sides saves half of the search.
    """
    low, high, halvings = math.log2(_FINEST * energy), math.log2(4 * energy), _HALVINGS
    if near is not None:
        below, above = max(low, math.log2(near) - _NEAR), min(high, math.log2(near) + _NEAR)
        if size_bytes(2**below) > budget_bytes >= size_bytes(2**above):
            low, high, halvings = below, above, math.ceil(math.log2((above - below) * 2**_HALVINGS / (high - low)))
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if size_bytes(2**middle) <= budget_bytes else (middle, high)
    return float(2**high)


def meet(pack: Callable[[float], Packed], level: float, budget_bytes: int) -> Packed:
    """What fits the budget, beginning at an estimated level: once corrected by what came out too small or too large."""
    first = pack(level)
    entries = sum(field.shape[0] * field.shape[1] for part in (first.shared, *first.parts) for field in part)
    missed_bits = 8 * (first.size_bytes - _FILLED * budget_bytes) / max(1, entries)
    level *= 2 ** max(-1.0, min(1.0, 2 * missed_bits))
    second = pack(level)
    for n in range(_MOST_CORRECTIONS):
        if second.size_bytes <= budget_bytes:
            return first if second.size_bytes < first.size_bytes <= budget_bytes else second
        level *= _COARSER ** (1 + n // 8)  # faster and faster: 17 times the level in the end
        second = pack(level)
    # a coarser basis may leave more residual than it saves, so no level need fit: then nothing does, which always fits
    return first if first.size_bytes <= budget_bytes else Packed((), [()] * len(first.parts))


def refit(target: Tensor, other: Tensor, stored: Tensor) -> Tensor:
    """X (k, d) that makes `stored X` nearest to `target other`. target: (m, r).  other: (r, d).  stored: (m, k).

    What rounding took from one factor's span the other can still take up.
    """
    solution: Tensor = torch.linalg.pinv(stored.mT @ stored, hermitian=True) @ (stored.mT @ target) @ other
    return solution


def is_short(shape: tuple[int, int]) -> bool:
    """Whether a fixed encoding may beat entropy-coded steps."""
    return min(shape) < _SHORT
