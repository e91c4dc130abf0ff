"""What the training loop is given: tasks whose rows it can have the outputs of, for coefficients that it chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merge_algos.learn.layout import Layout
from merge_algos.learn.objectives import Output

Picked = Mapping[int, Sequence[int]]  # task -> rows of its training or held-out part


@dataclass(frozen=True, slots=True)
class Task:
    """weight: of its loss, above 0.  rows: for training.  held_out: for early stopping.  forget: minimise its skill instead."""

    name: str
    weight: float
    rows: int
    held_out: int
    forget: bool = False


class Problem(Protocol):
    """A model, its adapters and its data, wherever they are."""

    @property
    def layout(self) -> Layout: ...

    @property
    def tasks(self) -> Sequence[Task]: ...

    @property
    def device(self) -> torch.device: ...

    def outputs(self, coefficients: Tensor, picked: Picked, *, held_out: bool = False, noise: int | None = None) -> list[Output]:
        """Of these rows, one per task picked, in that order; differentiable in the coefficients (size,).

        noise: a seed for dropping some tokens, the strong view of `ufm`.  Raises torch.OutOfMemoryError.
        """
        ...

    def asked(self, picked: Picked, *, held_out: bool = False) -> list[int]:
        """Of each task picked, how many predictions its rows ask for: what its mean loss is a mean over."""
        ...
