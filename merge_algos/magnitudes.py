"""The k-th largest magnitude among the entries of one delta, or of all deltas of an adapter, exactly.

Non-negative floats order as their bits do, so it is found by a radix select: every pass over the entries counts the next
16 bits among those that begin with the bits known so far. float32 takes two passes, float64 four. Counts add up over
modules, so the threshold of a whole adapter needs no two modules in the same place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from merge_algos.blocks import BLOCK_ENTRIES, dense_rows, row_ranges
from merge_algos.entries import at_least, kept
from merge_algos.lowrank import LowRankDelta

_DIGIT = 16  # bits to a pass
_BINS = 1 << _DIGIT
_BITS_OF = {torch.float32: torch.int32, torch.float64: torch.int64}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Search:
    """A magnitude of which the leading bits are known.

    dtype: the float whose bits they are.  unknown: how many bits are not known yet, a multiple of 16.  prefix: those that are.
    left: its position, 1 the largest, among the magnitudes that begin with them; 0 where there are none.
    """

    dtype: torch.dtype
    unknown: int
    prefix: int = 0
    left: int = 0

    @classmethod
    def begin(cls, dtype: torch.dtype, left: int = 0) -> "Search":
        return cls(dtype, 8 * dtype.itemsize, 0, left)

    @property
    def is_fresh(self) -> bool:
        return self.unknown == 8 * self.dtype.itemsize

    @property
    def value(self) -> float:
        """The magnitude, once no bit is unknown."""
        return float(torch.tensor(self.prefix, dtype=_BITS_OF[self.dtype]).view(self.dtype))

    def counts(self, delta: LowRankDelta, block_entries: int = BLOCK_ENTRIES) -> Tensor:
        """(65536,): how many |entries| of `B A` begin with the prefix, by the 16 bits that follow it. In row blocks.

        Entries narrower than the search are widened, which changes none.
        """
        totals = torch.zeros(_BINS, dtype=torch.int64, device=delta.B.device)
        for start, stop in row_ranges(delta.shape, block_entries):
            totals += self.counts_in(dense_rows(delta, start, stop))
        return totals

    def counts_in(self, entries: Tensor) -> Tensor:
        """The same of a dense matrix."""
        bits = entries.to(self.dtype).abs().flatten().view(_BITS_OF[self.dtype]) >> (self.unknown - _DIGIT)
        like = bits if self.is_fresh else bits[bits >> _DIGIT == self.prefix] & (_BINS - 1)
        return torch.bincount(like, minlength=_BINS)

    def narrowed(self, counts: Tensor) -> "Search":
        """Sixteen bits more, from the counts of all entries that are searched."""
        bin_, above = _bin_of(counts, self.left) if self.left else (0, 0)
        return replace(self, unknown=self.unknown - _DIGIT, prefix=self.prefix << _DIGIT | bin_, left=self.left - above)


def magnitude_threshold(delta: LowRankDelta, keep: int, block_entries: int = BLOCK_ENTRIES) -> float:
    """The keep-th largest |entry| of `B A`.  keep: from 1 to d_out * d_in."""
    search = Search.begin(delta.B.dtype, keep)
    while search.unknown:
        search = search.narrowed(search.counts(delta, block_entries))
    return search.value


def trim(matrix: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude, zero the rest. Entries equal to the threshold are all kept."""
    if matrix.numel() == 0:
        return matrix
    search = Search.begin(matrix.dtype, kept(matrix.numel(), density))
    while search.unknown:
        search = search.narrowed(search.counts_in(matrix))
    return at_least(matrix, search.value)


# The same for every adapter over all modules, as the rounds of a survey. What is known is a JSON object of the fields of
# `Search`: one dtype, as many unknown bits for every adapter, and of each its prefix and what is left.


def is_found(known: Mapping[str, Any] | None) -> bool:
    return known is not None and known["unknown"] == 0


def model_threshold(known: Mapping[str, Any], n: int) -> float:
    """That of adapter n, which is present in some module."""
    return _searches(known)[n].value


def survey_counts(deltas: Sequence[LowRankDelta], here: Sequence[int], known: Mapping[str, Any] | None) -> dict[str, Any]:
    """One module's counts.  here: positions of the adapters that count; the others have no entries.

    JSON: the dtype of the bits, null where nobody is here; for each adapter the bins that are not empty and their counts.
    """
    dtype = deltas[0].B.dtype if known is None else _DTYPES[known["dtype"]]
    searches = _searches(known) if known else [Search.begin(dtype)] * len(deltas)
    of_each: list[list[list[int]]] = [
        _sparse(searches[n].counts(delta)) if n in here else [[], []] for n, delta in enumerate(deltas)
    ]
    return {"dtype": _name(dtype) if here else None, "counts": of_each}


def pooled_counts(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Those of both. Bits of two dtypes do not compare: then the dtype is "mixed", and what was counted is of no use."""
    dtypes = {side["dtype"] for side in (left, right)} - {None}
    if len(dtypes) > 1:
        return {"dtype": "mixed", "counts": [[[], []] for _ in left["counts"]]}
    both = zip(left["counts"], right["counts"], strict=True)
    return {"dtype": next(iter(dtypes), None), "counts": [_sparse(_dense(one) + _dense(other)) for one, other in both]}


def settled_counts(findings: Mapping[str, Any], known: Mapping[str, Any] | None, density: float) -> dict[str, Any]:
    """What is known of each adapter's threshold, after the counts of all modules: the smallest kept of all its entries.

    Where some modules are float32 and others float64, the search begins anew on the bits of float64, which hold both.
    """
    count = len(findings["counts"])
    if findings["dtype"] is None:  # no adapter is present in any module
        return _json([Search(torch.float32, 0)] * count)
    if findings["dtype"] == "mixed":
        return _json([Search.begin(torch.float64)] * count)
    searches = _searches(known) if known else [Search.begin(_DTYPES[findings["dtype"]])] * count
    return _json([_narrowed(s, _dense(c), density) for s, c in zip(searches, findings["counts"], strict=True)])


def _narrowed(search: Search, counts: Tensor, density: float) -> Search:
    """The first counts are those of all entries, which is when their number is known."""
    total = int(counts.sum())
    return (replace(search, left=kept(total, density)) if search.is_fresh and total else search).narrowed(counts)


def _searches(known: Mapping[str, Any]) -> list[Search]:
    dtype, unknown = _DTYPES[known["dtype"]], known["unknown"]
    return [Search(dtype, unknown, prefix, left) for prefix, left in zip(known["prefix"], known["left"], strict=True)]


def _json(searches: Sequence[Search]) -> dict[str, Any]:
    shared = {"dtype": _name(searches[0].dtype), "unknown": searches[0].unknown}
    return shared | {"prefix": [s.prefix for s in searches], "left": [s.left for s in searches]}


def _sparse(counts: Tensor) -> list[list[int]]:
    bins = counts.nonzero().flatten()
    return [bins.tolist(), counts[bins].tolist()]


def _dense(sparse: Sequence[Sequence[int]]) -> Tensor:
    bins, counts = (torch.tensor(part, dtype=torch.int64) for part in sparse)
    return torch.zeros(_BINS, dtype=torch.int64).index_put((bins,), counts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bin_of(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest, and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(keep, device=counts.device)))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above
