"""Meeting a budget of bytes: whatever sizes come out, it ends, and what it gives fits."""

from collections.abc import Callable

import pytest
import torch

from merge_algos.codec import Packed
from merge_algos.packing import Field, pack
from merge_algos.waterline import meet

BUDGET = 1000


def of_bytes(size: int) -> Packed:
    """Two tasks with nothing, and this many bytes shared."""
    field: Field = pack("zeros", torch.zeros(size // 2, 1), "bf16")
    return Packed((field,), [(), ()])


def calls(size_at: Callable[[float], int]) -> tuple[Callable[[float], Packed], list[float]]:
    asked: list[float] = []

    def packed(level: float) -> Packed:
        asked.append(level)
        return of_bytes(size_at(level))

    return packed, asked


@pytest.mark.parametrize("start", [0.001, 1.0, 1000.0])
def test_sizes_that_fall_with_the_level_end_within_the_budget(start: float) -> None:
    packed, _ = calls(lambda level: int(BUDGET / (2 * level)) * 2)
    assert meet(packed, max(start, 0.1), BUDGET).size_bytes <= BUDGET


def test_sizes_that_never_fit_end_with_nothing_stored() -> None:
    """A coarser shared basis may leave more residual than it saves, so sizes need not fall with the level."""
    packed, asked = calls(lambda level: BUDGET + 2)
    nothing = meet(packed, 1.0, BUDGET)
    assert (nothing.size_bytes, len(nothing.parts)) == (0, 2)
    assert len(asked) < 100


def test_sizes_that_grow_end_with_what_fitted_first() -> None:
    packed, _ = calls(lambda level: BUDGET // 2 if level <= 1.0 else BUDGET + 2)
    assert meet(packed, 1.0, BUDGET).size_bytes == BUDGET // 2
