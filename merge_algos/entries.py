"""Rules on entries, applied to any stack of equally shaped matrices: rows of deltas, or cores."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from merge_algos.errors import InvalidParams

Combine = Literal["sum", "ties"]


def elect_and_merge(stack: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES steps 2 and 3 (arXiv:2306.01708): the sign of the weighted sum, then the weighted mean of what agrees with it.

    stack: n matrices of one shape, trimmed.  weights: n.  An entry that is zero everywhere, or cancels exactly, becomes zero.
    """
    elected = weighted(stack, weights).sign()
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, X in zip(weights, stack, strict=True):  # one by one, so that no temporary is n blocks large
        agreeing = (weight * X * elected).clamp_(min=0)  # |w x| where it agrees, else 0
        total += agreeing
        mass += abs(weight) * agreeing.sign()  # a boolean would cost five times as much
    return elected * total / mass.where(mass > 0, 1)


def weighted(stack: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i w_i stack_i`, added in the order given."""
    total = torch.zeros_like(stack[0])
    for weight, X in zip(weights, stack, strict=True):
        total += weight * X
    return total


def combine(stack: Sequence[Tensor], weights: Sequence[float], how: Combine) -> Tensor:
    return elect_and_merge(stack, weights) if how == "ties" else weighted(stack, weights)


def at_least(matrix: Tensor, threshold: float) -> Tensor:
    """The entries of this magnitude or more; the rest zero. The threshold need not be a number of the matrix's dtype."""
    below = torch.tensor(threshold, dtype=matrix.dtype)
    if float(below) >= threshold:
        below = torch.nextafter(below, torch.zeros_like(below))
    return torch.nn.functional.hardshrink(matrix, float(below))  # one pass; a mask would take five times as long


def drop(matrix: Tensor, chance: Tensor | float, seed: int) -> Tensor:
    """Keep each entry with its chance and divide it by that, so that E[drop(x)] = x; zero the rest.

    The mask is drawn on the CPU, so a device changes nothing.
    """
    drawn = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(seed)).to(matrix.device)
    return matrix.where(drawn < chance, 0) / chance


def kept(count: int, density: float) -> int:
    """How many of `count` entries a density keeps: rounded, at least one."""
    return max(1, round(density * count))


def check_fraction(field: str, value: float) -> None:
    """Raises InvalidParams unless value is in (0, 1]."""
    if not (_is_number(value) and 0.0 < value <= 1.0):
        raise InvalidParams(f"parameters.{field}", f"must be in (0, 1], not {_shown(value)}")


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidParams(f"parameters.{field}", f"must be one of {', '.join(choices)}, not {_shown(value)}")


def check_finite_number(field: str, value: float, *, least: float = float("-inf")) -> None:
    if not (_is_number(value) and math.isfinite(value) and least <= value):
        bound = f" of at least {least}" if math.isfinite(least) else ""
        raise InvalidParams(f"parameters.{field}", f"must be a finite number{bound}, not {_shown(value)}")


def check_whole_number(field: str, value: int, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidParams(f"parameters.{field}", f"must be a whole number of at least {least}, not {_shown(value)}")


def check_flag(field: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise InvalidParams(f"parameters.{field}", f"must be true or false, not {_shown(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """What was given, for a message, at a length that nobody can abuse."""
    return repr(value)[:100]
